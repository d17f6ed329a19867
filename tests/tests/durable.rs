//! An answer is sent when what it says is on the disk: `qosd` is traced by ptrace(2), and before each answer
//! every write to the store's log has been followed by an `fdatasync` that succeeded. Needs root.

#![expect(clippy::unwrap_used, reason = "the helpers of a test end it where something is not as it must be")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use qos_tests::api::Client;
use qos_tests::daemon::{Config, Daemon};
use qos_tests::topology::Topology;
use serde_json::{Value, json};

/// Clients at once in the second part, and what each asks for.
const CLIENTS: u16 = 8;
const EACH: u16 = 4;
/// A look at whether anything was traced or asked for, so often.
const PAUSE: Duration = Duration::from_micros(100);

/// One thing that the daemon did, in the order in which it did them.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    /// A request was read from a connection, or a part of one.
    Asked { connection: u64 },
    /// The store's log was written to.
    Written,
    /// Its `fdatasync` or `fsync` began.
    SyncBegun,
    /// It ended well.
    Synced,
    /// An answer of success is about to be sent.
    Answer { connection: u64 },
}

#[test]
fn a_change_is_on_the_disk_before_it_is_answered() {
    let net = Topology::pair().unwrap();
    let more = "reconcile_interval = \"1h\"".to_owned();
    let daemon = Daemon::start(&net.gateway, &Config { more, ..Config::default() }).unwrap();
    let mut client = Client::connect(&daemon.socket()).unwrap();
    // The connection is taken, and the log made, before anybody looks.
    must(
        &mut client,
        "POST",
        "/v1/providers",
        &json!({"name": "video", "kind": "application", "networks": ["203.0.113.0/24"]}),
    );

    let (events, asked) = traced(&daemon, || one_after_the_other(&mut client));
    let answers = events.iter().filter(|event| matches!(event, Event::Answer { .. })).count();
    assert_eq!(answers, asked, "{events:?}");
    let (mut written, mut synced, mut is_clean) = (0, 0, true);
    // What was written when the sync that is under way began.
    let mut clean_by = 0;
    for (place, event) in events.iter().enumerate() {
        match event {
            Event::Asked { .. } => {}
            Event::Written => (written, is_clean) = (written + 1, false),
            Event::SyncBegun => clean_by = written,
            Event::Synced => (synced, is_clean) = (synced + 1, clean_by == written),
            Event::Answer { .. } => {
                assert!(written > 0 && is_clean, "answered before it was synced: {:?}", &events[..=place]);
                written = 0;
            }
        }
    }
    println!("{asked} changes one after the other: {synced} syncs of the log, each before its answer");
    assert!(synced >= asked, "{synced} syncs for {asked} answers");

    let (events, asked) = traced(&daemon, || all_at_once(&daemon));
    let answers: Vec<usize> =
        (0..events.len()).filter(|place| matches!(events[*place], Event::Answer { .. })).collect();
    assert_eq!(answers.len(), asked, "{events:?}");
    for place in answers {
        let Event::Answer { connection } = events[place] else { continue };
        let asked = events[..place].iter().rposition(|event| *event == Event::Asked { connection }).unwrap();
        // Other changes may be written while this one is answered: one sync must lie in between, whole.
        let mut between = events[asked..place].iter();
        let in_order = [Event::Written, Event::SyncBegun, Event::Synced];
        let is_synced = in_order.iter().all(|next| between.any(|event| event == next));
        assert!(is_synced, "answered before it was synced: {:?}", &events[asked..=place]);
    }
    let synced = events.iter().filter(|event| **event == Event::Synced).count();
    println!("{asked} changes of {CLIENTS} clients: {synced} syncs, one at least before each answer");
}

fn must(client: &mut Client, method: &str, path: &str, body: &Value) -> Value {
    let answer = client.ask(method, path, Some(body)).unwrap();
    assert!((200..300).contains(&answer.status), "{method} {path} {body}: {answer:?}");
    answer.body["result"].clone()
}

fn request(line: u16, port: u16) -> Value {
    let flow = format!("down udp from 203.0.113.0/24:{port} to 192.0.2.{line}");
    json!({
        "provider": "video", "selectors": [flow], "level": {"maximum": {"down": "1mbit"}, "enforcement": "police"},
        "duration": "1h",
    })
}

