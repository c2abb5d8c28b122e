//! All states of a small machine, for tests that try every order of steps.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;

/// The states that can be reached from one.
pub struct Reachable<S> {
    states: Vec<S>,
    /// Of each state those that it can come from.
    comes_from: Vec<Vec<usize>>,
}

/// More states are a fault of the machine.
const MOST: usize = 3_000_000;

impl<S: Clone + Eq + Hash + Debug> Reachable<S> {
    /// From this state, by these steps.
    pub fn from(start: S, next: impl Fn(&S) -> Vec<S>) -> Self {
        let mut known = HashMap::from([(start.clone(), 0)]);
        let (mut states, mut comes_from) = (vec![start], vec![Vec::new()]);
        let mut at = 0;
        while at < states.len() {
            for state in next(&states[at]) {
                let number = *known.entry(state).or_insert_with_key(|state| {
                    states.push(state.clone());
                    comes_from.push(Vec::new());
                    states.len() - 1
                });
                comes_from[number].push(at);
            }
            at += 1;
            assert!(states.len() < MOST, "there is no end of states");
        }
        println!("{} states", states.len());
        Self { states, comes_from }
    }

    /// From every state one can be reached that is as wanted; searched backwards from those.
    pub fn all_lead_to(&self, what: &str, is_wanted: impl Fn(&S) -> bool) {
        let wanted = |state: &usize| is_wanted(&self.states[*state]);
        let mut queue: VecDeque<_> = (0..self.states.len()).filter(wanted).collect();
        let mut reaches: HashSet<_> = queue.iter().copied().collect();
        assert!(!reaches.is_empty(), "{what}: it never comes to that at all");
        while let Some(state) = queue.pop_front() {
            queue.extend(self.comes_from[state].iter().copied().filter(|from| reaches.insert(*from)));
        }
        if let Some(stuck) = (0..self.states.len()).find(|state| !reaches.contains(state)) {
            panic!("{what}: it can never come to that again: {:#?}", self.states[stuck]);
        }
    }
}
