//! Devices whose other end is a program: tun and tap, and a pump that carries what comes out of one
//! to a link or to another. What a kernel lacks (VLAN devices, PPPoE) can so be put around the
//! packets of a real stack.

use std::ffi::c_char;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::capture::{Capture, Injector};
use crate::netlink::Mac;
use crate::netns::Namespace;

/// How soon a pump sees that it is to end.
const TICK: Duration = Duration::from_millis(100);
const LARGEST: usize = 65_536;

/// What packets of a device begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// The IP header: a tun device.
    Three,
    /// The Ethernet header: a tap device.
    Two,
}

/// A tun or tap device, which goes when this is dropped.
#[derive(Debug)]
pub struct Tunnel {
    file: File,
}

impl Tunnel {
    /// Makes a device in `namespace`. It is down.
    ///
    /// # Errors
    /// When the kernel has none (CONFIG_TUN), or the name is taken.
    pub fn new(namespace: &Namespace, name: &str, layer: Layer) -> Result<Self> {
        let kind = match layer {
            Layer::Three => libc::IFF_TUN,
            Layer::Two => libc::IFF_TAP,
        };
        ensure!(name.len() < libc::IFNAMSIZ, "`{name}` is too long for a device");
        let file = namespace.run(|| -> io::Result<File> {
            let file = File::options().read(true).write(true).open("/dev/net/tun")?;
            // SAFETY: zeros are a valid `ifreq`.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from as c_char;
            }
            request.ifr_ifru.ifru_flags = (kind | libc::IFF_NO_PI) as libc::c_short;
            // SAFETY: TUNSETIFF reads and writes the `ifreq`, which outlives the call.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
        });
        let file = file.with_context(|| format!("making device {name} in {}", namespace.name()))?;
        Ok(Self { file })
    }

    /// The next packet, or none when none comes within a tick.
    fn next(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let limit = PollTimeout::try_from(TICK).context("time to wait for a packet")?;
        let mut waiting = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waiting, limit).context("waiting for a packet")? == 0 {
            return Ok(None);
        }
        (&self.file).read(buffer).map(Some).context("reading from a tunnel")
    }

    /// A device that is down loses what is sent to it, as a link would.
    fn send(&self, packet: &[u8]) {
        let _ = (&self.file).write(packet);
    }

    fn duplicate(&self) -> Result<Self> {
        Ok(Self { file: self.file.try_clone().context("the device's descriptor")? })
    }
}

/// What is put around packets on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encapsulation {
    /// VLAN tags, outer first: EtherType and tag control. The device is [`Layer::Two`].
    Tags(Vec<(u16, u16)>),
    /// A PPPoE session (RFC 2516). The device is [`Layer::Three`].
    Pppoe(u16),
}

impl Encapsulation {
    /// Kind of device whose packets it is put around.
    #[must_use]
    pub const fn layer(&self) -> Layer {
        match self {
            Self::Tags(_) => Layer::Two,
            Self::Pppoe(_) => Layer::Three,
        }
    }

    /// Bytes it takes of a link's MTU.
    #[must_use]
    pub fn length(&self) -> u32 {
        match self {
            // A link has room for one tag beside its MTU.
            Self::Tags(tags) => {
                if tags.len() == 1 {
                    0
                } else {
                    4 * tags.len() as u32
                }
            }
            Self::Pppoe(_) => 8,
        }
    }

    /// The frame around a packet of [`Encapsulation::layer`]; `macs` are the sender's address and the
    /// receiver's.
    #[must_use]
    pub fn wrap(&self, packet: &[u8], macs: (Mac, Mac)) -> Vec<u8> {
        match self {
            Self::Tags(tags) => {
                let mut frame = packet.to_vec();
                let tags = tags
                    .iter()
                    .flat_map(|(kind, control)| kind.to_be_bytes().into_iter().chain(control.to_be_bytes()));
                frame.splice(12..12, tags);
                frame
            }
            Self::Pppoe(session) => {
                let mut frame = Vec::with_capacity(packet.len() + 22);
                frame.extend(macs.1);
                frame.extend(macs.0);
                frame.extend([0x88, 0x64, 0x11, 0]);
                frame.extend(session.to_be_bytes());
                frame.extend((packet.len() as u16 + 2).to_be_bytes());
                let is_v6 = packet.first().is_some_and(|byte| byte >> 4 == 6);
                frame.extend(if is_v6 { [0x00, 0x57] } else { [0x00, 0x21] });
                frame.extend(packet);
                frame
            }
        }
    }

