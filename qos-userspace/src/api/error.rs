//! What a request that is not carried out is answered with: a status and a JSON body, always.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::service::ServiceError;
use super::types::{ErrorAnswer, ErrorBody};
use super::worker::Stopped;
use crate::manager::{Refusal, RefusalCode};

/// An answer to a request that is not carried out.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ApiError {
    status: StatusCode,
    body: ErrorBody,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let body = ErrorBody {
            code: code.to_owned(),
            message: message.into(),
            field: None,
            value: None,
            counter_offer: None,
        };
        Self { status, body }
    }

    /// A value in the request that can't be used.
    pub(super) fn invalid(field: &str, value: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
            .about(Some(field.to_owned()), Some(value.into()))
    }

    /// The error with the field that it is about and its value.
    pub(super) fn about(mut self, field: Option<String>, value: Option<String>) -> Self {
        self.body.field = field;
        self.body.value = value;
        self
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorAnswer { error: self.body })).into_response()
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let (status, code) = match refusal.code {
            RefusalCode::Invalid => (StatusCode::BAD_REQUEST, "invalid"),
            RefusalCode::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            RefusalCode::Conflict => (StatusCode::CONFLICT, "conflict"),
            RefusalCode::DurationOutOfRange => (StatusCode::BAD_REQUEST, "duration_out_of_range"),
            RefusalCode::ProfileNotApplicable => (StatusCode::UNPROCESSABLE_ENTITY, "profile_not_applicable"),
            RefusalCode::SessionDown => (StatusCode::CONFLICT, "session_down"),
            RefusalCode::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            // The request may be granted another time: 409 as for other conflicts with what is there.
            RefusalCode::InsufficientCapacity => (StatusCode::CONFLICT, "insufficient_capacity"),
            RefusalCode::InsufficientSlots => (StatusCode::CONFLICT, "insufficient_slots"),
            RefusalCode::TooManyChecks => (StatusCode::CONFLICT, "too_many_checks"),
        };
        let mut error = Self::new(status, code, refusal.message).about(refusal.field, refusal.value);
        error.body.counter_offer = refusal.counter_offer;
        error
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> Self {
        let (status, code) = match error {
            ServiceError::Refused(refusal) => return refusal.into(),
            ServiceError::Store(_) | ServiceError::Unwritten(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "store")
            }
            ServiceError::Kernel(_) | ServiceError::Gateway { .. } => {
                (StatusCode::INTERNAL_SERVER_ERROR, "kernel")
            }
            ServiceError::Config(_) | ServiceError::NeedsRestart(_) => {
                (StatusCode::BAD_REQUEST, "configuration")
            }
            ServiceError::Interface(_) => (StatusCode::INTERNAL_SERVER_ERROR, "kernel"),
            ServiceError::Overcommitted(_) => (StatusCode::CONFLICT, "insufficient_capacity"),
            ServiceError::Detached => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<Stopped> for ApiError {
    fn from(stopped: Stopped) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", stopped.to_string())
    }
}
