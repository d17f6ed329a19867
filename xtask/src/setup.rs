//! What building needs beyond a stable toolchain: found, or installed, or named as missing.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::programs::HOST_PACKAGES;

/// A tool that is installed from source into the target folder, at one version.
pub(crate) struct Tool {
    package: &'static str,
    version: &'static str,
    /// Built by nightly; by the stable toolchain otherwise.
    nightly: bool,
    /// More options of `cargo install`.
    options: &'static [&'static str],
}

/// Links the kernel programs. It uses the LLVM that rustc ships with, so nightly builds it. From
/// 0.11 on it wants a system LLVM instead.
pub(crate) const BPF_LINKER: Tool =
    Tool { package: "bpf-linker", version: "0.10.4", nightly: true, options: &[] };
/// LLVM that this bpf-linker is known to work with.
const BPF_LINKER_LLVM: &str = "22";

/// Checks dependencies.
pub(crate) const CARGO_DENY: Tool =
    Tool { package: "cargo-deny", version: "0.20.2", nightly: false, options: &[] };

/// Makes Debian packages. It compresses with the system's `xz` or `gzip`.
pub(crate) const CARGO_DEB: Tool =
    Tool { package: "cargo-deb", version: "3.8.0", nightly: false, options: &["--no-default-features"] };

/// How to compile.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    /// The one that tests use too, so that nothing is compiled twice.
    Dev,
    /// For measurements.
    Release,
}

