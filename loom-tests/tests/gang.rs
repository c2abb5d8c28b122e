//! A gang: nobody leaves while another process has just begun to work, whatever the order of their steps.
#![cfg(loom)]

use loom::sync::Arc;
use loom::thread;
use loom_tests::check;
use nvshare::gang_cut::{self, Cut, Row, Stage};
use nvshare::gang_order::GpuState;
use nvshare::gang_page::{GangPage, Place};
use nvshare::slot::SlotIndex;
use nvshare::units::GpuUuid;

fn place(slot: usize) -> Place {
    Place::new(0, SlotIndex::new(slot).unwrap()).unwrap()
}

/// One process is recalled as soon as it runs, and drains. The other one has its GPU too and opens its gate at that moment. Either
/// the first one sees that the other works and waits for it, or the other sees the cut and does not open.
#[test]
fn nobody_leaves_while_another_one_begins() {
    check(3, || {
        let page: Arc<GangPage> = Arc::from(*GangPage::on_heap([GpuUuid([1; 16])]));
        let ready = Row { state: GpuState::Ready, ..Row::default() };
        page.show(place(0), Row { cut: Cut::new(Stage::Run, 0), works: true, ..ready });
        page.show(place(1), ready);
        let second = {
            let page = page.clone();
            thread::spawn(move || {
                page.show(place(1), Row { works: true, ..ready });
                let runs = gang_cut::may_run(ready.cut, &[page.row(place(0))], false);
                if !runs {
                    page.show(place(1), ready);
                }
                runs
            })
        };
        let cut = gang_cut::shut(Cut::new(Stage::Run, 0), &[page.row(place(1))]);
        page.show(place(0), Row { state: GpuState::Draining, cut, works: true, ..ready });
        let drained = Cut::new(Stage::Drained, cut.number);
        let leaves = gang_cut::all_have_drained(drained, &[page.row(place(1))]);
        let runs = second.join().unwrap();
        assert!(!(leaves && runs), "one has given its GPU up, and the other runs and waits for it");
    });
}
