//! A page and a socket full of lies: no reader panics, hangs, or reads out of bounds.

use nvshare::client::{Bookkeeper, Next, NoMemory};
use nvshare::map::{MapError, MappedPage, scribble};
use nvshare::page::{LAYOUT_VERSION, PAGE_BYTES, PageError, Phase, Quantum, Settings, Slot};
use nvshare::register::{self, RegisterError};
use nvshare::scm_rights;
use nvshare::slot::{SLOTS, SlotIndex};
use nvshare::snapshot::Snapshot;
use nvshare::units::{GpuUuid, Granules, MILLISECOND};
use nvshare::wire::{Hello, Reply, Status};
use nvshare::{Client, Page};
use nvshare::{policy, slot::Process};
use proptest::prelude::*;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

const GPU: GpuUuid = GpuUuid([3; 16]);

/// Everything that reads a page, one after another.
fn read_everything(page: &Page) {
    let _ = page.check();
    let snapshot = Snapshot::take(page, page.admitted());
    let _ = (policy::admit(&snapshot), policy::admit(&snapshot.at(u64::MAX)), policy::lacking(&snapshot));
    let _ =
        (policy::evictors(&snapshot), policy::next_decision(&snapshot, 0), policy::first_waiter(&snapshot));
    for slot in (0..SLOTS).filter_map(SlotIndex::new) {
        let _ = (page.details(slot), page.owner(slot), page.account(slot), page.view(slot));
        let _ = (policy::quantum(&snapshot, slot), policy::evict_share(&snapshot, slot));
    }
    page.decide();
    page.audit();
    page.rebuild_occupied();
    page.open_slot(Process { pid: 1, started: 1 }, "victim", 1);
    for slot in page.occupied().iter() {
        page.set_context(slot, 7);
        page.reap(slot);
    }
    page.set_capacity(1);
    page.audit();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 1 } else { 200 }, ..ProptestConfig::default() })]

    #[test]
    fn random_garbage(words in prop::collection::vec(any::<u64>(), 1..400)) {
        let page = Page::on_heap(GPU, 100);
        scribble(&page, &words);
        read_everything(&page);
    }
}

#[test]
fn a_lie_in_any_single_word() {
    // Miri takes a second for each: it gets the header and the first row, and one lie for each word.
    let (last, lies) = if cfg!(miri) { (10, 1) } else { (PAGE_BYTES / 8, 6) };
    for index in 0..last {
        for lie in [0, 1, u64::MAX, 1 << 63, 0x7fff_ffff, 0xffff_ffff_0000_0000].into_iter().take(lies) {
            let page = Page::on_heap(GPU, 100);
            page.open_slot(Process { pid: 9, started: 9 }, "honest", 1);
            let mut words = words(&page);
            words[index] = lie;
            scribble(&page, &words);
            read_everything(&page);
        }
    }
}

/// A client on a page of 100 granules that is all its tests', and what moves its memory.
fn client(page: &Arc<Page>, needs: Granules) -> (Client<Arc<Page>>, Bookkeeper<Arc<Page>>) {
    let slot = page.open_slot(Process { pid: 1, started: 1 }, "job", 1).unwrap();
    let client = Client::new(page.clone(), slot);
    client.books().grow(needs);
    let runtime = Bookkeeper::new(client.books(), 10);
    (client, runtime)
}

/// Runs `what` on a thread of its own; one that is not done after 10 s hangs.
fn ends(what: impl FnOnce() + Send + 'static) {
    let (done, waits) = mpsc::channel();
    std::thread::spawn(move || {
        what();
        let _ = done.send(());
    });
    waits
        .recv_timeout(Duration::from_secs(if cfg!(miri) { 600 } else { 10 }))
        .expect("it hangs, or has panicked");
}

