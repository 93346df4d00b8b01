//! The host cores that virtual machines may use: one PMU and one token a core.
//!
//! Whoever has something live on a core holds its token from `load` to `put` (switch.md section 1). Tokens are given in
//! the order of asking; the first in the queue kicks the holder once its slice of [`SLICE`] is up, and kicks again
//! every slice, so that a holder which was just about to enter the guest cannot keep it. A guest with nothing live
//! neither holds nor asks.
//!
//! A token that is given up wakes the one who gets it, and nobody else: fifty guests that count on one core would wake
//! forty-nine times in vain every slice.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pmu::Shape;

use crate::host::msr::{self, MsrError};
use crate::hypervisor::Kick;

mod pmu_of_core;

pub use pmu_of_core::{CorePmu, MsrPaths};

/// How long a holder may keep a core that somebody waits for.
pub const SLICE: Duration = Duration::from_millis(2);

/// The cores of one process, shared by all its virtual machines.
pub struct HostCores {
    shape: Shape,
    backend: Backend,
    slots: BTreeMap<u32, Arc<CoreSlot>>,
}

impl std::fmt::Debug for HostCores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostCores")
            .field("mode", &self.mode())
            .field("shape", &self.shape.to_string())
            .field("cores", &self.slots.keys())
            .finish_non_exhaustive()
    }
}

/// Who holds the guests' PMUs.
#[derive(Debug, Clone)]
pub enum Backend {
    /// A software PMU a core.
    Model,
    /// The processor's, through the msr driver.
    Msr(MsrPaths),
    /// KVM's own vPMU: cores are for pinning only.
    Kvm,
}

impl Backend {
    /// From its name in the API; the msr driver is this host's.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "model" => Some(Self::Model),
            "msr" => Some(Self::Msr(MsrPaths::of_this_host())),
            "kvm" => Some(Self::Kvm),
            _ => None,
        }
    }

    /// Its name in the API.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Msr(_) => "msr",
            Self::Kvm => "kvm",
        }
    }
}

impl HostCores {
    /// One model PMU of `shape` for each of `cores` (host CPU numbers; duplicates count once).
    pub fn new(shape: Shape, cores: &[u32]) -> Self {
        Self::with(Backend::Model, shape, cores)
    }

    /// `cores` whose PMUs are of `shape`, held by `backend`. Nothing is opened before a vCPU claims a core.
    pub fn with(backend: Backend, shape: Shape, cores: &[u32]) -> Self {
        let slots = cores.iter().map(|id| (*id, Arc::new(CoreSlot::new(*id, &shape, &backend)))).collect();
        Self { shape, backend, slots }
    }

    /// "model", "msr" or "kvm".
    pub fn mode(&self) -> &'static str {
        self.backend.name()
    }

    /// The host's PMU.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Host CPU numbers, ascending.
    pub fn ids(&self) -> Vec<u32> {
        self.slots.keys().copied().collect()
    }

    /// One core.
    pub fn slot(&self, id: u32) -> Option<Arc<CoreSlot>> {
        self.slots.get(&id).cloned()
    }
}

/// One host core.
pub struct CoreSlot {
    id: u32,
    shape: Shape,
    /// Where its device is, in mode `msr`.
    msr: Option<MsrPaths>,
    pmu: Mutex<CorePmu>,
    turn: Mutex<Turn>,
    /// Length of the queue.
    waiting: AtomicU32,
}

/// Who has the token and who is next.
#[derive(Default)]
struct Turn {
    /// Somebody has the token, or has been given it and is about to wake.
    taken: bool,
    /// Whoever has it and since when; none while it is on its way.
    holder: Option<(Instant, Arc<dyn Kick>)>,
    queue: VecDeque<Arc<Waiter>>,
    /// Wakes of waiters that were not by time.
    #[cfg(test)]
    wakes: u64,
}

/// One who waits for the token. Used with the lock of the slot's turn alone.
#[derive(Default)]
struct Waiter {
    has_it: AtomicBool,
    woken: Condvar,
}

impl CoreSlot {
    fn new(id: u32, shape: &Shape, backend: &Backend) -> Self {
        let (msr, pmu) = match backend {
            Backend::Msr(paths) => (Some(paths.clone()), CorePmu::msr(*shape)),
            Backend::Model | Backend::Kvm => (None, CorePmu::model(*shape)),
        };
        Self {
            id,
            shape: *shape,
            msr,
            pmu: Mutex::new(pmu),
            turn: Mutex::default(),
            waiting: AtomicU32::new(0),
        }
    }

    /// Host CPU number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Opens what a vCPU needs to count here: in mode `msr` the core's device, for which there is one user; otherwise
    /// nothing. Opens files; any thread may.
    ///
    /// # Errors
    /// In mode `msr`, with what stands against it.
    pub fn prepare(self: &Arc<Self>) -> Result<Prepared, MsrError> {
        let opened = self.msr.as_ref().map(|paths| msr::open(self.id, self.shape, paths)).transpose()?;
        Ok(Prepared { slot: Arc::clone(self), opened })
    }

    /// Waits for the token: at most about one slice for each vCPU that asked before. `kick` is how later askers get
    /// this holder out of the guest.
    pub fn acquire(self: &Arc<Self>, kick: &Arc<dyn Kick>) -> Token {
        let mut turn = lock(&self.turn);
        if turn.taken {
            turn = self.wait(turn);
        }
        turn.taken = true;
        let since = Instant::now();
        turn.holder = Some((since, Arc::clone(kick)));
        drop(turn);
        Token { slot: Arc::clone(self), since }
    }

