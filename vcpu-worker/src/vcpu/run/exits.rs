//! What is done about each reason for which the guest was left. Nothing here blocks, but for a guest that rests or idles: then
//! requests are listened for.

use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use vpmu_proto::worker::{GuestEnd, guest_end};

use super::Driver;
use crate::devices::Asked;
use crate::error::WorkerError;
use crate::host::thread_cpu_ns;
use crate::hypervisor::{Completion, Exit};
use crate::vcpu::Left;
use crate::vcpu::counting::Pmi;
use crate::vcpu::state::{Event, State};

/// How long an idle guest without an interrupt controller sleeps before it is asked again.
const IDLE: Duration = Duration::from_millis(5);

/// Local APIC of vCPU 0, for message-signalled interrupts; the APIC id goes into bits 19:12.
const MSI_BASE: u64 = 0xfee0_0000;

impl Driver {
    #[expect(clippy::inline_always, reason = "a page of code less to look up with each exit; see `run`")]
    #[inline(always)]
    pub(super) fn on_exit(&mut self, exit: Exit, counted: bool) -> Result<(), WorkerError> {
        match exit {
            Exit::RdMsr { index } => {
                self.shared.stats.pmu_msr();
                let answer = self.counting.rdmsr(index)?;
                self.vcpu.complete(answer)?;
            }
            Exit::WrMsr { index, value } => {
                self.shared.stats.pmu_msr();
                let answer = self.counting.wrmsr(index, value)?;
                self.vcpu.complete(answer)?;
            }
            Exit::PioIn { port, size } => {
                let value = self.devices.port_in(port, size);
                self.vcpu.complete(Completion::Value(value))?;
            }
            Exit::PioOut { port, size, data } => {
                if let Some(asked) = self.devices.port_out(port, size, data) {
                    self.asked(asked, port);
                }
            }
            rarer => self.on_rarer_exit(rarer, counted)?,
        }
        Ok(())
    }

    #[cold]
    fn on_rarer_exit(&mut self, exit: Exit, counted: bool) -> Result<(), WorkerError> {
        match exit {
            Exit::MmioRead { addr, size } => {
                let value = self.devices.mmio_read(addr, size);
                self.vcpu.complete(Completion::Value(value))?;
            }
            // Nobody is there; the store is lost as on a bus.
            Exit::MmioWrite { .. } => {}
            // Answered in `on_exit`; a guest whose exit nobody answers would run on with nonsense.
            missed @ (Exit::RdMsr { .. } | Exit::WrMsr { .. } | Exit::PioIn { .. } | Exit::PioOut { .. }) => {
                self.ended(guest_end::Kind::WorkerError, &format!("{missed:?} was not answered"));
            }
            // While an instruction is being finished there is no inbox to look at: a request is being served.
            Exit::Interrupted if self.finishing => {}
            Exit::Interrupted => self.interrupted(counted)?,
            Exit::Hlt => self.idle()?,
            Exit::DirtyRingFull => {
                self.vm.drain_dirty_rings()?;
            }
            Exit::Shutdown => self.ended(guest_end::Kind::TripleFault, "triple fault"),
            Exit::SystemEvent(1) => self.ended(guest_end::Kind::Shutdown, "system event 1"),
            Exit::SystemEvent(2) => self.ended(guest_end::Kind::Reset, "system event 2"),
            Exit::SystemEvent(n) => self.ended(guest_end::Kind::InternalError, &format!("system event {n}")),
            Exit::InternalError { suberror, data } => {
                self.ended(
                    guest_end::Kind::InternalError,
                    &format!("KVM internal error {suberror}, data {data:x?}"),
                );
            }
            Exit::FailEntry { reason } => {
                self.ended(guest_end::Kind::InternalError, &format!("VM entry failed, reason {reason:#x}"));
            }
        }
        Ok(())
    }

    #[cold]
    fn asked(&mut self, asked: Asked, port: u16) {
        let kind = match asked {
            Asked::Shutdown => guest_end::Kind::Shutdown,
            Asked::Reset => guest_end::Kind::Reset,
        };
        self.ended(kind, &format!("port {port:#x}"));
    }

    /// A kick or a tick.
    fn interrupted(&mut self, counted: bool) -> Result<(), WorkerError> {
        self.vcpu.clear_kick();
        let now = thread_cpu_ns();
        if !counted {
            self.shared.stats.guest_ns(now.saturating_sub(self.cpu_seen));
        }
        self.cpu_seen = now;
        while self.state == State::Running {
            match self.inbox.try_recv() {
                Ok(request) => self.on_request(request),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.counting.put()?;
                    self.set_state(State::Gone);
                }
            }
        }
        if self.state == State::Running && self.counting.token_wanted() {
            self.counting.put()?;
        }
        if self.state == State::Running
            && let Some(time) = self.throttle.due(&mut self.throttle_seen)
        {
            self.rest(time)?;
        }
        Ok(())
    }

    /// Keeps out of the guest for a while, off the core's PMU, with an ear for requests.
    fn rest(&mut self, time: Duration) -> Result<(), WorkerError> {
        self.counting.put()?;
        self.disarm();
        let begin = Instant::now();
        while self.state == State::Running && self.throttle.percent() > 0 {
            let left = time.saturating_sub(begin.elapsed());
            if left.is_zero() {
                break;
            }
            self.wait(left);
        }
        self.throttle.rested(begin.elapsed());
        Ok(())
    }

    /// The guest has nothing to do and no interrupt controller that would wake it.
    fn idle(&mut self) -> Result<(), WorkerError> {
        self.counting.put()?;
        self.disarm();
        self.wait(IDLE);
        Ok(())
    }

    fn wait(&mut self, at_most: Duration) {
        match self.inbox.recv_timeout(at_most) {
            Ok(request) => self.on_request(request),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.set_state(State::Gone),
        }
        // Serving one may have cleared the kick of the next.
        while self.state == State::Running
            && let Ok(request) = self.inbox.try_recv()
        {
            self.on_request(request);
        }
    }

    pub(super) fn judge(&mut self) -> Result<(), WorkerError> {
        let lvtpc = self.vcpu.lvtpc()?;
        match self.counting.judge(lvtpc) {
            None => {}
            Some(Pmi::Nmi) => self.vcpu.inject_nmi()?,
            Some(Pmi::Fixed(vector)) => self.signal(vector)?,
        }
        self.shared.stats.set_pmis(self.counting.pmis());
        Ok(())
    }

    pub(super) fn ended(&mut self, kind: guest_end::Kind, what: &str) {
        let detail = format!("{what}; {}", self.vcpu.describe());
        let end = GuestEnd { kind: kind.into(), vcpu: self.index, detail };
        self.on_event(Event::GuestEnded, &Left::Ended(end));
    }

    /// The thread cannot go on with this guest.
    pub(super) fn fail(&mut self, error: &WorkerError) {
        tracing::error!(vcpu = self.index, %error, "vCPU stopped");
        self.ended(guest_end::Kind::WorkerError, &format!("{}: {error}", error.reason()));
        // Also if putting the PMU failed in the table's effects: nothing runs again.
        self.set_state(State::Ended);
    }

    pub(super) fn signal(&self, vector: u8) -> Result<(), crate::hypervisor::HvError> {
        self.vm.signal_msi(MSI_BASE | u64::from(self.index & 0xff) << 12, u32::from(vector))
    }
}
