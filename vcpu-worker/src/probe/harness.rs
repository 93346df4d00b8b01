//! Drives the probe guest in tests on either hypervisor: a thread a vCPU, the model PMU answering its register accesses,
//! counter overflow interrupts, serial output.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pmu::{CpuMode, Hardware as _, ModelPmu, RateClock, Rates, Shape};
use vpmu_proto::api::ProbeVcpuReport;
use vpmu_proto::worker::StatePiece;

use super::{ProbeConfig, ProbePmu, details, layout, load, report};
use crate::hypervisor::{Completion, Exit, InitialRegs, Kick, Vcpu, Vm};
use crate::memory::GuestMemory;

/// A PMU as the probe sees it.
pub(crate) fn probe_pmu(shape: &Shape) -> ProbePmu {
    ProbePmu {
        amd: shape.vendor == pmu::Vendor::Amd,
        version: shape.version,
        gp: shape.gp,
        fixed: shape.fixed,
        gp_width: shape.gp_width,
        fixed_width: shape.fixed_width,
        full_width_writes: shape.perf_capabilities >> 13 & 1 == 1,
    }
}

/// A configuration with frequent checks and overflows.
pub(crate) fn config(shape: &Shape, vcpus: u32, memory_bytes: u64) -> ProbeConfig {
    let mut cfg = ProbeConfig::new(vcpus, memory_bytes, tsc_khz(), Some(probe_pmu(shape)));
    cfg.overflow_period = 10_000_000;
    cfg.check_every = 5;
    cfg.line_every = 100;
    cfg.fill_bytes = 1 << 20;
    cfg
}

/// The guest's TSC frequency where there is KVM, else any.
fn tsc_khz() -> u64 {
    kvm_ioctls::Kvm::new()
        .and_then(|kvm| kvm.create_vm())
        .and_then(|vm| vm.create_vcpu(0))
        .and_then(|vcpu| vcpu.get_tsc_khz())
        .map_or(2_000_000, u64::from)
}

/// What a vCPU left behind.
pub(crate) struct Stopped {
    pub pieces: Vec<StatePiece>,
    pub model: ModelPmu,
}

/// How a vCPU begins.
pub(crate) enum Start {
    Initial(InitialRegs),
    Restored(Box<Stopped>),
}

struct Shared {
    stop: AtomicBool,
    /// MSR of which the next read is answered wrongly, 0 for none.
    plant: AtomicU32,
    serial: Mutex<String>,
    kicks: Mutex<Vec<Arc<dyn Kick>>>,
}

/// A running machine.
pub(crate) struct Machine {
    pub vm: Arc<dyn Vm>,
    pub cfg: ProbeConfig,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Stopped>>,
    ticker: JoinHandle<()>,
}

impl Machine {
    /// Loads the probe and starts it.
    pub(crate) fn start(vm: Arc<dyn Vm>, shape: Shape, cfg: ProbeConfig) -> Self {
        let starts = load(vm.memory(), &cfg).unwrap();
        Self::run(vm, shape, cfg, starts.into_iter().map(Start::Initial).collect())
    }

