//! The filter at the root that sends a packet into its group: HTB itself finds only classes of its
//! own by `skb->priority`. It is asked for packets whose class is not the root's.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

use super::class::{FIRST_GROUP, GROUP_STEP, Id, LAST_GROUP, ROOT};

/// Offset of `priority` in `struct __sk_buff` (include/uapi/linux/bpf.h).
const PRIORITY: u16 = 32;

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const ADD_WORD: u8 = 0x04;
const SHIFT_RIGHT: u8 = 0x77;
const DIVIDE: u8 = 0x37;
const MULTIPLY: u8 = 0x27;
const JUMP_GREATER: u8 = 0x25;
const JUMP_NOT_EQUAL: u8 = 0x5d;
const EXIT: u8 = 0x95;

const PROG_LOAD: libc::c_long = 5;
const SCHED_CLS: u32 = 3;

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Source in the upper half, destination in the lower.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[derive(Default)]
#[repr(C)]
struct Load {
    prog_type: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kern_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// Loads the program of the filter.
pub(super) fn load() -> io::Result<OwnedFd> {
    let program = program();
    let mut load = Load {
        prog_type: SCHED_CLS,
        instructions: program.len() as u32,
        code: program.as_ptr().addr() as u64,
        license: c"GPL".as_ptr().addr() as u64,
        ..Load::default()
    };
    load.name[..9].copy_from_slice(b"qos_group");
    // SAFETY: bpf(2) reads `Load` and what it points to, all of which outlive the call, and writes
    // nothing: there is no log.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns the class of the group that has the major number of `skb->priority`, or 0.
fn program() -> [Instruction; 13] {
    let instruction = |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
    let last = 12;
    let to_end = |at: i16| last - at - 1;
    [
        instruction(LOAD_WORD, 0x12, PRIORITY as i16, 0),
        instruction(MOVE, 0x00, 0, 0),
        instruction(SHIFT_RIGHT, 0x02, 0, 16),
        // Wraps to more than any group has where it is below the root's.
        instruction(ADD_WORD, 0x02, 0, -i32::from(ROOT)),
        instruction(MOVE_REGISTER, 0x23, 0, 0),
        instruction(DIVIDE, 0x03, 0, GROUP_STEP.into()),
        instruction(JUMP_GREATER, 0x03, to_end(6), LAST_GROUP.into()),
        instruction(MOVE_REGISTER, 0x34, 0, 0),
        instruction(MULTIPLY, 0x04, 0, GROUP_STEP.into()),
        instruction(JUMP_NOT_EQUAL, 0x24, to_end(9), 0),
        instruction(MOVE_REGISTER, 0x30, 0, 0),
        instruction(ADD, 0x00, 0, Id::root(FIRST_GROUP).handle().cast_signed()),
        instruction(EXIT, 0, 0, 0),
    ]
}
