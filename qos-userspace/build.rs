//! Builds the kernel programs, which `qosd` embeds, and tells dependents where they are.

use std::env;

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain};

/// 32-bit jumps (Linux 5.1) and atomics that return what was there (5.12).
const CPU: &str = "-Ctarget-cpu=v3";

fn main() -> Result<()> {
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../qos-ebpf");
    println!("cargo:rerun-if-changed={}/../qos-common/src", env!("CARGO_MANIFEST_DIR"));
    // aya-build sets the compiler's flags itself, so the CPU goes the other way that nightly's cargo
    // takes flags; build scripts and procedural macros are for the host and must not get them.
    for (name, value) in [
        ("CARGO_UNSTABLE_PROFILE_RUSTFLAGS", "true"),
        ("CARGO_PROFILE_RELEASE_RUSTFLAGS", CPU),
        ("CARGO_PROFILE_RELEASE_BUILD_OVERRIDE_RUSTFLAGS", ""),
    ] {
        // SAFETY: there is one thread.
        unsafe { env::set_var(name, value) };
    }
    let features: &[&str] = if cfg!(feature = "next") { &["next"] } else { &[] };
    aya_build::build_ebpf(
        [Package { name: "qos-ebpf", root_dir, features, ..Package::default() }],
        Toolchain::default(),
    )
    .context("building the kernel programs; `cargo xtask build` installs what this needs")?;
    // To dependents' build scripts, as DEP_QOS_KERNEL_FOLDER.
    println!("cargo:folder={}", env::var("OUT_DIR").context("OUT_DIR")?);
    Ok(())
}
