//! A simulated vCPU: turns the script's register accesses and output into exits, takes interrupts and kicks.
//!
//! ```text
//! Reset --set_initial--> Setup --last write answered--> Running --exception--> Halted (says Hlt for ever)
//!
//! Running, in this order: the interrupt handler's next step | a pending interrupt | the next check of a round |
//!                         the next byte for the serial port | a turn, if it is due | Hlt
//! ```
//!
//! Invariant: while `waits` is not `Nothing` the only call that moves the guest on is `complete`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use vpmu_proto::worker::StatePiece;

use super::guest::{Check, Script};
use super::registers::{Handler, Phase, Registers};
use super::{Shared, VCPUS};
use crate::hypervisor::{Completion, EntryMode, Exit, HvError, InitialRegs, Kick, Vcpu};
use crate::memory::MemoryError;
use crate::probe::layout;

/// What the last exit waits for.
#[derive(Debug, Clone, Copy)]
enum Waits {
    Nothing,
    SetupWrite { msr: u32, value: u64 },
    Check(Check),
    Status,
    Clear,
    Preset,
}

/// Interrupts on their way to a vCPU.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    irr: [AtomicU64; 4],
    nmi: AtomicBool,
}

impl Interrupts {
    pub(super) fn raise(&self, vector: u8) {
        self.irr[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::Release);
    }

    pub(super) fn raise_nmi(&self) {
        self.nmi.store(true, Ordering::Release);
    }
}

/// Kicks a simulated vCPU.
#[derive(Debug, Default)]
struct SimKick {
    kicked: AtomicBool,
}

impl Kick for SimKick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
    }
}

/// A simulated vCPU.
pub(super) struct SimVcpu {
    shared: Arc<Shared>,
    index: u32,
    registers: Registers,
    script: Script,
    waits: Waits,
    kick: Arc<SimKick>,
    interrupts: Arc<Interrupts>,
}

impl Drop for SimVcpu {
    fn drop(&mut self) {
        VCPUS.fetch_sub(1, Ordering::Relaxed);
    }
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

impl SimVcpu {
    pub(super) fn new(shared: Arc<Shared>, index: u32, interrupts: Arc<Interrupts>) -> Self {
        VCPUS.fetch_add(1, Ordering::Relaxed);
        let script = Script::new(shared.memory.clone());
        Self {
            shared,
            index,
            registers: Registers::reset(),
            script,
            waits: Waits::Nothing,
            kick: Arc::default(),
            interrupts,
        }
    }

    fn kicked(&self) -> bool {
        self.kick.kicked.load(Ordering::Acquire)
    }

    /// Nanoseconds in the guest's TSC ticks; the TSC is the host's monotonic clock at the guest's frequency.
    fn ticks(&self, ns: u64) -> Result<u64, MemoryError> {
        let khz = self.script.word(&self.registers, layout::P_TSC_KHZ)?;
        Ok((u128::from(ns) * u128::from(khz) / 1_000_000) as u64)
    }

