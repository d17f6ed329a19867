//! Network namespaces that live as long as the value that owns them.
//!
//! No `ip netns`, no name in `/run/netns`: a namespace is a file descriptor. `nsenter
//! --net=PATH` reaches one from outside ([`Namespace::path`]). Links and addresses are
//! [`crate::netlink`]'s.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netlink::Netlink;

/// A network namespace. Dropping the last clone closes it; its links go with it.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: Arc<str>,
    handle: Arc<File>,
}

impl Namespace {
    /// Makes an empty namespace with `lo` up. IPv6 addresses are usable as soon as they are set,
    /// router advertisements and ICMP redirects are off.
    ///
    /// `name` appears in error texts only.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`.
    pub fn new(name: &str) -> Result<Self> {
        let handle = on_new_thread(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET), which needs root")?;
            // `/proc/self` is the main thread, which stays where it was.
            let handle =
                File::open("/proc/thread-self/ns/net").context("opening /proc/thread-self/ns/net")?;
            for (key, value) in QUIET {
                set_sysctl_here(key, value)?;
            }
            Ok(handle)
        })
        .with_context(|| format!("making namespace {name}"))?;
        let namespace = Self { name: name.into(), handle: Arc::new(handle) };
        let mut netlink = Netlink::open(&namespace)?;
        let lo = netlink.link("lo")?;
        netlink.set_up(lo.index)?;
        Ok(namespace)
    }

    /// The name it was made with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path for `nsenter --net=PATH`, valid while this process runs and owns the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.handle.as_raw_fd()).into()
    }

    /// Runs `work` on a thread of its own inside the namespace and returns what it returns; a
    /// panic goes on in the caller.
    ///
    /// A socket belongs to the namespace it was made in for good, so sockets may be returned and
    /// used anywhere.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        on_new_thread(|| {
            setns(&self.handle, CloneFlags::CLONE_NEWNET).expect("entering a namespace that we own, as root");
            work()
        })
    }

    /// Sets `/proc/sys/net/<key>`, such as `ipv4/ip_forward`.
    ///
    /// # Errors
    /// When the kernel lacks the key or refuses the value.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| set_sysctl_here(key, value)).with_context(|| format!("namespace {}", self.name))
    }

    /// Reads `/proc/sys/net/<key>`, trimmed.
    ///
    /// # Errors
    /// When the kernel lacks the key.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let text = self.run(|| fs::read_to_string(format!("/proc/sys/net/{key}")));
        Ok(text
            .with_context(|| format!("reading sysctl net/{key} in namespace {}", self.name))?
            .trim()
            .to_owned())
    }

    /// Starts `command` inside the namespace. It is killed when the [`Process`] is dropped, and
    /// when this process dies.
    ///
    /// # Errors
    /// When the program can't be started.
    pub fn spawn(&self, mut command: Command) -> Result<Process> {
        self.enter_on_exec(&mut command, true);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = spawn_for_life(command)
            .with_context(|| format!("starting {program} in namespace {}", self.name))?;
        Ok(Process { program, child })
    }

    /// Runs `command` inside the namespace to its end.
    ///
    /// # Errors
    /// When the program can't be started; its exit status is the caller's to judge.
    pub fn output(&self, mut command: Command) -> Result<std::process::Output> {
        self.enter_on_exec(&mut command, false);
        command.output().with_context(|| {
            format!("running {} in namespace {}", command.get_program().to_string_lossy(), self.name)
        })
    }

    fn enter_on_exec(&self, command: &mut Command, die_with_us: bool) {
        let namespace: RawFd = self.handle.as_raw_fd();
        // SAFETY: setns and prctl are async-signal-safe; the closure allocates nothing. The
        // descriptor is open in the child until exec, since `self` outlives the spawn.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(namespace, libc::CLONE_NEWNET) != 0 {
                    return Err(io::Error::last_os_error());
                }
                if die_with_us && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// A process in a namespace, killed when dropped.
#[derive(Debug)]
pub struct Process {
    program: String,
    child: Child,
}

impl Process {
    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it has ended.
    ///
    /// # Errors
    /// When the kernel can't say.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("waiting for {}", self.program))
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// When the process has been waited for already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if let Some(status) = self.status()? {
            bail!("{} has ended already: {status}", self.program);
        }
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)
            .with_context(|| format!("sending {signal} to {}", self.program))
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} (pid {}) still runs after {limit:?}", self.program, self.child.id());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// `kill -9`, and waits for it.
    ///
    /// # Errors
    /// When it can't be killed.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.program))?;
        self.child.wait().with_context(|| format!("waiting for {}", self.program))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended and been waited for: nothing is left to do then.
        let _ = self.kill();
    }
}

/// What keeps a namespace silent and its addresses immediately usable.
const QUIET: [(&str, &str); 7] = [
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/dad_transmits", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
];

/// `/proc/sys/net` shows the namespace of the thread that opens the file.
fn set_sysctl_here(key: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| format!("sysctl net/{key} = {value}"))
}

fn on_new_thread<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => resume_unwind(panic),
    })
}

/// `PR_SET_PDEATHSIG` fires when the *thread* that forked ends (prctl(2)), so every long-lived child
/// is forked by a thread that lives as long as the process.
fn spawn_for_life(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                // The caller waits for the answer, so it is there to take it.
                let _ = answer.send(command.spawn());
            }
        });
        jobs
    });
    let (answer, result) = mpsc::channel();
    spawner
        .send((command, answer))
        .expect("the spawner lives as long as its channel, which is never dropped");
    result.recv().expect("the spawner answers every job")
}