/// Not even a lie: a small client whose slice is over runs on beside a large one, in room that a second
/// large one cannot use. It has nothing to decide until something changes.
#[test]
#[cfg_attr(miri, ignore = "a fifth of a second is too short for Miri")]
fn an_overdue_holder_in_a_gap_sleeps() {
    ends(|| {
        let page: Arc<Page> = Page::on_heap(GPU, 100).into();
        page.set_settings(Settings { quantum: Quantum::Fixed(200 * MILLISECOND), ..Settings::default() });
        let ((mut small, mut moves), (mut large, mut large_moves), (mut second, _)) =
            (client(&page, 10), client(&page, 60), client(&page, 63));
        small.request();
        assert_eq!(small.poll(&mut moves), Ok(Next::Open));
        small.books().begin_slice();
        std::thread::sleep(Duration::from_millis(210));
        large.request();
        assert_eq!(large.poll(&mut large_moves), Ok(Next::Open));
        large.books().begin_slice();
        second.request();
        let rings = page.doorbell(large.books().slot());
        assert!(matches!(small.poll(&mut moves), Ok(Next::Sleep { until: Some(_), .. })));
        assert!(!small.should_yield());
        let rings = page.doorbell(large.books().slot()).wrapping_sub(rings);
        assert!(rings <= 2, "it has rung the other holder {rings} times");
    });
}

/// The page says that an idle client waits: it is admitted, and says no.
#[test]
fn a_lie_about_the_phase_of_an_idle_client() {
    ends(|| {
        let page: Arc<Page> = Page::on_heap(GPU, 100).into();
        let (mut victim, mut moves) = client(&page, 10);
        lie_in(&page, victim.books().slot(), PHASE, Phase::Waiting as u64);
        page.decide();
        assert!(victim.books().admitted());
        assert!(matches!(victim.poll(&mut moves), Ok(Next::Sleep { .. })));
        assert!(!victim.books().admitted());
    });
}

/// The page says that a client holds memory which it does not have, and others need it.
#[test]
fn a_lie_about_the_memory_of_a_client_that_has_none() {
    ends(|| {
        let page: Arc<Page> = Page::on_heap(GPU, 100).into();
        let ((mut victim, _), (mut waiter, _)) = (client(&page, 10), client(&page, 60));
        page.set_context(victim.books().slot(), 90);
        lie_in(&page, victim.books().slot(), ACCOUNT, 99);
        waiter.request();
        match victim.poll(&mut NoMemory) {
            Ok(Next::Sleep { until: Some(_), .. }) => {}
            other => panic!("{other:?}: it must look again, and after a while"),
        }
    });
}

/// Where a row of layout 8 has them, in bytes: the fields are the crate's own.
const PHASE: usize = 128;
const ACCOUNT: usize = 512;

/// Puts a word into a slot's row, at an offset of the row.
fn lie_in(page: &Page, slot: SlotIndex, offset: usize, lie: u64) {
    let row = offset_of!(Page, slots) + slot.get() * size_of::<Slot>();
    let mut all = words(page);
    all[(row + offset) / 8] = lie;
    scribble(page, &all);
}

/// Somebody writes garbage into the page all the time, the lock word most of all.
#[test]
#[cfg_attr(miri, ignore = "it overwrites words by other sizes than they are read in, which Miri forbids")]
fn a_page_that_never_stands_still() {
    let page: Arc<Page> = Page::on_heap(GPU, 100).into();
    let stop = Arc::new(AtomicBool::new(false));
    let vandals: Vec<_> = (0..2)
        .map(|_| {
            let (page, stop) = (page.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut garbage = vec![0x9e37_79b9_7f4a_7c15_u64; 400];
                while !stop.load(Ordering::Relaxed) {
                    for word in &mut garbage {
                        *word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
                    }
                    scribble(&page, &garbage);
                }
            })
        })
        .collect();
    let victim = page.clone();
    ends(move || (0..20).for_each(|_| read_everything(&victim)));
    stop.store(true, Ordering::Relaxed);
    vandals.into_iter().for_each(|vandal| vandal.join().unwrap());
}

/// A page's bytes, through a file: the mapping is the only view that is ours to read.
fn bytes(page: &Page) -> Vec<u8> {
    // SAFETY: nobody else has this page, so plain reads race with nothing.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(page).cast::<u8>(), PAGE_BYTES) }.to_vec()
}

