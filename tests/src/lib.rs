//! The harness of everything that needs real packets: namespaces, links, traffic, captures and the
//! real daemon. It shells out to nothing but qos's own binaries.
//!
//! It isn't a test itself: the tests are in `tests/tests`, and the demo and the benchmark are
//! programs built on the same parts. All of it needs root.
//!
//! Everything is owned: a [`netns::Namespace`] is gone, with its links, once dropped; so are
//! processes, flows and captures, after a panic too.

pub mod capture;
pub mod daemon;
pub mod netlink;
pub mod netns;
pub mod random;
pub mod reference;
pub mod skip;
pub mod topology;
pub mod traffic;
