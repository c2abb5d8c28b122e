//! Reading nodes whose pages this test makes, as an arbiter would.

use nvshare::journal::{Event, Why};
use nvshare::map::{self, MappedPage};
use nvshare::page::Phase;
use nvshare::record::Record;
use nvshare::shares::Shares;
use nvshare::slot::{Process, SlotIndex};
use nvshare::sync::now;
use nvshare::units::{GpuUuid, MILLISECOND};
use nvshare_stats::{ReadError, Reader, process};
use std::path::Path;

const GPU: GpuUuid = GpuUuid([9; 16]);

/// A page as an arbiter makes it and records it: this test's process has it.
fn page(dir: &Path, granules: u32) -> MappedPage {
    let (file, page) = map::create(GPU, granules).unwrap();
    Record::create(dir, GPU, &file).unwrap();
    page
}

/// A client in a new slot that is this process.
fn client(page: &MappedPage, name: &str) -> SlotIndex {
    let pid = std::process::id();
    let process = Process { pid, started: process::started(pid).unwrap() };
    page.open_slot(process, name, Shares::default().weight).expect("a slot is free")
}

#[test]
fn a_client_is_read_with_what_the_page_and_the_system_say_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let page = page(dir.path(), 50);
    let slot = client(&page, "train");
    let node = Reader::new(dir.path()).read().unwrap();
    assert_eq!(node.schema_version, nvshare_stats::SCHEMA_VERSION);
    assert!(node.host_memory_bytes > node.host_available_bytes);
    let gpu = &node.gpus[0];
    assert_eq!((gpu.capacity_bytes, gpu.index, gpu.running), (100 << 20, None, 0));
    let client = &gpu.clients[0];
    assert_eq!((client.slot, client.pid, &*client.name), (slot.get(), std::process::id(), "train"));
    assert_eq!(client.uid, Some(nix::unistd::getuid().as_raw()));
    assert_eq!((&*client.phase, client.turn_waiting_ns, client.stall.as_deref()), ("idle", None, None));
    page.claim_turn(slot);
    let gpu = Reader::new(dir.path()).read().unwrap().gpus.remove(0);
    assert_eq!(gpu.turn_slot, Some(slot.get() as u32));
    assert!(gpu.clients[0].has_turn);
}

#[test]
fn a_process_with_the_clients_pid_that_is_another_one_is_not_taken_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let page = page(dir.path(), 50);
    page.open_slot(Process { pid: std::process::id(), started: 1 }, "elsewhere", 100).unwrap();
    let client = Reader::new(dir.path()).read().unwrap().gpus.remove(0).clients.remove(0);
    assert_eq!((client.uid, client.user, client.container_id), (None, None, None));
}

#[test]
fn switches_are_read_from_the_journals_once_each_and_the_latest_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    let page = page(dir.path(), 50);
    let (one, other) = (client(&page, "one"), client(&page, "other"));
    let begun = now() - 100 * MILLISECOND;
    let write = |slot: SlotIndex, at: u64, event| {
        page.journals[slot.get()].write(begun + at * MILLISECOND, event);
    };
    let mut reader = Reader::new(dir.path());
    for (slot, pid) in [(one, 11), (other, 12)] {
        write(slot, 0, Event::Registered { pid });
    }
    reader = reader.with_news();
    write(one, 1, Event::Phase(Phase::Filling));
    write(one, 2, Event::Runs { bytes: 5 });
    write(other, 3, Event::Phase(Phase::Waiting));
    write(one, 10, Event::Drains(Why::TurnOver));
    write(one, 12, Event::Phase(Phase::Waiting));
    write(other, 13, Event::Phase(Phase::Filling));
    write(other, 30, Event::Runs { bytes: 7 });
    let switches = |reader: &mut Reader| reader.read().unwrap().gpus.remove(0).switches;
    let seen = switches(&mut reader);
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((seen[0].took_ns, seen[0].in_bytes), (20 * MILLISECOND, 7));
    assert_eq!((seen[0].from_pid, seen[0].to_pid), (Some(11), 12));
    let news = reader.take_news();
    assert_eq!(news.iter().map(|news| news.switches.len()).sum::<usize>(), 1);
    assert_eq!(news[0].switches[0].handoff, MILLISECOND);
    assert!(news[0].spans.is_sorted_by_key(|(_, span)| span.ended));
    assert_eq!(reader.take_news(), []);
    write(other, 40, Event::Drains(Why::TurnOver));
    write(other, 41, Event::Phase(Phase::Waiting));
    write(one, 42, Event::Phase(Phase::Filling));
    write(one, 45, Event::Runs { bytes: 9 });
    let seen = switches(&mut reader);
    assert_eq!(seen.iter().map(|switch| switch.took_ns / MILLISECOND).collect::<Vec<_>>(), [5, 20]);
    assert!(seen[0].ago_ns < seen[1].ago_ns);
    assert_eq!(switches(&mut reader).len(), 2);
}

#[test]
fn a_page_that_takes_the_place_of_another_is_read_by_the_same_reader() {
    let dir = tempfile::tempdir().unwrap();
    let first = page(dir.path(), 50);
    let mut reader = Reader::new(dir.path());
    let capacity = |reader: &mut Reader| reader.read().unwrap().gpus[0].capacity_bytes;
    assert_eq!(capacity(&mut reader), 100 << 20);
    let _second = page(dir.path(), 60);
    assert_eq!(capacity(&mut reader), 120 << 20);
    drop(first);
    std::fs::remove_file(nvshare::paths::page(dir.path(), GPU)).unwrap();
    let error = reader.read().unwrap_err();
    assert!(matches!(error, ReadError::NoPage { .. }));
    assert!(error.to_string().contains("nvshare run"), "{error}");
}

#[test]
fn a_page_that_cannot_be_read_is_named_with_the_reason_beside_those_that_can() {
    let dir = tempfile::tempdir().unwrap();
    let _page = page(dir.path(), 50);
    std::fs::write(nvshare::paths::page(dir.path(), GpuUuid([3; 16])), [0; 100]).unwrap();
    let node = Reader::new(dir.path()).read().unwrap();
    assert_eq!((node.gpus.len(), node.unreadable.len()), (1, 1));
    assert!(node.unreadable[0].contains("magic"), "{:?}", node.unreadable);
    let missing = Reader::new(&dir.path().join("missing")).read().unwrap_err();
    assert!(matches!(missing, ReadError::NoNode { .. }));
}
