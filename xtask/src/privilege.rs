//! Whether this process and this kernel can do what the privileged commands do.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};

/// Oldest kernel that qos supports (Debian 12).
const KERNEL: (u32, u32) = (6, 1);
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Capabilities of linux/capability.h by number, and what they are needed for.
const NEEDED: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "links, addresses, qdiscs, attaching programs"),
    (13, "CAP_NET_RAW", "packet sockets"),
    (21, "CAP_SYS_ADMIN", "network namespaces, mounting bpffs"),
    (39, "CAP_BPF", "loading programs and maps"),
];

/// Checks the kernel, and the capabilities unless `runner` is there to give them.
///
/// # Errors
/// Says what is missing and what needs it.
pub(crate) fn check(runner: &str) -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?;
    check_kernel(release.trim())?;
    ensure!(
        fs::exists(BTF).unwrap_or(false),
        "{BTF} doesn't exist: the kernel was built without CONFIG_DEBUG_INFO_BTF, and without its type \
         information the kernel programs can't be loaded"
    );
    if runner.is_empty() {
        let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
        check_capabilities(&status)?;
    }
    Ok(())
}

fn check_kernel(release: &str) -> Result<()> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("the kernel's release `{release}` doesn't start with two numbers");
    };
    ensure!(
        (major, minor) >= KERNEL,
        "kernel {release} is too old: qos needs {}.{} or later",
        KERNEL.0,
        KERNEL.1
    );
    Ok(())
}

fn check_capabilities(status: &str) -> Result<()> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .context("/proc/self/status has no CapEff")?;
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(number, ..)| effective >> number & 1 == 0)
        .map(|(_, name, what)| format!("{name} ({what})"))
        .collect();
    ensure!(
        missing.is_empty(),
        "this needs root; missing: {}. Run it as root, or pass --runner \"sudo -E\"",
        missing.join(", ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels() {
        for (release, fine) in [
            ("6.1.0-13-amd64", true),
            ("6.18.44-fc-v657", true),
            ("7.0", true),
            ("6.0.19", false),
            ("5.15.0-91-generic", false),
        ] {
            assert_eq!(check_kernel(release).is_ok(), fine, "{release}");
        }
        assert!(check_kernel("unknown").is_err());
    }

    #[test]
    fn what_is_missing_is_named() {
        check_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n").unwrap();
        // A container's usual set: no NET_ADMIN, no SYS_ADMIN, no BPF.
        let error = check_capabilities("CapEff:\t00000000a80425fb\n").unwrap_err().to_string();
        for (name, missing) in
            [("CAP_NET_ADMIN", true), ("CAP_SYS_ADMIN", true), ("CAP_BPF", true), ("CAP_NET_RAW", false)]
        {
            assert_eq!(error.contains(name), missing, "{name}: {error}");
        }
    }
}
