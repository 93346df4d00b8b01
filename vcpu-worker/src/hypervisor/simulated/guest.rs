//! The script: what one turn of the probe's loop does to guest memory. Mirrors `probe/guest.S` step by step, over the
//! same fields; coarser, because a turn is milliseconds here.

use std::fmt::Write as _;

use super::registers::{Phase, Registers};
use crate::memory::{GuestMemory, MemoryError};
use crate::probe::layout::{self, PAGE};

/// Pages filled or dirtied in a turn at most.
const TURN_PAGES: u64 = 1024;
/// Pages dirtied in a turn when nothing limits the rate.
const UNTHROTTLED_PAGES: u64 = 256;

/// One check of the parameter page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Check {
    pub msr: u32,
    pub kind: u32,
    pub operand: u64,
    pub slot: u64,
    pub fault: u64,
}

/// Guest memory as one vCPU's script uses it.
#[derive(Debug)]
pub(super) struct Script {
    mem: GuestMemory,
}

impl Script {
    pub(super) fn new(mem: GuestMemory) -> Self {
        Self { mem }
    }

    /// A word of the vCPU's block.
    pub(super) fn word(&self, r: &Registers, field: u64) -> Result<u64, MemoryError> {
        self.mem.load_u64(r.base + field)
    }

    /// A half word of the vCPU's block.
    pub(super) fn half(&self, r: &Registers, field: u64) -> Result<u32, MemoryError> {
        let word = self.word(r, field & !7)?;
        Ok((word >> (field % 8 * 8)) as u32)
    }

    /// Writes a word of the vCPU's block.
    pub(super) fn set(&mut self, r: &Registers, field: u64, value: u64) -> Result<(), MemoryError> {
        self.mem.store_u64(r.base + field, value)
    }

    fn add(&mut self, r: &Registers, field: u64, more: u64) -> Result<u64, MemoryError> {
        let value = self.word(r, field)?.wrapping_add(more);
        self.set(r, field, value)?;
        Ok(value)
    }

    /// Counts an interrupt.
    pub(super) fn interrupt(&mut self, r: &Registers) -> Result<(), MemoryError> {
        self.add(r, layout::R_PMIS, 1).map(drop)
    }

    /// Records a fault, the first one with its circumstances.
    pub(super) fn fault(
        &mut self,
        r: &Registers,
        code: u64,
        place: u32,
        expected: u64,
        got: u64,
    ) -> Result<(), MemoryError> {
        if self.word(r, layout::R_FIRST)? == 0 {
            self.set(r, layout::R_FIRST_WHERE, place.into())?;
            self.set(r, layout::R_FIRST_EXPECTED, expected)?;
            self.set(r, layout::R_FIRST_GOT, got)?;
            self.set(r, layout::R_FIRST, code)?;
        }
        self.add(r, layout::R_FAULTS, 1).map(drop)
    }

    /// Halts as the guest does after an exception that it does not handle.
    pub(super) fn exception(&mut self, r: &mut Registers, vector: u32) -> Result<(), MemoryError> {
        r.phase = Phase::Halted;
        let code = layout::FAULT_EXCEPTION + u64::from(vector);
        self.fault(r, code, vector, 0, 0)?;
        self.set(r, layout::R_STAGE, layout::STAGE_HALTED)
    }

    /// The set-up write of this number.
    pub(super) fn setup_write(&self, r: &Registers, number: u64) -> Result<(u32, u64), MemoryError> {
        let at = layout::P_SETUP + number.min(layout::SETUP_MAX as u64 - 1) * layout::SETUP_BYTES;
        Ok((self.half(r, at)?, self.word(r, at + 8)?))
    }

    /// The check of this number.
    pub(super) fn check(&self, r: &Registers, number: u64) -> Result<Check, MemoryError> {
        let at = layout::P_CHECKS + number.min(layout::CHECKS_MAX as u64 - 1) * layout::CHECK_BYTES;
        Ok(Check {
            msr: self.half(r, at)?,
            kind: self.half(r, at + 4)?,
            operand: self.word(r, at + 8)?,
            slot: self.word(r, at + 16)?.min(layout::CHECKS_MAX as u64 - 1),
            fault: self.word(r, at + 24)?,
        })
    }

    /// Checks done in a round: bounded whatever memory says.
    pub(super) fn check_count(&self, r: &Registers) -> Result<u64, MemoryError> {
        Ok(self.word(r, layout::P_CHECK_COUNT)?.min(layout::CHECKS_MAX as u64))
    }

