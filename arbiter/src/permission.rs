//! Who may change what while it runs.
//!
//! The settings of the node: root, and the user that the arbiter runs as. A client's shares, and whether it is paused, as with
//! signals: these two, and the client's own user, who could as well stop it, or start it again with other shares. Nobody changes
//! another user's client.

/// A user's number, as the arbiter's user namespace has it.
pub type Uid = u32;

/// Users that the arbiter's user namespace does not have all show as this one (`/proc/sys/kernel/overflowuid`), so two
/// processes with it may belong to different users.
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

/// Whether `asker` may change settings of an arbiter that runs as `arbiter`.
///
/// # Errors
/// Why not, and who may.
pub fn may_configure(asker: Uid, arbiter: Uid) -> Result<(), String> {
    if asker == 0 || asker == arbiter && asker != UNMAPPED {
        return Ok(());
    }
    let user =
        if arbiter == 0 { String::new() } else { format!(" and by user {arbiter}, whose the arbiter is") };
    Err(format!(
        "settings of the node are changed by root{user}, and you are user {asker}; clients of your own you may pause and give other shares"
    ))
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
    fn only_root_and_the_arbiters_user_change_settings_of_the_node() {
        assert_eq!((may_configure(0, ARBITER), may_configure(ARBITER, ARBITER)), (Ok(()), Ok(())));
        for (asker, arbiter) in [(1000, ARBITER), (1000, 0), (UNMAPPED, UNMAPPED)] {
            let why = may_configure(asker, arbiter).unwrap_err();
            assert!(why.contains(&format!("you are user {asker}")) && why.contains("root"), "{why}");
        }
    }

    #[test]
    fn nobody_else_may_and_is_told_who_may() {
        for (asker, client) in [(1001, Some(1000)), (1000, Some(0)), (1000, None), (UNMAPPED, Some(UNMAPPED))]
        {
            let why = may_change(asker, client, ARBITER).unwrap_err();
            assert!(why.contains(&format!("you are user {asker}")) && why.contains("user 50"), "{why}");
        }
    }
}
