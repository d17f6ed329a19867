//! Requests to the kernel's routing and netfilter netlink: batches, dumps, and the kernel's own words when it
//! refuses. What the messages mean is not known here, only which interface those of traffic control are
//! about.

use std::cell::{Cell, RefCell};
use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator, Parseable as _,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::TcMessage;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

/// Most requests that go into one send. The kernel works a send off without giving way to the
/// packets of that CPU: 200 class changes in one cost them about 100 ms.
pub(crate) const BATCH: usize = 16;

/// Filters of any protocol: linux/if_ether.h.
pub(crate) const ETH_P_ALL: u16 = 3;

/// The kernel sends at most 32 KiB at a time to a reader with a smaller buffer.
const RECEIVE_BUFFER: usize = 64 << 10;
/// A dump during which something changed is taken again, so often.
const DUMP_ATTEMPTS: usize = 5;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Header of the request that an answer repeats, before its attributes.
const NETLINK_HEADER: usize = 16;

/// A request that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Error number, positive.
    pub(crate) errno: i32,
    /// What the kernel said about it.
    pub(crate) text: Option<String>,
}

impl Refusal {
    /// The kernel's words, or the error's.
    pub(crate) fn reason(&self) -> String {
        let error = io::Error::from_raw_os_error(self.errno);
        self.text.as_ref().map_or_else(|| error.to_string(), |text| format!("{text} ({error})"))
    }
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetlinkError {
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error("{0}")]
    Malformed(String),
    #[error("{}", .0.reason())]
    Refused(Refusal),
}

/// One request's answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) result: Result<(), Refusal>,
    /// Payloads that came with it, with their message types.
    pub(crate) payloads: Vec<Vec<u8>>,
}

/// A routing or netfilter socket of the network namespace of the thread that opened it.
pub(crate) struct RouteSocket {
    socket: Socket,
    sequence: Cell<u32>,
    /// What was received last.
    buffer: RefCell<Vec<u8>>,
}

impl std::fmt::Debug for RouteSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RouteSocket").finish_non_exhaustive()
    }
}

impl RouteSocket {
    pub(crate) fn open() -> io::Result<Self> {
        Self::open_of(NETLINK_ROUTE)
    }

    /// One that speaks to netfilter.
    pub(crate) fn open_netfilter() -> io::Result<Self> {
        Self::open_of(NETLINK_NETFILTER)
    }

    fn open_of(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Errors come with the kernel's text and without the whole request.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: Cell::new(0), buffer: RefCell::new(vec![0; RECEIVE_BUFFER]) })
    }

    /// Sends requests with their flags, `BATCH` at most, and returns their answers in order.
    ///
    /// The kernel carries out every one of them, also behind one that it refuses.
    pub(crate) fn request(
        &self,
        requests: impl IntoIterator<Item = (RouteNetlinkMessage, u16)>,
    ) -> Result<Vec<Answer>, NetlinkError> {
        let first = self.sequence.get();
        let mut buffer = Vec::new();
        let mut count = 0_u32;
        for (message, flags) in requests {
            append(&mut buffer, message, NLM_F_REQUEST | NLM_F_ACK | flags, first.wrapping_add(count));
            count += 1;
        }
        debug_assert!(count as usize <= BATCH, "a batch of {count} stalls packets");
        self.sequence.set(first.wrapping_add(count));
        if count == 0 {
            return Ok(Vec::new());
        }
        self.socket.send(&buffer, 0)?;

        let mut answers: Vec<Option<Result<(), Refusal>>> = vec![None; count as usize];
        let mut payloads: Vec<Vec<Vec<u8>>> = vec![Vec::new(); count as usize];
        let mut missing = count;
        while missing > 0 {
            self.receive(|header, payload| {
                let index = header.sequence_number.wrapping_sub(first) as usize;
                // Of an earlier request that was given up.
                if index >= answers.len() {
                    return Ok(());
                }
                if header.message_type == NLMSG_ERROR {
                    if answers[index].replace(outcome(header, payload)?).is_none() {
                        missing -= 1;
                    }
                } else {
                    payloads[index].push(payload.to_vec());
                }
                Ok(())
            })?;
        }
        Ok(answers
            .into_iter()
            .zip(payloads)
            .map(|(result, payloads)| Answer { result: result.unwrap_or(Ok(())), payloads })
            .collect())
    }

