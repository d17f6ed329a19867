//! A copy of this machine that is gone afterwards: what a package's scripts do to it, they do not do
//! to the machine itself.
//!
//! The copy has the machine's files with a layer in memory over them (overlayfs), processes, mounts,
//! control groups and a BPF file system of its own, and the network of a [`Namespace`]. Kernel and
//! clock are the machine's.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, pivot_root};
use tempfile::TempDir;

use crate::netns::Namespace;

const SYSTEMD: &str = "/lib/systemd/systemd";
/// How long it may take to be up.
const BOOT: Duration = Duration::from_secs(30);

type Job = Box<dyn FnOnce() + Send>;

/// The copy. Dropping it kills every process in it and forgets what was written.
#[derive(Debug)]
pub struct Machine {
    /// Runs what is to happen inside, on a thread that lives there. `None` once it is over.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    init: Child,
    group: ControlGroup,
    /// Where the layers are mounted; empty as seen from outside.
    _folder: TempDir,
}

impl Machine {
    /// Boots it with systemd, up to `basic.target`, without the machine's own services.
    ///
    /// # Errors
    /// Where this machine has no systemd, no overlayfs or no cgroup2, or it isn't up within half a
    /// minute.
    pub fn boot(network: &Namespace) -> Result<Self> {
        ensure!(Path::new(SYSTEMD).exists(), "this machine has no systemd");
        let mut init = Command::new(SYSTEMD);
        init.args(["--system", "--unit=basic.target", "--show-status=no", "--log-target=journal"]);
        // Any name tells systemd that kernel and devices are not its own.
        init.env_clear().env("container", "qos-test");
        let machine = Self::start(network, init)?;
        let deadline = Instant::now() + BOOT;
        loop {
            let state = machine.output(Command::new("systemctl").arg("is-system-running"))?;
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            match state.as_str() {
                "running" => return Ok(machine),
                "degraded" => {
                    let failed = machine.output(Command::new("systemctl").args(["--failed", "--plain"]))?;
                    bail!("units failed: {}", String::from_utf8_lossy(&failed.stdout));
                }
                _ if Instant::now() > deadline => {
                    bail!("systemd is not up after {BOOT:?} but `{state}`");
                }
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Starts it without an init system.
    ///
    /// # Errors
    /// Where this machine has no overlayfs or no cgroup2.
    pub fn without_systemd(network: &Namespace) -> Result<Self> {
        let mut init = Command::new("sleep");
        init.arg("infinity");
        Self::start(network, init)
    }

    fn start(network: &Namespace, init: Command) -> Result<Self> {
        let group = ControlGroup::new()?;
        let folder = tempfile::Builder::new().prefix("qos-machine-").tempdir().context("a folder")?;
        let (jobs, inbox) = mpsc::channel::<Job>();
        let (started, start) = mpsc::channel();
        let (network, path, procs) = (network.clone(), folder.path().to_owned(), group.procs()?);
        let thread = thread::Builder::new()
            .name("machine".to_owned())
            .spawn(move || {
                // The one who waits for it is there.
                let _ = started.send(enter(&network, &path).and_then(|()| spawn_init(init, &procs)));
                inbox.into_iter().for_each(|job| job());
            })
            .context("a thread")?;
        let init = start.recv().context("the machine's thread ended")??;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), init, group, _folder: folder })
    }

    /// Runs `work` inside: its paths, its network, and the processes it starts. It must start no
    /// threads, for which the kernel has no place between two process namespaces.
    ///
    /// # Panics
    /// Where `work` does.
    pub fn run<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let (sender, result) = mpsc::channel();
        let job: Job = Box::new(move || {
            let _ = sender.send(work());
        });
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).expect("the machine lives");
        result.recv().expect("what runs in the machine doesn't panic")
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it can't be started; its exit status is the caller's to judge.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        let shown = format!("{command:?}");
        let mut command = std::mem::replace(command, Command::new("true"));
        self.run(move || command.stdin(Stdio::null()).output()).with_context(|| format!("running {shown}"))
    }

    /// Starts a process that goes on; the machine's end is its end.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let shown = format!("{command:?}");
        self.run(move || command.stdin(Stdio::null()).spawn()).with_context(|| format!("starting {shown}"))
    }

    /// Copies a file of this machine to `path` inside.
    ///
    /// # Errors
    /// When it can't be read or written.
    pub fn copy_in(&self, file: &Path, path: &str) -> Result<()> {
        let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        self.write(path, bytes)
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When it can't.
    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) -> Result<()> {
        let (path, content) = (path.to_owned(), content.as_ref().to_owned());
        self.run(move || fs::write(&path, content).with_context(|| format!("writing {path} in the machine")))
    }

    /// Reads a text file.
    ///
    /// # Errors
    /// When it can't.
    pub fn read(&self, path: &str) -> Result<String> {
        let path = path.to_owned();
        self.run(move || fs::read_to_string(&path).with_context(|| format!("reading {path} in the machine")))
    }

    /// Whether there is something at `path`.
    #[must_use]
    pub fn exists(&self, path: &str) -> bool {
        let path = path.to_owned();
        self.run(move || fs::symlink_metadata(path).is_ok())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // With the first process of their namespace all others end.
        let _ = self.init.kill();
        let _ = self.init.wait();
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.group.remove();
    }
}

/// A control group below this process's own, for systemd to put its own into.
#[derive(Debug)]
struct ControlGroup(PathBuf);

