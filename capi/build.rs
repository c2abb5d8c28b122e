//! The shared library's name for the dynamic linker: its number changes when programs must be built anew.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnvshare_client.so.0");
}
