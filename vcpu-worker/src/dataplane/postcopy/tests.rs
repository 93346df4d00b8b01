use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::super::{
    CancelFlag, ConnectOptions, DataAddress, DataplaneError, Identity, Incoming, Outgoing, SessionId,
    Timeouts, Tls,
};
use super::*;
use crate::bitmap::PageBitmap;
use crate::lazy::{LazyError, LazyMemory, LazyStats};
use crate::memory::{GuestMemory, PAGE_SIZE};

const BYTES: u64 = 8 << 20;
const PATIENT: Duration = Duration::from_secs(60);

fn session() -> SessionId {
    SessionId { migration_id: [7; 16], attempt: 1, token: [9; 32] }
}

fn content(page: u64) -> Vec<u8> {
    // Every eighth page is zero: those travel by name.
    let seed = if page.is_multiple_of(8) { 0 } else { page * 31 + 1 };
    (0..PAGE_SIZE / 8).flat_map(|i| (seed * (i + 1)).to_le_bytes()).collect()
}

/// Whether userfaultfd is to be had; KVM's hosts have it.
fn possible() -> bool {
    if crate::sys::uffd::Uffd::new().is_ok() {
        return true;
    }
    let required = std::env::var_os("VPMU_REQUIRE_KVM").is_some_and(|v| v == "1");
    assert!(!required, "userfaultfd is required and not there");
    println!("skipped: no userfaultfd");
    false
}

struct Moved {
    source: GuestMemory,
    destination: GuestMemory,
    out: Outgoing,
    left: Left,
    lazy: LazyMemory,
    end: Arc<parking_lot::Mutex<Option<Result<LazyStats, LazyError>>>>,
    pager: std::thread::JoinHandle<Result<(), DataplaneError>>,
    address: DataAddress,
    options: ConnectOptions,
}

/// Moves a guest of which every odd page is left for later. `way` puts something between source and destination.
fn moved(
    tls: bool,
    bandwidth: u64,
    recover: Duration,
    way: impl FnOnce(DataAddress) -> DataAddress,
) -> Moved {
    let source = GuestMemory::new("source", BYTES).expect("memory");
    let destination = GuestMemory::new("destination", BYTES).expect("memory");
    let mut missing = PageBitmap::new(source.pages());
    let mut sent = PageBitmap::new(source.pages());
    for page in 0..source.pages() {
        source.write_at(page * PAGE_SIZE, &content(page)).expect("inside memory");
        if page % 2 == 1 || page.is_multiple_of(8) { missing.set(page) } else { sent.set(page) }
    }
    let timeouts = Timeouts { stall: PATIENT, idle: PATIENT, accept: PATIENT, hello: PATIENT, recover };
    let (ours, theirs) =
        (Arc::new(Identity::generate().expect("made")), Arc::new(Identity::generate().expect("made")));
    let listen = "tcp:127.0.0.1:0".parse().expect("address");
    let mut incoming =
        Incoming::bind(&listen, session(), 1, destination.clone()).expect("bind").with_timeouts(timeouts);
    if tls {
        incoming = incoming.with_tls(Tls::new(Arc::clone(&theirs), ours.fingerprint()));
    }
    let address = way(incoming.local_address().expect("address"));
    let receiving = std::thread::spawn(move || incoming.run(CancelFlag::new(), &AtomicU64::new(0)));
    let options = ConnectOptions {
        bandwidth,
        timeouts,
        deadline: PATIENT,
        tls: tls.then(|| Tls::new(ours, theirs.fingerprint())),
        ..ConnectOptions::default()
    };
    let mut out = Outgoing::open(&address, &session(), source.clone(), CancelFlag::new(), options.clone())
        .expect("connect");
    out.send_round(1, &sent, false).expect("round");
    out.finish(b"state").expect("finish");
    let mut received = receiving.join().expect("no panic").expect("received");
    let (conn, door, round) = received.take_pages().expect("a connection");
    let pager = Pager::new().expect("a pager");
    let end = Arc::new(parking_lot::Mutex::new(None));
    let on_end = {
        let (pager, end) = (Arc::clone(&pager), Arc::clone(&end));
        Box::new(move |how: Result<LazyStats, LazyError>| {
            pager.over(how.is_ok());
            *end.lock() = Some(how);
        })
    };
    let asked: Arc<Pager> = Arc::clone(&pager);
    let lazy = LazyMemory::begin(&destination, missing.clone(), asked, None, on_end).expect("lazy memory");
    let placer = lazy.placer();
    let thread = {
        let pager = Arc::clone(&pager);
        std::thread::spawn(move || pager.run(conn, &door, round, &placer))
    };
    let mut left = Left::new(missing);
    pager.applied();
    out.serve(&mut left, Until::Applied(Instant::now() + PATIENT)).expect("applied");
    Moved { source, destination, out, left, lazy, end, pager: thread, address, options }
}

