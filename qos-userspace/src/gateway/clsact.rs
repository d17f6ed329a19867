//! The tc hooks of kernels without tcx (before Linux 6.6): filters on the `clsact` queueing
//! discipline, over routing netlink.
//!
//! Filters have a priority and handle of their own, behind an operator's at lower numbers. What runs
//! there is known by its program's id and name, never by the priority alone. The name is the filter's:
//! to ask the kernel for that of a program by its id would take CAP_SYS_ADMIN.

use aya::programs::TcAttachType;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, Nla as _, Parseable as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use super::link::Link;
use super::netlink::{Answer, ETH_P_ALL, NetlinkError, RouteSocket, malformed};

/// Priority of our filters.
pub(crate) const PRIORITY: u16 = 0x5150;
/// Number of our filter at that priority.
pub(super) const HANDLE: u32 = 1;

/// Handle of the queueing discipline that has the hooks.
const HOOKS: u32 = 0xffff_0000;

/// Why the hooks can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ClsactError {
    /// The kernel lacks the queueing discipline.
    #[error(
        "this kernel has neither tcx nor the `clsact` queueing discipline (module sch_ingress); install the \
         kernel's extra modules"
    )]
    NoSuchDiscipline,
    /// The kernel lacks the classifier.
    #[error(
        "this kernel has neither tcx nor the `bpf` classifier (module cls_bpf); install the kernel's extra \
         modules"
    )]
    NoSuchClassifier,
    /// The place of `clsact` is taken.
    #[error(
        "it has an `ingress` queueing discipline, which has no egress hook, and this kernel needs `clsact` in \
         its place: `tc qdisc del dev {0} ingress`, `tc qdisc add dev {0} clsact`, and add your filters again"
    )]
    Ingress(String),
    /// Somebody else's filter has our place.
    #[error("priority {PRIORITY} of its {side} hook has a filter that is not ours (program id {program})")]
    Foreign {
        /// `ingress` or `egress`.
        side: &'static str,
        /// Its program.
        program: u32,
    },
    /// Anything else.
    #[error("its clsact hooks: {0}")]
    Netlink(String),
}

impl From<NetlinkError> for ClsactError {
    fn from(error: NetlinkError) -> Self {
        Self::Netlink(error.to_string())
    }
}

impl From<std::io::Error> for ClsactError {
    fn from(error: std::io::Error) -> Self {
        Self::Netlink(error.to_string())
    }
}

/// What is at our place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// Id of its program.
    pub(super) program: u32,
    /// Name of its program, as who attached it said.
    pub(super) name: String,
}

impl Filter {
    /// Whether its program is one of the object's, of whatever version.
    pub(super) fn is_ours(&self) -> bool {
        self.name.starts_with("qos_")
    }
}

/// A filter of whatever kind, in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Lower goes first.
    pub priority: u16,
    /// `bpf`, `flower`, `u32`, …
    pub kind: String,
    /// Id of its program, if it has one.
    pub program: Option<u32>,
    /// Name of its program, as who attached it said.
    pub name: Option<String>,
    /// The driver has it too.
    pub in_hardware: bool,
}

impl Listed {
    fn read(message: TcMessage) -> Self {
        // linux/pkt_cls.h: TCA_CLS_FLAGS_IN_HW, in an attribute of each kind's own.
        const IN_HARDWARE: u32 = 1 << 2;
        const TCA_FLOWER_FLAGS: u16 = 22;
        const TCA_MATCHALL_FLAGS: u16 = 3;
        let priority = (message.header.info >> 16) as u16;
        let mut listed =
            Self { priority, kind: String::new(), program: None, name: None, in_hardware: false };
        let mut options = Vec::new();
        for attribute in message.attributes {
            match attribute {
                TcAttribute::Kind(kind) => listed.kind = kind,
                TcAttribute::Options(found) => options = found,
                _ => {}
            }
        }
        let flags_of_kind = match listed.kind.as_str() {
            "flower" => Some(TCA_FLOWER_FLAGS),
            "matchall" => Some(TCA_MATCHALL_FLAGS),
            _ => None,
        };
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => listed.program = Some(id),
                TcOption::Bpf(TcFilterBpfOption::ProgName(text)) => listed.name = Some(text),
                // Kinds that the library does not read, and those that it reads in part.
                option if flags_of_kind == Some(option.kind()) => {
                    let mut value = vec![0; option.value_len()];
                    option.emit_value(&mut value);
                    let flags = value.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
                    listed.in_hardware = flags & IN_HARDWARE != 0;
                }
                _ => {}
            }
        }
        listed
    }
}

/// The hooks of one interface.
#[derive(Debug)]
pub(super) struct Clsact<'a> {
    link: &'a Link,
    socket: RouteSocket,
}

impl<'a> Clsact<'a> {
    pub(super) fn open(link: &'a Link) -> Result<Self, ClsactError> {
        Ok(Self { link, socket: RouteSocket::open()? })
    }

