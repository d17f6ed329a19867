//! The history of decisions: who asked for what, what came of it, and why.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Change, Command, Decision, GrantRequest, RefusalCode, State};
use crate::domain::{Allocation, AllocationId, Direction, Name, Session};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// The daemon by itself: what expires, what is read again by a signal.
    Daemon,
    /// A user of this machine, by the socket; none: the kernel does not tell.
    User(Option<u32>),
    /// What tells of lines.
    Source(Name),
    /// A program of a provider, by the network.
    Client {
        /// Whose it is.
        provider: Name,
        /// The one application that it may ask for; none: for all.
        application: Option<Name>,
        /// Who it has shown to be: the client of a token, or `key:` and the number of an API key. No spaces.
        client: String,
    },
}

impl Actor {
    /// Whether the actor of a record, as its text has it, was a program of this provider.
    #[must_use]
    pub fn is_client_of(text: &str, provider: &Name) -> bool {
        let client = text.strip_prefix("client ").and_then(|client| client.rsplit_once(" of "));
        client.is_some_and(|(_, of)| of == provider.as_str())
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Daemon => f.write_str("qosd"),
            Self::User(Some(uid)) => write!(f, "uid {uid}"),
            Self::User(None) => f.write_str("a user"),
            Self::Source(name) => write!(f, "source {name}"),
            Self::Client { provider, client, .. } => write!(f, "client {client} of {provider}"),
        }
    }
}

/// What came of what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was carried out.
    Done,
    /// It was refused; nothing was changed.
    Refused,
    /// It could not be carried out; nothing was changed.
    Failed,
}

impl Verdict {
    /// All of them with their names.
    pub const NAMES: [(Self, &'static str); 3] =
        [(Self::Done, "done"), (Self::Refused, "refused"), (Self::Failed, "failed")];

    /// The name, as it stands in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(verdict, _)| *verdict == self).map_or("", |(_, name)| name)
    }

    /// The verdict of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(verdict, _)| *verdict)
    }
}

/// One decision, or one of its consequences for something else than what was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its place in the history, from 1; a later one is higher. The store says which; 0 before.
    pub sequence: u64,
    /// When it was decided.
    pub at: Timestamp,
    /// Who asked: `uid 0`, `qosd`, or `client shop-1 of acme`.
    pub actor: String,
    /// What was asked for: the command's name, as `grant`; or what followed: `end`, `move`.
    pub action: String,
    /// What came of it.
    pub verdict: Verdict,
    /// The provider that it concerns.
    pub provider: Option<Name>,
    /// The application that it concerns.
    pub application: Option<Name>,
    /// The line that it concerns.
    pub session: Option<Name>,
    /// The allocation that it concerns.
    pub allocation: Option<AllocationId>,
    /// What kind of refusal it was.
    pub code: Option<RefusalCode>,
    /// Why, or what the asker was told beside; none: it was carried out as asked.
    pub reason: Option<String>,
    /// What was asked, as the API takes it, with its first 16 selectors; none: it is a consequence.
    pub asked: Option<Value>,
}

/// Which of the history is looked for: what all that is said here agrees with, the newest first.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecordQuery {
    /// Concerning this provider.
    pub provider: Option<Name>,
    /// Concerning an application of this name.
    pub application: Option<Name>,
    /// Concerning this line.
    pub session: Option<Name>,
    /// Concerning this allocation.
    pub allocation: Option<AllocationId>,
    /// With this verdict.
    pub verdict: Option<Verdict>,
    /// Not earlier than this.
    pub since: Option<Timestamp>,
    /// Before this place in the history: where the answer before ended.
    pub before: Option<u64>,
    /// That many at most: 1 to [`RecordQuery::MOST`].
    pub limit: u32,
}

impl RecordQuery {
    /// Most records of one answer.
    pub const MOST: u32 = 1_000;
}