/// The checkout, and how to run cargo in it.
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// # Errors
    /// When this program isn't in a target folder.
    pub(crate) fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
        // target/debug/xtask
        let program = env::current_exe().context("the path of xtask")?;
        let target = program.ancestors().nth(2).context("xtask is run by `cargo xtask`")?;
        Ok(Self { root: root.to_owned(), target: target.to_owned() })
    }

    /// Makes sure of everything that compiling qos takes.
    ///
    /// # Errors
    /// Says what is missing, what needs it and how to get it.
    pub(crate) fn set_up(&self) -> Result<()> {
        check_c_compiler()?;
        check_nightly()?;
        self.install(&BPF_LINKER)
    }

    /// Makes sure of what compiling for another target takes.
    ///
    /// # Errors
    /// Says what is missing and how to get it.
    pub(crate) fn set_up_target(&self, triple: &str) -> Result<()> {
        let mut add = Command::new("rustup");
        self.prepare(&mut add);
        add.args(["target", "add", triple]);
        run(add).with_context(|| format!("the standard library for {triple} can't be installed"))?;
        ensure!(
            !triple.ends_with("-musl")
                || env::vars().any(|(name, _)| name.starts_with("CC_"))
                || succeeds(Command::new("musl-gcc").arg("--version")),
            "no C compiler for {triple}: `musl-gcc --version` fails. SQLite is compiled from source. Install it \
             (Debian: apt install musl-tools), or name another in CC_{}",
            triple.replace('-', "_")
        );
        Ok(())
    }

    /// Installs a tool under the target folder, unless that version is there.
    ///
    /// # Errors
    /// When it can't be built.
    pub(crate) fn install(&self, tool: &Tool) -> Result<()> {
        let tools = self.tools();
        if tool.is_installed(&tools) {
            return Ok(());
        }
        eprintln!("installing {} {} into {}, once", tool.package, tool.version, tools.display());
        let version = format!("={}", tool.version);
        let args = [
            OsStr::new("install"),
            OsStr::new(tool.package),
            OsStr::new("--version"),
            OsStr::new(&version),
            OsStr::new("--locked"),
            OsStr::new("--force"),
            OsStr::new("--root"),
            tools.as_os_str(),
        ];
        let mut install = if tool.nightly { self.nightly_cargo(args) } else { self.cargo(args) };
        install.args(tool.options);
        run(install).with_context(|| {
            format!(
                "{} {} can't be installed; it is built from the crate registry",
                tool.package, tool.version
            )
        })
    }

    /// Builds `qosd`, `qos` and `programs` of `qos-tests`, and returns their folder.
    ///
    /// # Errors
    /// When something doesn't compile.
    pub(crate) fn build(&self, profile: Profile, programs: &[&str]) -> Result<PathBuf> {
        self.build_for(None, profile, programs)
    }

    /// The same for a target triple, or for this machine.
    pub(crate) fn build_for(
        &self,
        triple: Option<&str>,
        profile: Profile,
        programs: &[&str],
    ) -> Result<PathBuf> {
        let mut build = self.cargo(["build"]);
        // The same packages for each profile's builds, so that the library is compiled once.
        build.args(HOST_PACKAGES).args(["--bin", "qosd", "--bin", "qos"]);
        for program in programs {
            build.args(["--bin", program]);
        }
        let folder = match profile {
            Profile::Dev => "debug",
            Profile::Release => {
                build.arg("--release");
                "release"
            }
        };
        if let Some(triple) = triple {
            build.args(["--target", triple]);
        }
        run(build)?;
        Ok(self.target.join(triple.unwrap_or_default()).join(folder))
    }

    /// Compiles `qosd` and `qos` with the maps' layout of a version to come, and returns the folder that
    /// they are copied to.
    ///
    /// # Errors
    /// When something doesn't compile, or can't be copied.
    pub(crate) fn build_next(&self) -> Result<PathBuf> {
        let mut build = self.cargo(["build"]);
        build.args(HOST_PACKAGES).args(["--bin", "qosd", "--bin", "qos", "--features", "qos-userspace/next"]);
        run(build)?;
        let folder = self.target.join("next");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        for program in ["qosd", "qos"] {
            let from = self.target.join("debug").join(program);
            fs::copy(&from, folder.join(program)).with_context(|| format!("copying {}", from.display()))?;
        }
        Ok(folder)
    }

    /// A `cargo` command in the workspace, tools of the target folder first in its `PATH`.
    pub(crate) fn cargo<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        self.prepare(&mut command);
        command.args(args);
        command
    }

    /// The same with the nightly toolchain.
    pub(crate) fn nightly_cargo<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new("rustup");
        self.prepare(&mut command);
        command.args(["run", "nightly", "cargo"]).args(args);
        command
    }

    /// Path of a file of the checkout.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Path of a file of the target folder.
    pub(crate) fn target(&self, path: &str) -> PathBuf {
        self.target.join(path)
    }

    fn prepare(&self, command: &mut Command) {
        let mut path = OsString::from(self.tools().join("bin"));
        if let Some(old) = env::var_os("PATH") {
            path.push(":");
            path.push(old);
        }
        command.current_dir(&self.root).env("PATH", path);
    }

    fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }
}

impl Tool {
    fn is_installed(&self, tools: &Path) -> bool {
        let listed = fs::read_to_string(tools.join(".crates.toml"))
            .is_ok_and(|list| list.contains(&format!("\"{} {} (", self.package, self.version)));
        listed && tools.join("bin").join(self.package).is_file()
    }
}

/// `program`, started by `runner` (a command with its arguments) if that isn't empty.
pub(crate) fn through(runner: &str, program: &Path) -> Command {
    let mut words = runner.split_whitespace().map(OsStr::new).chain([program.as_os_str()]);
    let mut command = Command::new(words.next().unwrap_or(program.as_os_str()));
    command.args(words);
    command
}

/// Prints a command and runs it.
///
/// # Errors
/// When it can't be started or fails.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let shown = shown(&command);
    eprintln!("+ {shown}");
    let status = command.status().with_context(|| format!("starting `{shown}`"))?;
    ensure!(status.success(), "`{shown}` ended with {status}");
    Ok(())
}

/// A command as it would be typed, `cargo` without its folder.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().filter(|name| *name == "cargo").unwrap_or(program.as_os_str());
    [name].into_iter().chain(command.get_args()).map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// SQLite is compiled from source (`rusqlite`'s feature `bundled`).
