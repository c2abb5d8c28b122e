//! Processes with several GPUs, and gangs: clients of different GPUs that run together.
//!
//! A *team* is all of them: the GPUs of one process, or those of the processes of a gang. Each of its clients has a *seat* here.
//! When a client may ask for its GPU, and when it must give it up, is decided by [`nvshare::gang_order`], and how the team
//! stops by [`nvshare::gang_cut`], as among real processes. Work is collective: an iteration is done on all GPUs at the same time,
//! as fast as the slowest of them, and only while all memory is in place everywhere.
//!
//! A process with several GPUs stops like a gang here. A real one drains each GPU by itself, but all of them wait for all its work.

use nvshare::gang_cut::{self, Cut, Row, Stage};
use nvshare::gang_order::{GangOrder, GpuState};
use nvshare::slot::SlotIndex;
use nvshare::units::{GpuUuid, Nanos};
use std::cell::RefCell;
use std::rc::Rc;

/// A part of the speed that a GPU has alone: the first number over the second one.
pub type Speed = (u128, u128);

/// What a client shows the others of its team.
#[derive(Debug)]
struct Member {
    gpu: GpuUuid,
    cut: Cut,
    works: bool,
    /// Somebody who is not admitted needs the GPU.
    needed: bool,
    /// How fast its GPU would compute; `None` while it cannot.
    speed: Option<Speed>,
}

/// The clients of one process with several GPUs, or of one gang.
#[derive(Debug, Default)]
struct Team {
    order: GangOrder,
    members: Vec<Member>,
    /// Since when it wants its GPUs and does not run, ns.
    waits_since: Option<Nanos>,
}

/// The UUID of a GPU by its number: the order of numbers is that of UUIDs.
fn uuid(gpu: usize) -> GpuUuid {
    GpuUuid((gpu as u128).to_be_bytes())
}

/// A client's seat in its team.
#[derive(Debug, Clone)]
pub struct Seat {
    team: Rc<RefCell<Team>>,
    gpu: GpuUuid,
}

impl Seat {
    /// The seats of a team on these GPUs, none of which is there twice.
    pub fn all_on(gpus: &[usize]) -> Vec<Self> {
        let team = Rc::new(RefCell::new(Team::default()));
        gpus.iter().map(|gpu| Self { team: team.clone(), gpu: uuid(*gpu) }).collect()
    }

    /// The client has come, and has this slot.
    pub fn sit(&self, slot: SlotIndex) {
        let mut team = self.team.borrow_mut();
        team.order.join(self.gpu, slot);
        team.members.push(Member {
            gpu: self.gpu,
            cut: Cut::default(),
            works: false,
            needed: false,
            speed: None,
        });
    }

    /// The client goes.
    pub fn leave(&self) {
        let mut team = self.team.borrow_mut();
        team.order.leave(self.gpu);
        team.members.retain(|member| member.gpu != self.gpu);
    }

    /// Writes what the client has of its GPU.
    pub fn has(&self, state: GpuState) {
        self.team.borrow_mut().order.set(self.gpu, state);
    }

    /// Writes whether somebody else needs the GPU.
    pub fn is_needed(&self, needed: bool) {
        self.team.borrow_mut().own(self.gpu).needed = needed;
    }

    /// Whether somebody needs a GPU of the team.
    pub fn anybody_is_needed(&self) -> bool {
        self.team.borrow().members.iter().any(|member| member.needed)
    }

    /// As [`GangOrder::may_ask`].
    pub fn may_ask(&self) -> bool {
        self.team.borrow().order.may_ask(self.gpu)
    }

    /// As [`GangOrder::must_give_up`].
    pub fn must_give_up(&self) -> bool {
        self.team.borrow().order.must_give_up(self.gpu)
    }

    /// Writes when the client's turn is likely to come, ns, if it waits for its GPU.
    pub fn expects(&self, turn: Option<Nanos>) {
        self.team.borrow_mut().order.expect(self.gpu, turn);
    }

    /// As [`GangOrder::asks_at`].
    pub fn asks_at(&self) -> Option<Nanos> {
        self.team.borrow().order.asks_at(self.gpu)
    }

    /// Whether the client works: it has begun to run with the others, and has not drained since.
    pub fn works(&self) -> bool {
        self.team.borrow_mut().own(self.gpu).works
    }

    /// Begins to run if all memory is in place everywhere and nobody has begun to stop. True if it does.
    pub fn begins(&self) -> bool {
        let mut team = self.team.borrow_mut();
        let others = team.others(self.gpu);
        let complete = team.order.complete();
        let own = team.own(self.gpu);
        if own.works || !complete || !gang_cut::may_run(own.cut, &others, false) {
            return false;
        }
        (own.works, own.cut) = (true, gang_cut::run_on(own.cut, &others));
        true
    }

