//! The worker's run loop and its kick beside bare ones.
//!
//! Both sides run on threads pinned to the same core, one at a time, in turns; who measures sits on another core and looks
//! at a counter that the measured side raises with each return from `KVM_RUN`. Neither side knows that it is measured.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use pmu::{EventFilter, GuestId, GuestPmu, Policy, Rates, Shape};

use super::guests::Guest;
use crate::cores::HostCores;
use crate::devices::Devices;
use crate::error::WorkerError;
use crate::grant::{Grant, Rights, RunRight};
use crate::host::{boottime_ns, pin_current_thread};
use crate::hypervisor::Vm;
use crate::hypervisor::kvm::{KvmOptions, KvmVm};
use crate::memory::GuestMemory;
use crate::sys::kick;
use crate::vcpu::request::{Answer, LoadFrom, Request};
use crate::vcpu::{Left, Listener, VcpuHandle, VcpuSetup};

/// Rounds; each has a median of either side.
pub const ROUNDS: usize = 10;
/// Looks at the counter in one round of exits, and the time between two.
const LOOKS: usize = 40;
const LOOK: Duration = Duration::from_millis(1);
/// Before the first look.
const WARM_UP: Duration = Duration::from_millis(3);
/// Kicks in one round.
const KICKS: usize = 200;
/// A guest that was left gets this long to be in again.
const BACK_IN: Duration = Duration::from_micros(150);
/// After this a signal is taken as lost.
const LOST: Duration = Duration::from_millis(50);
/// For what takes microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Median microseconds of one round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Round {
    /// The worker's.
    pub ours: f64,
    /// The kernel's alone.
    pub floor: f64,
}

/// One OUT that no device wants, nothing counting.
///
/// # Errors
/// Without KVM, or with a core that cannot be used.
pub fn pio_exit(shape: Shape, core: u32) -> Result<Vec<Round>, WorkerError> {
    exits(Guest::Out, shape, core)
}

/// One RDMSR of a PMU register, answered by the guest's PMU on one side and with a constant on the other.
///
/// # Errors
/// As [`pio_exit`].
pub fn msr_exit(shape: Shape, core: u32) -> Result<Vec<Round>, WorkerError> {
    exits(Guest::RdMsr, shape, core)
}

/// From the request to leave a guest that computes until the vCPU's thread is in user space. `observer` is another core.
///
/// # Errors
/// As [`pio_exit`].
pub fn kick(shape: Shape, core: u32, observer: u32) -> Result<Vec<Round>, WorkerError> {
    on_core(observer, move || {
        let ours = Ours::start(Guest::Spin, shape, core)?;
        let bare = Bare::start(Guest::Spin, core)?;
        let mut rounds = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            ours.run()?;
            let mine = kicks(
                || ours.exits(),
                || {
                    let answer = ours.vcpu.ask(Request::Look)?;
                    Ok(Some(answer))
                },
            )?;
            ours.pause()?;
            bare.run();
            let floor = kicks(
                || bare.exits(),
                || {
                    bare.signal();
                    Ok(None)
                },
            )?;
            bare.pause();
            rounds.push(Round { ours: mine, floor });
        }
        Ok(rounds)
    })
}

fn kicks(
    exits: impl Fn() -> u64,
    kick: impl Fn() -> Result<Option<Answer<Option<pmu::Image>>>, WorkerError>,
) -> Result<f64, WorkerError> {
    let mut samples = Vec::with_capacity(KICKS);
    while samples.len() < KICKS {
        spin(BACK_IN);
        let before = exits();
        let begin = Instant::now();
        let answer = kick()?;
        let mut lost = false;
        while exits() == before {
            if begin.elapsed() > LOST {
                lost = true;
                break;
            }
            std::hint::spin_loop();
        }
        let took = begin.elapsed();
        if let Some(answer) = answer {
            wait(answer)?;
        }
        // A bare signal that comes just before KVM_RUN leaves no trace: that is what a kick is for.
        if !lost {
            samples.push(took.as_nanos() as f64 / 1000.0);
        }
    }
    Ok(median(samples))
}

fn exits(guest: Guest, shape: Shape, core: u32) -> Result<Vec<Round>, WorkerError> {
    let ours = Ours::start(guest, shape, core)?;
    let bare = Bare::start(guest, core)?;
    let mut rounds = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        ours.run()?;
        let mine = looks(|| ours.exits());
        ours.pause()?;
        bare.run();
        let floor = looks(|| bare.exits());
        bare.pause();
        rounds.push(Round { ours: mine, floor });
    }
    Ok(rounds)
}