    /// What was wrapped; none: it is something else's.
    fn unwrap(&self, frame: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Tags(tags) => {
                let mut rest = frame.get(12..)?;
                for (kind, control) in tags {
                    let (tag, behind) = rest.split_at_checked(4)?;
                    // Priority bits are not the tunnel's.
                    let found = (u16::from_be_bytes([tag[0], tag[1]]), u16::from_be_bytes([tag[2], tag[3]]));
                    if found != (*kind, *control) {
                        return None;
                    }
                    rest = behind;
                }
                Some([&frame[..12], rest].concat())
            }
            Self::Pppoe(session) => {
                let header = frame.get(12..22)?;
                let length = usize::from(u16::from_be_bytes([header[6], header[7]]));
                let expected = [&[0x88, 0x64, 0x11, 0], &session.to_be_bytes()[..]].concat();
                if header[..6] != expected {
                    return None;
                }
                frame.get(22..20 + length).map(<[u8]>::to_vec)
            }
        }
    }
}

/// Carries packets both ways until it is dropped.
#[derive(Debug)]
pub struct Pump {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pump {
    /// Between two devices of the same layer.
    ///
    /// # Errors
    /// When a descriptor can't be had.
    pub fn between(one: Tunnel, other: Tunnel) -> Result<Self> {
        let mut pump = Self::new();
        for (from, to) in [(one.duplicate()?, other.duplicate()?), (other, one)] {
            pump.carry(move |buffer| {
                if let Some(length) = from.next(buffer)? {
                    to.send(&buffer[..length]);
                }
                Ok(())
            });
        }
        Ok(pump)
    }

    /// Between a device and `link` of `namespace`, where its packets are wrapped; `macs` are its own
    /// address and the other end's.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn around(
        device: Tunnel,
        namespace: &Namespace,
        link: &str,
        encapsulation: &Encapsulation,
        macs: (Mac, Mac),
    ) -> Result<Self> {
        let mut pump = Self::new();
        let (capture, injector) = (Capture::open(namespace, link)?, Injector::open(namespace, link)?);
        let (from, wrapping) = (device.duplicate()?, encapsulation.clone());
        pump.carry(move |buffer| {
            if let Some(length) = from.next(buffer)? {
                // A frame that the link refuses is lost, as on any link.
                let _ = injector.send(&wrapping.wrap(&buffer[..length], macs));
            }
            Ok(())
        });
        let (to, unwrapping) = (device, encapsulation.clone());
        pump.carry(move |_| {
            if let Some(frame) = capture.next(TICK)?.filter(|frame| !frame.outgoing)
                && let Some(packet) = unwrapping.unwrap(&frame.bytes)
            {
                to.send(&packet);
            }
            Ok(())
        });
        Ok(pump)
    }

    fn new() -> Self {
        Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() }
    }

    /// Repeats a step that takes a tick at most. It ends when its link or device has gone.
    fn carry(&mut self, mut step: impl FnMut(&mut [u8]) -> Result<()> + Send + 'static) {
        let stop = Arc::clone(&self.stop);
        self.threads.push(thread::spawn(move || {
            let mut buffer = vec![0; LARGEST];
            while !stop.load(Ordering::Relaxed) && step(&mut buffer).is_ok() {}
        }));
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that panicked has printed why.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrapped_is_unwrapped_and_nothing_else() {
        let frame: Vec<u8> = (0..60).collect();
        let macs = ([1; 6], [2; 6]);
        let tagged = Encapsulation::Tags(vec![(0x88a8, 100), (0x8100, 7)]);
        let wrapped = tagged.wrap(&frame, macs);
        assert_eq!(wrapped.len(), 68);
        assert_eq!(tagged.unwrap(&wrapped), Some(frame.clone()));
        assert_eq!(Encapsulation::Tags(vec![(0x88a8, 101), (0x8100, 7)]).unwrap(&wrapped), None);

        let packet = [&[0x45, 0][..], &frame].concat();
        let session = Encapsulation::Pppoe(9);
        let mut wrapped = session.wrap(&packet, macs);
        // Short frames are padded.
        wrapped.extend([0; 10]);
        assert_eq!(session.unwrap(&wrapped), Some(packet));
        assert_eq!(Encapsulation::Pppoe(8).unwrap(&wrapped), None);
        assert_eq!(session.unwrap(&wrapped[..40]), None);
    }
}
