//! One vCPU: an OS thread of its own, pinned to a host core, driven by messages.
//!
//! The thread is created paused and lives until `Stop`. Others talk to it through a [`VcpuHandle`]: a bounded inbox, a
//! kick that gets it out of the guest (hypervisor module's contract: message first, then kick; the thread clears the
//! kick after an exit and then looks into its inbox, so none is lost), and figures that are read without stopping it.
//! A thread that is not running waits at its inbox, and looks there once more when it begins to run: it needs no kick,
//! which would be a signal to handle before it enters the guest.
//! What it does with a message is the table in [`state`]; what it does in the guest is [`run`].

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use pmu::{GuestPmu, Rates};
use vpmu_proto::worker::GuestEnd;

use crate::cores::CoreSlot;
use crate::devices::Devices;
use crate::error::WorkerError;
use crate::grant::RunRight;
use crate::hypervisor::{InitialRegs, Kick, Vm};
use crate::sys::thread::Thread;

#[cfg(test)]
pub(crate) mod bare;
mod counting;
#[cfg(test)]
mod kernel_pmu_tests;
pub mod request;
mod run;
#[cfg(test)]
mod settle_tests;
pub mod state;
pub mod stats;
pub mod throttle;

use request::{Answer, LoadFrom, Request};
use state::State;
use stats::{Snapshot, Stats};
use throttle::Throttle;

/// Requests that may wait. A machine sends one at a time and a few looks.
const INBOX: usize = 64;

/// How a vCPU left the guest by itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Left {
    /// The guest ended.
    Ended(GuestEnd),
    /// The right to run is over; it is paused.
    RightLost,
}

/// Told by vCPU threads; must not block.
pub trait Listener: Send + Sync {
    /// vCPU `vcpu` left the guest by itself.
    fn left(&self, vcpu: u32, how: Left);
}

/// What a vCPU thread is made of.
pub struct VcpuSetup {
    /// Index.
    pub index: u32,
    /// For the thread's name.
    pub vm_name: String,
    /// Its VM.
    pub vm: Arc<dyn Vm>,
    /// Devices.
    pub devices: Arc<Devices>,
    /// Core to be pinned to and to count on.
    pub slot: Arc<CoreSlot>,
    /// SCHED_FIFO priority; none for the ordinary scheduler.
    pub fifo: Option<u8>,
    /// PMU; none if the guest has none.
    pub pmu: Option<GuestPmu>,
    /// Event rates of the model.
    pub rates: Rates,
    /// Right to run.
    pub right: Arc<RunRight>,
    /// Whom to tell.
    pub listener: Arc<dyn Listener>,
    /// How much it rests.
    pub throttle: Arc<Throttle>,
}

/// What the thread shares with its handle.
struct Shared {
    state: AtomicU8,
    core: AtomicU32,
    /// SCHED_FIFO priority; 0 for the ordinary scheduler.
    fifo: AtomicU8,
    stats: Stats,
}

impl Shared {
    fn state(&self) -> State {
        match self.state.load(Ordering::SeqCst) {
            0 => State::Paused,
            1 => State::Running,
            2 => State::Ended,
            _ => State::Gone,
        }
    }

    fn set_place(&self, core: u32, fifo: Option<u8>) {
        self.core.store(core, Ordering::SeqCst);
        self.fifo.store(fifo.unwrap_or(0), Ordering::SeqCst);
    }

    fn set_state(&self, state: State) {
        let word = match state {
            State::Paused => 0,
            State::Running => 1,
            State::Ended => 2,
            State::Gone => 3,
        };
        self.state.store(word, Ordering::SeqCst);
        // Before the next look into the inbox: see `VcpuLink::send`.
        fence(Ordering::SeqCst);
    }
}

/// Sends to a vCPU thread without owning it.
#[derive(Clone)]
pub struct VcpuLink {
    index: u32,
    inbox: SyncSender<Request>,
    kick: Arc<dyn Kick>,
    shared: Arc<Shared>,
}

impl VcpuLink {
    /// Gets it out of the guest for a moment, without a request.
    pub fn nudge(&self) {
        self.kick.kick();
    }

    /// Sends a request, and gets the thread out of the guest for it. Never blocks.
    pub fn send(&self, request: Request) -> Result<(), WorkerError> {
        let problem = match self.inbox.try_send(request) {
            Ok(()) => {
                // Either the thread is seen running, or it sees the request once it is.
                fence(Ordering::SeqCst);
                if self.shared.state() == State::Running {
                    self.kick.kick();
                }
                return Ok(());
            }
            Err(TrySendError::Full(_)) => "too many requests wait for it",
            Err(TrySendError::Disconnected(_)) => "it has ended",
        };
        Err(WorkerError::Thread { thread: format!("vCPU {}", self.index), problem: problem.to_owned() })
    }
}

/// Talks to one vCPU thread. Dropping it ends the thread and waits for it.
pub struct VcpuHandle {
    link: VcpuLink,
    shared: Arc<Shared>,
    thread: Mutex<Option<Thread>>,
}

