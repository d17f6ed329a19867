//! The Debian package: lays out programs, manual pages and completions, and has cargo-deb pack them.
//!
//! What is in it and where it goes is in `qos-userspace/Cargo.toml`; its scripts and the unit are in
//! `packaging/debian`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::setup::{self, Workspace};

/// What a package is to be.
pub(crate) struct Package<'a> {
    /// Folder of the programs.
    pub(crate) programs: &'a Path,
    /// What they were built for, if not simply for this machine.
    pub(crate) triple: Option<&'a str>,
    /// Last part of the version.
    pub(crate) revision: &'a str,
    /// Folder that the package is put into.
    pub(crate) folder: &'a Path,
    /// Made fast rather than small.
    pub(crate) fast: bool,
}

/// Makes a package, and returns its path.
///
/// # Errors
/// When cargo-deb can't be installed, or a step fails.
pub(crate) fn make(workspace: &Workspace, package: &Package<'_>) -> Result<PathBuf> {
    workspace.install(&setup::CARGO_DEB)?;
    // What cargo-deb takes for the target folder, of whatever profile the programs are.
    let target = workspace.target("package");
    lay_out(package.programs, &target.join(package.triple.unwrap_or_default()).join("release"))?;

    let mut deb = workspace.cargo(["deb", "--no-build", "--strip", "--package", "qos-userspace"]);
    deb.args(["--deb-revision", package.revision]).arg("--output").arg(package.folder);
    if let Some(triple) = package.triple {
        deb.args(["--target", triple]);
    }
    if package.fast {
        deb.arg("--fast");
    }
    deb.env("CARGO_TARGET_DIR", &target).stderr(Stdio::inherit());
    if std::env::var_os("SOURCE_DATE_EPOCH").is_none()
        && let Ok(seconds) = setup::text_of(
            Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(workspace.file("")),
        )
    {
        // The same sources make the same package.
        deb.env("SOURCE_DATE_EPOCH", seconds.trim());
    }
    let shown = setup::shown(&deb);
    eprintln!("+ {shown}");
    let path = setup::text_of(&mut deb)?;
    Ok(path.trim().into())
}

fn lay_out(programs: &Path, folder: &Path) -> Result<()> {
    let completions = folder.join("completions");
    if folder.exists() {
        // A page of a verb that is no more must not stay.
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::create_dir_all(&completions).with_context(|| format!("making {}", completions.display()))?;
    for name in ["qos", "qosd"] {
        fs::copy(programs.join(name), folder.join(name)).with_context(|| format!("copying {name}"))?;
    }
    let qos = folder.join("qos");
    let man = folder.join("man");
    let mut pages = Command::new(&qos);
    pages.arg("man").arg(&man);
    setup::run(pages)?;
    // Without name and time, so that the same page is the same file.
    let mut gzip = Command::new("gzip");
    gzip.args(["-9", "--no-name", "--recursive"]).arg(&man);
    setup::run(gzip)?;
    for (shell, name) in [("bash", "qos"), ("zsh", "_qos"), ("fish", "qos.fish")] {
        let path = completions.join(name);
        let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        let mut script = Command::new(&qos);
        script.args(["completions", shell]).stdout(file);
        setup::run(script)?;
    }
    Ok(())
}
