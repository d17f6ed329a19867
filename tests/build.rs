//! Tells where the kernel programs are that the benchmark drives the others with.

fn main() {
    // Of the build script of qos-userspace.
    if let Ok(folder) = std::env::var("DEP_QOS_KERNEL_FOLDER") {
        println!("cargo:rustc-env=QOS_KERNEL_FOLDER={folder}");
    }
}
