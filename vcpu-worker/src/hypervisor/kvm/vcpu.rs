//! A vCPU: entering the guest, translating exits, answering them.
//!
//! ```text
//!   run ──► exit wants an answer ──► complete ──► run     (the answer goes into the run page; KVM takes it at entry)
//!   run ──► string I/O of n elements: n exits from one entry, each answered in turn, then KVM is entered again
//! ```
//!
//! Invariants: `pending` says what the run page waits for; the guest is not entered while elements of a string are
//! left. `owed` is false only if KVM_RUN was interrupted after it had finished what an exit had left to do, so that the
//! state can be read as it is.

mod exits;
mod registers;

use std::sync::Arc;

use kvm_bindings::*;
use kvm_ioctls::{Cap, VcpuExit};
use vpmu_proto::worker::StatePiece;

use super::kick::Kicker;
use super::{CpuidDifference, Shared, cpuid, state, uninterrupted};
use crate::hypervisor::{Completion, Exit, HvError, InitialRegs, Kick, Vcpu};
use crate::kvm_pmu::{KvmPmu, MsrPort as _, VcpuPort};
use crate::sys::run_page::RunVcpu;
use crate::sys::{self, failed, kick};

pub(crate) use registers::initial_sregs;

/// What the last exit waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Nothing,
    RdMsr,
    WrMsr,
    MmioRead,
    Io { input: bool, port: u16, size: u8, count: u32, offset: u64, done: u32 },
}

/// A vCPU on KVM.
pub(crate) struct KvmVcpu {
    pub(super) fd: RunVcpu,
    pub(super) shared: Arc<Shared>,
    pub(super) index: u32,
    /// CPUID as KVM stored it when it was set, as bytes of a state piece.
    pub(super) cpuid: Vec<u8>,
    /// The PMU that KVM keeps for it.
    pmu: Option<KvmPmu>,
    kicker: Arc<Kicker>,
    pending: Pending,
    /// KVM may have half of an instruction to finish.
    owed: bool,
    differences: Vec<CpuidDifference>,
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kicker.unbind();
    }
}

impl KvmVcpu {
    pub(super) fn new(shared: Arc<Shared>, index: u32) -> Result<Self, HvError> {
        if index >= shared.options.vcpus {
            return Err(HvError::Unsupported {
                what: "the vCPU index asked for",
                remedy: format!("this VM has {} vCPUs; {index} is not one of them", shared.options.vcpus),
            });
        }
        kick::prepare_thread().map_err(|source| HvError::Os { call: "sigaction", source })?;
        let fd = uninterrupted(|| RunVcpu::create(&shared.fd, u64::from(index)))
            .map_err(failed("KVM_CREATE_VCPU"))?;
        let mut vcpu = Self {
            fd,
            index,
            cpuid: Vec::new(),
            pmu: None,
            kicker: Kicker::new(),
            pending: Pending::Nothing,
            owed: false,
            differences: Vec::new(),
            shared,
        };
        let mut entries = cpuid::build(
            vcpu.shared.system.cpuid.as_slice(),
            index,
            vcpu.shared.options.vcpus,
            vcpu.shared.fd.check_extension(Cap::TscDeadlineTimer),
            vcpu.shared.options.guest_pmu_cpuid.as_ref(),
        );
        let policy = &vcpu.shared.options.features;
        policy.check(&entries).map_err(|refused| HvError::State {
            kind: "cpuid".to_owned(),
            problem: format!("feature {:?} {}", refused.feature, refused.problem),
        })?;
        policy.apply(&mut entries);
        vcpu.set_cpuid(&entries)?;
        if index == 0 {
            // Set once: a VM has one first vCPU.
            drop(vcpu.shared.differences.set(vcpu.differences.clone()));
        }
        vcpu.enable_lapic()?;
        if vcpu.shared.ring_entries > 0 {
            let ring = sys::ring::Ring::map(&vcpu.fd, vcpu.shared.ring_entries)?;
            vcpu.shared.rings.lock().push(ring);
        }
        if let Some(stats) = sys::stats::StatsFd::open(&vcpu.fd)? {
            vcpu.shared.stats.lock().push((Some(index), stats));
        }
        if let Some(shape) = vcpu.shared.options.kernel_pmu {
            vcpu.open_pmu(shape)?;
        }
        Ok(vcpu)
    }

