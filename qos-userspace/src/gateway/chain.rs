//! What runs on the hooks of an interface, in its order, ours and others'. Nothing is changed here.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use aya::programs::TcAttachType;

use super::clsact::{Clsact, ClsactError, Listed};
use super::link::Link;
use super::object::{pinned_programs, program_name};

/// Programs that tcx holds on a hook at most: `BPF_MPROG_MAX` of linux/bpf_mprog.h.
const MOST: usize = 64;

/// A program on a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its number, as `bpftool prog` shows it.
    pub id: u32,
    /// Its name; none: it can't be looked up.
    pub name: Option<String>,
    /// Whether it is ours.
    pub ours: bool,
}

/// Everything on the hooks of one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chains {
    /// The XDP program.
    pub xdp: Option<Program>,
    /// tc ingress.
    pub ingress: Chain,
    /// tc egress.
    pub egress: Chain,
}

/// What is on one hook of tc: tcx first, then the filters of clsact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Programs of tcx, in order; none where the kernel has no tcx.
    pub tcx: Vec<Program>,
    /// Filters, in order, and whether each is ours.
    pub filters: Vec<(Listed, bool)>,
}

/// Why the hooks can't be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// tcx can't be asked.
    #[error("the tcx programs of {interface}: {reason}")]
    Tcx {
        /// Interface by name.
        interface: String,
        /// What the kernel said.
        reason: io::Error,
    },
    /// clsact can't be asked.
    #[error(transparent)]
    Clsact(#[from] ClsactError),
}

impl Chains {
    /// Looks at the hooks of an interface of the calling thread's network namespace. Ours are known by
    /// the links below `bpffs_dir`, and by their names where they are filters.
    ///
    /// # Errors
    /// Where the kernel can't be asked.
    pub fn read(link: &Link, bpffs_dir: &Path) -> Result<Self, ChainError> {
        let ours = pinned_programs(bpffs_dir, link.index);
        let program = |id| Program { id, name: program_name(id), ours: ours.contains(&id) };
        let hooks = Clsact::open(link)?;
        let chain = |side| -> Result<Chain, ChainError> {
            let tcx = tcx(link.index, side)
                .map_err(|reason| ChainError::Tcx { interface: link.name.clone(), reason })?;
            let filters = hooks.filters(side)?.into_iter().map(|filter| {
                let is_ours = is_our_filter(&filter, &ours);
                (filter, is_ours)
            });
            Ok(Chain { tcx: tcx.into_iter().map(program).collect(), filters: filters.collect() })
        };
        Ok(Self {
            xdp: link.xdp_program.map(program),
            ingress: chain(TcAttachType::Ingress)?,
            egress: chain(TcAttachType::Egress)?,
        })
    }
}

fn is_our_filter(filter: &Listed, ours: &BTreeSet<u32>) -> bool {
    filter.program.is_some_and(|id| ours.contains(&id))
        || filter.priority == super::clsact::PRIORITY
            && filter.name.as_ref().is_some_and(|name| name.starts_with("qos_"))
}

/// Ids of the programs that tcx has on a hook, in order; none where the kernel has no tcx.
/// `BPF_PROG_QUERY` of bpf(2): aya's own looks each of them up, which takes CAP_SYS_ADMIN.
fn tcx(index: u32, side: TcAttachType) -> io::Result<Vec<u32>> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    const BPF_TCX_INGRESS: u32 = 46;
    const BPF_TCX_EGRESS: u32 = 47;
    /// `union bpf_attr`, query.
    #[repr(C)]
    struct Query {
        target: u32,
        attach_type: u32,
        flags: [u32; 2],
        programs: u64,
        count: u32,
        padding: u32,
        more: [u64; 4],
    }
    let mut programs = [0_u32; MOST];
    let attach_type = if side == TcAttachType::Ingress { BPF_TCX_INGRESS } else { BPF_TCX_EGRESS };
    let mut query = Query {
        target: index,
        attach_type,
        flags: [0; 2],
        programs: programs.as_mut_ptr() as u64,
        count: MOST as u32,
        padding: 0,
        more: [0; 4],
    };
    // SAFETY: the attributes, and the array that they point to with its length, outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        // Before Linux 6.6 there is no such attach type, and the attributes are shorter.
        return match error.raw_os_error() {
            Some(libc::EINVAL | libc::E2BIG | libc::ENOENT) => Ok(Vec::new()),
            _ => Err(error),
        };
    }
    Ok(programs.into_iter().take(query.count as usize).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_filters_are_known_by_program_or_by_name_and_place() {
        let filter = |priority, program, name: &str| Listed {
            priority,
            kind: "bpf".to_owned(),
            program,
            name: Some(name.to_owned()),
            in_hardware: false,
        };
        let ours = BTreeSet::from([7]);
        for (filter, expected) in [
            (filter(1, Some(7), "whatever"), true),
            (filter(super::super::clsact::PRIORITY, Some(9), "qos_egress_lan"), true),
            (filter(super::super::clsact::PRIORITY, Some(9), "somebodys"), false),
            (filter(1, Some(9), "qos_egress_lan"), false),
            (filter(1, None, ""), false),
        ] {
            assert_eq!(is_our_filter(&filter, &ours), expected, "{filter:?}");
        }
    }
}