impl Moved {
    /// Serves as the worker does, while somebody reads the memory from its end.
    fn follow(mut self) -> (u32, LazyStats) {
        let mut reopened = 0;
        let reader = {
            let memory = self.destination.clone();
            std::thread::spawn(move || {
                for page in (0..memory.pages()).rev() {
                    let mut found = vec![0; PAGE_SIZE as usize];
                    memory.read_at(page * PAGE_SIZE, &mut found).expect("inside memory");
                    assert!(found == content(page), "page {page}");
                }
            })
        };
        let mut resumed = false;
        while let Err(error) = self.out.serve(&mut self.left, Until::Drained { resumed }) {
            println!("{error}");
            self.out
                .reopen(&self.address, &session(), &CancelFlag::new(), &self.options)
                .expect("the destination waits for us");
            (reopened, resumed) = (reopened + 1, true);
        }
        reader.join().expect("every page is as it was");
        assert!(self.lazy.wait(PATIENT).expect("in time").is_ok());
        self.pager.join().expect("no panic").expect("drained");
        let (mut x, mut y) = (vec![0; BYTES as usize], vec![0; BYTES as usize]);
        self.source.read_at(0, &mut x).expect("inside memory");
        self.destination.read_at(0, &mut y).expect("inside memory");
        assert!(x == y, "what followed is what was there");
        let end = self.end.lock().take().expect("the end was told").expect("all of it");
        (reopened, end)
    }
}

#[test]
fn pages_follow_on_demand_and_by_themselves() {
    if !possible() {
        return;
    }
    for tls in [false, true] {
        let (reopened, stats) = moved(tls, 0, PATIENT, |address| address).follow();
        assert_eq!((reopened, stats.missing, stats.late), (0, 0, 0), "TLS {tls}: each page once: {stats:?}");
        assert_eq!(stats.placed, BYTES / PAGE_SIZE / 2 + BYTES / PAGE_SIZE / 8);
    }
}

/// Passes bytes on and cuts the connection once, when so many have gone to the destination.
fn cutting(to: &DataAddress, after: u64) -> (DataAddress, Arc<AtomicUsize>) {
    let DataAddress::Tcp(to) = *to else { panic!("TCP") };
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = DataAddress::Tcp(listener.local_addr().expect("address"));
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    std::thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            let first = count.fetch_add(1, Ordering::SeqCst) == 0;
            let far = TcpStream::connect(to).expect("connect");
            let (mut back, mut forth) = (far.try_clone().expect("clone"), near.try_clone().expect("clone"));
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut forth);
                let _ = forth.shutdown(Shutdown::Both);
            });
            std::thread::spawn(move || {
                let (mut near, mut far, mut passed) = (near, far, 0);
                let mut piece = vec![0; 16 << 10];
                while let Ok(n @ 1..) = near.read(&mut piece) {
                    passed += n as u64;
                    if (first && passed > after) || far.write_all(&piece[..n]).is_err() {
                        break;
                    }
                }
                let _ = near.shutdown(Shutdown::Both);
                let _ = far.shutdown(Shutdown::Both);
            });
        }
    });
    (address, taken)
}

#[test]
fn a_lost_connection_is_opened_anew_and_the_rest_follows() {
    if !possible() {
        return;
    }
    let mut taken = None;
    // 3 MiB go before it moves, 4 after.
    let moved = moved(true, 0, PATIENT, |address| {
        let (address, count) = cutting(&address, 5 << 20);
        taken = Some(count);
        address
    });
    let (reopened, stats) = moved.follow();
    assert_eq!((reopened, taken.map(|n| n.load(Ordering::SeqCst))), (1, Some(2)));
    assert_eq!(stats.missing, 0, "{stats:?}");
}

#[test]
fn a_source_that_does_not_come_back_is_told_to_the_guest() {
    if !possible() {
        return;
    }
    let moved = moved(false, 0, Duration::from_millis(300), |address| address);
    drop(moved.out);
    assert!(moved.lazy.wait(PATIENT).expect("in time").is_err());
    let end = moved.end.lock().take().expect("the end was told");
    assert_eq!(end.expect_err("not all of it").reason(), "LAZY_MEMORY_SOURCE_FAILED");
    assert_eq!(moved.pager.join().expect("no panic").expect_err("lost").reason(), "DATA_TIMEOUT");
}
