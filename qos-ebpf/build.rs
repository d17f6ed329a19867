//! Rebuilds when the linker changes, and asks it for the instructions that atomics need.

fn main() {
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
    // `core::intrinsics::atomic_cxchg` compiles to BPF_CMPXCHG only with 32-bit ALU enabled. rustc
    // names the CPU itself, and the linker takes no second name, so that the 32-bit jumps of v3 can't
    // be had here. Without them LLVM 22 compares a number extended with zeros to one extended with
    // ones: `Ok(())` of a `Result<(), Enum>` that a function returns is never found to be that.
    println!("cargo:rustc-link-arg-bins=--cpu-features=+alu32");
}
