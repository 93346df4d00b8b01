//! The vCPU thread: waits for requests while paused, runs the guest otherwise.
//!
//! At the loop head the right to run is checked, then the PMU is resumed, the guest entered, the PMU paused and an
//! overflow judged. Exits are finished here without blocking; only `Interrupted` looks at the inbox and at who waits for
//! the core, because every request to a running vCPU comes with a kick that stays in force until it is cleared here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use vpmu_proto::worker::{GuestEnd, guest_end};

use super::counting::{Counting, Pmi, TICK};
use super::request::{LoadFrom, Place, Reply, Request};
use super::state::{Effect, Event, State, step};
use super::throttle::Throttle;
use super::{Left, Listener, Shared, VcpuSetup};
use crate::devices::{Asked, Devices};
use crate::error::WorkerError;
use crate::grant::RunRight;
use crate::host::affinity::{VcpuThread, pinned_core};
use crate::host::{TickTimer, boottime_ns, monotonic_ns, pin_current_thread, schedule, thread_cpu_ns};
use crate::hypervisor::{Completion, Exit, Kick, Vcpu, Vm};

/// How long an idle guest without an interrupt controller sleeps before it is asked again.
const IDLE: Duration = Duration::from_millis(5);

/// Shortest time between two ticks.
const SHORTEST_TICK: Duration = Duration::from_micros(62);

/// Moments that a guest gets to leave a place where its state cannot be read whole.
const SETTLE_TRIES: u32 = 64;
/// After so many the moments get twice as long, up to [`TICK`]: on a slow host an entry alone takes longer than the
/// shortest, and the guest would never get anywhere.
const SETTLE_STEP: u32 = 8;