impl Default for RecordQuery {
    fn default() -> Self {
        Self {
            provider: None,
            application: None,
            session: None,
            allocation: None,
            verdict: None,
            since: None,
            before: None,
            limit: 100,
        }
    }
}

impl Record {
    /// A record of what is no command.
    #[must_use]
    pub fn new(at: Timestamp, actor: &Actor, action: &str) -> Self {
        Self {
            sequence: 0,
            at,
            actor: actor.to_string(),
            action: action.to_owned(),
            verdict: Verdict::Done,
            provider: None,
            application: None,
            session: None,
            allocation: None,
            code: None,
            reason: None,
            asked: None,
        }
    }

    /// A record of what is no command: what it did, one text each, or why it did not.
    #[must_use]
    pub fn of_operation<E: fmt::Display>(
        actor: &Actor,
        action: &str,
        result: &Result<Vec<String>, E>,
    ) -> Self {
        let record = Self::new(Timestamp::now(), actor, action);
        match result {
            Ok(did) => Self { reason: (!did.is_empty()).then(|| did.join("; ")), ..record },
            Err(error) => record.without_effect(Verdict::Failed, None, error.to_string()),
        }
    }

    /// A record of a command that is not decided yet, on the state as it finds it.
    #[must_use]
    pub fn of_command(state: &State, command: &Command, actor: &Actor, at: Timestamp) -> Self {
        let mut asked = asked(command);
        let action = asked.as_object_mut().and_then(|asked| asked.remove("command"));
        let action = action.and_then(|action| action.as_str().map(str::to_owned)).unwrap_or_default();
        remove_nulls(&mut asked);
        let record = Self { asked: Some(asked), ..Self::new(at, actor, &action) };
        match command {
            Command::AddProvider(new) => Self { provider: Some(new.name.clone()), ..record },
            Command::RemoveProvider { name } => Self { provider: Some(name.clone()), ..record },
            Command::AddApplication { provider, name, .. }
            | Command::RemoveApplication { provider, name } => {
                Self { provider: Some(provider.clone()), application: Some(name.clone()), ..record }
            }
            Command::ChangeContract { provider, application, .. } => {
                Self { provider: Some(provider.clone()), application: application.clone(), ..record }
            }
            Command::AddSession(new) | Command::StartSession(new) => {
                Self { session: Some(new.name.clone()), ..record }
            }
            Command::StopSession { name } | Command::RemoveSession { name } => {
                Self { session: Some(name.clone()), ..record }
            }
            Command::Grant(request) => {
                let near = request.selectors.first().and_then(|selector| {
                    let covered = Direction::BOTH.into_iter().filter(|direction| selector.covers(*direction));
                    covered.filter_map(|direction| selector.near(direction)).next()
                });
                Self {
                    provider: Some(request.provider.clone()),
                    application: request.application.clone(),
                    session: near.and_then(|prefix| state.index.session_around(&prefix)).cloned(),
                    ..record
                }
            }
            Command::AddKey(new) => {
                Self { provider: Some(new.provider.clone()), application: new.application.clone(), ..record }
            }
            Command::RemoveKey { id } => match state.keys.get(id) {
                Some(key) => Self {
                    provider: Some(key.provider.clone()),
                    application: key.application.clone(),
                    ..record
                },
                None => record,
            },
            Command::Extend { id, .. } | Command::Revoke { id } => {
                let record = Self { allocation: Some(*id), ..record };
                match state.allocations.get(id) {
                    Some(allocation) => record.about(allocation),
                    None => record,
                }
            }
            Command::PutSegment(_)
            | Command::RemoveSegment { .. }
            | Command::PutProfile(_)
            | Command::RemoveProfile { .. }
            | Command::Expire => record,
        }
    }

    /// What is left of it where nothing was changed.
    #[must_use]
    pub fn without_effect(self, verdict: Verdict, code: Option<RefusalCode>, reason: String) -> Self {
        Self { verdict, code, reason: Some(reason), ..self }
    }

