//! Compiles the protocol files of `proto/` with protox, so that no protoc has to be installed.

/// The protocol files, relative to `proto/`.
const FILES: &[&str] = &[
    "deviceplugin.proto",
    "dra_health_v1.proto",
    "dra_health_v1alpha1.proto",
    "dra_v1.proto",
    "dra_v1beta1.proto",
    "pluginregistration.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(FILES, ["proto"])?;
    // The servers of the kubelet's own services are for tests, which play the kubelet.
    tonic_prost_build::configure().build_client(true).build_server(true).compile_fds(files)?;
    Ok(())
}