/// The same as words.
fn words(page: &Page) -> Vec<u64> {
    bytes(page).chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

/// A path at which nothing is.
fn temporary(name: &str) -> PathBuf {
    let taken = tempfile::Builder::new().prefix(&format!("nvshare-{name}-")).tempfile().unwrap();
    taken.path().to_owned()
}

fn file(content: &[u8]) -> File {
    let file = nvshare::sealed::create("page", content.len().max(1)).unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

#[test]
#[cfg_attr(miri, ignore = "Miri maps no files")]
fn files_that_are_no_pages() {
    let page = Page::on_heap(GPU, 100);
    let good = bytes(&page);
    assert!(MappedPage::open(file(&good)).is_ok());
    for length in [0, 1, 8, 4096, PAGE_BYTES - 1] {
        assert!(matches!(
            MappedPage::open(file(&good[..length])),
            Err(MapError::Page(PageError::Short { .. }) | MapError::Io(_))
        ));
    }
    let mut other = good.clone();
    other[8..12].copy_from_slice(&9u32.to_le_bytes());
    let error = MappedPage::open(file(&other)).err().unwrap().to_string();
    assert!(error.contains('9') && error.contains(&LAYOUT_VERSION.to_string()), "{error}");
}

/// An arbiter that answers each connection with the next of `answers`, with a descriptor or without; an empty
/// one is no answer: it hangs up.
fn liar(name: &str, answers: Vec<Vec<u8>>, fd: Option<File>) -> PathBuf {
    use nix::sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, recv, socket,
    };
    let path = temporary(name);
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut answered = Vec::new();
        for answer in answers {
            // SAFETY: accept has just made the descriptor.
            let peer = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd()).unwrap()) };
            let mut hello = [0; 512];
            let _ = recv(peer.as_raw_fd(), &mut hello, MsgFlags::empty());
            if !answer.is_empty() {
                let fds: Vec<BorrowedFd> = fd.iter().map(|file| file.as_fd()).collect();
                let _ = scm_rights::send(peer.as_fd(), &answer, &fds);
                // As an arbiter does: it has not ended.
                answered.push(peer);
            }
        }
        // Until the test is over.
        std::thread::park();
    });
    path
}

/// A name, what the arbiter answers, the file that it sends, and words that the error must have.
type Lie = (&'static str, Vec<u8>, Option<Vec<u8>>, &'static str);

