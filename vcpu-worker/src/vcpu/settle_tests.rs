//! A guest that stays where its state cannot be read whole: it is not paused, and what is not whole is never saved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pmu::Shape;
use tonic::Code;
use vpmu_proto::worker::StatePiece;

use super::request::{Answer, Request};
use super::state::State;
use super::{VcpuHandle, bare};
use crate::bitmap::PageBitmap;
use crate::cores::Backend;
use crate::error::WorkerError;
use crate::grant::{Grant, Rights, RunRight};
use crate::hypervisor::simulated::{SimOptions, SimVm};
use crate::hypervisor::{Completion, Exit, HvError, InitialRegs, Kick, Vcpu, Vm};
use crate::memory::GuestMemory;

/// What the guest is at.
#[derive(Default)]
struct Guest {
    /// At a software exception that is never delivered.
    stuck: AtomicBool,
    entries: AtomicU64,
}

struct GuestVm {
    inner: Arc<SimVm>,
    guest: Arc<Guest>,
}

struct GuestVcpu {
    inner: Box<dyn Vcpu>,
    guest: Arc<Guest>,
}

impl Vm for GuestVm {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HvError> {
        Ok(Box::new(GuestVcpu { inner: self.inner.create_vcpu(index)?, guest: Arc::clone(&self.guest) }))
    }
    fn memory(&self) -> &GuestMemory {
        self.inner.memory()
    }
    fn start_dirty_tracking(&self) -> Result<(), HvError> {
        self.inner.start_dirty_tracking()
    }
    fn collect_dirty(&self, into: &mut PageBitmap) -> Result<(), HvError> {
        self.inner.collect_dirty(into)
    }
    fn stop_dirty_tracking(&self) -> Result<(), HvError> {
        self.inner.stop_dirty_tracking()
    }
    fn save(&self) -> Result<Vec<StatePiece>, HvError> {
        self.inner.save()
    }
    fn restore(&self, pieces: &[StatePiece]) -> Result<(), HvError> {
        self.inner.restore(pieces)
    }
    fn signal_msi(&self, address: u64, data: u32) -> Result<(), HvError> {
        self.inner.signal_msi(address, data)
    }
    fn set_irq_line(&self, gsi: u32, level: bool) -> Result<(), HvError> {
        self.inner.set_irq_line(gsi, level)
    }
}

impl Vcpu for GuestVcpu {
    fn run(&mut self) -> Result<Exit, HvError> {
        self.guest.entries.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros(50));
        Ok(Exit::Interrupted)
    }
    fn settled(&mut self) -> Result<bool, HvError> {
        Ok(!self.guest.stuck.load(Ordering::SeqCst))
    }
    fn complete(&mut self, answer: Completion) -> Result<(), HvError> {
        self.inner.complete(answer)
    }
    fn finish_pending(&mut self) -> Result<Option<Exit>, HvError> {
        Ok(None)
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        self.inner.kicker()
    }
    fn clear_kick(&mut self) {
        self.inner.clear_kick();
    }
    fn set_initial(&mut self, regs: &InitialRegs) -> Result<(), HvError> {
        self.inner.set_initial(regs)
    }
    fn set_runnable(&mut self) -> Result<(), HvError> {
        self.inner.set_runnable()
    }
    fn save(&mut self) -> Result<Vec<StatePiece>, HvError> {
        self.inner.save()
    }
    fn restore(&mut self, pieces: &[StatePiece]) -> Result<(), HvError> {
        self.inner.restore(pieces)
    }
    fn lvtpc(&mut self) -> Result<u32, HvError> {
        self.inner.lvtpc()
    }
    fn inject_nmi(&mut self) -> Result<(), HvError> {
        self.inner.inject_nmi()
    }
    fn describe(&mut self) -> String {
        self.inner.describe()
    }
}

/// One vCPU that runs, what its guest is at, and its right to run.
struct Bench {
    vcpu: VcpuHandle,
    guest: Arc<Guest>,
    rights: Rights,
    right: Arc<RunRight>,
}

impl Bench {
    fn running() -> Self {
        let guest = Arc::new(Guest::default());
        let memory = GuestMemory::new("settle", 4 << 20).expect("memory");
        let inner = SimVm::new(memory, SimOptions::default()).expect("simulated");
        let vm: Arc<dyn Vm> = Arc::new(GuestVm { inner, guest: Arc::clone(&guest) });
        let shape: Shape = "intel:v5:4+3:48".parse().expect("a shape");
        let (rights, right) = bare::granted();
        let vcpu = bare::spawn(vm, Backend::Model, shape, &right);
        answer(vcpu.ask(Request::Run)).expect("runs");
        Self { vcpu, guest, rights, right }
    }

    fn pause(&self) -> Result<(), WorkerError> {
        answer(self.vcpu.ask(|reply| Request::Pause(Some(reply)))).map(drop)
    }
}

fn answer<T>(asked: Result<Answer<T>, WorkerError>) -> Result<T, WorkerError> {
    asked.expect("sent").blocking_recv().expect("answered")
}

#[test]
fn a_guest_that_stays_at_a_software_exception_is_not_paused() {
    let bench = Bench::running();
    bench.guest.stuck.store(true, Ordering::SeqCst);
    let error = bench.pause().expect_err("refused");
    assert_eq!((error.reason(), error.code()), ("VCPU_UNSETTLED", Code::Unavailable));
    assert!(error.to_string().contains("try again"), "{error}");
    assert_eq!(bench.vcpu.state(), State::Running);
    let before = bench.guest.entries.load(Ordering::SeqCst);
    while bench.guest.entries.load(Ordering::SeqCst) < before + 10 {
        std::thread::yield_now();
    }
    assert_eq!(answer(bench.vcpu.ask(Request::Save)).expect_err("it runs").reason(), "VCPU_RUNNING");

    bench.guest.stuck.store(false, Ordering::SeqCst);
    bench.pause().expect("paused");
    assert_eq!(bench.vcpu.state(), State::Paused);
    answer(bench.vcpu.ask(Request::Save)).expect("saved");
}

#[test]
fn without_a_right_it_stops_there_and_is_not_saved() {
    let mut bench = Bench::running();
    bench.guest.stuck.store(true, Ordering::SeqCst);
    bench.rights.seal(1);
    bench.right.publish(&bench.rights);
    bench.pause().expect("stopped");
    assert_eq!(bench.vcpu.state(), State::Paused);
    let error = answer(bench.vcpu.ask(Request::Save)).expect_err("not whole");
    assert_eq!(error.reason(), "VCPU_UNSETTLED");

    // It goes on with a later right, and to a place where it can be saved.
    bench.rights.grant(Grant { epoch: 2, term: 1, seq: 2, deadline_ns: None }, 0).expect("granted");
    bench.right.publish(&bench.rights);
    bench.guest.stuck.store(false, Ordering::SeqCst);
    answer(bench.vcpu.ask(Request::Run)).expect("runs");
    bench.pause().expect("paused");
    answer(bench.vcpu.ask(Request::Save)).expect("saved");
}

#[test]
fn it_can_be_ended_there() {
    let bench = Bench::running();
    bench.guest.stuck.store(true, Ordering::SeqCst);
    answer(bench.vcpu.ask(|reply| Request::Stop(Some(reply)))).expect("stopped");
    bench.vcpu.join();
    assert!(bench.vcpu.is_finished());
}