    /// Access to memory that is not there ends the guest as a page fault would.
    fn guarded<T>(&mut self, result: Result<T, MemoryError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                tracing::warn!(vcpu = self.index, %error, "simulated guest accesses memory that it does not have");
                // The report page may be what is not there.
                let _ = self.script.exception(&mut self.registers, 14);
                self.registers.phase = Phase::Halted;
                None
            }
        }
    }

    /// The next exit, or None when there is nothing to do before the next turn is due.
    fn step(&mut self) -> Result<Option<Exit>, MemoryError> {
        match self.registers.phase {
            Phase::Reset | Phase::Halted => return Ok(None),
            Phase::Setup => {
                if let Some(exit) = self.setup()? {
                    return Ok(Some(exit));
                }
            }
            Phase::Running => {}
        }
        let mut turned = false;
        loop {
            if let Some(exit) = self.handler()? {
                return Ok(Some(exit));
            }
            if self.registers.phase != Phase::Running {
                return Ok(None);
            }
            if self.registers.handler == Handler::Idle && self.take_interrupt()? {
                continue;
            }
            let position = self.script.word(&self.registers, layout::R_CHECK_POS)?;
            if position < self.script.check_count(&self.registers)? {
                return self.check(position).map(Some);
            }
            if let Some(byte) = self.script.next_byte(&self.registers)? {
                return Ok(Some(Exit::PioOut { port: layout::COM1, size: 1, data: byte.into() }));
            }
            let now = self.ticks(now_ns())?;
            let period = self.ticks(self.shared.turn_ns())?;
            // A due time far ahead comes from a host whose clock is ahead of ours.
            let far = self.registers.due > now.saturating_add(period.saturating_mul(4));
            if turned || self.kicked() || (now < self.registers.due && !far) {
                return Ok(None);
            }
            turned = true;
            self.script.turn(&mut self.registers, now, period)?;
            self.burn();
        }
    }

    /// Uses up CPU time, so that the model's counters move; a kick ends it.
    fn burn(&self) {
        let start = Instant::now();
        while start.elapsed() < self.shared.options.burn && !self.kicked() {
            std::hint::spin_loop();
        }
    }

    fn setup(&mut self) -> Result<Option<Exit>, MemoryError> {
        let count = self.script.word(&self.registers, layout::P_SETUP_COUNT)?;
        let count = count.min(layout::SETUP_MAX as u64);
        if self.registers.setup == 0 {
            self.script.set(&self.registers, layout::R_STAGE, layout::STAGE_SETUP)?;
            if count > 0 {
                self.registers.lvtpc = self.script.half(&self.registers, layout::P_LVTPC)?;
            }
        }
        if self.registers.setup < count {
            let (index, value) = self.script.setup_write(&self.registers, self.registers.setup)?;
            self.waits = Waits::SetupWrite { msr: index, value };
            return Ok(Some(Exit::WrMsr { index, value }));
        }
        let now = self.ticks(now_ns())?;
        self.script.begin(&mut self.registers, now)?;
        Ok(None)
    }

    /// The interrupt handler's next access; None when it is not in the handler.
    fn handler(&mut self) -> Result<Option<Exit>, MemoryError> {
        let r = &self.registers;
        let (waits, exit) = match r.handler {
            Handler::Idle => return Ok(None),
            Handler::Status => {
                let index = self.script.half(r, layout::P_STATUS_MSR)?;
                (Waits::Status, Exit::RdMsr { index })
            }
            Handler::Clear => {
                let index = self.script.half(r, layout::P_CLEAR_MSR)?;
                let value = self.script.half(r, layout::P_STATUS_BIT)?.into();
                (Waits::Clear, Exit::WrMsr { index, value })
            }
            Handler::Preset => {
                let index = self.script.half(r, layout::P_OVF_MSR)?;
                let value = self.script.word(r, layout::P_PRESET)?;
                (Waits::Preset, Exit::WrMsr { index, value })
            }
        };
        self.waits = waits;
        Ok(Some(exit))
    }

    /// Takes one pending interrupt; true if there was one.
    fn take_interrupt(&mut self) -> Result<bool, MemoryError> {
        if self.interrupts.nmi.swap(false, Ordering::Acquire) {
            self.script.exception(&mut self.registers, 2)?;
            return Ok(true);
        }
        for (word, irr) in self.interrupts.irr.iter().enumerate().rev() {
            let pending = irr.load(Ordering::Acquire);
            if pending == 0 {
                continue;
            }
            let bit = pending.ilog2();
            irr.fetch_and(!(1 << bit), Ordering::AcqRel);
            let vector = word as u32 * 64 + bit;
            if vector == u32::from(layout::PMI_VECTOR) {
                self.script.interrupt(&self.registers)?;
                let status = self.script.half(&self.registers, layout::P_STATUS_MSR)?;
                self.registers.handler = if status == 0 { Handler::Preset } else { Handler::Status };
            } else if vector != u32::from(layout::SPURIOUS_VECTOR) {
                // The guest has no handler: its IDT entry is not present.
                self.script.exception(&mut self.registers, 11)?;
            }
            return Ok(true);
        }
        Ok(false)
    }

    fn check(&mut self, position: u64) -> Result<Exit, MemoryError> {
        let r = &self.registers;
        let check = self.script.check(r, position)?;
        let index = if check.kind == layout::CHECK_RDPMC {
            // RDPMC is #GP to the guest, whose handler reads the MSR instead.
            if check.msr >> 30 & 1 == 1 {
                check.msr.wrapping_add(self.script.half(r, layout::P_RDPMC_FIXED)?)
            } else {
                let stride = self.script.half(r, layout::P_RDPMC_STRIDE)?;
                self.script.half(r, layout::P_RDPMC_GP)?.wrapping_add(check.msr.wrapping_mul(stride))
            }
        } else {
            check.msr
        };
        self.waits = Waits::Check(check);
        Ok(Exit::RdMsr { index })
    }

    fn answered(&mut self, waits: Waits, value: Option<u64>) -> Result<(), MemoryError> {
        let r = &mut self.registers;
        match (waits, value) {
            (Waits::Nothing, _) => Ok(()),
            (Waits::SetupWrite { msr, value }, answer) => {
                r.setup += 1;
                match answer {
                    Some(_) => Ok(()),
                    None => self.script.fault(r, layout::FAULT_SETUP, msr, value, 0),
                }
            }
            (Waits::Check(check), got) => {
                let position = self.script.word(r, layout::R_CHECK_POS)?.saturating_add(1);
                self.script.set(r, layout::R_CHECK_POS, position)?;
                if position >= self.script.check_count(r)? {
                    let rounds = self.script.word(r, layout::R_CHECKS)?.wrapping_add(1);
                    self.script.set(r, layout::R_CHECKS, rounds)?;
                }
                self.script.judge(r, check, got)
            }
            (Waits::Status | Waits::Clear | Waits::Preset, None) => {
                r.handler = Handler::Idle;
                self.script.exception(r, 13)
            }
            (Waits::Status, Some(status)) => {
                if status as u32 & self.script.half(r, layout::P_STATUS_BIT)? == 0 {
                    r.handler = Handler::Idle;
                    let place = self.script.half(r, layout::P_STATUS_MSR)?;
                    return self.script.fault(r, layout::FAULT_SPURIOUS_PMI, place, 0, 0);
                }
                r.handler = Handler::Clear;
                Ok(())
            }
            (Waits::Clear, Some(_)) => {
                r.handler = Handler::Preset;
                Ok(())
            }
            (Waits::Preset, Some(_)) => {
                r.handler = Handler::Idle;
                Ok(())
            }
        }
    }
}

