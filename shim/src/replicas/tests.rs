//! Members of groups, all in this process, with files in memory in place of GPU memory.

use crate::local_socket::{self, connect_to};
use crate::replicas::giving::{Giving, Wanted};
use crate::replicas::message::{Digest, MOST_BYTES, Message};
use crate::replicas::taking::{self, Taker};
use crate::replicas::{Group, GroupId, MOST_OFFERED, MOST_UNDER_WAY, socket_name};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use nvshare::Page;
use nvshare::scm_rights::{receive, send};
use nvshare::slot::{Process, SlotIndex, SlotSet};
use nvshare::sync::lock;
use nvshare::units::{GRANULE, GpuUuid, Granules};
use nvshare_test_support::Patience;
use std::hash::{BuildHasher, RandomState};
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

const TIMEOUT: Patience = Patience::seconds(60);

const SIZE: u64 = 4 * GRANULE;

fn digest(number: u64) -> Digest {
    Digest::of(SIZE, 15, [[number, !number]].into_iter())
}

/// A page of a GPU that no other test has.
fn page() -> Arc<Page> {
    let half = || RandomState::new().hash_one(0u8).to_ne_bytes();
    let gpu = GpuUuid([half(), half()].concat().try_into().unwrap());
    Page::on_heap(gpu, 1000).into()
}

fn client(page: &Page) -> SlotIndex {
    page.open_slot(Process { pid: std::process::id(), started: 7 }, "replica", 1).unwrap()
}

/// A taker: what it lacks by address, and what is promised.
#[derive(Default)]
struct Shelf {
    lacks: Mutex<Vec<(u64, Digest)>>,
    promised: Mutex<Vec<u64>>,
}

struct OfShelf(Arc<Shelf>);

impl Taker for OfShelf {
    fn promise(&self, offered: &[Digest], most: Granules) -> Vec<(u32, u64)> {
        let lacks = lock(&self.0.lacks);
        let address = |digest: &Digest| lacks.iter().find(|(_, lacked)| lacked == digest).map(|(at, _)| *at);
        let wanted = (0..).zip(offered).filter_map(|(place, digest)| Some((place, address(digest)?)));
        let wanted: Vec<_> = wanted.take(most as usize / 4).collect();
        lock(&self.0.promised).extend(wanted.iter().map(|(_, address)| *address));
        wanted
    }

    fn take_back(&self, promised: &[u64]) {
        lock(&self.0.promised).retain(|address| !promised.contains(address));
    }
}

struct Member {
    group: Arc<Group>,
    slot: SlotIndex,
    shelf: Arc<Shelf>,
}

impl Member {
    /// That lacks the chunks of these numbers.
    fn start(page: &Arc<Page>, name: &str, lacks: std::ops::Range<u64>) -> Self {
        let slot = client(page);
        let (group, shelf) = (Arc::new(Group::new(page.gpu(), name)), Arc::new(Shelf::default()));
        *lock(&shelf.lacks) = lacks.map(|number| (number << 30, digest(number))).collect();
        taking::start(&group, page, slot, OfShelf(shelf.clone())).unwrap();
        Self { group, slot, shelf }
    }

    fn admitted(&self) -> SlotSet {
        SlotSet::EMPTY.with(self.slot)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.leave();
    }
}

/// A giver that has met the others of a page.
fn giver(page: &Arc<Page>, name: &str) -> Giving {
    let mut giving = Giving::new(Arc::new(Group::new(page.gpu(), name)));
    giving.meet(page, client(page));
    giving
}

fn offered(numbers: std::ops::Range<u64>) -> Vec<Digest> {
    numbers.map(digest).collect()
}

/// Something that stands for memory: the reader learns when the last descriptor of it is closed.
fn memory() -> (PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader, writer.into())
}

fn places(wanted: &[Wanted]) -> Vec<usize> {
    wanted.iter().map(|wanted| wanted.at).collect()
}

#[test]
fn what_is_lacked_is_wanted_and_comes_with_its_address() {
    let page = page();
    let taker = Member::start(&page, "weights", 3..6);
    let mut giving = giver(&page, "weights");
    assert_eq!(giving.group().oldest(), taker.group.oldest(), "they have agreed on a key");
    let wanted = giving.offer(taker.admitted(), &offered(0..5), 1000);
    assert_eq!(places(&wanted), [3, 4]);
    assert_eq!(*lock(&taker.shelf.promised), [3 << 30, 4 << 30]);
    let (mut reader, writer) = memory();
    assert!(giving.has_room(&wanted[1]) && giving.send(&wanted[1], SIZE, writer.as_fd()));
    drop(writer);
    TIMEOUT.until("it has come", || taker.group.inbox.has_some());
    let handed = taker.group.inbox.pop().unwrap();
    assert_eq!((handed.address, handed.size, handed.digest), (4 << 30, SIZE, digest(4)));
    giving.over();
    TIMEOUT.until("the rest is taken back", || *lock(&taker.shelf.promised) == [4 << 30]);
    drop(handed);
    let mut heard = Vec::new();
    reader.read_to_end(&mut heard).unwrap();
    assert!(heard.is_empty(), "the memory is closed with what was handed");
}

