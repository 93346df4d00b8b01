//! The migration data plane: guest memory and state from one worker to another, over 1 to 16 connections.
//!
//! Blocking sockets on plain OS threads. Data threads inherit the CPU affinity of the thread that calls in here, so
//! the caller keeps them off cores that vCPUs own. Nothing here decides who may run; a `Receipt` only says that
//! everything arrived, and `Applied` that it was set.
//!
//! ```text
//! source                                     destination
//! Outgoing::connect  --Hello, n times-->     Incoming::run: authenticates, collects n connections
//!                    <--HelloAck--
//! send_round(1..)    --Pages*,Zero*,RoundEnd on every connection-->   straight into guest memory
//!                    <--RoundAck (live rounds)--   all connections meet at each round's end
//! finish(state)      --Done on 1..n; State*, Done on 0-->   counts and digest checked, receivers joined
//!                    <--Receipt--
//! await_applied()    <--Applied--            Received::acknowledge, after the state was set
//! ```
//! Where the state leaves pages for later, the last line is [`postcopy`]'s.
//!
//! **Pages of a running guest change under our feet.** In a live round each chunk is first copied to a buffer of the
//! connection; sum and send both come from that copy, so the sum matches what is sent, and a page torn by the guest
//! comes again with a later round, since the dirty log saw the write. In rounds of a stopped guest (`live = false`)
//! pages go straight from guest memory with writev. The destination reads straight into guest memory with readv, and
//! reads back for the sum; only in the first round, where the memory has no pages yet, it goes through a buffer, which
//! is faster there (see `conn`).
//!
//! **Zero pages.** The destination's memory starts zero and is written by nobody else. In the first round pages that the
//! memory file never allocated are skipped unread; others are looked at, and a page that is zero and was never sent
//! with content costs nothing on the wire. A page that became zero after it was sent goes as a `Zero` range.

pub mod frame;
#[doc(hidden)]
pub mod fuzz;
pub mod postcopy;
pub mod precopy;

mod address;
mod cancel;
mod compress;
mod conn;
mod error;
mod limiter;
mod local;
mod receiver;
mod sender;
mod tls;

pub use address::DataAddress;
pub use cancel::CancelFlag;
pub use compress::{Algorithm, Compression};
pub use conn::Timeouts;
pub use error::{DataplaneError, Result};
pub use local::hand_over;
pub use receiver::{Incoming, Received};
pub use sender::{ConnectOptions, FinishStats, Outgoing, RoundStats, SendProgress};
pub use tls::{Fingerprint, Identity, Tls};

/// Oldest and newest protocol that this build speaks. 2 has compressed pages, 3 pages after the guest has moved; a
/// destination that cannot wait for those (no userfaultfd) answers 2.
pub const PROTOCOL_VERSIONS: std::ops::RangeInclusive<u16> = 1..=3;

/// Which attempt of which migration, and the secret that its connections present.
#[derive(Clone, PartialEq, Eq)]
pub struct SessionId {
    /// UUID bytes.
    pub migration_id: [u8; 16],
    /// From 1; a later attempt refuses frames of an earlier one.
    pub attempt: u32,
    /// Random, from the control plane, over its authenticated channel.
    pub token: [u8; 32],
}

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionId")
            .field("migration_id", &format_args!("{:032x}", u128::from_be_bytes(self.migration_id)))
            .field("attempt", &self.attempt)
            .field("token", &"(secret)")
            .finish()
    }
}

impl SessionId {
    pub(crate) fn key(&self) -> frame::FrameKey {
        frame::FrameKey { migration_id: self.migration_id, attempt: self.attempt }
    }
}

fn check_connections(connections: u16) -> Result<()> {
    if (1..=frame::MAX_CONNECTIONS).contains(&connections) {
        Ok(())
    } else {
        Err(DataplaneError::Connections(connections))
    }
}
