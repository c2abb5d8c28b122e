//! Connections that have not said yet what they want.
//!
//! Anybody may connect, and a connection costs the arbiter a descriptor until it speaks. Honest clients speak at once. So
//! the number of silent ones is bounded: for a process, for a user, and in all. When a bound is reached, the one goes that
//! has been silent for longest, among those of the process with the most of them, of the user with the most of them. So
//! whoever opens many displaces itself. What goes is asked once more first: it may have spoken in the meantime.

use nvshare::units::Nanos;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Silent connections of one process.
const OF_PROCESS: usize = 16;

/// Silent connections of one user.
const OF_USER: usize = 128;

/// Silent connections in all.
const IN_ALL: usize = 512;

/// Who is at the other end, as the kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Its user.
    pub user: u32,
    /// Its process; 0 where the arbiter cannot see it.
    pub pid: u32,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// Its socket.
    pub socket: OwnedFd,
    /// Who has it.
    pub peer: Peer,
    /// Since when it is there.
    pub since: Nanos,
}

/// The silent ones.
#[derive(Debug, Default)]
pub struct Silent {
    connections: HashMap<RawFd, Connection>,
    of_process: HashMap<Peer, usize>,
    of_user: HashMap<u32, usize>,
}

impl Silent {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Takes a connection in. Returns the one that has to go for it, if one has to.
    pub fn add(&mut self, connection: Connection) -> Option<Connection> {
        let peer = connection.peer;
        *self.of_process.entry(peer).or_default() += 1;
        *self.of_user.entry(peer.user).or_default() += 1;
        self.connections.insert(connection.socket.as_raw_fd(), connection);
        self.displaced(peer)
    }

    /// Takes out the one that has spoken.
    pub fn remove(&mut self, socket: RawFd) -> Option<Connection> {
        let connection = self.connections.remove(&socket)?;
        uncount(&mut self.of_process, connection.peer);
        uncount(&mut self.of_user, connection.peer.user);
        Some(connection)
    }

    /// Closes those that have been there since before `time`.
    pub fn close_older(&mut self, time: Nanos) {
        let old = self.connections.iter().filter(|(_, connection)| connection.since < time);
        let old: Vec<_> = old.map(|(socket, _)| *socket).collect();
        old.into_iter().for_each(|socket| drop(self.remove(socket)));
    }

    fn displaced(&mut self, newest: Peer) -> Option<Connection> {
        let user = if self.of_user[&newest.user] > OF_USER {
            newest.user
        } else {
            *self.of_user.iter().max_by_key(|(_, count)| **count)?.0
        };
        let goes = |connection: &Connection| {
            if self.of_process[&newest] > OF_PROCESS {
                connection.peer == newest
            } else {
                connection.peer.user == user
            }
        };
        let full = self.of_process[&newest] > OF_PROCESS
            || self.of_user[&newest.user] > OF_USER
            || self.connections.len() > IN_ALL;
        let candidates = self.connections.values().filter(|connection| full && goes(connection));
        let oldest_of_largest = candidates
            .min_by_key(|connection| (Reverse(self.of_process[&connection.peer]), connection.since))?;
        self.remove(oldest_of_largest.socket.as_raw_fd())
    }
}

fn uncount<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
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

    fn counts_are_right(silent: &Silent) {
        let count = |of: &dyn Fn(&Peer) -> bool| {
            silent.connections.values().filter(|connection| of(&connection.peer)).count()
        };
        assert!(silent.of_process.iter().all(|(peer, number)| count(&|other| other == peer) == *number));
        assert!(silent.of_user.iter().all(|(user, number)| count(&|other| other.user == *user) == *number));
        assert_eq!(silent.of_user.values().sum::<usize>(), silent.connections.len());
    }

    #[test]
    fn whoever_opens_many_displaces_its_own_oldest() {
        let mut silent = Silent::default();
        let honest = connection(1, 1, 0);
        let kept = honest.socket.as_raw_fd();
        assert!(silent.add(honest).is_none());
        for since in 1..1000 {
            if let Some(gone) = silent.add(connection(1, 2, since)) {
                assert_eq!((gone.peer.pid, gone.since), (2, since - OF_PROCESS as Nanos));
            }
        }
        counts_are_right(&silent);
        assert_eq!(silent.connections.len(), OF_PROCESS + 1);
        assert!(silent.remove(kept).is_some());
    }

    #[test]
    fn a_user_with_many_processes_displaces_its_largest() {
        let mut silent = Silent::default();
        for time in 0..10_000 {
            let gone = silent.add(connection(1, 100 + time % 500, u64::from(time)));
            assert!(gone.is_none_or(|gone| gone.peer.user == 1));
            if time % 100 == 0 {
                // Somebody else comes among them, and the same user's honest process.
                for honest in [connection(2, 7, u64::from(time)), connection(1, 8, u64::from(time))] {
                    let socket = honest.socket.as_raw_fd();
                    assert!(silent.add(honest).is_none_or(|gone| gone.peer.pid >= 100));
                    assert!(silent.remove(socket).is_some());
                }
            }
        }
        counts_are_right(&silent);
        assert_eq!(silent.connections.len(), OF_USER);
    }

    #[test]
    fn all_users_together_are_bounded_and_the_largest_goes_first() {
        let mut silent = Silent::default();
        for index in 0..2_000 {
            let gone = silent.add(connection(index % 20, index % 9, u64::from(index)));
            assert!(gone.is_none_or(|gone| silent.of_user[&gone.peer.user] + 1 >= IN_ALL / 20));
        }
        counts_are_right(&silent);
        assert_eq!(silent.connections.len(), IN_ALL);
        silent.close_older(1_900);
        counts_are_right(&silent);
        assert!(silent.connections.values().all(|connection| connection.since >= 1_900));
        silent.close_older(u64::MAX);
        assert!(silent.is_empty() && silent.of_process.is_empty() && silent.of_user.is_empty());
    }
}