    /// Whether the client must drain because another one of its team does.
    pub fn is_called_to_drain(&self) -> bool {
        let mut team = self.team.borrow_mut();
        let others = team.others(self.gpu);
        let own = team.own(self.gpu);
        own.works && gang_cut::is_called_to_shut(own.cut, &others)
    }

    /// The client begins to drain.
    pub fn drains(&self) {
        let mut team = self.team.borrow_mut();
        let others = team.others(self.gpu);
        let own = team.own(self.gpu);
        if own.works {
            own.cut = gang_cut::shut(own.cut, &others);
        }
    }

    /// The client's work is done. Whether it may give its GPU up: all who work have drained.
    pub fn has_drained(&self) -> bool {
        let mut team = self.team.borrow_mut();
        let others = team.others(self.gpu);
        let own = team.own(self.gpu);
        if !own.works {
            return true;
        }
        own.cut = Cut::new(Stage::Drained, gang_cut::keep_up(own.cut, &others).number);
        let all = gang_cut::all_have_drained(own.cut, &others);
        if all {
            (own.works, own.cut) = (false, gang_cut::leave(own.cut));
        }
        all
    }

    /// Writes how fast the client's GPU would compute its work, if it could.
    pub fn could_compute(&self, speed: Option<Speed>) {
        self.team.borrow_mut().own(self.gpu).speed = speed;
    }

    /// How fast the team computes; `None` while some client cannot.
    pub fn speed(&self) -> Option<Speed> {
        let team = self.team.borrow();
        let speeds: Option<Vec<Speed>> = team.members.iter().map(|member| member.speed).collect();
        speeds?.into_iter().min_by(|one, other| (one.0 * other.1).cmp(&(other.0 * one.1)))
    }

    /// The team wants its GPUs, from now on if it did not yet.
    pub fn waits(&self, now: Nanos) {
        self.team.borrow_mut().waits_since.get_or_insert(now);
    }

    /// For how long the team has waited until now, ns. Each client asks once, when it begins.
    pub fn waited(&self, now: Nanos) -> Nanos {
        let mut team = self.team.borrow_mut();
        let waited = team.waits_since.map_or(0, |since| now - since);
        if team.members.iter().all(|member| member.works) {
            team.waits_since = None;
        }
        waited
    }
}

impl Team {
    fn own(&mut self, gpu: GpuUuid) -> &mut Member {
        self.members.iter_mut().find(|member| member.gpu == gpu).expect("who asks has a seat")
    }

    /// What the others show, as in the page of gangs.
    fn others(&self, gpu: GpuUuid) -> Vec<Row> {
        let row = |member: &Member| Row {
            state: self.order.state(member.gpu),
            cut: member.cut,
            works: member.works,
            needed: member.needed,
            ..Row::default()
        };
        self.members.iter().filter(|member| member.gpu != gpu).map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> [Seat; 2] {
        let seats: [Seat; 2] = Seat::all_on(&[3, 5]).try_into().unwrap();
        seats.iter().for_each(|seat| seat.sit(SlotIndex::new(0).unwrap()));
        seats
    }

    #[test]
    fn gpus_are_taken_in_the_order_of_their_numbers_and_all_begin_together() {
        assert!(uuid(2) < uuid(10) && uuid(255) < uuid(256));
        let [first, second] = two();
        assert!(first.may_ask() && !second.may_ask());
        first.has(GpuState::Waiting);
        assert!(!second.may_ask() && second.must_give_up() && !first.must_give_up());
        first.has(GpuState::Ready);
        assert!(second.may_ask() && !first.begins());
        second.has(GpuState::Ready);
        assert!(first.begins() && second.begins());
        assert!(!first.begins(), "it has begun");
    }

    #[test]
    fn all_drain_when_one_does_and_none_gives_up_its_gpu_before_all_have() {
        let [first, second] = two();
        [&first, &second].into_iter().for_each(|seat| seat.has(GpuState::Ready));
        assert!(first.begins() && second.begins() && !first.is_called_to_drain());
        second.drains();
        assert!(first.is_called_to_drain());
        assert!(!second.has_drained(), "the first one works");
        first.drains();
        assert!(first.has_drained() && second.has_drained());
        assert!(!first.works() && !second.works());
    }

    #[test]
    fn the_slowest_gpu_says_how_fast_the_team_is_and_one_that_cannot_that_it_stands() {
        let [first, second] = two();
        first.could_compute(Some((1, 2)));
        assert_eq!(first.speed(), None);
        second.could_compute(Some((3, 7)));
        assert_eq!(first.speed(), Some((3, 7)));
        second.leave();
        assert_eq!(first.speed(), Some((1, 2)));
    }
}