    fn about(self, allocation: &Allocation) -> Self {
        Self {
            provider: Some(allocation.provider.clone()),
            application: allocation.application.clone(),
            session: allocation.session.clone(),
            allocation: Some(allocation.id),
            ..self
        }
    }
}

/// Records of a decision on `command`, the command's own first. `state` is as it was before. None of what says
/// nothing new: a line that only gives a sign of life, a sweep that finds nothing.
#[must_use]
pub fn records(
    state: &State,
    command: &Command,
    decision: &Decision,
    actor: &Actor,
    at: Timestamp,
) -> Vec<Record> {
    let changes = &decision.changes;
    if changes.iter().all(|change| is_sign_of_life(state, change)) {
        return Vec::new();
    }
    let mut own = Record::of_command(state, command, actor, at);
    if !decision.warnings.is_empty() {
        own.reason = Some(decision.warnings.join("; "));
    }
    let mut records = Vec::new();
    for change in changes {
        let consequence = |action: &str, reason: &str| Record {
            reason: Some(reason.to_owned()),
            ..Record::new(at, actor, action)
        };
        match change {
            Change::PutAllocation(allocation) => match state.allocations.get(&allocation.id) {
                None => own = own.about(allocation),
                Some(_) if own.allocation == Some(allocation.id) => {}
                Some(_) => {
                    records.push(consequence("move", "its line has other addresses").about(allocation));
                }
            },
            Change::EndAllocation(allocation) if own.allocation != Some(allocation.id) => {
                let reason = allocation.reason.as_deref().unwrap_or_default();
                records.push(consequence("end", reason).about(allocation));
            }
            Change::PutSession(Session { name, .. }) if own.session.as_ref() != Some(name) => {
                let record = match state.sessions.contains_key(name) {
                    true => consequence("stop_session", "no sign of life"),
                    false => consequence("start_session", "it comes into service with the first grant on it"),
                };
                records.push(Record { session: Some(name.clone()), ..record });
            }
            Change::DeleteSession(name) if own.session.as_ref() != Some(name) => {
                let reason = match &own.session {
                    Some(session) => format!("its addresses are those of line {session}"),
                    None => "down for the grace time".to_owned(),
                };
                let record = consequence("remove_session", &reason);
                records.push(Record { session: Some(name.clone()), ..record });
            }
            _ => {}
        }
    }
    if *command != Command::Expire {
        records.insert(0, own);
    }
    records
}

/// Selectors of a request that are kept; how many more there were is kept in the place of the others.
const MOST_SELECTORS: usize = 16;

/// A command in JSON. A history is bounded in bytes as well: a request may have thousands of selectors.
fn asked(command: &Command) -> Value {
    let json = |command: &Command| serde_json::to_value(command).unwrap_or_default();
    let Command::Grant(request) = command else { return json(command) };
    let GrantRequest { provider, application, selectors, profile, level, precedence, duration } =
        request.as_ref();
    let more = selectors.len().saturating_sub(MOST_SELECTORS);
    if more == 0 {
        return json(command);
    }
    let mut asked = json(&Command::Grant(Box::new(GrantRequest {
        provider: provider.clone(),
        application: application.clone(),
        selectors: selectors.iter().take(MOST_SELECTORS).cloned().collect(),
        profile: profile.clone(),
        level: level.clone(),
        precedence: *precedence,
        duration: *duration,
    })));
    asked["selectors_left_out"] = more.into();
    asked
}

/// What was left open is left out.
fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.values_mut().for_each(remove_nulls);
            fields.retain(|_, value| {
                !value.is_null() && value.as_object().is_none_or(|inner| !inner.is_empty())
            });
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

fn is_sign_of_life(state: &State, change: &Change) -> bool {
    let Change::PutSession(new) = change else { return false };
    let Some(old) = state.sessions.get(&new.name) else { return false };
    Session { seen_at: old.seen_at, ..new.clone() } == *old
}
