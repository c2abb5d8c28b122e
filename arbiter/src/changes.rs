//! Who may change a client's shares while it runs.
//!
//! As with signals: root, the user that the arbiter runs as, and the client's own user, who could as well start it again
//! with other shares. Nobody changes another's.

use std::fs;

/// A user's number, as the arbiter's user namespace has it.
pub type Uid = u32;

/// Users that the arbiter's user namespace does not have all show as this one (`/proc/sys/kernel/overflowuid`): it is
/// nobody in particular, so nobody is the same as it.
pub const UNMAPPED: Uid = 65_534;

/// Whether `asker` may change a client of the user `client` (`None`: it cannot be seen whose it is). The arbiter runs as
/// `arbiter`.
///
/// # Errors
/// Why not, and who may.
pub fn may_change(asker: Uid, client: Option<Uid>, arbiter: Uid) -> Result<(), String> {
    if asker == 0 || asker == arbiter || (client == Some(asker) && asker != UNMAPPED) {
        return Ok(());
    }
    let whose =
        client.map_or_else(|| "a user that cannot be seen from here".into(), |uid| format!("user {uid}"));
    Err(format!(
        "the client belongs to {whose} and you are user {asker}; ask that user, root or user {arbiter}, whose the arbiter is"
    ))
}

/// Whose process it is: its real user, as for signals.
pub fn user_of(pid: u32) -> Option<Uid> {
    real_user(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

fn real_user(status: &str) -> Option<Uid> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARBITER: Uid = 50;

    #[test]
    fn root_the_arbiters_user_and_the_clients_own_may() {
        for asker in [0, ARBITER, 1000] {
            assert_eq!(may_change(asker, Some(1000), ARBITER), Ok(()), "{asker}");
        }
        assert_eq!(may_change(0, None, ARBITER), Ok(()));
    }

    #[test]
    fn nobody_else_may_and_is_told_who_may() {
        for (asker, client) in [(1001, Some(1000)), (1000, Some(0)), (1000, None), (UNMAPPED, Some(UNMAPPED))]
        {
            let why = may_change(asker, client, ARBITER).unwrap_err();
            assert!(why.contains(&format!("you are user {asker}")) && why.contains("user 50"), "{why}");
        }
    }

    #[test]
    fn a_process_belongs_to_its_real_user() {
        assert_eq!(user_of(std::process::id()), Some(nix::unistd::getuid().as_raw()));
        assert_eq!(user_of(u32::MAX / 2), None);
        assert_eq!(real_user("Name:\tx\nUid:\t1000\t0\t0\t0\nGid:\t5\n"), Some(1000));
        assert_eq!(real_user("Name:\tUid:\n"), None);
    }
}
