//! Pages after the guest has moved: the source keeps what it has not sent and gives it out, on demand first.
//!
//! ```text
//! source                                        destination
//!                       <--Receipt--            (the state names the missing pages)
//!                       <--Want*--              setting the state may touch some
//!                       <--Applied--
//! Pages|Packed|Zero, in the background; what is wanted goes first
//!                       <--Want*--              a fault
//!                       <--Drained--            everything is there
//!                       --Drained-->            it was heard: both sides may go
//! ```
//!
//! All of it on connection 0, in the round after the last. A connection that breaks is opened anew by the source, with
//! the session's credentials; the destination then first says what is still missing (`Want` with `FLAG_RESUME`, several
//! frames where one is too small, empty if nothing is). Which pages may be written is judged by the memory that they are
//! placed in: those that are missing, once each.
//!
//! Both give up by time: the destination after [`Timeouts::recover`](super::Timeouts::recover), whereupon its guest ends
//! (missing pages must not be read as zero), the source after twice that.

mod pager;
mod serve;
#[cfg(test)]
mod tests;

pub(crate) use pager::Pager;
pub use serve::{Left, Until};

use std::time::Duration;

use super::error::DataplaneError;

/// How long a destination waits for a source that lost its connection.
pub const RECOVER: Duration = Duration::from_secs(20);

/// Pages in a frame of the background.
const CHUNK_PAGES: u64 = 64;

/// How often a wait looks at what else there is to do.
const SLICE: Duration = Duration::from_millis(20);

/// Whether the peer went away, as far as can be seen, rather than saying something wrong or that it gives up.
pub(crate) fn is_lost(error: &DataplaneError) -> bool {
    matches!(
        error,
        DataplaneError::Closed { .. } | DataplaneError::Io { .. } | DataplaneError::Timeout { .. }
    )
}
