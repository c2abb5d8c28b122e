//! Gives the library the name that programs look for, keeps it loaded (its threads must not lose their code), and binds
//! its functions to each other as NVIDIA's are: else what is preloaded would stand in for them inside the library too,
//! and `cuGetProcAddress` would give out the shim's hooks by itself.
//!
//! A thread of the real driver wants no lock of the dynamic loader's when it begins, and serves threads until the last of
//! their destructors. Rust's thread-locals with destructors would take that lock in `__cxa_thread_atexit_impl` and go
//! early; without that function they go by a pthread key.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic");
    println!("cargo:rustc-cdylib-link-arg=-Wl,--defsym=__cxa_thread_atexit_impl=0");
}
