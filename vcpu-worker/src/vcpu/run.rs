//! The vCPU thread: waits for requests while paused, runs the guest otherwise.
//!
//! At the loop head the right to run is checked, then the PMU is resumed, the guest entered, the PMU paused and an
//! overflow judged. Exits are finished without blocking (`exits`); only one that was interrupted, or found the guest with
//! nothing to do, looks at the inbox, because every request to a running vCPU comes with a kick that stays in force until it
//! is cleared there.

mod contents;
mod exits;
mod requests;
mod settle;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use vpmu_proto::worker::{GuestEnd, guest_end};

use super::counting::{Counting, TICK};
use super::request::{Reply, Request};
use super::state::{Event, State};
use super::throttle::Throttle;
use super::{Left, Listener, Shared, VcpuSetup};
use crate::devices::Devices;
use crate::error::WorkerError;
use crate::grant::RunRight;
use crate::host::affinity::VcpuThread;
use crate::host::{TickTimer, boottime_ns, monotonic_ns, pin_current_thread, schedule, thread_cpu_ns};
use crate::hypervisor::{Kick, Vcpu, Vm};

/// Shortest time between two ticks.
const SHORTEST_TICK: Duration = Duration::from_micros(62);

/// Body of the thread.
pub(super) fn thread(
    setup: VcpuSetup,
    shared: Arc<Shared>,
    inbox: Receiver<Request>,
    ready: &SyncSender<Result<Arc<dyn Kick>, WorkerError>>,
) {
    let right = Arc::clone(&setup.right);
    let _lives = right.enter();
    // Before it is pinned: housekeeping leaves it alone from here on.
    let _registered = VcpuThread::register();
    match Driver::new(setup, shared, inbox) {
        Ok((mut driver, kick)) => {
            // What a vCPU opens is open now.
            if let Err(error) = crate::sandbox::enter(crate::sandbox::Kind::Vcpu) {
                let problem = format!("its seccomp filter: {error}");
                let thread = super::thread_name("", driver.index);
                drop(ready.send(Err(WorkerError::Thread { thread, problem })));
                return;
            }
            // Nobody waits only if the starter is gone, and then the inbox is closed too.
            drop(ready.send(Ok(kick)));
            // A defect in handling one guest ends that guest, says so, and gives its core back.
            if catch_unwind(AssertUnwindSafe(|| driver.main())).is_err() {
                driver.panicked();
            }
        }
        Err(error) => drop(ready.send(Err(error))),
    }
}

struct Driver {
    index: u32,
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    devices: Arc<Devices>,
    right: Arc<RunRight>,
    listener: Arc<dyn Listener>,
    counting: Counting,
    tick: TickTimer,
    shared: Arc<Shared>,
    inbox: Receiver<Request>,
    state: State,
    run_replies: Vec<Reply<u64>>,
    cpu_seen: u64,
    finishing: bool,
    /// What is read of its state is all of it: it was left in no place where KVM keeps some for itself.
    whole: bool,
    throttle: Arc<Throttle>,
    throttle_seen: u64,
    fifo: Option<u8>,
    /// Scheduled as a guest computes; until it first does, the thread is one that answers calls.
    computes: bool,
}

impl Driver {
    fn new(
        setup: VcpuSetup,
        shared: Arc<Shared>,
        inbox: Receiver<Request>,
    ) -> Result<(Self, Arc<dyn Kick>), WorkerError> {
        let VcpuSetup { index, vm_name, vm, devices, slot, fifo, pmu, rates, right, listener, throttle } =
            setup;
        let failed =
            |problem: String| WorkerError::Thread { thread: super::thread_name(&vm_name, index), problem };
        pin_current_thread(slot.id())
            .map_err(|e| failed(format!("pinning it to core {}: {e}", slot.id())))?;
        if fifo.is_some() {
            schedule::set_current(fifo).map_err(|e| {
                failed(format!("SCHED_FIFO: {e}; give vpmud CAP_SYS_NICE, or use no priority"))
            })?;
        }
        let tick = TickTimer::new(TICK).map_err(|e| failed(format!("tick timer: {e}")))?;
        let vcpu = vm.create_vcpu(index)?;
        let kick = vcpu.kicker();
        let counting = Counting::new(index, pmu, slot, Arc::clone(&kick), rates)?;
        let driver = Self {
            index,
            vm,
            vcpu,
            devices,
            right,
            listener,
            counting,
            tick,
            shared,
            inbox,
            state: State::Paused,
            run_replies: Vec::new(),
            cpu_seen: 0,
            finishing: false,
            whole: true,
            throttle,
            throttle_seen: 0,
            fifo,
            computes: false,
        };
        Ok((driver, kick))
    }

