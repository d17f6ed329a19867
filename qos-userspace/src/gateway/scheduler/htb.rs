//! HTB.
