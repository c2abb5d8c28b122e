//! Connections whose process has not sent its first message yet.
//!
//! Anybody may connect, and a connection costs the arbiter a descriptor until its message comes. Honest clients send it at
//! once, so the number of connections that wait is bounded: for a process, for a user, and in all. When a bound is exceeded,
//! one connection is displaced: the oldest of the process with the most of them, of the user with the most of them. So a
//! process that opens many displaces its own. The caller reads a displaced connection once more before it closes it: its
//! message may have come in the meantime.

use nvshare::units::Nanos;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// The most pending connections of one process.
const MAX_PER_PROCESS: usize = 16;

/// The most pending connections of one user.
const MAX_PER_USER: usize = 128;

/// The most pending connections in all.
const MAX_TOTAL: usize = 512;

/// The process at the other end, as the kernel recorded it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Peer {
    /// Its user.
    pub user: u32,
    /// Its process; 0 where the arbiter cannot see it.
    pub pid: u32,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub socket: OwnedFd,
    pub peer: Peer,
    /// When it was accepted, in ns.
    pub since: Nanos,
}

/// The connections that wait for their first message.
#[derive(Debug, Default)]
pub(super) struct PendingConnections {
    connections: HashMap<RawFd, Connection>,
    per_process: HashMap<Peer, usize>,
    per_user: HashMap<u32, usize>,
}

impl PendingConnections {
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Adds a connection. Returns the one that is displaced, if a bound is exceeded now.
    pub fn add(&mut self, connection: Connection) -> Option<Connection> {
        let peer = connection.peer;
        *self.per_process.entry(peer).or_default() += 1;
        *self.per_user.entry(peer.user).or_default() += 1;
        self.connections.insert(connection.socket.as_raw_fd(), connection);
        self.displace(peer)
    }

    /// Removes a connection, because its message has come.
    pub fn remove(&mut self, socket: RawFd) -> Option<Connection> {
        let connection = self.connections.remove(&socket)?;
        decrement(&mut self.per_process, connection.peer);
        decrement(&mut self.per_user, connection.peer.user);
        Some(connection)
    }

    /// Closes those that were accepted before `time` (ns).
    pub fn close_older(&mut self, time: Nanos) {
        let old = self.connections.iter().filter(|(_, connection)| connection.since < time);
        let old: Vec<_> = old.map(|(socket, _)| *socket).collect();
        old.into_iter().for_each(|socket| drop(self.remove(socket)));
    }

    /// Removes a connection, if the newest one exceeds a bound.
    fn displace(&mut self, newest: Peer) -> Option<Connection> {
        let process_has_too_many = self.per_process[&newest] > MAX_PER_PROCESS;
        let user_has_too_many = self.per_user[&newest.user] > MAX_PER_USER;
        if !process_has_too_many && !user_has_too_many && self.connections.len() <= MAX_TOTAL {
            return None;
        }
        let user = if user_has_too_many {
            newest.user
        } else {
            *self.per_user.iter().max_by_key(|(_, count)| **count)?.0
        };
        let may_go = |connection: &&Connection| match process_has_too_many {
            true => connection.peer == newest,
            false => connection.peer.user == user,
        };
        let candidates = self.connections.values().filter(may_go);
        let oldest_of_largest = candidates
            .min_by_key(|connection| (Reverse(self.per_process[&connection.peer]), connection.since))?;
        self.remove(oldest_of_largest.socket.as_raw_fd())
    }
}

fn decrement<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
    if let std::collections::hash_map::Entry::Occupied(mut entry) = counts.entry(key) {
        *entry.get_mut() -= 1;
        if *entry.get() == 0 {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn connection(user: u32, pid: u32, since: Nanos) -> Connection {
        let socket = File::open("/dev/null").unwrap().into();
        Connection { socket, peer: Peer { user, pid }, since }
    }

    fn counts_are_right(pending: &PendingConnections) {
        let count = |of: &dyn Fn(&Peer) -> bool| {
            pending.connections.values().filter(|connection| of(&connection.peer)).count()
        };
        assert!(pending.per_process.iter().all(|(peer, number)| count(&|other| other == peer) == *number));
        assert!(pending.per_user.iter().all(|(user, number)| count(&|other| other.user == *user) == *number));
        assert_eq!(pending.per_user.values().sum::<usize>(), pending.connections.len());
    }

    #[test]
    fn a_process_that_opens_many_displaces_its_own_oldest() {
        let mut pending = PendingConnections::default();
        let honest = connection(1, 1, 0);
        let kept = honest.socket.as_raw_fd();
        assert!(pending.add(honest).is_none());
        for since in 1..1000 {
            if let Some(gone) = pending.add(connection(1, 2, since)) {
                assert_eq!((gone.peer.pid, gone.since), (2, since - MAX_PER_PROCESS as Nanos));
            }
        }
        counts_are_right(&pending);
        assert_eq!(pending.connections.len(), MAX_PER_PROCESS + 1);
        assert!(pending.remove(kept).is_some());
    }

    #[test]
    fn a_user_with_many_processes_displaces_its_largest_process() {
        let mut pending = PendingConnections::default();
        for time in 0..10_000 {
            let gone = pending.add(connection(1, 100 + time % 500, u64::from(time)));
            assert!(gone.is_none_or(|gone| gone.peer.user == 1));
            if time % 100 == 0 {
                // Somebody else comes among them, and the same user's honest process.
                for honest in [connection(2, 7, u64::from(time)), connection(1, 8, u64::from(time))] {
                    let socket = honest.socket.as_raw_fd();
                    assert!(pending.add(honest).is_none_or(|gone| gone.peer.pid >= 100));
                    assert!(pending.remove(socket).is_some());
                }
            }
        }
        counts_are_right(&pending);
        assert_eq!(pending.connections.len(), MAX_PER_USER);
    }

    #[test]
    fn all_users_together_are_bounded_and_the_largest_goes_first() {
        let mut pending = PendingConnections::default();
        for index in 0..2_000 {
            let gone = pending.add(connection(index % 20, index % 9, u64::from(index)));
            assert!(gone.is_none_or(|gone| pending.per_user[&gone.peer.user] + 1 >= MAX_TOTAL / 20));
        }
        counts_are_right(&pending);
        assert_eq!(pending.connections.len(), MAX_TOTAL);
        pending.close_older(1_900);
        counts_are_right(&pending);
        assert!(pending.connections.values().all(|connection| connection.since >= 1_900));
        pending.close_older(u64::MAX);
        assert!(pending.is_empty() && pending.per_process.is_empty() && pending.per_user.is_empty());
    }
}
