//! The harness of everything that needs real packets: namespaces, links, traffic, captures and the
//! real daemon. It shells out to nothing but qos's own binaries.
//!
//! It isn't a test itself: the tests are in `tests/tests`, and the demo and the benchmark are
//! programs built on the same parts. All of it needs root.
//!
//! Everything is owned: a [`netns::Namespace`] is gone, with its links, once dropped; so are
//! processes, flows and captures, after a panic too.
//!
//! ```no_run
//! # use std::{net::SocketAddr, time::Duration};
//! # use qos_tests::{daemon::{Config, Daemon}, topology::Topology, traffic::{TcpFlow, UdpFlow, measure}};
//! # use qos_userspace::domain::units::BitsPerSecond;
//! let net = Topology::builder()
//!     .subscriber("home", &["192.0.2.10", "2001:db8:1::10"])
//!     .provider("video", &["203.0.113.10", "2001:db8:2::10"])
//!     .provider("games", &["203.0.113.40"])
//!     .build()?;
//! let (home, video, games) = (net.subscriber("home"), net.provider("video"), net.provider("games"));
//! let mut daemon = Daemon::start(&net.gateway, &Config::default())?;
//! daemon.qos_line("provider add video --kind application --network 203.0.113.0/27")?;
//! let grant = daemon.qos_line(
//!     "grant --provider video --flow 'down udp from 203.0.113.0/27 to 192.0.2.10:5000' --max-down 10mbit --for 1h",
//! )?;
//! let to = |port| SocketAddr::new(home.v4(0).into(), port);
//! let held = UdpFlow::new((video.v4(0), 0), to(5000), BitsPerSecond(20_000_000))
//!     .start(&video.namespace, &home.namespace)?;
//! let free = TcpFlow::new((games.v4(0), 0), to(80)).connections(4).start(&games.namespace, &home.namespace)?;
//! let results = measure(&[&held, &free], Duration::from_secs(1), Duration::from_secs(3))?;
//! assert!((results[0].ratio_to(BitsPerSecond(10_000_000)) - 1.0).abs() < 0.03);
//! daemon.kill()?;
//! daemon.restart()?;
//! daemon.qos(["revoke", &grant["id"].to_string()])?;
//! # anyhow::Ok(())
//! ```

pub mod api;
pub mod ask;
pub mod boxes;
pub mod capture;
pub mod classbench;
pub mod daemon;
pub mod foreign;
pub mod frames;
pub mod freeradius;
pub mod kernel;
pub mod layer3;
pub mod machine;
pub mod netlink;
pub mod netns;
pub mod random;
pub mod reference;
pub mod skip;
pub mod stops;
pub mod topology;
pub mod traffic;
pub mod tunnel;