/// Changes of every kind; returns how many.
fn one_after_the_other(client: &mut Client) -> usize {
    let line =
        json!({"name": "home", "addresses": ["192.0.2.10/32"], "rate": {"down": "100mbit", "up": "50mbit"}});
    let profile = json!({"level": {"maximum": {"down": "3mbit"}}});
    let segment = json!({"capacity": {"down": "1gbit", "up": "1gbit"}});
    must(client, "POST", "/v1/providers/video/applications", &json!({"name": "player"}));
    must(client, "PUT", "/v1/profiles/gold", &profile);
    must(client, "PUT", "/v1/segments/dslam", &segment);
    must(client, "POST", "/v1/sessions", &line);
    let id = must(client, "POST", "/v1/allocations", &request(10, 1))["id"].clone();
    must(client, "POST", &format!("/v1/allocations/{id}/extend"), &json!({"by": "1h"}));
    must(client, "POST", "/v1/sessions/home/stop", &Value::Null);
    must(client, "PUT", "/v1/sessions/home", &line);
    must(client, "DELETE", &format!("/v1/allocations/{id}"), &Value::Null);
    must(client, "PUT", "/v1/providers/video/contract", &json!({"contract": {"allocations": 100}}));
    10
}

fn all_at_once(daemon: &Daemon) -> usize {
    let start = Barrier::new(usize::from(CLIENTS));
    let (start, socket) = (&start, &daemon.socket());
    thread::scope(|scope| {
        for number in 0..CLIENTS {
            scope.spawn(move || {
                let mut client = Client::connect(socket).unwrap();
                start.wait();
                for turn in 0..EACH {
                    must(&mut client, "POST", "/v1/allocations", &request(10, 100 + number * EACH + turn));
                }
            });
        }
    });
    usize::from(CLIENTS * EACH)
}

/// Traces the daemon while something is done; returns what it did.
fn traced<T>(daemon: &Daemon, work: impl FnOnce() -> T) -> (Vec<Event>, T) {
    let pid = Pid::from_raw(daemon.id().unwrap().cast_signed());
    let (ready, stop) = (Barrier::new(2), AtomicBool::new(false));
    thread::scope(|scope| {
        // Whoever begins to trace is the only one who may go on.
        let tracer = scope.spawn(|| {
            let mut tracer = Tracer::begin(pid);
            ready.wait();
            while !stop.load(Ordering::SeqCst) {
                tracer.go_on();
            }
            tracer.end()
        });
        ready.wait();
        let done = work();
        stop.store(true, Ordering::SeqCst);
        (tracer.join().unwrap(), done)
    })
}

/// Follows the system calls of all threads of a process.
struct Tracer {
    pid: Pid,
    memory: File,
    threads: BTreeSet<Pid>,
    /// What a thread has asked the system for.
    calls: BTreeMap<Pid, Call>,
    events: Vec<Event>,
}

/// A system call that says something here.
#[derive(Clone, Copy)]
enum Call {
    Read { descriptor: u64 },
    WriteLog,
    SyncLog,
}

impl Tracer {
    fn begin(pid: Pid) -> Self {
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut tracer =
            Self { pid, memory, threads: BTreeSet::new(), calls: BTreeMap::new(), events: Vec::new() };
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
        loop {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let tasks = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
            let tasks = tasks.map(|task| Pid::from_raw(task.parse().unwrap()));
            let new: Vec<Pid> = tasks.filter(|task| !tracer.threads.contains(task)).collect();
            if new.is_empty() {
                break;
            }
            for thread in new {
                match ptrace::seize(thread, options) {
                    Ok(()) => {
                        ptrace::interrupt(thread).unwrap();
                        tracer.threads.insert(thread);
                    }
                    // It has ended, or is a child of one that is traced already.
                    Err(Errno::ESRCH | Errno::EPERM) => {}
                    Err(error) => panic!("tracing thread {thread}: {error}"),
                }
            }
        }
        // From here on all of them stop at system calls.
        for thread in tracer.threads.clone() {
            let stopped = waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
            tracer.stopped(stopped);
        }
        tracer
    }

    /// Notes what has happened, if anything.
    fn go_on(&mut self) {
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        match waitpid(None, Some(flags)) {
            Ok(WaitStatus::StillAlive) => thread::sleep(PAUSE),
            Ok(stopped) => self.stopped(stopped),
            Err(error) => panic!("waiting for qosd: {error}"),
        }
    }