#[test]
fn no_more_is_wanted_than_is_to_be_evicted_and_only_by_those_who_are_admitted() {
    let page = page();
    let taker = Member::start(&page, "weights", 0..9);
    let mut giving = giver(&page, "weights");
    assert_eq!(places(&giving.offer(taker.admitted(), &offered(0..9), 8)), [0, 1]);
    assert!(giving.offer(SlotSet::EMPTY, &offered(0..9), 1000).is_empty());
}

#[test]
fn of_two_takers_each_chunk_goes_to_one() {
    let page = page();
    let takers = [0..4, 2..6].map(|lacks| Member::start(&page, "weights", lacks));
    let mut giving = giver(&page, "weights");
    let admitted = takers.iter().map(|taker| taker.slot).collect();
    let wanted = giving.offer(admitted, &offered(0..9), 1000);
    assert_eq!(places(&wanted), [0, 1, 2, 3, 4, 5]);
    assert_eq!(*lock(&takers[1].shelf.promised), [4 << 30, 5 << 30]);
    for wanted in &wanted {
        let (_, writer) = memory();
        assert!(giving.has_room(wanted) && giving.send(wanted, SIZE, writer.as_fd()));
    }
    for (taker, addresses) in takers.iter().zip([0..4, 4..6]) {
        for address in addresses {
            TIMEOUT.until("it has come", || taker.group.inbox.has_some());
            assert_eq!(taker.group.inbox.pop().unwrap().address, address << 30);
        }
    }
}

#[test]
fn members_of_other_groups_and_clients_without_replicas_are_told_nothing() {
    let page = page();
    let other = Member::start(&page, "other", 0..4);
    let without = client(&page);
    let mut giving = giver(&page, "weights");
    let own_key = giving.group().oldest();
    assert!(giving.offer(other.admitted().with(without), &offered(0..4), 1000).is_empty());
    assert_eq!(giving.group().oldest(), own_key, "though the other's key is older");
    assert!(other.group.oldest() < own_key && !other.group.adopt());
}

#[test]
fn a_taker_that_takes_nothing_gets_no_more_than_the_most_under_way() {
    let page = page();
    let taker = Member::start(&page, "weights", 0..20);
    let mut giving = giver(&page, "weights");
    let wanted = giving.offer(taker.admitted(), &offered(0..20), 1000);
    let (mut reader, writer) = memory();
    let sent = wanted
        .iter()
        .take_while(|wanted| giving.has_room(wanted) && giving.send(wanted, SIZE, writer.as_fd()));
    assert_eq!(sent.count(), MOST_UNDER_WAY);
    TIMEOUT.until("the promises are taken back, because the giver has given up", || {
        lock(&taker.shelf.promised).len() == MOST_UNDER_WAY
    });
    drop(writer);
    // Nobody takes it, and still it does not stay.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert!(giving.offer(taker.admitted(), &offered(0..20), 1000).is_empty(), "it is left alone for a while");
}

#[test]
fn what_a_giver_has_promised_is_free_again_when_it_ends() {
    let page = page();
    let taker = Member::start(&page, "weights", 0..4);
    let mut giving = giver(&page, "weights");
    assert_eq!(giving.offer(taker.admitted(), &offered(0..4), 1000).len(), 4);
    drop(giving);
    TIMEOUT.until("the promises are taken back", || lock(&taker.shelf.promised).is_empty());
}

#[test]
fn whoever_leaves_closes_what_it_has_not_taken_and_answers_no_more() {
    let page = page();
    let taker = Member::start(&page, "weights", 0..4);
    let mut giving = giver(&page, "weights");
    let wanted = giving.offer(taker.admitted(), &offered(0..4), 1000);
    let (mut reader, writer) = memory();
    assert!(giving.send(&wanted[0], SIZE, writer.as_fd()));
    drop(writer);
    TIMEOUT.until("it has come", || taker.group.inbox.has_some());
    taker.group.leave();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    let name = socket_name(&page, taker.slot).unwrap();
    TIMEOUT.until("nobody listens", || connect_to(&name).is_err());
    assert!(!giving.has_room(&wanted[1]));
}

/// A socket of the right name that accepts and says nothing, as that of a process that is stopped.
#[test]
fn one_that_does_not_answer_is_asked_once_and_holds_nobody_up() {
    let page = page();
    let silent = client(&page);
    let _listener = local_socket::listen_at(&socket_name(&page, silent).unwrap()).unwrap();
    let taker = Member::start(&page, "weights", 0..4);
    let own = client(&page);
    let mut giving = Giving::new(Arc::new(Group::new(page.gpu(), "weights")));
    giving.meet(&page, own);
    let asked = local_socket::accept(&_listener);
    assert!(asked.is_ok(), "it was asked");
    giving.meet(&page, own);
    assert!(local_socket::accept(&_listener).is_err(), "and not again at once");
    let all = taker.admitted().with(silent);
    assert_eq!(giving.offer(all, &offered(0..4), 1000).len(), 4);
}

