//! Packets put into a gateway by a live-frame test run (`BPF_F_TEST_XDP_LIVE_FRAMES`) as if one of its
//! interfaces had received them, so that no sender's work is counted: the driving program writes the
//! next packet and goes on with the gateway's own XDP program, if it has one; then comes the stack,
//! routing, tc and the interface they leave by. What is counted is what left it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use qos_tests::netlink::Netlink;
use qos_tests::netns::Namespace;

use crate::programs::{Driver, cpu_time};

/// Packets of one test run.
const BURST: u32 = 20_000;

/// A way through a gateway.
pub(crate) struct Path<'a> {
    pub(crate) gateway: &'a Namespace,
    /// The driving program.
    pub(crate) program: &'static str,
    /// What it writes into.
    pub(crate) frame: &'a [u8],
    /// Index of the interface that receives.
    pub(crate) from: u32,
    /// Name of the one that sends.
    pub(crate) to: &'a str,
}

/// What one way took in some time.
pub(crate) struct Forwarded {
    pub(crate) sent: u64,
    /// Packets that left the gateway.
    pub(crate) left: u64,
    pub(crate) per_second: f64,
}

impl Driver {
    /// Ends all packets but ARP that come to `link` of `namespace`, so that the far end costs every
    /// gateway the same and little.
    pub(crate) fn drop_at(&mut self, namespace: &Namespace, link: &str) -> Result<()> {
        let drop: &mut Xdp = self.object.program_mut("bench_drop").context("bench_drop")?.try_into()?;
        namespace
            .run(|| drop.attach(link, XdpMode::Driver))
            .with_context(|| format!("bench_drop at {link}"))?;
        Ok(())
    }

    /// Sends along `path` for `time` or little longer.
    pub(crate) fn forward(&mut self, path: &Path<'_>, time: Duration) -> Result<Forwarded> {
        let mut netlink = Netlink::open(path.gateway)?;
        let mut left = || -> Result<u64> {
            let counters = netlink.link(path.to)?.counters;
            // What nobody reads from a tun device.
            Ok(counters.tx_packets + counters.tx_dropped)
        };
        let before = left()?;
        let start = Instant::now();
        let mut sent = 0;
        path.gateway.run(|| -> Result<()> {
            while start.elapsed() < time {
                self.live_frames(path)?;
                sent += u64::from(BURST);
            }
            Ok(())
        })?;
        let took = start.elapsed();
        let left = left()? - before;
        if left == 0 {
            bail!("no packet left the gateway by {}", path.to);
        }
        Ok(Forwarded { sent, left, per_second: left as f64 / took.as_secs_f64() })
    }

    /// Sends along `path` for `time` or little longer; returns how many packets, and the CPU time in ns that
    /// each took, wherever it ended.
    pub(crate) fn take(&mut self, path: &Path<'_>, time: Duration) -> Result<(u64, f64)> {
        path.gateway.run(|| {
            let (start, before) = (Instant::now(), cpu_time()?);
            let mut packets = 0;
            while packets == 0 || start.elapsed() < time {
                self.live_frames(path)?;
                packets += u64::from(BURST);
            }
            Ok((packets, (cpu_time()? - before) / packets as f64))
        })
    }

    /// Puts packets into the stack of the calling thread's namespace.
    fn live_frames(&mut self, path: &Path<'_>) -> Result<()> {
        // `struct xdp_md`, linux/bpf.h: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
        // egress_ifindex.
        let context: Vec<u8> = [0, path.frame.len() as u32, 0, path.from, 0, 0]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        let options = TestRunOptions {
            data_in: Some(path.frame),
            ctx_in: Some(&context),
            repeat: BURST,
            attrs: TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::default()
        };
        let program: &mut Xdp = self.object.program_mut(path.program).context(path.program)?.try_into()?;
        program.test_run(options).context("live frames")?;
        Ok(())
    }
}