    /// Judges what a check read; None is #GP.
    pub(super) fn judge(&mut self, r: &Registers, c: Check, got: Option<u64>) -> Result<(), MemoryError> {
        let Some(got) = got else {
            return self.fault(r, layout::FAULT_READ, c.msr, c.operand, 0);
        };
        let negative = |value: u64| (value << (c.operand & 63)) >> 63 == 1;
        match c.kind {
            layout::CHECK_EQUAL if got == c.operand => Ok(()),
            layout::CHECK_EQUAL => self.fault(r, c.fault, c.msr, c.operand, got),
            layout::CHECK_OVERFLOW if negative(got) => self.set(r, layout::R_OVF_SEEN, 0),
            layout::CHECK_OVERFLOW => {
                let (seen, before) = (self.word(r, layout::R_OVF_SEEN)?, self.word(r, layout::R_OVF_PMIS)?);
                let pmis = self.word(r, layout::R_PMIS)?;
                self.set(r, layout::R_OVF_SEEN, 1)?;
                self.set(r, layout::R_OVF_PMIS, pmis)?;
                if seen != 0 && pmis == before {
                    return self.fault(r, c.fault, c.msr, before, got);
                }
                Ok(())
            }
            _ => {
                let slot = layout::R_SLOTS + c.slot * 8;
                let last = self.word(r, slot)?;
                self.set(r, slot, got)?;
                if negative(got.wrapping_sub(last)) {
                    return self.fault(r, c.fault, c.msr, last, got);
                }
                Ok(())
            }
        }
    }

    /// Begins the loop.
    pub(super) fn begin(&mut self, r: &mut Registers, now: u64) -> Result<(), MemoryError> {
        self.set(r, layout::R_CHECK_POS, self.check_count(r)?)?;
        self.set(r, layout::R_CHECK_WAIT, self.word(r, layout::P_CHECK_EVERY)?)?;
        self.set(r, layout::R_LINE_WAIT, self.word(r, layout::P_LINE_EVERY)?)?;
        self.set(r, layout::R_WS_PASS, 1)?;
        if self.word(r, layout::P_LINES)? != 0 {
            self.say(r, &format!("probe vcpu{} up\n", self.word(r, layout::P_VCPU)?))?;
        }
        self.set(r, layout::R_STAGE, layout::STAGE_RUNNING)?;
        (r.turn, r.due, r.page_due, r.beat_due) = (now, now, now, now);
        r.phase = Phase::Running;
        Ok(())
    }

    /// One turn of the loop; `period` is the TSC ticks that are meant to lie between two turns.
    pub(super) fn turn(&mut self, r: &mut Registers, now: u64, period: u64) -> Result<(), MemoryError> {
        let gap = if let Some(gap) = now.checked_sub(r.turn) {
            gap
        } else {
            self.add(r, layout::R_TSC_BACK, 1)?;
            (r.page_due, r.beat_due) = (now, now);
            0
        };
        r.turn = now;
        r.due = now.saturating_add(period);
        let mark = self.word(r, layout::R_MARK)?;
        if mark != self.word(r, layout::R_MARK_SEEN)? {
            self.set(r, layout::R_MARK_SEEN, mark)?;
            self.set(r, layout::R_LAST_GAP, 0)?;
        }
        if gap > self.word(r, layout::R_LAST_GAP)? {
            self.set(r, layout::R_LAST_GAP, gap)?;
        }
        if gap > self.word(r, layout::R_MAX_GAP)? {
            self.set(r, layout::R_MAX_GAP, gap)?;
        }
        // Turns are meant to lie apart here: only what goes well beyond that is a hole.
        if gap > self.word(r, layout::P_GAP)?.saturating_add(period.saturating_mul(3)) {
            self.add(r, layout::R_GAPS, 1)?;
        }
        self.add(r, layout::R_LOOPS, 1)?;
        if now >= r.beat_due {
            self.beat(r, now)?;
        }
        if self.word(r, layout::R_FILLED)? < self.word(r, layout::P_FILL_PAGES)? {
            self.fill(r)
        } else {
            self.dirty(r, now)
        }
    }

    fn beat(&mut self, r: &mut Registers, now: u64) -> Result<(), MemoryError> {
        self.add(r, layout::R_BEATS, 1)?;
        self.set(r, layout::R_BEAT_TSC, now)?;
        let period = self.word(r, layout::P_BEAT)?;
        r.beat_due = r.beat_due.saturating_add(period);
        if r.beat_due <= now {
            r.beat_due = now.saturating_add(period);
        }
        if self.add(r, layout::R_CHECK_WAIT, u64::MAX)? == 0 {
            self.set(r, layout::R_CHECK_WAIT, self.word(r, layout::P_CHECK_EVERY)?)?;
            if self.word(r, layout::R_CHECK_POS)? >= self.check_count(r)? {
                self.set(r, layout::R_CHECK_POS, 0)?;
            }
        }
        if self.add(r, layout::R_LINE_WAIT, u64::MAX)? == 0 {
            self.set(r, layout::R_LINE_WAIT, self.word(r, layout::P_LINE_EVERY)?)?;
            self.lines(r)?;
        }
        Ok(())
    }

