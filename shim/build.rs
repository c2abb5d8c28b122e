//! How the library is linked, so that it asks little of the process that it is loaded into.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Thread-locals with destructors go by a pthread key and not by the C library's __cxa_thread_atexit_impl, which Rust
    // uses where it finds one: see `src/thread.rs` for what comes of that. What the function is for, to keep a library
    // loaded as long as a thread has something of it, a preloaded library does not need.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--defsym=__cxa_thread_atexit_impl=0");
    // The unwinder comes with the library. A process that is not C++ would load libgcc_s for it, at every start.
    println!("cargo:rustc-link-lib=static:-bundle,+verbatim=libgcc_eh.a");
}
