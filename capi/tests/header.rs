//! The committed header is what cbindgen makes of the crate.

use std::path::Path;

#[test]
fn the_header_is_what_cbindgen_makes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let settings = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    cbindgen::Builder::new()
        .with_config(settings)
        .with_src(root.join("src/lib.rs"))
        .generate()
        .unwrap()
        .write(&mut made);
    let (made, file) = (String::from_utf8(made).unwrap(), root.join("include/nvshare_client.h"));
    if std::env::var_os("NVSHARE_WRITE_HEADER").is_some() {
        std::fs::write(&file, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        made == committed,
        "{} is not what cbindgen makes of the crate: NVSHARE_WRITE_HEADER=1 cargo test --release -p nvshare-capi --test header",
        file.display()
    );
}