    fn main(&mut self) {
        while self.state != State::Gone {
            if self.state == State::Running {
                if let Err(error) = self.run() {
                    self.fail(&error);
                }
                continue;
            }
            match self.inbox.recv() {
                Ok(request) => {
                    self.vcpu.clear_kick();
                    self.on_request(request);
                    // Whose kick was cleared along with this one's is in the inbox already; and whoever saw this thread
                    // wait sent none (`VcpuLink::send`): its request is found here, after the state has changed.
                    while let Ok(request) = self.inbox.try_recv() {
                        self.on_request(request);
                    }
                }
                // Every handle is gone.
                Err(_) => break,
            }
        }
        if let Err(error) = self.counting.release() {
            tracing::error!(vcpu = self.index, %error, "PMU at the thread's end");
        }
        self.shared.set_state(State::Gone);
        // Requests that came too late are refused rather than left to a dropped reply.
        while let Ok(request) = self.inbox.try_recv() {
            self.on_request(request);
        }
    }

    fn panicked(&mut self) {
        tracing::error!(thread = ?rustix::thread::name().unwrap_or_default(), "vCPU thread panicked");
        self.set_state(State::Gone);
        if let Err(error) = self.counting.release() {
            tracing::error!(vcpu = self.index, %error, "PMU after a panic");
        }
        let detail = "WORKER_PANIC: its thread panicked; see the log".to_owned();
        let end = GuestEnd { kind: guest_end::Kind::WorkerError.into(), vcpu: self.index, detail };
        self.listener.left(self.index, Left::Ended(end));
    }

    /// Runs the guest until the state is another.
    ///
    /// What every exit needs is inlined here and in the vCPU's own `run`, what is rarer is out of line: where KVM_RUN
    /// flushes the TLB (nested or shadowed guests, no PCID), each page of code that an exit goes through is a miss. A
    /// dozen functions in as many pages were 0.2 us of 10.
    fn run(&mut self) -> Result<(), WorkerError> {
        self.cpu_seen = thread_cpu_ns();
        if !std::mem::replace(&mut self.computes, true) {
            self.compute()?;
        }
        while self.state == State::Running {
            if !self.right.allows(boottime_ns) {
                self.on_event(Event::RightLost, &Left::RightLost);
                break;
            }
            if self.counting.pmi_raised() {
                self.judge()?;
            }
            match self.counting.enter()? {
                Some(bound) => self.arm(bound)?,
                None => self.disarm(),
            }
            if !self.run_replies.is_empty() {
                self.answer_runs();
            }
            let exit = self.vcpu.run();
            let counted = self.counting.leave()?;
            let exit = exit?;
            self.shared.stats.exit();
            if let Some(ns) = counted {
                self.shared.stats.guest_ns(ns);
            }
            if self.counting.pmi_raised() {
                self.judge()?;
            }
            self.on_exit(exit, counted.is_some())?;
        }
        self.disarm();
        Ok(())
    }

    /// From here on it takes turns with other guests as one of them.
    fn compute(&self) -> Result<(), WorkerError> {
        schedule::compute().map_err(|e| WorkerError::Thread {
            thread: format!("vCPU {}", self.index),
            problem: format!("slices of the usual length: {e}"),
        })
    }

    /// Tells who asked for it that the guest is being entered.
    #[cold]
    fn answer_runs(&mut self) {
        let now = monotonic_ns();
        for reply in self.run_replies.drain(..) {
            drop(reply.send(Ok(now)));
        }
    }

    /// Ticks no later than `bound` apart. Steps of a half keep a bound that changes with every exit from costing system
    /// calls with every exit.
    fn arm(&mut self, bound: Duration) -> Result<(), WorkerError> {
        let mut period = TICK;
        while period > bound && period > SHORTEST_TICK {
            period /= 2;
        }
        let armed = self.tick.set_period(period).and_then(|()| self.tick.arm());
        armed.map_err(|e| WorkerError::Thread { thread: "tick timer".to_owned(), problem: e.to_string() })
    }

    #[inline]
    fn disarm(&mut self) {
        if self.tick.is_armed() {
            self.disarm_tick();
        }
    }

    #[inline(never)]
    fn disarm_tick(&mut self) {
        // A tick too many costs an exit and nothing else.
        if let Err(error) = self.tick.disarm() {
            tracing::warn!(vcpu = self.index, %error, "tick timer");
        }
    }

    fn set_state(&mut self, state: State) {
        self.state = state;
        self.shared.set_state(state);
    }
}