fn check_c_compiler() -> Result<()> {
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    ensure!(
        succeeds(Command::new(&compiler).arg("--version")),
        "no C compiler: `{compiler} --version` fails. SQLite, which qosd keeps its state in, is compiled from \
         source. Install gcc or clang (Debian: apt install gcc), or name one in CC"
    );
    Ok(())
}

/// The kernel programs need nightly: their target has no prebuilt `core`, and building that from
/// `rust-src` is unstable.
fn check_nightly() -> Result<()> {
    ensure!(
        succeeds(Command::new("rustup").arg("--version")),
        "rustup is not in PATH. It provides the nightly toolchain and its rust-src component, from which `core` \
         is built for the kernel programs. See https://rustup.rs"
    );
    if !succeeds(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])) {
        let mut install = Command::new("rustup");
        install.args([
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src,clippy",
        ]);
        run(install).context(
            "the kernel programs are compiled by nightly Rust (their target has no prebuilt `core`), and it \
             can't be installed",
        )?;
    }
    for component in ["rust-src", "clippy"] {
        if !has_component(component)? {
            let mut add = Command::new("rustup");
            add.args(["component", "add", component, "--toolchain", "nightly"]);
            run(add)
                .with_context(|| format!("the nightly toolchain lacks {component}, and it can't be added"))?;
        }
    }
    let version =
        text_of(Command::new("rustup").args(["run", "nightly", "rustc", "--version", "--verbose"]))?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or("unknown");
    if !llvm.starts_with(BPF_LINKER_LLVM) {
        eprintln!(
            "note: nightly has LLVM {llvm}; bpf-linker {} is known to work with {BPF_LINKER_LLVM}. If linking \
             fails, an older nightly is the way out",
            BPF_LINKER.version
        );
    }
    Ok(())
}

fn has_component(component: &str) -> Result<bool> {
    let installed =
        text_of(Command::new("rustup").args(["component", "list", "--toolchain", "nightly", "--installed"]))?;
    // Some are listed with the host's triple behind the name.
    Ok(installed.lines().any(|line| {
        line.strip_prefix(component).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }))
}

pub(crate) fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// What a command prints.
///
/// # Errors
/// When it can't be started or fails; what it says is in the text.
pub(crate) fn text_of(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = command.output().with_context(|| format!("starting `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` printed what isn't UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_counts_as_installed_only_at_its_version_and_with_its_binary() {
        let tools = env::temp_dir().join(format!("qos-xtask-{}", std::process::id()));
        let bin = tools.join("bin");
        fs::create_dir_all(&bin).unwrap();
        let list = |version: &str| {
            format!("[v1]\n\"bpf-linker {version} (registry+https://example.org)\" = [\"bpf-linker\"]\n")
        };
        assert!(!BPF_LINKER.is_installed(&tools), "no list");
        fs::write(tools.join(".crates.toml"), list(BPF_LINKER.version)).unwrap();
        assert!(!BPF_LINKER.is_installed(&tools), "no binary");
        fs::write(bin.join("bpf-linker"), "").unwrap();
        assert!(BPF_LINKER.is_installed(&tools));
        fs::write(tools.join(".crates.toml"), list("0.11.0")).unwrap();
        assert!(!BPF_LINKER.is_installed(&tools), "another version");
        fs::remove_dir_all(tools).unwrap();
    }

    #[test]
    fn commands_are_shown_as_typed() {
        let mut command = Command::new("/somewhere/bin/cargo");
        command.args(["test", "--lib"]);
        assert_eq!(shown(&command), "cargo test --lib");
        assert_eq!(shown(&through("", Path::new("/somewhere/qos-demo"))), "/somewhere/qos-demo");
        assert_eq!(shown(&through("sudo -E", Path::new("demo"))), "sudo -E demo");
    }
}
