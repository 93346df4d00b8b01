//! What KVM_RUN came back for, in words of ours.

use super::{KvmVcpu, Pending};
use crate::hypervisor::{Exit, HvError};
use crate::sys::run_page::RawExit;

impl KvmVcpu {
    /// The next element of string I/O that KVM has handed over, if one is left.
    #[inline]
    pub(super) fn next_element(&mut self) -> Option<Exit> {
        let Pending::Io { input, port, size, count, offset, done } = self.pending else { return None };
        if done >= count {
            self.pending = Pending::Nothing;
            return None;
        }
        if input {
            return Some(Exit::PioIn { port, size });
        }
        let data = self.fd.element(offset + u64::from(done) * u64::from(size), size);
        self.pending = Pending::Io { input, port, size, count, offset, done: done + 1 };
        Some(Exit::PioOut { port, size, data })
    }

    /// What the run page says, after KVM_RUN returned 0. None: nothing of interest, enter again.
    #[expect(clippy::inline_always, reason = "a page of code less to look up with each exit; see `run`")]
    #[inline(always)]
    pub(super) fn translate(&mut self) -> Result<Option<Exit>, HvError> {
        self.pending = Pending::Nothing;
        Ok(Some(match self.fd.exit() {
            RawExit::Io { input, port, size, count, offset } => {
                let bytes = u64::from(size) * u64::from(count);
                if !matches!(size, 1 | 2 | 4) || count == 0 || !self.fd.holds(offset, bytes) {
                    let problem = misplaced(count, size, offset);
                    return Err(HvError::State { kind: "port I/O exit".to_owned(), problem });
                }
                self.pending = Pending::Io { input, port, size, count, offset, done: 0 };
                return Ok(self.next_element());
            }
            RawExit::Mmio { write: true, addr, size, data } => Exit::MmioWrite { addr, size, data },
            RawExit::Mmio { write: false, addr, size, .. } => {
                self.pending = Pending::MmioRead;
                Exit::MmioRead { addr, size }
            }
            RawExit::RdMsr(index) => {
                self.pending = Pending::RdMsr;
                Exit::RdMsr { index }
            }
            RawExit::WrMsr(index, value) => {
                self.pending = Pending::WrMsr;
                Exit::WrMsr { index, value }
            }
            RawExit::Hlt => Exit::Hlt,
            RawExit::Shutdown => Exit::Shutdown,
            RawExit::SystemEvent(kind) => Exit::SystemEvent(kind),
            RawExit::Internal(suberror, data) => Exit::InternalError { suberror, data },
            RawExit::FailEntry(reason) => Exit::FailEntry { reason },
            RawExit::DirtyRingFull => Exit::DirtyRingFull,
            RawExit::Nothing => return Ok(None),
            // Nothing that we enabled leads here; the reason is in the data.
            RawExit::Other(reason) => {
                Exit::InternalError { suberror: u32::MAX, data: vec![u64::from(reason)] }
            }
        }))
    }
}

#[cold]
fn misplaced(count: u32, size: u8, offset: u64) -> String {
    format!("{count} elements of {size} bytes at {offset:#x} of the run page")
}
