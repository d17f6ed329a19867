//! Builds the kernel object that the benchmark drives the programs with.

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain};

fn main() -> Result<()> {
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../qos-ebpf");
    println!("cargo:rerun-if-changed={}/../qos-common/src", env!("CARGO_MANIFEST_DIR"));
    aya_build::build_ebpf(
        [Package { name: "qos-ebpf", root_dir, ..Package::default() }],
        Toolchain::default(),
    )
    .context("building the kernel programs; `cargo xtask build` installs what this needs")
}
