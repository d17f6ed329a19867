//! The test programs: compiled once, all together, and then run tier by tier.
//!
//! Cargo resolves features for the packages that a command selects, so a command a tier would
//! compile the library, and the kernel programs with it, once for each.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::deb::{self, Package};
use crate::setup::{Profile, Workspace, shown};

/// The package whose tests need the harness, and root.
pub(crate) const TESTS: &str = "qos-tests";
/// What is compiled for the host: everything but the kernel programs themselves.
pub(crate) const HOST_PACKAGES: [&str; 3] = ["--workspace", "--exclude", "qos-ebpf"];

/// One test program.
pub(crate) struct Program {
    /// Name of its package.
    pub(crate) package: String,
    /// `lib`, `bin`, `test`, …
    kind: String,
    /// Name of the target: an integration test's file name.
    pub(crate) name: String,
    /// Where cargo would run it.
    folder: PathBuf,
    path: PathBuf,
}

/// All of them, with the product that they start.
pub(crate) struct Programs<'a> {
    workspace: &'a Workspace,
    programs: Vec<Program>,
    product: PathBuf,
}

impl Program {
    pub(crate) fn is_product_library(&self) -> bool {
        self.package == "qos-userspace" && self.kind == "lib"
    }

    /// Whether it needs root but no other namespace.
    pub(crate) fn is_testrun(&self) -> bool {
        self.package == TESTS && self.name == "testrun"
    }

    /// Whether it takes Debian packages.
    pub(crate) fn is_package(&self) -> bool {
        self.package == TESTS && self.name == "package"
    }

    /// Reads a line of `--message-format=json`; `None` for what isn't a test program.
    fn read(message: &Value) -> Option<Self> {
        if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
            return None;
        }
        let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
        Some(Self {
            // path+file:///checkout/tests#qos-tests@0.1.0, or …/xtask#0.1.0 where the folder says it.
            package: message["package_id"].as_str()?.rsplit(['/', '#']).find_map(package_name)?.to_owned(),
            kind: message["target"]["kind"][0].as_str()?.to_owned(),
            name: message["target"]["name"].as_str()?.to_owned(),
            folder: folder.to_owned(),
            path: message["executable"].as_str()?.into(),
        })
    }
}

impl<'a> Programs<'a> {
    /// Compiles tests and product.
    ///
    /// # Errors
    /// When something doesn't compile.
    pub(crate) fn build(workspace: &'a Workspace) -> Result<Self> {
        let mut build = workspace.cargo(["test", "--no-run", "--message-format=json-render-diagnostics"]);
        build.args(HOST_PACKAGES).stderr(Stdio::inherit());
        let shown = shown(&build);
        eprintln!("+ {shown}");
        let output = build.output().with_context(|| format!("starting `{shown}`"))?;
        ensure!(output.status.success(), "`{shown}` ended with {}", output.status);
        let messages =
            String::from_utf8(output.stdout).with_context(|| format!("the output of `{shown}`"))?;
        let mut programs: Vec<_> = messages
            .lines()
            .map(|line| Ok(Program::read(&serde_json::from_str(line)?)))
            .filter_map(Result::transpose)
            .collect::<Result<_>>()
            .with_context(|| format!("the output of `{shown}`"))?;
        // Cargo reports them as they are done.
        programs.sort_by(|a, b| a.path.cmp(&b.path));
        let product = workspace.build(Profile::Dev, &[])?;
        Ok(Self { workspace, programs, product })
    }

    /// Commands that run those programs that `wanted` takes, started by `runner` if it isn't empty.
    pub(crate) fn commands(
        &self,
        runner: &str,
        wanted: impl Fn(&Program) -> bool,
        options: &[&str],
    ) -> Vec<Command> {
        self.programs
            .iter()
            .filter(|program| wanted(program))
            .map(|program| {
                let mut command = crate::setup::through(runner, &program.path);
                command
                    .current_dir(&program.folder)
                    .env("CARGO_MANIFEST_DIR", &program.folder)
                    .env("QOS_BIN_DIR", &self.product)
                    .args(options);
                command
            })
            .collect()
    }

    /// Makes the product with the maps' layout of a version to come, and returns its folder.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn next_version(&self) -> Result<PathBuf> {
        let next = self.workspace.build_next()?;
        // Both go to the same place, from which the tests take this one.
        self.workspace.build(Profile::Dev, &[])?;
        Ok(next)
    }

    /// Makes packages of two versions of the product, the older one first.
    ///
    /// # Errors
    /// When they can't be made.
    pub(crate) fn packages(&self) -> Result<[PathBuf; 2]> {
        let folder = self.workspace.target("package/debs");
        // Both come before any real one.
        let make = |revision| {
            let package =
                Package { programs: &self.product, triple: None, revision, folder: &folder, fast: true };
            deb::make(self.workspace, &package)
        };
        Ok([make("1~test1")?, make("1~test2")?])
    }

    /// The command that runs all documentation tests.
    pub(crate) fn doc_tests(&self) -> Command {
        let mut command = self.workspace.cargo(["test", "--doc", "--no-fail-fast"]);
        command.args(HOST_PACKAGES).arg("--");
        command
    }
}

/// The name in `name@version` or `name`; `None` for a bare version.
fn package_name(part: &str) -> Option<&str> {
    let name = part.split('@').next().unwrap_or(part);
    name.starts_with(|c: char| c.is_ascii_alphabetic()).then_some(name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn test_programs_are_told_from_other_artifacts() {
        let artifact = |id: &str, test: bool| {
            json!({
                "reason": "compiler-artifact",
                "package_id": id,
                "manifest_path": "/checkout/tests/Cargo.toml",
                "target": {"kind": ["lib"], "name": "qos_tests"},
                "profile": {"test": test},
                "executable": "/checkout/target/debug/deps/qos_tests-1",
            })
        };
        for (id, package) in [
            ("path+file:///checkout/tests#qos-tests@0.1.0", "qos-tests"),
            ("path+file:///checkout/xtask#0.1.0", "xtask"),
        ] {
            let program = Program::read(&artifact(id, true)).expect("a test program");
            assert_eq!((program.package.as_str(), program.kind.as_str()), (package, "lib"));
            assert_eq!(program.name, "qos_tests");
            assert_eq!(program.folder, Path::new("/checkout/tests"));
            assert!(Program::read(&artifact(id, false)).is_none());
        }
        assert!(Program::read(&json!({"reason": "build-finished", "success": true})).is_none());
    }
}