/// A vCPU thread that is making its vCPU. Dropping it ends the thread once that is made, and waits for it.
pub struct Starting {
    // Dropped first: a thread whose inbox is closed ends.
    inbox: SyncSender<Request>,
    started: Receiver<Result<Arc<dyn Kick>, WorkerError>>,
    thread: Thread,
    shared: Arc<Shared>,
    index: u32,
    name: String,
}

impl Starting {
    /// Has it take a start state once its vCPU is made. If it ends before, [`Self::started`] says why.
    pub fn load(&self, regs: InitialRegs) -> Answer<Option<pmu::Image>> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        // Nothing was sent to it before: there is room.
        drop(self.inbox.try_send(Request::Load(LoadFrom::Initial(Box::new(regs)), reply)));
        answer
    }

    /// Waits until it is pinned, has made its vCPU and is paused. Blocks for that long.
    pub fn started(self) -> Result<VcpuHandle, WorkerError> {
        let Self { inbox, started, thread, shared, index, name } = self;
        let ended = |_| WorkerError::Thread { thread: name, problem: "it ended while starting".to_owned() };
        match started.recv().map_err(ended).and_then(std::convert::identity) {
            Ok(kick) => {
                let link = VcpuLink { index, inbox, kick, shared: Arc::clone(&shared) };
                Ok(VcpuHandle { link, shared, thread: Mutex::new(Some(thread)) })
            }
            Err(error) => {
                drop(thread);
                Err(error)
            }
        }
    }
}

impl VcpuHandle {
    /// Starts the thread, which is pinned, makes its vCPU and waits. [`Starting::started`] waits for it.
    pub fn spawn(setup: VcpuSetup) -> Result<Starting, WorkerError> {
        let index = setup.index;
        let name = thread_name(&setup.vm_name, index);
        let failed = |problem: String| WorkerError::Thread { thread: name.clone(), problem };
        let (inbox, requests) = sync_channel(INBOX);
        let (ready, started) = sync_channel(1);
        let shared = Arc::new(Shared {
            state: AtomicU8::new(0),
            core: AtomicU32::new(setup.slot.id()),
            fifo: AtomicU8::new(setup.fifo.unwrap_or(0)),
            stats: Stats::default(),
        });
        let thread = Thread::spawn(&name, {
            let shared = Arc::clone(&shared);
            move || run::thread(setup, shared, requests, &ready)
        })
        .map_err(|e| failed(e.to_string()))?;
        Ok(Starting { inbox, started, thread, shared, index, name })
    }

    /// Sends a request, and gets the thread out of the guest for it. Never blocks.
    pub fn send(&self, request: Request) -> Result<(), WorkerError> {
        self.link.send(request)
    }

    /// A way to send to it that does not own it.
    pub fn link(&self) -> VcpuLink {
        self.link.clone()
    }

    /// Sends what `make` builds around a reply, and returns where the answer will arrive.
    pub fn ask<T>(&self, make: impl FnOnce(request::Reply<T>) -> Request) -> Result<Answer<T>, WorkerError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.send(make(reply))?;
        Ok(answer)
    }

    /// Sends a load.
    pub fn load(&self, from: LoadFrom) -> Result<Answer<Option<pmu::Image>>, WorkerError> {
        self.ask(|reply| Request::Load(from, reply))
    }

    /// Index.
    pub fn index(&self) -> u32 {
        self.link.index
    }

    /// Host core.
    pub fn core(&self) -> u32 {
        self.shared.core.load(Ordering::SeqCst)
    }

    /// SCHED_FIFO priority; none under the ordinary scheduler.
    pub fn fifo(&self) -> Option<u8> {
        Some(self.shared.fifo.load(Ordering::SeqCst)).filter(|priority| *priority != 0)
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.shared.state()
    }

    /// Tells where it is, also to who does not hold it.
    pub fn watcher(&self) -> impl Fn() -> State + Send + Sync + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.state()
    }

    /// Its figures.
    pub fn stats(&self) -> Snapshot {
        self.shared.stats.snapshot()
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_none_or(Thread::is_finished)
    }

    /// Ends the thread and waits for it. Blocks.
    pub fn join(&self) {
        // A full inbox empties, because the thread takes what is in it; a closed one means it has ended.
        while !self.is_finished() {
            if self.send(Request::Stop(None)).is_ok() || self.is_finished() {
                break;
            }
            std::thread::yield_now();
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.index(), "vCPU thread panicked");
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.join();
    }
}

/// `vm-<name>/<n>`, cut so that the kernel's 15 bytes keep the number.
fn thread_name(vm: &str, index: u32) -> String {
    let tail = format!("/{index}");
    let room = 15usize.saturating_sub("vm-".len() + tail.len());
    let head: String = vm.chars().filter(char::is_ascii_graphic).take(room).collect();
    format!("vm-{head}{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_names_keep_the_number() {
        assert_eq!(thread_name("web", 3), "vm-web/3");
        assert_eq!(thread_name("a-very-long-machine-name", 255), "vm-a-very-l/255");
        assert_eq!(thread_name("ä\n", 0), "vm-/0");
    }
}
