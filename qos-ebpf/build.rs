//! Rebuilds when the linker changes, and asks it for the instructions that atomics need.

fn main() {
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
    // `core::intrinsics::atomic_cxchg` compiles to BPF_CMPXCHG only with 32-bit ALU enabled.
    println!("cargo:rustc-link-arg-bins=--cpu-features=+alu32");
}
