//! Changes a client's shares, pauses and resumes it, as `nvshare set` and `nvshare ctl` do: the arbiter checks who asks, and writes
//! the client's row.

use nvshare::change;
use nvshare::control::PauseRequest;
use nvshare::page::Suspension;
use nvshare::slot::SlotIndex;
use nvshare::snapshot::ClientInfo;
use nvshare::wire::{Change, SharesUpdate};
use nvshare::{GpuUuid, paths, record};
use nvshare_top::rates::ClientKey;
use std::path::Path;
use std::time::Duration;

/// How long an arbiter that is just starting is waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Asks the arbiter for other shares of a client. What they are then, as a sentence.
///
/// # Errors
/// The client is gone, no arbiter answers, or it refuses: a sentence.
pub fn change_client(dir: &Path, client: &ClientKey, update: SharesUpdate) -> Result<String, String> {
    let (gpu, found) = find(dir, client)?;
    let wanted = Change::new(gpu, found.slot, found.owner, update);
    said(&found, change::change(&paths::socket(dir), &wanted, TIMEOUT))
}

/// Asks the arbiter to pause a client, or to resume it. What has been done, as a sentence.
///
/// # Errors
/// As for [`change_client`].
pub fn suspend_client(dir: &Path, client: &ClientKey, suspension: Suspension) -> Result<String, String> {
    let (gpu, found) = find(dir, client)?;
    let wanted = PauseRequest::new(gpu, found.slot, found.owner, suspension);
    said(&found, change::pause(&paths::socket(dir), &wanted, TIMEOUT))
}

/// The client as it is now.
fn find(dir: &Path, client: &ClientKey) -> Result<(GpuUuid, ClientInfo), String> {
    let gone = || format!("The client with pid {} is gone.", client.pid);
    let gpu: GpuUuid = client.gpu.parse().map_err(|_| gone())?;
    let slot = SlotIndex::new(client.slot).ok_or_else(gone)?;
    let details = record::view_page(dir, gpu)?.details(slot);
    // The slot may be another client's by now.
    let found = details.filter(|details| details.owner.pid == client.pid).ok_or_else(gone)?;
    Ok((gpu, found))
}

fn said(
    client: &ClientInfo,
    answer: Result<String, nvshare::register::RegisterError>,
) -> Result<String, String> {
    answer
        .map(|answer| format!("{} (pid {}): {answer}", client.name, client.owner.pid))
        .map_err(|error| error.to_string())
}