#[test]
#[cfg_attr(miri, ignore = "Miri has no sockets")]
fn an_arbiter_that_lies() {
    let page = bytes(&Page::on_heap(GPU, 100));
    let welcome = |change: fn(&mut Reply)| {
        let mut reply = Reply::welcome(SlotIndex::new(0).unwrap());
        change(&mut reply);
        bytemuck::bytes_of(&reply).to_vec()
    };
    let other_page = || bytes(&Page::on_heap(GpuUuid([4; 16]), 100));
    let cases: Vec<Lie> = vec![
        ("short", vec![1, 2, 3], None, "3 bytes"),
        ("long", vec![7; 1000], None, "bytes instead of"),
        ("magic", welcome(|reply| reply.magic = 1), None, "wrong magic"),
        ("status", welcome(|reply| reply.status = 99), None, "unknown status 99"),
        ("slot", welcome(|reply| reply.slot = 48), Some(page.clone()), "slot 48"),
        ("no page", welcome(|_| ()), None, "no page"),
        ("truncated", welcome(|_| ()), Some(page[..100].to_vec()), "truncated"),
        ("zeros", welcome(|_| ()), Some(vec![0; PAGE_BYTES]), "magic"),
        ("other GPU", welcome(|_| ()), Some(other_page()), "page of GPU-04040404"),
    ];
    for (name, answer, content, words) in cases {
        let path = liar(name, vec![answer], content.map(|content| file(&content)));
        let result = register::register(&path, &Hello::new(GPU, "victim"), Duration::from_secs(5));
        let error = result.err().unwrap_or_else(|| panic!("{name}: taken for an arbiter")).to_string();
        assert!(error.contains(words), "{name}: {error}");
        std::fs::remove_file(path).unwrap();
    }
    // The same lies to somebody who only looks, and the right answer to the wrong question.
    let shown = bytemuck::bytes_of(&Reply::shown()).to_vec();
    let welcomed = bytemuck::bytes_of(&Reply::welcome(SlotIndex::new(0).unwrap())).to_vec();
    let looks: Vec<Lie> = vec![
        ("look, short", vec![1, 2, 3], None, "3 bytes"),
        ("look, no page", shown.clone(), None, "no page"),
        ("look, zeros", shown.clone(), Some(vec![0; PAGE_BYTES]), "magic"),
        ("look, other GPU", shown.clone(), Some(other_page()), "page of GPU-04040404"),
        ("look, a slot", welcomed, Some(page.clone()), "Welcome to who asked for Shown"),
    ];
    for (name, answer, content, words) in looks {
        let path = liar(name, vec![answer], content.map(|content| file(&content)));
        let result = register::look(&path, GPU, Duration::from_secs(5));
        let error = result.err().unwrap_or_else(|| panic!("{name}: taken for an arbiter")).to_string();
        assert!(error.contains(words), "{name}: {error}");
        std::fs::remove_file(path).unwrap();
    }
    let path = liar("no slot", vec![shown], Some(file(&page)));
    let error = register::register(&path, &Hello::new(GPU, "victim"), Duration::from_secs(5)).err().unwrap();
    assert!(error.to_string().contains("Shown to who asked for Welcome"), "{error}");
    std::fs::remove_file(path).unwrap();

    let refusal = Reply::refuse(Status::Full, "all taken\u{1b}[2J");
    let path = liar("refusal", vec![bytemuck::bytes_of(refusal.as_ref()).to_vec()], None);
    match register::register(&path, &Hello::new(GPU, "victim"), Duration::from_secs(5)) {
        Err(RegisterError::Refused { status: Status::Full, text, .. }) => assert_eq!(text, "all taken?[2J"),
        other => panic!("{:?}", other.err()),
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no sockets")]
fn an_arbiter_that_ends_before_it_has_answered() {
    let page = bytes(&Page::on_heap(GPU, 100));
    let welcome = Reply::welcome(SlotIndex::new(7).unwrap());
    let answers = vec![Vec::new(), Vec::new(), bytemuck::bytes_of(&welcome).to_vec()];
    let path = liar("successor", answers, Some(file(&page)));
    let registration =
        register::register(&path, &Hello::new(GPU, "patient"), Duration::from_secs(60)).unwrap();
    assert_eq!(registration.slot.get(), 7, "its successor was not asked");
    std::fs::remove_file(path).unwrap();

    // No successor comes.
    let path = liar("last", vec![Vec::new()], None);
    let error = register::register(&path, &Hello::new(GPU, "patient"), Duration::ZERO).err().unwrap();
    assert!(matches!(error, RegisterError::NoArbiter { .. }), "{error}");
    std::fs::remove_file(path).unwrap();
}

/// One that is stopped: the kernel still takes connections for it, until its queue is full.
#[test]
#[cfg_attr(miri, ignore = "Miri has no sockets")]
fn an_arbiter_that_never_answers() {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    let listening = |name| {
        let path = temporary(name);
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        (listener, path)
    };
    let ((_silent, silent), (_full, full)) = (listening("silent"), listening("full"));
    let _queued = register::dial(&full, Duration::ZERO).unwrap();
    let look = |path: PathBuf, words: &'static str| {
        std::thread::spawn(move || {
            ends(move || {
                let error = register::look(&path, GPU, Duration::ZERO).err().unwrap().to_string();
                assert!(error.contains(words), "{error}");
                std::fs::remove_file(path).unwrap();
            });
        })
    };
    let looks = [look(silent, "said nothing"), look(full, "no arbiter answers")];
    looks.into_iter().for_each(|look| look.join().unwrap());
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no sockets")]
fn an_arbiter_that_is_not_there() {
    let path = temporary("nobody");
    let error =
        register::register(&path, &Hello::new(GPU, "victim"), Duration::from_millis(20)).err().unwrap();
    assert!(matches!(error, RegisterError::NoArbiter { .. }));
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}