    /// Starts vCPUs.
    pub(crate) fn run(vm: Arc<dyn Vm>, shape: Shape, cfg: ProbeConfig, starts: Vec<Start>) -> Self {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            plant: AtomicU32::new(0),
            serial: Mutex::default(),
            kicks: Mutex::default(),
        });
        let threads = (0u32..)
            .zip(starts)
            .map(|(index, start)| {
                let (vm, shared) = (Arc::clone(&vm), Arc::clone(&shared));
                std::thread::spawn(move || vcpu_thread(&*vm, index, start, shape, &shared))
            })
            .collect();
        let ticker = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                while !shared.stop.load(Ordering::Acquire) {
                    std::thread::park_timeout(Duration::from_millis(1));
                    shared.kicks.lock().unwrap().iter().for_each(|k| k.kick());
                }
            }
        });
        Self { vm, cfg, shared, threads, ticker }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }

    pub(crate) fn serial(&self) -> String {
        self.shared.serial.lock().unwrap().clone()
    }

    pub(crate) fn plant(&self, msr: u32) {
        self.shared.plant.store(msr, Ordering::Release);
    }

    pub(crate) fn reports(&self) -> Vec<ProbeVcpuReport> {
        (0..self.cfg.vcpus).map(|v| report(self.memory(), v).unwrap()).collect()
    }

    /// Waits until every vCPU's report fulfils the condition.
    pub(crate) fn wait(&self, what: &str, condition: impl Fn(&ProbeVcpuReport) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.reports().iter().all(&condition) {
            assert!(Instant::now() < deadline, "{what} within 60 s: {}", self.describe());
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }

    pub(crate) fn describe(&self) -> String {
        let vcpus = 0..self.cfg.vcpus;
        let lines = vcpus.map(|v| {
            let (report, details) = (report(self.memory(), v), details(self.memory(), v));
            let fault = details.as_ref().map_or(String::new(), ToString::to_string);
            format!("{report:?} {details:?} {fault}")
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Stops all vCPUs and takes their state.
    pub(crate) fn stop(self) -> (Arc<dyn Vm>, Vec<Stopped>) {
        self.shared.stop.store(true, Ordering::Release);
        self.ticker.thread().unpark();
        self.ticker.join().unwrap();
        let stopped = self
            .threads
            .into_iter()
            .map(|t| {
                while !t.is_finished() {
                    self.shared.kicks.lock().unwrap().iter().for_each(|k| k.kick());
                    std::thread::park_timeout(Duration::from_millis(1));
                }
                t.join().unwrap()
            })
            .collect();
        (self.vm, stopped)
    }
}

fn status_msr(shape: &Shape) -> u32 {
    if shape.vendor == pmu::Vendor::Amd { 0xc000_0300 } else { 0x38e }
}

fn vcpu_thread(vm: &dyn Vm, index: u32, start: Start, shape: Shape, shared: &Shared) -> Stopped {
    let mut vcpu = vm.create_vcpu(index).unwrap();
    let mut model = match start {
        Start::Initial(regs) => {
            vcpu.set_initial(&regs).unwrap();
            ModelPmu::new(shape)
        }
        Start::Restored(stopped) => {
            vcpu.restore(&stopped.pieces).unwrap();
            stopped.model
        }
    };
    vcpu.set_runnable().unwrap();
    shared.kicks.lock().unwrap().push(vcpu.kicker());
    let mut clock = RateClock::new(Rates::default());
    let mut seen = model.raw(status_msr(&shape)).unwrap_or(0);
    while !shared.stop.load(Ordering::Acquire) {
        let entered = Instant::now();
        let exit = vcpu.run().unwrap();
        model.feed(&clock.advance(entered.elapsed().as_nanos() as u64), CpuMode::Guest);
        let status = model.raw(status_msr(&shape)).unwrap_or(0);
        if status & !seen != 0 {
            let lvtpc = vcpu.lvtpc().unwrap();
            assert_eq!(lvtpc, u32::from(layout::PMI_VECTOR), "unmasked, fixed");
            vm.signal_msi(0xfee0_0000 | u64::from(index) << 12, lvtpc & 0xff).unwrap();
        }
        answer(&mut *vcpu, &mut model, &exit, shared);
        seen = model.raw(status_msr(&shape)).unwrap_or(0);
    }
    loop {
        while let Some(exit) = vcpu.finish_pending().unwrap() {
            answer(&mut *vcpu, &mut model, &exit, shared);
        }
        if vcpu.settled().unwrap() {
            break;
        }
        // `stop` goes on kicking, so this returns.
        let exit = vcpu.run().unwrap();
        answer(&mut *vcpu, &mut model, &exit, shared);
    }
    Stopped { pieces: vcpu.save().unwrap(), model }
}

fn answer(vcpu: &mut dyn Vcpu, model: &mut ModelPmu, exit: &Exit, shared: &Shared) {
    match exit {
        Exit::RdMsr { index } => {
            let planted = shared.plant.compare_exchange(*index, 0, Ordering::AcqRel, Ordering::Relaxed);
            let answer = model
                .rdmsr(*index)
                .map_or(Completion::Fault, |v| Completion::Value(if planted.is_ok() { v ^ 0x55 } else { v }));
            vcpu.complete(answer).unwrap();
        }
        Exit::WrMsr { index, value } => {
            let answer = model.wrmsr(*index, *value).map_or(Completion::Fault, |()| Completion::Done);
            vcpu.complete(answer).unwrap();
        }
        Exit::PioOut { port: layout::COM1, data, .. } => {
            shared.serial.lock().unwrap().push(char::from(*data as u8));
        }
        Exit::Interrupted => vcpu.clear_kick(),
        Exit::Hlt => std::thread::park_timeout(Duration::from_millis(1)),
        other => panic!("{other:?}: {}", vcpu.describe()),
    }
}
