//! Stalls: clients that must give way and cannot. Each one that lasts long is logged once, and once more when it ends.
//!
//! The clients report them themselves ([`nvshare::Books::stalled`]), and go on trying. The arbiter only logs them: a false
//! report costs a line in the log.

use nvshare::page::{Page, Stall};
use nvshare::slot::{Owner, SlotIndex};
use nvshare::snapshot::ClientInfo;
use nvshare::units::{GpuUuid, Nanos, format_nanos};
use std::collections::HashMap;

/// The stalls that were reported and have not ended.
#[derive(Debug, Default)]
pub struct StallLog {
    reported: HashMap<(usize, SlotIndex), Reported>,
}

/// A stall that was logged.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reported {
    owner: Owner,
    name: String,
    since: Nanos,
}

impl StallLog {
    /// Logs, for one GPU by its index, the stalls that have lasted for at least `bound` at `time` (both ns), and those that
    /// have ended.
    pub fn update(&mut self, index: usize, gpu: GpuUuid, page: &Page, bound: Nanos, time: Nanos) {
        for slot in (0..nvshare::slot::SLOTS).filter_map(SlotIndex::new) {
            let details = page.details(slot);
            if let Some(over) = self.ended(index, slot, details.as_ref()) {
                tracing::info!(
                    %gpu,
                    slot = slot.get(),
                    pid = over.owner.pid,
                    client = over.name,
                    "it could not give way for {}; that is over",
                    format_nanos(time.saturating_sub(over.since))
                );
            }
            if let Some((details, lasted)) =
                details.and_then(|details| self.begun(index, details, bound, time))
            {
                tracing::warn!(
                    %gpu,
                    slot = slot.get(),
                    pid = details.owner.pid,
                    client = details.name,
                    reason = details.stall.name(),
                    "it has not been able to give way for {}: {}. Others wait for it; {}",
                    format_nanos(lasted),
                    details.stall.reason(),
                    details.stall.remedy()
                );
            }
        }
    }

    /// The stall that was reported for a slot, if it is over.
    fn ended(&mut self, index: usize, slot: SlotIndex, details: Option<&ClientInfo>) -> Option<Reported> {
        let reported = self.reported.get(&(index, slot))?;
        let lasts = |details: &&ClientInfo| details.stall != Stall::None && details.owner == reported.owner;
        if details.filter(lasts).is_some() {
            return None;
        }
        self.reported.remove(&(index, slot))
    }

    /// The client and how long it has been stalled, if that is to be reported now.
    fn begun(
        &mut self,
        index: usize,
        details: ClientInfo,
        bound: Nanos,
        time: Nanos,
    ) -> Option<(ClientInfo, Nanos)> {
        let lasted = details.stalled_for(time).filter(|lasted| *lasted >= bound)?;
        let key = (index, details.slot);
        if self.reported.contains_key(&key) {
            return None;
        }
        let reported =
            Reported { owner: details.owner, name: details.name.clone(), since: details.stall_since };
        self.reported.insert(key, reported);
        Some((details, lasted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvshare::slot::Process;
    use nvshare::units::SECOND;
    use nvshare::{Client, sync};
    use std::sync::Arc;

    #[test]
    fn a_long_stall_is_reported_once_and_its_end_once() {
        let page: Arc<Page> = Page::on_heap(GpuUuid([7; 16]), 4).into();
        let slot = page.open_slot(Process { pid: 7, started: 7 }, "job", 1).unwrap();
        let client = Client::new(page.clone(), slot);
        let mut stalls = StallLog::default();
        let later = sync::now() + 10 * SECOND;
        let mut begun = |time| {
            let details = page.details(slot).unwrap();
            let over = stalls.ended(0, slot, Some(&details));
            (over.is_some(), stalls.begun(0, details, SECOND, time).is_some())
        };
        assert_eq!(begun(later), (false, false), "it is not stalled");
        client.books().stalled(Stall::EndlessWork);
        assert_eq!(begun(sync::now()), (false, false), "not for long");
        assert_eq!(begun(later), (false, true));
        client.books().stalled(Stall::DrainAwaitsSubmission);
        assert_eq!(begun(later), (false, false), "it has been said");
        client.books().stall_ended();
        assert_eq!(begun(later), (true, false));
        assert_eq!(begun(later), (false, false));
        client.books().stalled(Stall::NoHostMemory);
        assert_eq!(begun(later), (false, true), "another one");
    }

    #[test]
    fn a_stall_ends_with_its_client() {
        let page: Arc<Page> = Page::on_heap(GpuUuid([7; 16]), 4).into();
        let open = |pid| page.open_slot(Process { pid, started: 7 }, "job", 1).unwrap();
        let slot = open(7);
        Client::new(page.clone(), slot).books().stalled(Stall::EndlessWork);
        let mut stalls = StallLog::default();
        let details = || page.details(slot);
        assert!(stalls.begun(0, details().unwrap(), 0, sync::now()).is_some());
        page.reap(slot);
        assert_eq!(open(8), slot);
        Client::new(page.clone(), slot).books().stalled(Stall::EndlessWork);
        assert!(stalls.ended(0, slot, details().as_ref()).is_some(), "that was another client");
    }
}
