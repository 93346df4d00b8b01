//! A simulated vCPU's state outside of guest memory, and its encoding as one state piece: fixed little-endian words, so
//! that saving what was restored gives the same bytes.

use vpmu_proto::worker::StatePiece;

use crate::hypervisor::HvError;
use crate::probe::layout;

/// Name of the piece.
pub(super) const KIND: &str = "simulated-vcpu";
/// Version of its layout.
const VERSION: u32 = 1;
const WORDS: usize = 14;

/// Where the script is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No start state yet.
    Reset = 0,
    /// Programs its counters.
    Setup = 1,
    /// In its loop.
    Running = 2,
    /// Halted by an unexpected exception.
    Halted = 3,
}

/// Which step of the interrupt handler is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handler {
    /// Not in the handler.
    Idle = 0,
    /// Reads status.
    Status = 1,
    /// Clears it.
    Clear = 2,
    /// Presets the overflow counter.
    Preset = 3,
}

/// Registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registers {
    pub phase: Phase,
    pub handler: Handler,
    /// The vCPU's block.
    pub base: u64,
    /// Next set-up write.
    pub setup: u64,
    /// TSC of the last turn.
    pub turn: u64,
    /// TSC at which the next turn, page and heartbeat are due.
    pub due: u64,
    pub page_due: u64,
    pub beat_due: u64,
    /// LVT performance counter register.
    pub lvtpc: u32,
    /// Interrupts requested, by vector.
    pub irr: [u64; 4],
    /// NMI pending.
    pub nmi: bool,
}

impl Registers {
    /// After reset: LVTPC is masked.
    pub(super) fn reset() -> Self {
        Self {
            phase: Phase::Reset,
            handler: Handler::Idle,
            base: 0,
            setup: 0,
            turn: 0,
            due: 0,
            page_due: 0,
            beat_due: 0,
            lvtpc: 0x1_0000,
            irr: [0; 4],
            nmi: false,
        }
    }

    /// As a state piece.
    pub(super) fn encode(&self) -> StatePiece {
        let [i0, i1, i2, i3] = self.irr;
        let words: [u64; WORDS] = [
            self.phase as u64,
            self.handler as u64,
            self.base,
            self.setup,
            self.turn,
            self.due,
            self.page_due,
            self.beat_due,
            self.lvtpc.into(),
            i0,
            i1,
            i2,
            i3,
            self.nmi.into(),
        ];
        let data: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        StatePiece { kind: KIND.to_owned(), version: VERSION, data }
    }

    /// From state pieces of vCPU `index`; every value is checked.
    pub(super) fn decode(pieces: &[StatePiece], index: u32) -> Result<Self, HvError> {
        let bad = |kind: &str, problem: String| {
            Err(HvError::State { kind: kind.chars().take(64).collect(), problem })
        };
        let [piece] = pieces else {
            return bad(KIND, format!("{} pieces, a simulated vCPU has one", pieces.len()));
        };
        if piece.kind != KIND {
            return bad(&piece.kind, "a simulated vCPU has no such state".to_owned());
        }
        if piece.version != VERSION {
            return bad(KIND, format!("version {}, this host knows {VERSION}", piece.version));
        }
        if piece.data.len() != WORDS * 8 {
            return bad(KIND, format!("{} bytes instead of {}", piece.data.len(), WORDS * 8));
        }
        let mut w = [0u64; WORDS];
        for (word, bytes) in w.iter_mut().zip(piece.data.chunks_exact(8)) {
            *word = bytes.try_into().map_or(0, u64::from_le_bytes);
        }
        let [phase, handler, base, setup, turn, due, page_due, beat_due, lvtpc, i0, i1, i2, i3, nmi] = w;
        let phase = match phase {
            0 => Phase::Reset,
            1 => Phase::Setup,
            2 => Phase::Running,
            3 => Phase::Halted,
            other => return bad(KIND, format!("phase {other}, there are 0 to 3")),
        };
        let handler = match handler {
            0 => Handler::Idle,
            1 => Handler::Status,
            2 => Handler::Clear,
            3 => Handler::Preset,
            other => return bad(KIND, format!("handler step {other}, there are 0 to 3")),
        };
        if base != layout::block(index) && !(phase == Phase::Reset && base == 0) {
            return bad(KIND, format!("block {base:#x} is not that of vCPU {index}"));
        }
        let Ok(lvtpc) = u32::try_from(lvtpc) else {
            return bad(KIND, format!("LVTPC {lvtpc:#x} has more than 32 bits"));
        };
        if nmi > 1 {
            return bad(KIND, format!("NMI flag {nmi}"));
        }
        let irr = [i0, i1, i2, i3];
        let nmi = nmi == 1;
        Ok(Self { phase, handler, base, setup, turn, due, page_due, beat_due, lvtpc, irr, nmi })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn damaged_state_is_refused_or_kept_to_the_bit(at in 0usize..WORDS * 8, value: u8, cut in 0usize..=WORDS * 8) {
            let mut piece = Registers { phase: Phase::Running, base: layout::block(3), ..Registers::reset() }.encode();
            let mut data = piece.data.clone();
            data[at] = value;
            data.truncate(cut);
            piece.data = data;
            if let Ok(registers) = Registers::decode(std::slice::from_ref(&piece), 3) {
                prop_assert_eq!(registers.encode(), piece);
            }
        }
    }

    #[test]
    fn state_of_another_vcpu_or_kind_is_refused() {
        let piece =
            Registers { phase: Phase::Running, base: layout::block(3), ..Registers::reset() }.encode();
        assert!(Registers::decode(std::slice::from_ref(&piece), 3).is_ok());
        assert!(Registers::decode(std::slice::from_ref(&piece), 2).is_err());
        assert!(Registers::decode(&[], 3).is_err());
        assert!(Registers::decode(&[piece.clone(), piece.clone()], 3).is_err());
        let other = StatePiece { kind: "regs".to_owned(), ..piece.clone() };
        assert_eq!(Registers::decode(&[other], 3).unwrap_err().reason(), "STATE_REJECTED");
        assert!(Registers::decode(&[StatePiece { version: 2, ..piece }], 3).is_err());
    }
}
