//! Where decisions are kept.