    /// Asks for a list and hands the payload of each of its messages to `read`.
    ///
    /// `begin` is called before the first and again each time the list is taken anew.
    pub(crate) fn dump<M: NetlinkSerializable + Clone, T>(
        &self,
        message: &M,
        begin: impl Fn() -> T,
        mut read: impl FnMut(&mut T, &[u8]) -> Result<(), NetlinkError>,
    ) -> Result<T, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.sequence.get();
            self.sequence.set(sequence.wrapping_add(1));
            let mut buffer = Vec::new();
            append(&mut buffer, message.clone(), NLM_F_REQUEST | NLM_F_DUMP, sequence);
            self.socket.send(&buffer, 0)?;

            let mut list = begin();
            let mut interrupted = false;
            let mut done = false;
            while !done {
                self.receive(|header, payload| {
                    if header.sequence_number != sequence {
                        return Ok(());
                    }
                    interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                    match header.message_type {
                        NLMSG_DONE => {
                            done = true;
                            match payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)) {
                                0 => Ok(()),
                                code => Err(NetlinkError::Refused(Refusal {
                                    errno: code.saturating_neg(),
                                    text: None,
                                })),
                            }
                        }
                        NLMSG_ERROR => {
                            done = true;
                            outcome(header, payload)?.map_err(NetlinkError::Refused)
                        }
                        _ => read(&mut list, payload),
                    }
                })?;
            }
            if !interrupted {
                return Ok(list);
            }
        }
        Err(NetlinkError::Malformed(format!("it changed during each of {DUMP_ATTEMPTS} dumps")))
    }

    /// What `read` makes of each queueing discipline of an interface.
    pub(crate) fn qdiscs<T>(
        &self,
        index: u32,
        read: impl Fn(&TcMessage) -> Result<T, NetlinkError>,
    ) -> Result<Vec<T>, NetlinkError> {
        let message = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        self.dump(&message, Vec::new, |list, payload| {
            if let Some(message) = read_tc(index, payload)? {
                list.push(read(&message)?);
            }
            Ok(())
        })
    }

    /// Receives one datagram and hands out its messages. All are handed out, whatever the first
    /// error is, so that none is left to be taken for the next request's.
    fn receive(
        &self,
        mut each: impl FnMut(&NetlinkHeader, &[u8]) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        let mut buffer = self.buffer.borrow_mut();
        let length = loop {
            match self.socket.recv(&mut &mut buffer[..], libc::MSG_TRUNC) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => break received?,
            }
        };
        let mut rest = buffer
            .get(..length)
            .ok_or_else(|| NetlinkError::Malformed(format!("a datagram of {length} bytes was cut off")))?;
        let mut result = Ok(());
        while rest.len() >= NETLINK_HEADER {
            let message = NetlinkBuffer::new_checked(rest).map_err(malformed)?;
            let header = NetlinkHeader::parse(&message).map_err(malformed)?;
            let handed = each(&header, message.payload());
            result = result.and(handed);
            let aligned = (header.length as usize).next_multiple_of(4).min(rest.len());
            rest = &rest[aligned..];
        }
        result
    }
}

/// Tells when a network interface of a namespace comes, goes or changes.
pub(crate) struct LinkEvents {
    socket: Socket,
}

impl std::fmt::Debug for LinkEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkEvents").finish_non_exhaustive()
    }
}

impl LinkEvents {
    /// Listens in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub(crate) fn open() -> io::Result<Self> {
        // linux/rtnetlink.h
        const RTNLGRP_LINK: u32 = 1;
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.add_membership(RTNLGRP_LINK)?;
        Ok(Self { socket })
    }

    /// Waits for the next event, and takes those that have come with it.
    ///
    /// # Errors
    /// Where the socket fails. Events that were lost because too many came count as one.
    pub(crate) fn wait(&self) -> io::Result<()> {
        let mut buffer = vec![0; RECEIVE_BUFFER];
        let mut flags = 0;
        loop {
            match self.socket.recv(&mut &mut buffer[..], flags) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            flags = libc::MSG_DONTWAIT;
        }
    }
}

/// Reads a message of traffic control; none: it is about another interface. That is looked at first: a
/// dump of qdiscs names those of all interfaces, kinds that can't be read among them.
pub(crate) fn read_tc(index: u32, payload: &[u8]) -> Result<Option<TcMessage>, NetlinkError> {
    let found = payload.get(4..).and_then(<[u8]>::first_chunk);
    match found.map(|found| u32::from_ne_bytes(*found)) {
        None => Err(malformed(format!("{} bytes, no interface among them", payload.len()))),
        Some(found) if found != index => Ok(None),
        Some(_) => TcMessage::parse(payload).map(Some).map_err(malformed),
    }
}

