//! Rebuilds when the linker changes, and asks it for the instructions that atomics need.

fn main() {
    if let Ok(linker) = which::which("bpf-linker") {
        println!("cargo:rerun-if-changed={}", linker.display());
    }
    // Version 3 of the instruction set (Linux 5.1) has 32-bit arithmetic, which `atomic_cxchg` needs,
    // and 32-bit jumps. With the one and not the other LLVM 22 compares a number extended with zeros
    // to one extended with ones, and `Ok(())` of a `Result<(), Enum>` is never found to be that.
    println!("cargo:rustc-link-arg-bins=--cpu=v3");
}