/// Says something to a member over a new connection, after a greeting if there is one. What comes back; nothing: it is closed.
fn says(
    page: &Page,
    member: &Member,
    greeting: Option<GroupId>,
    bytes: &[u8],
    memory: &[&OwnedFd],
) -> Vec<u8> {
    let socket = connect_to(&socket_name(page, member.slot).unwrap()).unwrap();
    let hear = || {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        while poll(&mut fds, PollTimeout::NONE).is_err() {}
        receive(socket.as_fd(), MOST_BYTES + 1, MsgFlags::empty()).map_or(Vec::new(), |(bytes, _)| bytes)
    };
    if let Some(id) = greeting {
        send(socket.as_fd(), &Message::Hello(id, member.group.key()).encode(), &[]).unwrap();
        assert!(matches!(Message::decode(&hear()), Some(Message::Hello(..))));
    }
    let fds: Vec<_> = memory.iter().map(|fd| fd.as_fd()).collect();
    send(socket.as_fd(), bytes, &fds).unwrap();
    hear()
}

#[test]
fn nonsense_closes_the_connection_and_leaves_nothing_open() {
    let page = page();
    let taker = Member::start(&page, "weights", 0..4);
    let id = Some(taker.group.id);
    let key = taker.group.key();
    let offer = Message::Offer(1000, offered(0..4)).encode();
    for (greeting, bytes, why) in [
        (None, b"hello".to_vec(), "no message"),
        (None, vec![0; MOST_BYTES + 100], "one that is too long"),
        (None, offer.clone(), "an offer of somebody who has not said who it is"),
        (None, Message::Here(0, SIZE).encode(), "memory of the same"),
        (None, Message::Hello(GroupId::new(page.gpu(), "other"), key).encode(), "another group"),
        (id, Message::Hello(taker.group.id, key).encode(), "a second greeting"),
        (id, Message::Here(0, SIZE).encode(), "memory that was not promised"),
        (id, Message::Wanted(vec![0]).encode(), "what only a taker says"),
        (id, Message::Done.encode(), "the same"),
    ] {
        let (mut reader, writer) = memory();
        assert_eq!(says(&page, &taker, greeting, &bytes, &[]), b"", "{why}, without memory");
        assert_eq!(says(&page, &taker, greeting, &bytes, &[&writer]), b"", "{why}");
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "{why}: its memory stays open");
        assert!(!taker.group.inbox.has_some(), "{why}");
    }
    assert!(lock(&taker.shelf.promised).is_empty());
    // It still serves those who make sense.
    let answer = says(&page, &taker, id, &offer, &[]);
    assert_eq!(Message::decode(&answer), Some(Message::Wanted(vec![0, 1, 2, 3])));
}

/// A taker that wants what was not offered.
#[test]
fn a_taker_that_lies_is_left_alone() {
    let page = page();
    let slot = client(&page);
    let listener = local_socket::listen_at(&socket_name(&page, slot).unwrap()).unwrap();
    let group = Arc::new(Group::new(page.gpu(), "weights"));
    let id = group.id;
    let liar = std::thread::spawn(move || {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        while poll(&mut fds, PollTimeout::NONE).is_err() {}
        let socket = local_socket::accept(&listener).unwrap();
        for answer in [Message::Hello(id, group.key()), Message::Wanted(vec![0, 9])] {
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            while poll(&mut fds, PollTimeout::NONE).is_err() {}
            receive(socket.as_fd(), MOST_BYTES + 1, MsgFlags::empty()).unwrap();
            send(socket.as_fd(), &answer.encode(), &[]).unwrap();
        }
        // The giver hangs up.
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        while poll(&mut fds, PollTimeout::NONE).is_err() {}
        assert_eq!(receive(socket.as_fd(), 1, MsgFlags::empty()).unwrap().0, b"");
    });
    let mut giving = giver(&page, "weights");
    assert!(giving.offer(SlotSet::EMPTY.with(slot), &offered(0..4), 1000).is_empty());
    liar.join().unwrap();
}

#[test]
fn of_more_chunks_than_an_offer_has_room_for_the_first_are_offered() {
    let page = page();
    let most = MOST_OFFERED as u64;
    let taker = Member::start(&page, "weights", most - 1..most + 1);
    let mut giving = giver(&page, "weights");
    let wanted = giving.offer(taker.admitted(), &offered(0..most + 10), 1000);
    assert_eq!(places(&wanted), [MOST_OFFERED - 1]);
}
