//! A client as a member of its group: what its engine and the thread that serves other replicas share.

use crate::replicas::GroupId;
use crate::replicas::inbox::Inbox;
use crate::replicas::key::Key;
use nvshare::sync::lock;
use nvshare::units::GpuUuid;
use std::io::Write;
use std::sync::Mutex;

/// Ends the thread that serves other members when it is dropped.
#[derive(Debug)]
pub struct Serving(std::io::PipeWriter);

impl Serving {
    /// What the thread looks at: it ends when there is something to read.
    pub(super) fn new() -> std::io::Result<(std::io::PipeReader, Self)> {
        let (reader, writer) = std::io::pipe()?;
        Ok((reader, Self(writer)))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // A byte, and not only the end of the pipe: a forked child may have a copy of it.
        let _ = self.0.write(&[0]);
    }
}

/// A client as a member of its group.
#[derive(Debug)]
pub struct Group {
    /// Which group.
    pub id: GroupId,
    /// The GPU.
    pub gpu: GpuUuid,
    /// What has come from other members.
    pub inbox: Inbox,
    keys: Mutex<Keys>,
    serving: Mutex<Option<Serving>>,
}

#[derive(Debug)]
struct Keys {
    own: Key,
    /// The oldest key that another member has shown.
    oldest: Key,
}

impl Group {
    /// A member of the group of this name, with a key of its own.
    pub fn new(gpu: GpuUuid, name: &str) -> Self {
        let own = Key::draw();
        let keys = Mutex::new(Keys { own, oldest: own });
        Self { id: GroupId::new(gpu, name), gpu, inbox: Inbox::default(), keys, serving: Mutex::new(None) }
    }

    /// A thread serves other members, until the client leaves.
    pub(super) fn serves(&self, serving: Serving) {
        *lock(&self.serving) = Some(serving);
    }

    /// The client leaves: nothing comes any more.
    pub fn leave(&self) {
        drop(lock(&self.serving).take());
    }

    /// The key with which it takes fingerprints.
    pub fn key(&self) -> Key {
        lock(&self.keys).own
    }

    /// The oldest key that it knows, which it shows to others: the one that all will have in the end.
    pub(super) fn oldest(&self) -> Key {
        lock(&self.keys).oldest
    }

    /// Another member has shown its key.
    pub(super) fn saw(&self, key: Key) {
        let mut keys = lock(&self.keys);
        keys.oldest = keys.oldest.min(key);
    }

    /// Takes the oldest key that it knows. True if that is another one than before: then fingerprints taken so far say nothing. Only
    /// the engine calls it, between two scans.
    pub fn adopt(&self) -> bool {
        let mut keys = lock(&self.keys);
        let changes = keys.own != keys.oldest;
        keys.own = keys.oldest;
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_that_meet_come_to_the_same_key_and_the_oldest_one_keeps_its_own() {
        let [first, second, third] = [(); 3].map(|()| Group::new(GpuUuid([1; 16]), "weights"));
        let key = first.key();
        third.saw(second.oldest());
        second.saw(third.oldest());
        second.saw(first.oldest());
        third.saw(second.oldest());
        first.saw(third.oldest());
        assert!(second.key() != key && !first.adopt() && second.adopt() && third.adopt());
        assert_eq!([&first, &second, &third].map(Group::key), [key; 3]);
        assert!(!second.adopt());
    }

    #[test]
    fn groups_differ_by_name_and_gpu() {
        let id = |gpu: u8, name: &str| Group::new(GpuUuid([gpu; 16]), name).id;
        assert_eq!(id(1, "weights"), id(1, "weights"));
        assert!(id(1, "weights") != id(2, "weights") && id(1, "weights") != id(1, "weight"));
    }
}