    fn stopped(&mut self, status: WaitStatus) {
        let Some(thread) = status.pid() else { return };
        let signal = match status {
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                self.threads.remove(&thread);
                return;
            }
            WaitStatus::PtraceSyscall(_) => {
                self.call(thread);
                None
            }
            // What else a thread stops for is a signal that it shall get.
            WaitStatus::Stopped(_, signal) if signal != Signal::SIGTRAP => Some(signal),
            _ => None,
        };
        self.threads.insert(thread);
        // A thread that was killed meanwhile tells so next.
        let _ = ptrace::syscall(thread, signal);
    }

    /// Notes the beginning or the end of a system call.
    fn call(&mut self, thread: Pid) {
        let Ok(info) = ptrace::syscall_info(thread) else { return };
        match info.op {
            libc::PTRACE_SYSCALL_INFO_ENTRY => {
                // SAFETY: `op` says which of the union's members is there.
                let entry = unsafe { info.u.entry };
                match self.begun(entry.nr.cast_signed(), entry.args) {
                    Some(call) => self.calls.insert(thread, call),
                    None => self.calls.remove(&thread),
                };
            }
            libc::PTRACE_SYSCALL_INFO_EXIT => {
                // SAFETY: likewise.
                let result = unsafe { info.u.exit.sval };
                match self.calls.remove(&thread) {
                    Some(Call::Read { descriptor }) if result > 0 => {
                        self.events.push(Event::Asked { connection: descriptor });
                    }
                    Some(Call::WriteLog) => self.events.push(Event::Written),
                    Some(Call::SyncLog) if result == 0 => self.events.push(Event::Synced),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn begun(&mut self, number: libc::c_long, arguments: [u64; 6]) -> Option<Call> {
        let [descriptor, buffer, ..] = arguments;
        let is_log = || self.file(descriptor).is_some_and(|path| path.to_string_lossy().ends_with("-wal"));
        let is_socket =
            || self.file(descriptor).is_some_and(|path| path.to_string_lossy().starts_with("socket:"));
        match number {
            libc::SYS_fdatasync | libc::SYS_fsync if is_log() => {
                self.events.push(Event::SyncBegun);
                Some(Call::SyncLog)
            }
            libc::SYS_pwrite64 | libc::SYS_pwritev if is_log() => Some(Call::WriteLog),
            libc::SYS_read | libc::SYS_readv | libc::SYS_recvfrom | libc::SYS_recvmsg if is_socket() => {
                Some(Call::Read { descriptor })
            }
            libc::SYS_write | libc::SYS_writev | libc::SYS_sendto | libc::SYS_sendmsg if is_socket() => {
                // struct iovec {base, length}; struct msghdr {name, name's length, vectors, …}.
                let sent = match number {
                    libc::SYS_writev => self.word(buffer),
                    libc::SYS_sendmsg => self.word(self.word(buffer + 16)),
                    _ => buffer,
                };
                let mut head = [0; 10];
                let is_answer = self.memory.read_exact_at(&mut head, sent).is_ok() && head == *b"HTTP/1.1 2";
                if is_answer {
                    self.events.push(Event::Answer { connection: descriptor });
                }
                None
            }
            _ => None,
        }
    }

    fn word(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, address).map_or(0, |()| u64::from_ne_bytes(bytes))
    }

    /// What a descriptor stands for.
    fn file(&self, descriptor: u64) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/fd/{descriptor}", self.pid)).ok()
    }

    /// Lets the process go; returns what it did.
    fn end(mut self) -> Vec<Event> {
        while let Some(thread) = self.threads.pop_first() {
            if ptrace::interrupt(thread).is_err() {
                continue;
            }
            while let Ok(stopped) = waitpid(thread, Some(WaitPidFlag::__WALL)) {
                if let WaitStatus::PtraceSyscall(_) = stopped {
                    self.call(thread);
                }
                let signal = match stopped {
                    WaitStatus::Stopped(_, signal) if signal != Signal::SIGTRAP => Some(signal),
                    _ => None,
                };
                if ptrace::detach(thread, signal).is_ok() {
                    break;
                }
            }
        }
        self.events
    }
}
