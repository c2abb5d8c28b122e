//! Changes a client's shares, as `nvshare set` does: the arbiter checks who asks, and writes the client's row.

use nvshare::change;
use nvshare::slot::SlotIndex;
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
    let gone = || format!("The client with pid {} is gone.", client.pid);
    let gpu: GpuUuid = client.gpu.parse().map_err(|_| gone())?;
    let slot = SlotIndex::new(client.slot).ok_or_else(gone)?;
    let details = record::view_page(dir, gpu)?.details(slot);
    // The slot may be another client's by now.
    let details = details.filter(|details| details.owner.pid == client.pid).ok_or_else(gone)?;
    let wanted = Change::new(gpu, slot, details.owner, update);
    change::change(&paths::socket(dir), &wanted, TIMEOUT)
        .map(|shares| format!("{} (pid {}): {shares}", details.name, client.pid))
        .map_err(|error| error.to_string())
}