    /// Waits in the queue until the token is given to the caller.
    fn wait<'a>(&'a self, mut turn: MutexGuard<'a, Turn>) -> MutexGuard<'a, Turn> {
        let me = Arc::new(Waiter::default());
        turn.queue.push_back(Arc::clone(&me));
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while !me.has_it.load(Ordering::Acquire) {
            let before_me = turn.queue.iter().position(|waiter| Arc::ptr_eq(waiter, &me)).unwrap_or(0);
            let held = turn.holder.as_ref().map_or(Duration::ZERO, |(since, _)| since.elapsed());
            let left = SLICE.saturating_sub(held);
            // Nobody says so to the one who becomes the first: it looks by itself, no later than after a slice for each
            // of those before.
            let wait = match &turn.holder {
                Some((_, holder)) if before_me == 0 && left.is_zero() => {
                    holder.kick();
                    SLICE
                }
                _ => left + SLICE * u32::try_from(before_me).unwrap_or(u32::MAX),
            };
            let woke = me.woken.wait_timeout(turn, wait).unwrap_or_else(PoisonError::into_inner);
            turn = woke.0;
            #[cfg(test)]
            {
                turn.wakes += u64::from(!woke.1.timed_out());
            }
        }
        turn
    }

    /// Vcpus that wait for the token.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::SeqCst)
    }
}

/// A core that a vCPU may claim.
pub struct Prepared {
    slot: Arc<CoreSlot>,
    opened: Option<msr::Opened>,
}

impl Prepared {
    /// Takes the core's PMU for a vCPU that is to count on it, on that vCPU's thread, pinned to the core.
    ///
    /// # Errors
    /// In mode `msr`, with every precondition that does not hold.
    pub fn claim(self) -> Result<Claim, MsrError> {
        if let Some(opened) = self.opened {
            let (device, held) = opened.take(&self.slot.shape)?;
            lock(&self.slot.pmu).open(device, held);
        }
        Ok(Claim { slot: self.slot })
    }
}

/// A vCPU's place on a core; dropping it closes the core's device. The guest's PMU has been taken off before.
pub struct Claim {
    slot: Arc<CoreSlot>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.slot.msr.is_some() {
            lock(&self.slot.pmu).close();
        }
    }
}

/// The right to use a core's PMU; dropping it passes it on.
pub struct Token {
    slot: Arc<CoreSlot>,
    since: Instant,
}

impl Token {
    /// The core's PMU.
    pub fn core(&self) -> MutexGuard<'_, CorePmu> {
        lock(&self.slot.pmu)
    }

    /// Whether it should be passed on now: somebody waits and the slice is up.
    pub fn wanted(&self) -> bool {
        self.slot.waiting() > 0 && self.since.elapsed() >= SLICE
    }

    /// Whether somebody waits at all.
    pub fn contended(&self) -> bool {
        self.slot.waiting() > 0
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        let mut turn = lock(&self.slot.turn);
        turn.holder = None;
        let next = turn.queue.pop_front();
        turn.taken = next.is_some();
        if let Some(next) = next {
            self.slot.waiting.fetch_sub(1, Ordering::SeqCst);
            next.has_it.store(true, Ordering::Release);
            drop(turn);
            next.woken.notify_one();
        }
    }
}

/// A panic of another vCPU thread ends that VM, not the others on its core: the switcher itself treats a core that it
/// does not fully know as unknown and cleans it first.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    struct Flag(AtomicBool);
    impl Kick for Flag {
        fn kick(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    fn cores() -> HostCores {
        HostCores::new("intel:v5:8+4:48".parse().unwrap(), &[0, 1])
    }

    #[test]
    fn a_waiter_kicks_the_holder_and_everybody_gets_a_turn() {
        let slot = cores().slot(0).unwrap();
        let inside = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (slot, inside) = (Arc::clone(&slot), Arc::clone(&inside));
                std::thread::spawn(move || {
                    let flag = Arc::new(Flag(AtomicBool::new(false)));
                    let kick: Arc<dyn Kick> = flag.clone();
                    for _ in 0..5 {
                        let token = slot.acquire(&kick);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two holders");
                        // "Runs the guest" until kicked or, with nobody waiting, for a moment.
                        let begin = Instant::now();
                        while !flag.0.swap(false, Ordering::SeqCst) && begin.elapsed() < SLICE * 3 {
                            std::hint::spin_loop();
                        }
                        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(token);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(slot.waiting(), 0);
    }

    #[test]
    fn a_token_that_is_given_up_wakes_one_waiter() {
        const WAITERS: u64 = 12;
        let slot = cores().slot(0).unwrap();
        let kick: Arc<dyn Kick> = Arc::new(Flag(AtomicBool::new(false)));
        let order = Arc::new(Mutex::new(Vec::new()));
        let first = slot.acquire(&kick);
        let threads: Vec<_> = (0..WAITERS)
            .map(|number| {
                let (thread_slot, order) = (Arc::clone(&slot), Arc::clone(&order));
                let thread = std::thread::spawn(move || {
                    let kick: Arc<dyn Kick> = Arc::new(Flag(AtomicBool::new(false)));
                    let token = thread_slot.acquire(&kick);
                    lock(&order).push(number);
                    drop(token);
                });
                while u64::from(slot.waiting()) <= number {
                    std::thread::yield_now();
                }
                thread
            })
            .collect();
        assert!(first.contended());
        drop(first);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(*lock(&order), (0..WAITERS).collect::<Vec<_>>(), "in the order of asking");
        // One that looked by itself in the very moment was not woken.
        let wakes = lock(&slot.turn).wakes;
        assert!((1..=WAITERS).contains(&wakes), "{wakes} wakes of {WAITERS} waiters");
        assert!(!lock(&slot.turn).taken, "free again");
    }

    #[test]
    fn unknown_cores_are_not_there() {
        assert!(cores().slot(2).is_none());
        assert_eq!(cores().ids(), vec![0, 1]);
    }
}