    fn fill(&mut self, r: &Registers) -> Result<(), MemoryError> {
        let (area, first) = (self.word(r, layout::P_FILL)?, self.word(r, layout::P_FILL_FIRST)?);
        let filled = self.word(r, layout::R_FILLED)?;
        let end = self.word(r, layout::P_FILL_PAGES)?.min(filled.saturating_add(TURN_PAGES));
        for page in filled..end {
            let word = layout::fill_word(first.wrapping_add(page)).to_le_bytes();
            let offset = area.wrapping_add(page.wrapping_mul(PAGE));
            self.mem.write_at(offset, &word.repeat(PAGE as usize / 8))?;
            self.set(r, layout::R_FILLED, page + 1)?;
        }
        Ok(())
    }

    fn dirty(&mut self, r: &mut Registers, now: u64) -> Result<(), MemoryError> {
        let pages = self.word(r, layout::P_WS_PAGES)?;
        if pages == 0 {
            return Ok(());
        }
        let (area, salt) = (self.word(r, layout::P_WS)?, self.word(r, layout::P_WS_SALT)?);
        let ticks = self.word(r, layout::P_WS_TICKS)?;
        for _ in 0..if ticks == 0 { UNTHROTTLED_PAGES } else { TURN_PAGES } {
            if ticks != 0 {
                if now < r.page_due {
                    return Ok(());
                }
                r.page_due = r.page_due.saturating_add(ticks);
            }
            let (pass, page) = (self.word(r, layout::R_WS_PASS)?, self.word(r, layout::R_WS_NEXT)?);
            let value = layout::ws_word(salt, pass, page);
            let offset = area.wrapping_add(page.wrapping_mul(PAGE));
            self.mem.write_at(offset, &value.to_le_bytes())?;
            self.mem.write_at(offset.wrapping_add(PAGE - 8), &(!value).to_le_bytes())?;
            if page.wrapping_add(1) < pages {
                self.set(r, layout::R_WS_NEXT, page + 1)?;
            } else {
                self.set(r, layout::R_WS_NEXT, 0)?;
                self.add(r, layout::R_WS_PASS, 1)?;
            }
            self.add(r, layout::R_DIRTIED, 1)?;
        }
        // As much as a turn may and still behind: drop the backlog.
        r.page_due = r.page_due.max(now);
        Ok(())
    }

    /// Progress lines of the first vCPUs, unless earlier text is still on its way.
    fn lines(&mut self, r: &Registers) -> Result<(), MemoryError> {
        let lines = self.word(r, layout::P_LINES)?.min(u64::from(layout::MAX_VCPUS));
        if self.word(r, layout::R_TX_POS)? < self.word(r, layout::R_TX_LEN)? {
            return Ok(());
        }
        let mut text = String::new();
        for vcpu in 0..lines as u32 {
            let word = |field: u64| self.mem.load_u64(layout::block(vcpu) + field);
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "probe vcpu{vcpu} beats {} pmis {} checks {} faults {}",
                word(layout::R_BEATS)?,
                word(layout::R_PMIS)?,
                word(layout::R_CHECKS)?,
                word(layout::R_FAULTS)?,
            );
        }
        self.say(r, &text)
    }

    fn say(&mut self, r: &Registers, text: &str) -> Result<(), MemoryError> {
        let bytes = text.as_bytes();
        let bytes = bytes.get(..layout::TX_MAX).unwrap_or(bytes);
        self.mem.write(r.base + layout::R_TX, bytes)?;
        self.set(r, layout::R_TX_LEN, bytes.len() as u64)?;
        self.set(r, layout::R_TX_POS, 0)
    }

    /// The next byte for the serial port.
    pub(super) fn next_byte(&mut self, r: &Registers) -> Result<Option<u8>, MemoryError> {
        let position = self.word(r, layout::R_TX_POS)?;
        if position >= self.word(r, layout::R_TX_LEN)?.min(layout::TX_MAX as u64) {
            return Ok(None);
        }
        let mut byte = [0];
        self.mem.read(r.base + layout::R_TX + position, &mut byte)?;
        self.set(r, layout::R_TX_POS, position + 1)?;
        Ok(Some(byte[0]))
    }
}
