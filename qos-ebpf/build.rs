//! Rebuilds when the linker changes, and lets it load what is not aligned at once.

fn main() {
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
    // Headers of packets are where they are; without this LLVM loads them byte by byte.
    println!("cargo:rustc-link-arg-bins=--cpu-features=+allows-misaligned-mem-access");
}
