//! A place to stop at: an instruction that KVM has half done is finished, and the guest goes on for moments until all of its
//! state can be read.

use super::{Driver, SHORTEST_TICK};
use crate::error::WorkerError;
use crate::host::boottime_ns;
use crate::hypervisor::Exit;
use crate::vcpu::state::State;

/// Moments that a guest gets to leave a place where its state cannot be read whole.
const SETTLE_TRIES: u32 = 64;
/// After so many the moments get twice as long, up to [`TICK`](crate::vcpu::counting::TICK): on a slow host an entry alone
/// takes longer than the shortest, and the guest would never get anywhere.
const SETTLE_STEP: u32 = 8;

impl Driver {
    /// Finishes a half-done instruction, and goes on for moments until state can be read whole. A guest that never
    /// comes to such a place, or has no right to run any more, is left where it is, and known not to be whole.
    pub(super) fn settle(&mut self) -> Result<(), WorkerError> {
        self.finish_pending()?;
        for round in 0..=SETTLE_TRIES {
            if self.state != State::Running {
                break;
            }
            self.whole = self.vcpu.settled()?;
            if self.whole || round == SETTLE_TRIES || !self.right.allows(boottime_ns) {
                break;
            }
            self.counting.enter()?;
            self.arm(SHORTEST_TICK * (1 << (round / SETTLE_STEP)))?;
            let exit = self.vcpu.run();
            if let Some(ns) = self.counting.leave()? {
                self.shared.stats.guest_ns(ns);
            }
            if self.counting.pmi_raised() {
                self.judge()?;
            }
            let exit = exit?;
            if exit == Exit::Interrupted {
                // A kick for a later request: it will be seen, since requests are looked for after this one.
                self.vcpu.clear_kick();
            }
            self.on_exit(exit, true)?;
            self.finish_pending()?;
        }
        Ok(())
    }

    fn finish_pending(&mut self) -> Result<(), WorkerError> {
        while let Some(exit) = self.vcpu.finish_pending()? {
            self.on_exit(exit, true)?;
            if self.state != State::Running {
                break;
            }
        }
        Ok(())
    }
}
