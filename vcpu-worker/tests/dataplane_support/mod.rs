//! What the data-plane tests share: memories with content, a destination on a thread, and the comparison.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::Duration;

use vcpu_worker::dataplane::{
    CancelFlag, ConnectOptions, DataAddress, DataplaneError, Incoming, Outgoing, Received, SessionId,
    Timeouts,
};
use vcpu_worker::memory::{GuestMemory, PAGE_SIZE};

pub(crate) const MIB: u64 = 1 << 20;

/// Long enough for a machine loaded twentyfold, and longer than what the tests call prompt.
pub(crate) const PATIENT: Timeouts = Timeouts {
    stall: Duration::from_secs(30),
    idle: Duration::from_secs(40),
    accept: Duration::from_secs(40),
    hello: Duration::from_secs(30),
    recover: Duration::from_secs(30),
};

pub(crate) fn options(connections: u16) -> ConnectOptions {
    ConnectOptions {
        connections,
        deadline: Duration::from_secs(30),
        timeouts: PATIENT,
        ..ConnectOptions::default()
    }
}

pub(crate) fn session() -> SessionId {
    SessionId { migration_id: *b"0123456789abcdef", attempt: 3, token: [0x5a; 32] }
}

/// Xorshift; good enough that no two pages are alike.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn page(&mut self) -> Vec<u8> {
        (0..PAGE_SIZE / 8).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

/// Writes random content to `every`-th run of 37 pages; the rest is never touched. Pages share most of their bytes (a
/// debug build makes random numbers slowly), but no two are alike.
pub(crate) fn fill(memory: &GuestMemory, seed: u64, every: u64) {
    let mut random = Random(seed);
    let mut content = random.page();
    for page in (0..memory.pages()).filter(|page| page / 37 % every == 0) {
        let at = random.below(PAGE_SIZE / 8) as usize * 8;
        content[at..at + 8].copy_from_slice(&random.next().to_le_bytes());
        memory.write_at(page * PAGE_SIZE, &content).expect("inside memory");
    }
}

pub(crate) fn assert_same(a: &GuestMemory, b: &GuestMemory) {
    assert_eq!(a.bytes(), b.bytes());
    let (mut x, mut y) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for offset in (0..a.bytes()).step_by(MIB as usize) {
        a.read_at(offset, &mut x).expect("inside memory");
        b.read_at(offset, &mut y).expect("inside memory");
        if x != y {
            let at = x.iter().zip(&y).position(|(x, y)| x != y).expect("they differ");
            panic!("page {} differs", (offset + at as u64) / PAGE_SIZE);
        }
    }
}

/// A destination that receives on a thread.
pub(crate) struct Destination {
    pub(crate) address: DataAddress,
    pub(crate) memory: GuestMemory,
    pub(crate) cancel: CancelFlag,
    pub(crate) thread: JoinHandle<Result<Received, DataplaneError>>,
}

pub(crate) fn destination(address: &DataAddress, connections: u16, bytes: u64) -> Destination {
    let memory = GuestMemory::new("destination", bytes).expect("memory");
    let incoming =
        Incoming::bind(address, session(), connections, memory.clone()).expect("bind").with_timeouts(PATIENT);
    let address = incoming.local_address().expect("address");
    let cancel = CancelFlag::new();
    let flag = cancel.clone();
    let thread = std::thread::spawn(move || incoming.run(flag, &AtomicU64::new(0)));
    Destination { address, memory, cancel, thread }
}

impl Destination {
    pub(crate) fn connect(&self, connections: u16, memory: &GuestMemory) -> Outgoing {
        self.try_connect(&session(), connections, memory, &CancelFlag::new()).expect("connect")
    }

    pub(crate) fn try_connect(
        &self,
        session: &SessionId,
        connections: u16,
        memory: &GuestMemory,
        cancel: &CancelFlag,
    ) -> Result<Outgoing, DataplaneError> {
        Outgoing::open(&self.address, session, memory.clone(), cancel.clone(), options(connections))
    }

    pub(crate) fn join(self) -> Result<Received, DataplaneError> {
        self.thread.join().expect("no panic")
    }
}

pub(crate) fn tcp() -> DataAddress {
    "tcp:127.0.0.1:0".parse().expect("address")
}

pub(crate) fn unix(dir: &Path) -> DataAddress {
    DataAddress::Unix(dir.join("data.sock"))
}