pub(crate) fn malformed(error: impl std::fmt::Display) -> NetlinkError {
    NetlinkError::Malformed(error.to_string())
}

fn append<M: NetlinkSerializable>(buffer: &mut Vec<u8>, message: M, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let start = buffer.len();
    buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut buffer[start..]);
}

/// Reads an acknowledgement: code, header of the request, attributes.
fn outcome(header: &NetlinkHeader, payload: &[u8]) -> Result<Result<(), Refusal>, NetlinkError> {
    let code = payload
        .first_chunk()
        .map(|code| i32::from_ne_bytes(*code))
        .ok_or_else(|| NetlinkError::Malformed("an acknowledgement without a code".to_owned()))?;
    if code == 0 {
        return Ok(Ok(()));
    }
    let mut text = None;
    if header.flags & NLM_F_ACK_TLVS != 0 {
        let quoted = payload.get(4..).unwrap_or_default();
        let quoted_length = if header.flags & NLM_F_CAPPED != 0 {
            NETLINK_HEADER
        } else {
            quoted.first_chunk().map_or(0, |length| u32::from_ne_bytes(*length) as usize).next_multiple_of(4)
        };
        for attribute in NlasIterator::new(quoted.get(quoted_length..).unwrap_or_default()) {
            let attribute = attribute.map_err(malformed)?;
            if attribute.kind() == NLMSGERR_ATTR_MSG {
                let words = String::from_utf8_lossy(attribute.value());
                text = Some(words.trim_end_matches('\0').trim_end_matches('.').to_owned());
            }
        }
    }
    Ok(Err(Refusal { errno: code.saturating_neg(), text }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledgement(flags: u16, code: i32, text: Option<&str>) -> (NetlinkHeader, Vec<u8>) {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut payload = code.to_ne_bytes().to_vec();
        payload.extend([0; NETLINK_HEADER]);
        if let Some(text) = text {
            let length = 4 + text.len() + 1;
            payload.extend((length as u16).to_ne_bytes());
            payload.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
            payload.extend(text.as_bytes());
            payload.push(0);
            payload.resize(payload.len().next_multiple_of(4), 0);
        }
        (header, payload)
    }

    #[test]
    fn acknowledgements_are_read() {
        let tlvs = NLM_F_ACK_TLVS | NLM_F_CAPPED;
        for (flags, code, text, expected) in [
            (0, 0, None, Ok(())),
            (tlvs, 0, Some("a warning"), Ok(())),
            (0, -libc::ENOENT, None, Err((libc::ENOENT, None))),
            (tlvs, -libc::EBUSY, Some("HTB class in use"), Err((libc::EBUSY, Some("HTB class in use")))),
        ] {
            let (header, payload) = acknowledgement(flags, code, text);
            let expected = expected.map_err(|(errno, text)| Refusal { errno, text: text.map(str::to_owned) });
            assert_eq!(outcome(&header, &payload).expect("readable"), expected);
        }
        let (header, _) = acknowledgement(0, 0, None);
        assert!(outcome(&header, &[1, 2]).is_err(), "too short");
    }

    #[test]
    fn another_interfaces_messages_are_not_read() {
        let mut payload = vec![0; 20];
        payload[4..8].copy_from_slice(&7_u32.to_ne_bytes());
        assert!(read_tc(7, &payload).expect("readable").is_some());
        // An attribute that is longer than the message.
        payload.extend([0xff, 0, 1, 0]);
        assert!(read_tc(7, &payload).is_err());
        assert_eq!(read_tc(8, &payload).expect("not looked at"), None);
        assert!(read_tc(7, &payload[..6]).is_err(), "too short");
    }

    #[test]
    fn a_refusal_says_what_the_kernel_said() {
        let said = Refusal { errno: libc::EBUSY, text: Some("HTB class in use".to_owned()) };
        assert!(said.reason().starts_with("HTB class in use (Device or resource busy"), "{}", said.reason());
        let silent = Refusal { errno: libc::EINVAL, text: None };
        assert!(silent.reason().starts_with("Invalid argument"), "{}", silent.reason());
    }
}