    /// Makes sure of the queueing discipline. Tells whether it was made now.
    pub(super) fn establish(&self) -> Result<bool, ClsactError> {
        match self.discipline()?.as_deref() {
            Some("clsact") => return Ok(false),
            Some(_) => return Err(ClsactError::Ingress(self.link.name.clone())),
            None => {}
        }
        let mut message = self.message(HOOKS, TcHandle::CLSACT.into());
        message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
        let request = (RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL);
        match self.ask(request)?.result {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.errno == libc::ENOENT => Err(ClsactError::NoSuchDiscipline),
            Err(refusal) => Err(NetlinkError::Refused(refusal).into()),
        }
    }

    /// The filter at our place, if there is one.
    pub(super) fn filter(&self, side: TcAttachType) -> Result<Option<Filter>, ClsactError> {
        let mut message = self.message(HANDLE, parent(side));
        message.header.info = u32::from(PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be());
        message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
        // Without ECHO, kernels before 6.8 tell it to the subscribers of the group only.
        let answer = self.ask((RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_ECHO))?;
        match answer.result {
            Ok(()) => {}
            // No filter there, or no queueing discipline.
            Err(refusal) if [libc::ENOENT, libc::EINVAL].contains(&refusal.errno) => return Ok(None),
            Err(refusal) => return Err(NetlinkError::Refused(refusal).into()),
        }
        for payload in &answer.payloads {
            let message = TcMessage::parse(payload).map_err(malformed)?;
            for attribute in message.attributes {
                let TcAttribute::Options(options) = attribute else { continue };
                let (mut program, mut name) = (None, String::new());
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program = Some(id),
                        TcOption::Bpf(TcFilterBpfOption::ProgName(text)) => name = text,
                        _ => {}
                    }
                }
                if let Some(program) = program {
                    return Ok(Some(Filter { program, name }));
                }
            }
        }
        Ok(None)
    }

    /// All filters of a hook, by priority.
    pub(super) fn filters(&self, side: TcAttachType) -> Result<Vec<Listed>, ClsactError> {
        let message = RouteNetlinkMessage::GetTrafficFilter(self.message(0, parent(side)));
        let mut filters = self.socket.dump(&message, Vec::new, |list: &mut Vec<Listed>, payload| {
            let message = TcMessage::parse(payload).map_err(malformed)?;
            // Those without a number head the filters of a kind and priority.
            if u32::from(message.header.handle) != 0 {
                list.push(Listed::read(message));
            }
            Ok(())
        })?;
        filters.sort_by_key(|filter| filter.priority);
        Ok(filters)
    }

    /// Removes the queueing discipline, if no filter is left on it.
    pub(super) fn remove_unused(&self) -> Result<(), ClsactError> {
        if self.discipline()?.as_deref() != Some("clsact") {
            return Ok(());
        }
        for side in [TcAttachType::Ingress, TcAttachType::Egress] {
            let message = RouteNetlinkMessage::GetTrafficFilter(self.message(0, parent(side)));
            let filters = self.socket.dump(
                &message,
                || 0,
                |count, _| {
                    *count += 1;
                    Ok(())
                },
            )?;
            if filters > 0 {
                return Ok(());
            }
        }
        let message = self.message(HOOKS, TcHandle::CLSACT.into());
        let answer = self.ask((RouteNetlinkMessage::DelQueueDiscipline(message), 0))?;
        answer.result.map_err(|refusal| NetlinkError::Refused(refusal).into())
    }

    /// Kind of the queueing discipline that has the hooks.
    fn discipline(&self) -> Result<Option<String>, ClsactError> {
        let found = self.socket.qdiscs(self.link.index, |message| {
            let kind = message.attributes.iter().find_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind.clone()),
                _ => None,
            });
            Ok((u32::from(message.header.handle), kind))
        })?;
        Ok(found.into_iter().find(|(handle, _)| *handle == HOOKS).and_then(|(_, kind)| kind))
    }

    fn message(&self, handle: u32, parent: u32) -> TcMessage {
        let mut message = TcMessage::default();
        message.header.index = self.link.index.cast_signed();
        message.header.handle = handle.into();
        message.header.parent = parent.into();
        message
    }

    fn ask(&self, request: (RouteNetlinkMessage, u16)) -> Result<Answer, ClsactError> {
        Ok(self.socket.request([request])?.pop().ok_or_else(|| malformed("no answer"))?)
    }
}

/// The hook as a parent of filters.
fn parent(side: TcAttachType) -> u32 {
    let minor = if side == TcAttachType::Ingress { TcHandle::MIN_INGRESS } else { TcHandle::MIN_EGRESS };
    HOOKS | u32::from(minor)
}

/// The hook in words.
pub(super) fn name(side: TcAttachType) -> &'static str {
    if side == TcAttachType::Ingress { "ingress" } else { "egress" }
}
