//! The device plugin: offers each GPU to the kubelet as several virtual ones (`v1beta1`).
//!
//! | module | what it holds |
//! |---|---|
//! | [`protocol`] | messages and services, made of `proto/deviceplugin.proto` |
//! | [`plugin`] | what the plugin answers |
//! | [`answer`] | what containers get; pure |
//! | [`presence`] | the plugin's socket, and its registration with the kubelet |
//! | [`folder`] | tells of changes in the kubelet's folder |
//! | [`mod@print`] | `--print` |
//!
//! Nothing is kept but the GPUs themselves: what was given to whom, the kubelet knows, and what is available it says with every request. So the
//! plugin can end and begin at any time. Containers that run do not notice.

pub mod answer;
pub mod folder;
pub mod plugin;
pub mod presence;
pub mod print;

/// Messages and services of the protocol.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod protocol {
    tonic::include_proto!("v1beta1");
}

use crate::Error;
use crate::inventory::Inventory;
use crate::options::DevicePlugin as Options;
use crate::runtime;
use plugin::Plugin;
use presence::Presence;

/// Serves until a signal ends it (SIGTERM, SIGINT), or prints and ends.
///
/// # Errors
/// NVML cannot be used, or a folder cannot be written.
pub fn run(options: Options) -> Result<(), Error> {
    let common = &options.common;
    let inventory = Inventory::open(&common.nvml, &common.runtime_dir, common.arbiter_grace)?;
    if let Some(format) = options.print {
        return print::print(inventory, &options, format);
    }
    runtime::run(serve(options, inventory))
}

async fn serve(options: Options, inventory: Inventory) -> Result<(), Error> {
    // First, so that a signal that comes while NVML is asked ends the process as it should.
    let stop = runtime::signals()?;
    let every = options.interval;
    let plugin = Plugin::new(options, inventory)?;
    // The kubelet, which connects at once, finds the list as it is.
    plugin.look().await;
    let mut presence = Presence::new(plugin.clone())?;
    let result = tokio::select! {
        result = presence.keep(every) => result,
        () = plugin.watch() => Ok(()),
        () = stop => Ok(()),
    };
    presence.leave();
    result
}
