//! Gives the library the name that programs look for, keeps it loaded (its threads must not lose their code), and binds
//! its functions to each other as NVIDIA's are: else what is preloaded would stand in for them inside the library too,
//! and `cuGetProcAddress` would give out the shim's hooks by itself.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic");
}
