//! Who may change a client's shares while it runs.
//!
//! As with signals: root, the user that the arbiter runs as, and the client's own user, who could as well start it again
//! with other shares. Nobody changes another user's client.

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
}