    /// KVM's own PMU for this vCPU: what CPUID depends on comes before anything of its state.
    fn open_pmu(&mut self, shape: pmu::Shape) -> Result<(), HvError> {
        const PERF_CAPABILITIES: u32 = 0x345;
        let mut port = VcpuPort::new(&self.fd, &self.shared.system.msrs);
        if shape.perf_capabilities != 0 && port.set(&[(PERF_CAPABILITIES, shape.perf_capabilities)])? != 1 {
            return Err(HvError::Pmu {
                reason: "PMU_KVM_CAPABILITIES",
                message: format!(
                    "KVM refuses PERF_CAPABILITIES {:#x} for a guest; choose a host whose KVM has them",
                    shape.perf_capabilities
                ),
            });
        }
        self.pmu = Some(KvmPmu::new(shape, &mut port)?);
        Ok(())
    }

    /// Sets CPUID, reads it back and keeps both what it is and how it differs.
    pub(super) fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), HvError> {
        let list = CpuId::from_entries(entries).map_err(|_| HvError::State {
            kind: "cpuid".to_owned(),
            problem: format!("{} entries are too many", entries.len()),
        })?;
        self.fd.set_cpuid2(&list).map_err(failed("KVM_SET_CPUID2"))?;
        let stored = self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?;
        self.differences = cpuid::differences(entries, stored.as_slice());
        self.cpuid = cpuid::to_bytes(stored.as_slice());
        if let (0, Some(first)) = (self.index, self.differences.first()) {
            tracing::debug!(
                count = self.differences.len(),
                leaf = format_args!("{:#x}/{}", first.leaf, first.subleaf),
                asked = format_args!("{:x?}", first.asked),
                stored = format_args!("{:x?}", first.stored),
                "KVM stored CPUID differently from what it was given"
            );
        }
        Ok(())
    }

    /// See [`RunVcpu::run_bare`].
    pub(crate) fn run_bare(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.fd.run_bare()
    }

    /// How CPUID as the guest sees it differs from what was asked for.
    pub(super) fn cpuid_differences(&self) -> &[CpuidDifference] {
        &self.differences
    }

    /// Software-enables the local APIC and wires LINT0 and LINT1 as firmware does. LVTPC is left masked, as after
    /// reset; the guest writes it.
    fn enable_lapic(&mut self) -> Result<(), HvError> {
        const SVR: usize = 0xf0;
        const LINT0: usize = 0x350;
        const LINT1: usize = 0x360;
        let mut lapic = sys::LAPIC.read(&self.fd, &[])?;
        // Only the boot processor takes interrupts of the 8259 (ExtINT); NMI goes to all.
        let lint0: u32 = if self.index == 0 { 0x700 } else { 0x1_0700 };
        for (at, value) in [(SVR, 0x1ffu32), (LINT0, lint0), (LINT1, 0x400)] {
            if let Some(register) = lapic.get_mut(at..at + 4) {
                register.copy_from_slice(&value.to_le_bytes());
            }
        }
        sys::LAPIC.write(&self.fd, sys::LAPIC.kind, &lapic)
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit, HvError> {
        if let Some(exit) = self.next_element() {
            return Ok(exit);
        }
        loop {
            let kicker = &self.kicker;
            match self.fd.enter(|| kicker.kicked()) {
                None => return Ok(Exit::Interrupted),
                Some(Ok(())) => {
                    self.owed = true;
                    if let Some(exit) = self.translate()? {
                        return Ok(exit);
                    }
                }
                Some(Err(error)) => match error.raw_os_error() {
                    // KVM finishes an instruction before it looks for signals (kvm_arch_vcpu_ioctl_run).
                    Some(libc::EINTR) => {
                        self.owed = false;
                        return Ok(Exit::Interrupted);
                    }
                    // An application processor that just got INIT or SIPI: enter again.
                    Some(libc::EAGAIN) => {}
                    _ => return Err(HvError::Os { call: "KVM_RUN", source: error }),
                },
            }
        }
    }

    fn complete(&mut self, answer: Completion) -> Result<(), HvError> {
        match (self.pending, answer) {
            (Pending::RdMsr, Completion::Value(value)) => self.fd.answer_msr(value, false),
            (Pending::WrMsr, Completion::Done | Completion::Value(_)) => self.fd.answer_msr(0, false),
            (Pending::RdMsr | Pending::WrMsr, Completion::Fault) => self.fd.answer_msr(0, true),
            (Pending::MmioRead, Completion::Value(value)) => self.fd.answer_mmio(value),
            (Pending::Io { input: true, port, size, count, offset, done }, Completion::Value(value))
                if done < count =>
            {
                let at = offset + u64::from(done) * u64::from(size);
                self.fd.set_element(at, size, value as u32);
                self.pending = Pending::Io { input: true, port, size, count, offset, done: done + 1 };
                return Ok(());
            }
            (Pending::Nothing | Pending::Io { input: false, .. }, Completion::Done) => return Ok(()),
            (pending, answer) => {
                let problem = format!("{answer:?} does not answer it ({pending:?})");
                return Err(HvError::State { kind: "exit".to_owned(), problem });
            }
        }
        self.pending = Pending::Nothing;
        Ok(())
    }

    fn finish_pending(&mut self) -> Result<Option<Exit>, HvError> {
        if let Some(exit) = self.next_element() {
            return Ok(Some(exit));
        }
        if !self.owed {
            return Ok(None);
        }
        match self.fd.finish().map_err(|error| (error.raw_os_error(), error)) {
            Ok(()) => self.translate(),
            Err((Some(libc::EINTR), _)) => {
                self.owed = false;
                Ok(None)
            }
            Err((Some(libc::EAGAIN), _)) => Ok(None),
            Err((_, error)) => Err(HvError::Os { call: "KVM_RUN (immediate exit)", source: error }),
        }
    }

    fn settled(&mut self) -> Result<bool, HvError> {
        const INT3: u8 = 0xcc;
        const SOFTWARE: [u8; 2] = [3, 4];
        // KVM does not say whether a software exception waits to be delivered, but it does say which exception was the
        // last (kvm_vcpu_ioctl_x86_get_vcpu_events).
        let events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        if !SOFTWARE.contains(&events.exception.nr) {
            return Ok(true);
        }
        let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let at = regs.rip.wrapping_sub(1);
        let place = self.fd.translate_gva(at).map_err(failed("KVM_TRANSLATE"))?;
        let mut byte = [0];
        let read = place.valid != 0 && self.shared.memory.read(place.physical_address, &mut byte).is_ok();
        Ok(!read || byte != [INT3])
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicker.bind();
        Arc::clone(&self.kicker) as Arc<dyn Kick>
    }

    fn clear_kick(&mut self) {
        self.kicker.clear();
        self.fd.set_immediate_exit(false);
        kick::clear_signalled();
    }

    fn set_initial(&mut self, regs: &InitialRegs) -> Result<(), HvError> {
        let mut sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        initial_sregs(&mut sregs, regs);
        self.fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        let general = kvm_regs {
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags | 2,
            rbx: regs.rbx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            ..Default::default()
        };
        self.fd.set_regs(&general).map_err(failed("KVM_SET_REGS"))
    }

    fn set_runnable(&mut self) -> Result<(), HvError> {
        let state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        self.fd.set_mp_state(state).map_err(failed("KVM_SET_MP_STATE"))
    }

    fn save(&mut self) -> Result<Vec<StatePiece>, HvError> {
        state::save_vcpu(self)
    }

    fn restore(&mut self, pieces: &[StatePiece]) -> Result<(), HvError> {
        state::restore_vcpu(self, pieces)
    }

    fn has_pmu(&self) -> bool {
        self.pmu.is_some()
    }

    fn save_pmu(&mut self) -> Result<Option<pmu::Image>, HvError> {
        let Some(pmu) = &self.pmu else { return Ok(None) };
        let image = pmu.save(&mut VcpuPort::new(&self.fd, &self.shared.system.msrs))?;
        let (image, masked) = KvmPmu::transmittable(&image);
        if masked != 0 {
            tracing::warn!(
                vcpu = self.index,
                masked = format_args!("{masked:#x}"),
                "status bits beyond the guest's"
            );
        }
        Ok(Some(image))
    }

    fn restore_pmu(&mut self, image: &pmu::Image) -> Result<bool, HvError> {
        let Some(pmu) = &self.pmu else {
            return Err(HvError::Unsupported {
                what: "a PMU that KVM keeps for this vCPU",
                remedy: "restore it where the PMU mode is the same".to_owned(),
            });
        };
        // Pending events come behind the PMU, which may add one.
        let events = sys::VCPU_EVENTS.read(&self.fd, &[])?;
        let restored = pmu.restore(&mut VcpuPort::new(&self.fd, &self.shared.system.msrs), image)?;
        sys::VCPU_EVENTS.write(&self.fd, sys::VCPU_EVENTS.kind, &events)?;
        Ok(restored.armed_overflows != 0)
    }

    fn lvtpc(&mut self) -> Result<u32, HvError> {
        const LVTPC: usize = 0x340;
        let lapic = sys::LAPIC.read(&self.fd, &[])?;
        let register = lapic.get(LVTPC..).and_then(|l| l.first_chunk::<4>());
        Ok(register.map_or(0, |r| u32::from_le_bytes(*r)))
    }

    fn inject_nmi(&mut self) -> Result<(), HvError> {
        self.fd.nmi().map_err(failed("KVM_NMI"))
    }

    fn describe(&mut self) -> String {
        registers::describe(self)
    }
}
