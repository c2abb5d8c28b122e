//! (to come)
#[derive(Debug, clap::Args)]
pub struct Options {}
pub fn run(_: &Options) -> Result<(), String> {
    Ok(())
}