fn looks(exits: impl Fn() -> u64) -> f64 {
    std::thread::sleep(WARM_UP);
    let mut samples = Vec::with_capacity(LOOKS);
    let (mut count, mut at) = (exits(), Instant::now());
    for _ in 0..LOOKS {
        std::thread::sleep(LOOK);
        let (next, now) = (exits(), Instant::now());
        let done = next.wrapping_sub(count);
        if done > 0 {
            samples.push((now - at).as_nanos() as f64 / 1000.0 / done as f64);
        }
        (count, at) = (next, now);
    }
    median(samples)
}

/// Runs on a thread of its own that is pinned to `core`.
fn on_core<T: Send + 'static>(
    core: u32,
    body: impl FnOnce() -> Result<T, WorkerError> + Send + 'static,
) -> Result<T, WorkerError> {
    let thread = std::thread::spawn(move || {
        pin_current_thread(core).map_err(|e| thread_failed(&e))?;
        body()
    });
    thread.join().unwrap_or_else(|_| Err(thread_failed(&"it panicked")))
}

fn thread_failed(problem: &impl std::fmt::Display) -> WorkerError {
    WorkerError::Thread { thread: "bench".to_owned(), problem: problem.to_string() }
}

fn spin(time: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// The middle of some samples; NaN of none.
pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

fn wait<T>(mut answer: Answer<T>) -> Result<T, WorkerError> {
    let until = Instant::now() + PATIENCE;
    loop {
        match answer.try_recv() {
            Ok(answer) => return answer,
            Err(tokio::sync::oneshot::error::TryRecvError::Empty) if Instant::now() < until => {
                std::hint::spin_loop();
            }
            Err(_) => return Err(WorkerError::Deadline { what: "an answer of the vCPU", within: PATIENCE }),
        }
    }
}

/// A VM as the worker makes it.
fn make_vm(guest: Guest) -> Result<(Arc<KvmVm>, crate::hypervisor::InitialRegs), WorkerError> {
    let memory = GuestMemory::new("bench", 2 << 20).map_err(|e| WorkerError::Memory(e.to_string()))?;
    let regs = guest.load(&memory)?;
    let options = KvmOptions { vcpus: 1, filter_pmu_msrs: true, ..KvmOptions::default() };
    Ok((KvmVm::new(memory, options)?, regs))
}

struct Nobody;

impl Listener for Nobody {
    fn left(&self, _vcpu: u32, how: Left) {
        tracing::error!(?how, "a measured guest left by itself");
    }
}

/// The worker's thread.
struct Ours {
    vcpu: VcpuHandle,
}

impl Ours {
    fn start(guest: Guest, shape: Shape, core: u32) -> Result<Self, WorkerError> {
        let (vm, regs) = make_vm(guest)?;
        let vm: Arc<dyn Vm> = vm;
        let slot = HostCores::new(shape, &[core]).slot(core).ok_or_else(|| WorkerError::Core {
            vcpu: 0,
            core,
            allowed: Vec::new(),
        })?;
        let mut rights = Rights::default();
        rights.attach("bench", "bench", 1, 1)?;
        rights.grant(Grant { epoch: 1, term: 1, seq: 1, deadline_ns: None }, boottime_ns())?;
        let right = Arc::new(RunRight::default());
        right.publish(&rights);
        let pmu = GuestPmu::new(GuestId(u64::MAX), shape, Policy::Strict, EventFilter::allow_all());
        let vcpu = VcpuHandle::spawn(VcpuSetup {
            index: 0,
            vm_name: "bench".to_owned(),
            devices: Arc::new(Devices::new(Arc::clone(&vm), Arc::default())),
            vm,
            slot,
            pmu: Some(pmu),
            rates: Rates::default(),
            right,
            fifo: None,
            listener: Arc::new(Nobody),
            throttle: Arc::default(),
        })?
        .started()?;
        wait(vcpu.load(LoadFrom::Initial(Box::new(regs)))?)?;
        Ok(Self { vcpu })
    }

    fn run(&self) -> Result<(), WorkerError> {
        wait(self.vcpu.ask(Request::Run)?).map(drop)
    }

    fn pause(&self) -> Result<(), WorkerError> {
        wait(self.vcpu.ask(|reply| Request::Pause(Some(reply)))?).map(drop)
    }

    fn exits(&self) -> u64 {
        self.vcpu.stats().exits
    }
}

#[derive(Default)]
struct Shared {
    exits: AtomicU64,
    go: AtomicBool,
    end: AtomicBool,
    idle: AtomicBool,
    thread: AtomicI32,
}

/// A thread that does nothing but `KVM_RUN`, on a VM of the same kind.
struct Bare {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Bare {
    fn start(guest: Guest, core: u32) -> Result<Self, WorkerError> {
        let shared = Arc::new(Shared::default());
        let (ready, started) = mpsc::sync_channel(1);
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || match Self::prepare(guest, core) {
                Ok((_vm, mut vcpu)) => {
                    shared.thread.store(kick::thread_id(), Ordering::SeqCst);
                    drop(ready.send(Ok(())));
                    body(&shared, &mut vcpu);
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        });
        started.recv_timeout(PATIENCE).unwrap_or_else(|e| Err(thread_failed(&e)))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn prepare(
        guest: Guest,
        core: u32,
    ) -> Result<(Arc<KvmVm>, crate::hypervisor::kvm::KvmVcpu), WorkerError> {
        pin_current_thread(core).map_err(|e| thread_failed(&e))?;
        let (vm, regs) = make_vm(guest)?;
        let mut vcpu = vm.make_vcpu(0)?;
        crate::hypervisor::Vcpu::set_initial(&mut vcpu, &regs)?;
        Ok((vm, vcpu))
    }

    fn run(&self) {
        self.shared.idle.store(false, Ordering::SeqCst);
        self.shared.go.store(true, Ordering::SeqCst);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    fn pause(&self) {
        self.shared.go.store(false, Ordering::SeqCst);
        while !self.shared.idle.load(Ordering::SeqCst) {
            self.signal();
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn signal(&self) {
        kick::signal_thread(self.shared.thread.load(Ordering::SeqCst), kick::KICK_SIGNAL);
    }

    fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::SeqCst);
        self.pause();
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            drop(thread.join());
        }
    }
}

fn body(shared: &Shared, vcpu: &mut crate::hypervisor::kvm::KvmVcpu) {
    while !shared.end.load(Ordering::Relaxed) {
        if !shared.go.load(Ordering::Relaxed) {
            shared.idle.store(true, Ordering::SeqCst);
            std::thread::park_timeout(Duration::from_millis(20));
            continue;
        }
        match vcpu.run_bare() {
            Ok(VcpuExit::X86Rdmsr(msr)) => *msr.data = 0,
            Ok(_) => {}
            Err(e) if e.errno() == libc::EINTR => {}
            Err(error) => {
                tracing::error!(%error, "KVM_RUN of a measured guest");
                shared.end.store(true, Ordering::Relaxed);
            }
        }
        // One writer.
        shared.exits.store(shared.exits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
    shared.idle.store(true, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!(median(vec![3.0, 1.0, 2.0]).total_cmp(&2.0).is_eq());
        assert!(median(Vec::new()).is_nan());
    }

    /// Both sides of each loop really run, and leave when they are asked to.
    #[test]
    fn both_sides_count() {
        if !crate::testing::require_kvm() {
            return;
        }
        let shape: Shape = "intel:v5:8+4:48".parse().expect("shape");
        for guest in [Guest::Out, Guest::RdMsr] {
            let ours = Ours::start(guest, shape, 0).expect("ours");
            let bare = Bare::start(guest, 0).expect("bare");
            for _ in 0..2 {
                let before = (ours.exits(), bare.exits());
                ours.run().expect("runs");
                let until = Instant::now() + PATIENCE;
                while ours.exits() < before.0 + 10 {
                    assert!(Instant::now() < until, "{guest:?}: no exits of ours");
                    std::thread::yield_now();
                }
                ours.pause().expect("pauses");
                let stopped = ours.exits();
                bare.run();
                while bare.exits() < before.1 + 10 {
                    assert!(Instant::now() < until, "{guest:?}: no bare exits");
                    std::thread::yield_now();
                }
                bare.pause();
                assert_eq!(ours.exits(), stopped, "one side at a time");
            }
        }
    }
}