fn protocol(problem: String) -> HvError {
    HvError::State { kind: "exit".to_owned(), problem }
}

impl Vcpu for SimVcpu {
    fn run(&mut self) -> Result<Exit, HvError> {
        if !matches!(self.waits, Waits::Nothing) {
            return Err(protocol(format!("{:?} was not answered", self.waits)));
        }
        if self.registers.phase == Phase::Reset {
            return Err(protocol("a vCPU without a start state was run".to_owned()));
        }
        if self.kicked() {
            return Ok(Exit::Interrupted);
        }
        let step = self.step();
        let exit = self.guarded(step).flatten();
        Ok(match exit {
            Some(exit) => exit,
            None if self.kicked() => Exit::Interrupted,
            None => Exit::Hlt,
        })
    }

    fn complete(&mut self, answer: Completion) -> Result<(), HvError> {
        let waits = self.waits;
        let value = match (waits, answer) {
            (Waits::Nothing, Completion::Done) => return Ok(()),
            (Waits::Status | Waits::Check(_), Completion::Value(value)) => Some(value),
            (
                Waits::SetupWrite { .. } | Waits::Clear | Waits::Preset,
                Completion::Done | Completion::Value(_),
            ) => Some(0),
            (Waits::Nothing, _) | (_, Completion::Done) => {
                return Err(protocol(format!("{answer:?} does not answer it ({waits:?})")));
            }
            (_, Completion::Fault) => None,
        };
        self.waits = Waits::Nothing;
        let result = self.answered(waits, value);
        self.guarded(result);
        Ok(())
    }

    fn finish_pending(&mut self) -> Result<Option<Exit>, HvError> {
        match self.waits {
            Waits::Nothing => Ok(None),
            waits => Err(protocol(format!("{waits:?} was not answered"))),
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn clear_kick(&mut self) {
        self.kick.kicked.store(false, Ordering::Release);
    }

    fn set_initial(&mut self, regs: &InitialRegs) -> Result<(), HvError> {
        let block = layout::block(self.index);
        let probe = crate::probe::is_probe(&self.shared.memory, self.index);
        if regs.mode != EntryMode::LongUser || regs.rdi != block || !probe {
            return Err(HvError::Unsupported {
                what: "a way to run anything but the probe guest in a simulated VM",
                remedy: "use --hypervisor kvm for kernels".to_owned(),
            });
        }
        self.registers = Registers { phase: Phase::Setup, base: block, ..Registers::reset() };
        self.waits = Waits::Nothing;
        Ok(())
    }

    /// It is, from its start state on.
    fn set_runnable(&mut self) -> Result<(), HvError> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<StatePiece>, HvError> {
        if !matches!(self.waits, Waits::Nothing) {
            return Err(protocol(format!("{:?} was not answered", self.waits)));
        }
        let mut registers = self.registers;
        for (word, irr) in registers.irr.iter_mut().zip(&self.interrupts.irr) {
            *word = irr.load(Ordering::Acquire);
        }
        registers.nmi = self.interrupts.nmi.load(Ordering::Acquire);
        Ok(vec![registers.encode()])
    }

    fn restore(&mut self, pieces: &[StatePiece]) -> Result<(), HvError> {
        let registers = Registers::decode(pieces, self.index)?;
        for (irr, word) in self.interrupts.irr.iter().zip(registers.irr) {
            irr.store(word, Ordering::Release);
        }
        self.interrupts.nmi.store(registers.nmi, Ordering::Release);
        self.registers = registers;
        self.waits = Waits::Nothing;
        Ok(())
    }

    fn lvtpc(&mut self) -> Result<u32, HvError> {
        Ok(self.registers.lvtpc)
    }

    fn inject_nmi(&mut self) -> Result<(), HvError> {
        self.interrupts.raise_nmi();
        Ok(())
    }

    fn describe(&mut self) -> String {
        format!("simulated vcpu {} {:x?}, waits {:x?}", self.index, self.registers, self.waits)
    }
}