/// Local APIC of vCPU 0, for message-signalled interrupts; the APIC id goes into bits 19:12.
const MSI_BASE: u64 = 0xfee0_0000;

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
        tracing::error!(vcpu = self.index, "vCPU thread panicked");
        self.set_state(State::Gone);
        if let Err(error) = self.counting.release() {
            tracing::error!(vcpu = self.index, %error, "PMU after a panic");
        }
        let detail = "WORKER_PANIC: its thread panicked; see the log".to_owned();
        let end = GuestEnd { kind: guest_end::Kind::WorkerError.into(), vcpu: self.index, detail };
        self.listener.left(self.index, Left::Ended(end));
    }

    /// Runs the guest until the state is another.
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
            self.answer_runs();
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
    fn answer_runs(&mut self) {
        if !self.run_replies.is_empty() {
            let now = monotonic_ns();
            for reply in self.run_replies.drain(..) {
                drop(reply.send(Ok(now)));
            }
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

    fn disarm(&mut self) {
        // A tick too many costs an exit and nothing else.
        if let Err(error) = self.tick.disarm() {
            tracing::warn!(vcpu = self.index, %error, "tick timer");
        }
    }

    fn on_exit(&mut self, exit: Exit, counted: bool) -> Result<(), WorkerError> {
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
            Exit::PioOut { port, size, data } => match self.devices.port_out(port, size, data) {
                None => {}
                Some(Asked::Shutdown) => self.ended(guest_end::Kind::Shutdown, &format!("port {port:#x}")),
                Some(Asked::Reset) => self.ended(guest_end::Kind::Reset, &format!("port {port:#x}")),
            },
            Exit::MmioRead { addr, size } => {
                let value = self.devices.mmio_read(addr, size);
                self.vcpu.complete(Completion::Value(value))?;
            }
            // Nobody is there; the store is lost as on a bus.
            Exit::MmioWrite { .. } => {}
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

    fn judge(&mut self) -> Result<(), WorkerError> {
        let lvtpc = self.vcpu.lvtpc()?;
        match self.counting.judge(lvtpc) {
            None => {}
            Some(Pmi::Nmi) => self.vcpu.inject_nmi()?,
            Some(Pmi::Fixed(vector)) => self.signal(vector)?,
        }
        self.shared.stats.set_pmis(self.counting.pmis());
        Ok(())
    }

    fn ended(&mut self, kind: guest_end::Kind, what: &str) {
        let detail = format!("{what}; {}", self.vcpu.describe());
        let end = GuestEnd { kind: kind.into(), vcpu: self.index, detail };
        self.on_event(Event::GuestEnded, &Left::Ended(end));
    }

    /// The thread cannot go on with this guest.
    fn fail(&mut self, error: &WorkerError) {
        tracing::error!(vcpu = self.index, %error, "vCPU stopped");
        self.ended(guest_end::Kind::WorkerError, &format!("{}: {error}", error.reason()));
        // Also if putting the PMU failed in the table's effects: nothing runs again.
        self.set_state(State::Ended);
    }

    fn on_event(&mut self, event: Event, left: &Left) {
        // Events are never refused, only ignored.
        let Ok((next, effects)) = step(self.state, event) else { return };
        for effect in effects {
            match effect {
                Effect::Announce => {
                    self.set_state(next);
                    self.listener.left(self.index, left.clone());
                }
                other => {
                    if let Err(error) = self.effect(*other) {
                        tracing::error!(vcpu = self.index, %error, "leaving the guest");
                    }
                }
            }
        }
        self.set_state(next);
        for reply in self.run_replies.drain(..) {
            drop(reply.send(Err(WorkerError::State {
                what: "running",
                state: format!("{next:?}"),
                remedy: "the guest was not entered: it has no right to run, or has ended",
            })));
        }
    }

    fn on_request(&mut self, request: Request) {
        let (next, effects) = match step(self.state, Event::Request(request.kind())) {
            Ok(step) => step,
            Err(refusal) => return request.refuse(refusal.into()),
        };
        for effect in effects {
            if *effect == Effect::Serve {
                break;
            }
            if let Err(error) = self.effect(*effect) {
                // Left half-way: the values that were committed are in the image, the guest does not run again.
                let message = error.to_string();
                self.fail(&error);
                return request.refuse(WorkerError::Pmu { vcpu: self.index, message });
            }
            if *effect == Effect::FinishPending && self.must_go_on(&request) {
                return request.refuse(WorkerError::Unsettled { vcpu: self.index });
            }
        }
        // Finishing an instruction may have ended the guest, and that stands.
        if !(self.state == State::Ended && next == State::Paused) {
            self.set_state(next);
        }
        if next != State::Running {
            // Overtaken by this request before the first entry: what was asked was done, and undone.
            self.answer_runs();
        }
        if matches!(request, Request::Pause(_)) {
            crate::sandbox::hook(crate::sandbox::Kind::Vcpu);
        }
        self.serve(request);
    }

    fn effect(&mut self, effect: Effect) -> Result<(), WorkerError> {
        match effect {
            Effect::Put => {
                self.disarm();
                self.counting.put()
            }
            Effect::FinishPending => {
                self.finishing = true;
                let done = self.settle();
                self.finishing = false;
                done
            }
            Effect::Sync => self.counting.image().map(drop),
            Effect::Serve | Effect::Announce => Ok(()),
        }
    }

    /// Whether a pause is refused: who asks for one may read the state next. A guest that ends, or has no right to run,
    /// stops all the same.
    fn must_go_on(&self, request: &Request) -> bool {
        let refusable = matches!(request, Request::Pause(Some(_)));
        let refused =
            refusable && !self.whole && self.state == State::Running && self.right.allows(boottime_ns);
        if refused {
            tracing::warn!(
                vcpu = self.index,
                "the guest does not get past a software exception: it is not paused"
            );
        }
        refused
    }

    /// Finishes a half-done instruction, and goes on for moments until state can be read whole. A guest that never
    /// comes to such a place, or has no right to run any more, is left where it is, and known not to be whole.
    fn settle(&mut self) -> Result<(), WorkerError> {
        self.finish_pending()?;
        for round in 0..=SETTLE_TRIES {
            if self.state != State::Running {
                break;
            }
            self.whole = self.vcpu.settled()?;
            if self.whole || round == SETTLE_TRIES || !self.right.allows(boottime_ns) {
                break;
            }
            self.counting.enter()?;
            self.arm(SHORTEST_TICK * (1 << (round / SETTLE_STEP)))?;
            let exit = self.vcpu.run();
            if let Some(ns) = self.counting.leave()? {
                self.shared.stats.guest_ns(ns);
            }
            if self.counting.pmi_raised() {
                self.judge()?;
            }
            let exit = exit?;
            if exit == Exit::Interrupted {
                // A kick for a later request: it will be seen, since requests are looked for after this one.
                self.vcpu.clear_kick();
            }
            self.on_exit(exit, true)?;
            self.finish_pending()?;
        }
        Ok(())
    }

    fn finish_pending(&mut self) -> Result<(), WorkerError> {
        while let Some(exit) = self.vcpu.finish_pending()? {
            self.on_exit(exit, true)?;
            if self.state != State::Running {
                break;
            }
        }
        Ok(())
    }

    fn serve(&mut self, request: Request) {
        match request {
            Request::Run(reply) => self.run_replies.push(reply),
            Request::Pause(reply) | Request::Stop(reply) => {
                if let Some(reply) = reply {
                    drop(reply.send(self.image()));
                }
            }
            Request::Look(reply) => drop(reply.send(self.image())),
            Request::Save(reply) => drop(reply.send(self.save())),
            Request::Place(place, reply) => drop(reply.send(self.place(*place))),
            Request::Audit(reply) => drop(reply.send(self.counting.audit())),
            Request::Load(from, reply) => drop(reply.send(self.load(from))),
        }
    }

    /// Takes the PMU off the old core while still on it, then goes. After an error it is where it was.
    fn place(&mut self, to: Place) -> Result<u32, WorkerError> {
        self.counting.release()?;
        let (from, core) = (self.counting.core(), to.slot.id());
        let failed =
            |problem: String| WorkerError::Thread { thread: format!("vCPU {}", self.index), problem };
        pin_current_thread(core).map_err(|e| failed(format!("pinning it to core {core}: {e}")))?;
        if to.fifo != self.fifo
            && let Err(error) = schedule::set_current(to.fifo)
        {
            pin_current_thread(from).map_err(|e| failed(format!("{error}; and back to core {from}: {e}")))?;
            return Err(failed(format!("scheduling it at priority {:?}: {error}", to.fifo)));
        }
        if let Err(error) = self.counting.move_to(to.slot, to.prepared) {
            // Its place on the old core has been kept.
            schedule::set_current(self.fifo)
                .and_then(|()| pin_current_thread(from))
                .map_err(|e| failed(format!("{error}; and back to core {from}: {e}")))?;
            return Err(error);
        }
        self.fifo = to.fifo;
        if self.computes {
            // Under SCHED_FIFO nothing was said about the ordinary scheduler.
            self.compute()?;
        }
        self.shared.set_place(core, to.fifo);
        pinned_core().ok_or_else(|| failed("the kernel lets it run on several cores".to_owned()))
    }

    /// The PMU's image: the switcher's, or in mode `kvm` what KVM says.
    fn image(&mut self) -> Result<Option<pmu::Image>, WorkerError> {
        match self.vcpu.save_pmu()? {
            Some(image) => Ok(Some(image)),
            None => self.counting.image(),
        }
    }

    fn save(&mut self) -> Result<super::request::Saved, WorkerError> {
        if !self.whole {
            return Err(WorkerError::Unsettled { vcpu: self.index });
        }
        let pieces = self.vcpu.save()?;
        Ok((pieces, self.image()?))
    }

    fn load(&mut self, from: LoadFrom) -> Result<Option<pmu::Image>, WorkerError> {
        match from {
            LoadFrom::Initial(regs) => {
                self.vcpu.set_initial(&regs)?;
                self.vcpu.set_runnable()?;
                self.whole = true;
            }
            LoadFrom::Saved { pieces, pmu } => {
                let kernel = self.vcpu.has_pmu();
                match &pmu {
                    // After the rest of the state: CPUID and what else the PMU depends on come first.
                    Some(_) if kernel => {}
                    Some(image) => self.counting.import(image)?,
                    None if kernel || self.counting.enabled() => {
                        return Err(WorkerError::PmuImage {
                            vcpu: self.index,
                            message: "it is missing".to_owned(),
                        });
                    }
                    None => {}
                }
                self.vcpu.restore(&pieces)?;
                self.whole = true;
                if let (true, Some(image)) = (kernel, &pmu) {
                    self.restore_kernel_pmu(image)?;
                }
                self.shared.stats.set_pmis(self.counting.pmis());
            }
        }
        self.image()
    }

    /// Mode `kvm`: whether KVM still owed the guest an overflow's interrupt cannot be read, so one is given for overflows
    /// that the guest has not acknowledged. One too many finds the status that it is about.
    fn restore_kernel_pmu(&mut self, image: &pmu::Image) -> Result<(), WorkerError> {
        if !self.vcpu.restore_pmu(image)? {
            return Ok(());
        }
        match super::counting::delivery(self.vcpu.lvtpc()?) {
            Some(Pmi::Nmi) => Ok(self.vcpu.inject_nmi()?),
            Some(Pmi::Fixed(vector)) => Ok(self.signal(vector)?),
            None => Ok(()),
        }
    }

    fn signal(&self, vector: u8) -> Result<(), crate::hypervisor::HvError> {
        self.vm.signal_msi(MSI_BASE | u64::from(self.index & 0xff) << 12, u32::from(vector))
    }

    fn set_state(&mut self, state: State) {
        self.state = state;
        self.shared.set_state(state);
    }
}