impl ControlGroup {
    fn new() -> Result<Self> {
        static MACHINES: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
        // 36 35 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw
        let mounted = mounts
            .lines()
            .find(|line| line.contains(" - cgroup2 "))
            .and_then(|line| line.split(' ').nth(4))
            .context("no cgroup2 is mounted")?;
        let own = fs::read_to_string("/proc/self/cgroup").context("reading the own control group")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("no group of cgroup2")?;
        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(mounted).join(own).join(format!("qos-machine-{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making the control group {}", path.display()))?;
        Ok(Self(path))
    }

    fn procs(&self) -> Result<File> {
        let path = self.0.join("cgroup.procs");
        File::options().write(true).open(&path).with_context(|| format!("opening {}", path.display()))
    }

    fn remove(&self) {
        // Processes that were killed leave their groups a little later.
        let deadline = Instant::now() + Duration::from_secs(5);
        while remove_groups(&self.0).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        self.remove();
    }
}

fn remove_groups(path: &Path) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Takes the calling thread into the copy, whose layers are mounted below `folder`.
fn enter(network: &Namespace, folder: &Path) -> Result<()> {
    let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(own).context("unshare, which needs root")?;
    setns(network, CloneFlags::CLONE_NEWNET).context("entering the network")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("own mounts")?;
    let make = |kind: &str, at: &Path, flags: MsFlags, data: &str| {
        fs::create_dir_all(at).with_context(|| format!("making {}", at.display()))?;
        mount(Some(kind), at, Some(kind), flags, Some(data))
            .with_context(|| format!("mounting {kind} on {}", at.display()))
    };
    let plain = MsFlags::empty();
    make("tmpfs", folder, plain, "")?;
    let (upper, work, root) = (folder.join("upper"), folder.join("work"), folder.join("root"));
    for layer in [&upper, &work] {
        fs::create_dir(layer).with_context(|| format!("making {}", layer.display()))?;
    }
    let layers = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    make("overlay", &root, plain, &layers)?;
    make("sysfs", &root.join("sys"), plain, "")?;
    // As systemd mounts it: root's alone.
    make("bpf", &root.join("sys/fs/bpf"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0700")?;
    for (path, mode) in [("run", "mode=0755"), ("tmp", "mode=1777"), ("dev", "mode=0755")] {
        make("tmpfs", &root.join(path), plain, mode)?;
    }
    make("tmpfs", &root.join("dev/shm"), plain, "mode=1777")?;
    make("devpts", &root.join("dev/pts"), plain, "newinstance,ptmxmode=0666,mode=0620")?;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let (device, node) = (Path::new("/dev").join(name), root.join("dev").join(name));
        File::create(&node).with_context(|| format!("making {}", node.display()))?;
        mount(Some(&device), &node, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("binding {}", device.display()))?;
    }
    for (name, target) in [("fd", "/proc/self/fd"), ("ptmx", "pts/ptmx")] {
        symlink(target, root.join("dev").join(name)).with_context(|| format!("making /dev/{name}"))?;
    }
    // The kernel's settings are the machine's.
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, &root.join("sys"), none, read_only, none).context("making /sys read-only")?;
    keep_quiet(&root)?;

    chdir(&root).context("changing into the root")?;
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("leaving the old root")?;
    chdir("/").context("changing into the new root")?;
    // From here on, what this thread starts.
    unshare(CloneFlags::CLONE_NEWPID).context("own processes")
}

/// Takes out what systemd would start of the machine's own, what would keep `dpkg` from starting
/// services, and what would have it index manual pages.
fn keep_quiet(root: &Path) -> Result<()> {
    for path in ["usr/sbin/policy-rc.d", "var/lib/man-db/auto-update"] {
        if let Err(error) = fs::remove_file(root.join(path))
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("removing {path}"));
        }
    }
    for folder in ["etc/systemd/system", "usr/lib/systemd/system"] {
        let Ok(entries) = fs::read_dir(root.join(folder)) else { continue };
        for entry in entries.flatten() {
            if !entry.file_name().to_string_lossy().ends_with(".wants") {
                continue;
            }
            for unit in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                if !unit.file_name().to_string_lossy().starts_with("systemd-journald") {
                    fs::remove_file(unit.path())
                        .with_context(|| format!("removing {}", unit.path().display()))?;
                }
            }
        }
    }
    fs::write(root.join("etc/fstab"), "").context("writing fstab")?;
    fs::write(root.join("etc/machine-id"), "").context("writing machine-id")
}

/// Starts the first process, which ends with this thread.
fn spawn_init(mut init: Command, procs: &File) -> Result<Child> {
    let procs = procs.as_raw_fd();
    // SAFETY: system calls alone, which are async-signal-safe; nothing is allocated. The descriptor is
    // open until exec.
    unsafe {
        init.pre_exec(move || {
            let done = |result: i64| {
                if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            };
            let mount = |kind: &std::ffi::CStr, from: &std::ffi::CStr, at: &std::ffi::CStr, flags| {
                done(i64::from(libc::mount(
                    from.as_ptr(),
                    at.as_ptr(),
                    kind.as_ptr(),
                    flags,
                    std::ptr::null(),
                )))
            };
            done(i64::from(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)))?;
            done(libc::write(procs, c"0".as_ptr().cast(), 1) as i64)?;
            done(i64::from(libc::unshare(libc::CLONE_NEWCGROUP)))?;
            // These show the process namespace and the control group of who mounts them.
            mount(c"proc", c"proc", c"/proc", 0)?;
            mount(c"", c"/proc/sys", c"/proc/sys", libc::MS_BIND)?;
            let read_only = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
            mount(c"", c"", c"/proc/sys", read_only)?;
            mount(c"cgroup2", c"cgroup2", c"/sys/fs/cgroup", 0)
        });
    }
    init.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    init.spawn().context("starting the first process")
}
