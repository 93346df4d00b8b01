//! Cut, stalled, cancelled and damaged migrations: both sides end with a typed error, which says what happened and not
//! that a time-out (`PATIENT`) ran out; that is also how they are known to end at once.

mod dataplane_support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use dataplane_support::*;
use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::frame::ErrorCode;
use vcpu_worker::dataplane::{
    CancelFlag, ConnectOptions, DataAddress, DataplaneError, Incoming, Outgoing, Timeouts,
};
use vcpu_worker::memory::GuestMemory;

/// For an answer that comes at once: the bound is for a test that hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// Stands between source and destination and does something to the bytes from the source.
struct Relay {
    address: DataAddress,
    threads: JoinHandle<()>,
}

/// Decides per piece, given the bytes passed before it on all connections: false cuts everything.
type Meddle = dyn Fn(u64, &mut [u8]) -> bool + Send + Sync;

fn relay(target: &DataAddress, connections: u16, meddle: Arc<Meddle>) -> Relay {
    let DataAddress::Tcp(target) = *target else { panic!("a TCP destination") };
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = DataAddress::Tcp(listener.local_addr().expect("address"));
    let threads = std::thread::spawn(move || {
        let passed = AtomicU64::new(0);
        let pairs: Vec<_> = (0..connections).map(|_| pair(&listener, target)).collect();
        std::thread::scope(|scope| {
            for (near, far) in &pairs {
                scope.spawn(|| {
                    let whole = pump(near, far, |piece| {
                        meddle(passed.fetch_add(piece.len() as u64, Ordering::SeqCst), piece)
                    });
                    if whole {
                        return;
                    }
                    for (near, far) in &pairs {
                        let _ = near.shutdown(Shutdown::Both);
                        let _ = far.shutdown(Shutdown::Both);
                    }
                });
                scope.spawn(|| pump(far, near, |_| true));
            }
        });
    });
    Relay { address, threads }
}

fn pair(listener: &TcpListener, target: SocketAddr) -> (TcpStream, TcpStream) {
    let (near, _) = listener.accept().expect("accept");
    (near, TcpStream::connect(target).expect("connect"))
}

/// Passes bytes on until their end; false if they were cut. Once nobody takes them they go nowhere: what the receiver
/// has to say travels the other way, and the sender must live to hear it.
fn pump(mut from: &TcpStream, mut to: &TcpStream, mut allow: impl FnMut(&mut [u8]) -> bool) -> bool {
    let mut buf = vec![0; 64 << 10];
    let mut taken = true;
    while let Ok(n @ 1..) = from.read(&mut buf) {
        if !allow(&mut buf[..n]) {
            return false;
        }
        taken = taken && to.write_all(&buf[..n]).is_ok();
    }
    let _ = to.shutdown(Shutdown::Write);
    true
}

fn filled() -> GuestMemory {
    let source = GuestMemory::new("source", 64 * MIB).expect("memory");
    fill(&source, 3, 1);
    source
}

fn connect_to(
    address: &DataAddress,
    connections: u16,
    memory: &GuestMemory,
    cancel: &CancelFlag,
) -> Outgoing {
    Outgoing::open(address, &session(), memory.clone(), cancel.clone(), options(connections))
        .expect("connect")
}

fn cut_mid_way(connections: u16, live: bool) {
    let source = filled();
    let destination = destination(&tcp(), connections, 64 * MIB);
    let relay = relay(&destination.address, connections, Arc::new(|passed, _| passed < 20 * MIB));
    let mut out = connect_to(&relay.address, connections, &source, &CancelFlag::new());
    let error =
        out.send_round(1, &PageBitmap::full(source.pages()), live).and_then(|_| out.finish(b"s").map(drop));
    let error = error.expect_err("cut");
    assert!(matches!(error, DataplaneError::Closed { .. } | DataplaneError::Refused { .. }), "{error}");
    let other = destination.join().expect_err("cut");
    assert!(matches!(other, DataplaneError::Closed { .. } | DataplaneError::Io { .. }), "{other}");
    let again = out.send_round(2, &PageBitmap::full(source.pages()), live).expect_err("failed already");
    assert_eq!(again.reason(), "DATA_USAGE");
    relay.threads.join().expect("relay");
}

#[test]
fn cut_one_connection() {
    cut_mid_way(1, true);
}

#[test]
fn cut_four_connections_in_the_final_round() {
    cut_mid_way(4, false);
}

#[test]
fn damage_on_the_way_is_found_and_told() {
    for connections in [1, 2] {
        let source = filled();
        let destination = destination(&tcp(), connections, 64 * MIB);
        let hit = AtomicU64::new(0);
        let meddle = move |passed: u64, piece: &mut [u8]| {
            if passed > 10 * MIB && hit.fetch_add(1, Ordering::SeqCst) == 0 {
                let middle = piece.len() / 2;
                piece[middle] ^= 0x10;
            }
            true
        };
        let relay = relay(&destination.address, connections, Arc::new(meddle));
        let mut out = connect_to(&relay.address, connections, &source, &CancelFlag::new());
        let error = out.send_round(1, &PageBitmap::full(source.pages()), true).expect_err("damaged");
        let other = destination.join().expect_err("damaged");
        assert_eq!(other.reason(), "FRAME_CHECKSUM", "{other}");
        assert!(
            matches!(error, DataplaneError::Refused { code: ErrorCode::Checksum, .. }),
            "the source is told why: {error:?}"
        );
        drop(out);
        relay.threads.join().expect("relay");
    }
}

/// Runs rounds until one fails; `after` happens once the first is through.
fn rounds_until_failure(out: &mut Outgoing, pages: &PageBitmap, after: impl FnOnce()) -> DataplaneError {
    out.send_round(1, pages, true).expect("the first round");
    std::thread::scope(|scope| {
        let looping = scope.spawn(|| {
            (2..).find_map(|round| out.send_round(round, pages, true).err()).expect("ends with an error")
        });
        after();
        looping.join().expect("no panic")
    })
}

#[test]
fn destination_cancels() {
    for connections in [1, 3] {
        let source = filled();
        let destination = destination(&tcp(), connections, 64 * MIB);
        let mut out = destination.connect(connections, &source);
        let error =
            rounds_until_failure(&mut out, &PageBitmap::full(source.pages()), || destination.cancel.cancel());
        assert!(
            matches!(error, DataplaneError::Refused { code: ErrorCode::Cancelled, .. }),
            "the source is told why: {error:?}"
        );
        let other = destination.join().expect_err("cancelled");
        assert_eq!(other.reason(), "DATA_CANCELLED");
    }
}

#[test]
fn source_cancels() {
    for connections in [1, 3] {
        let source = filled();
        let dir = tempfile::tempdir().expect("dir");
        let destination = destination(&unix(dir.path()), connections, 64 * MIB);
        let cancel = CancelFlag::new();
        let mut out = destination.try_connect(&session(), connections, &source, &cancel).expect("connect");
        let error = rounds_until_failure(&mut out, &PageBitmap::full(source.pages()), || cancel.cancel());
        assert_eq!(error.reason(), "DATA_CANCELLED");
        let other = destination.join().expect_err("cancelled");
        assert!(matches!(other, DataplaneError::Closed { .. }), "{other}");
    }
}

#[test]
fn abort_is_told() {
    let source = filled();
    let destination = destination(&tcp(), 2, 64 * MIB);
    let mut out = destination.connect(2, &source);
    out.send_round(1, &PageBitmap::new(source.pages()), true).expect("an empty round");
    out.abort();
    let error = destination.join().expect_err("aborted");
    assert!(matches!(error, DataplaneError::Refused { code: ErrorCode::Cancelled, .. }), "{error}");
}

#[test]
fn cancel_ends_every_wait_of_the_destination() {
    // Waiting for connections, and waiting for the rest of them.
    for connected in [0, 1] {
        let destination = destination(&tcp(), 2, 64 * MIB);
        let DataAddress::Tcp(address) = destination.address else { panic!("TCP") };
        let strangers: Vec<_> =
            (0..connected).map(|_| TcpStream::connect(address).expect("connect")).collect();
        destination.cancel.cancel();
        assert_eq!(destination.join().expect_err("cancelled").reason(), "DATA_CANCELLED");
        drop(strangers);
    }
}

#[test]
fn silent_peers_time_out() {
    let short = Timeouts {
        stall: Duration::from_millis(200),
        idle: Duration::from_millis(300),
        accept: Duration::from_millis(300),
        hello: Duration::from_millis(200),
        recover: Duration::from_millis(300),
    };
    let memory = GuestMemory::new("m", 2 * MIB).expect("memory");
    let bind = || Incoming::bind(&tcp(), session(), 1, memory.clone()).expect("bind").with_timeouts(short);
    // Nobody comes.
    let error = bind().run(CancelFlag::new(), &AtomicU64::new(0)).expect_err("nobody");
    assert_eq!(error.reason(), "DATA_TIMEOUT");
    // Somebody listens, but never answers.
    let deaf = bind();
    let connect = |incoming: &Incoming| {
        let address = incoming.local_address().expect("address");
        let brief = ConnectOptions { deadline: Duration::from_secs(2), timeouts: short, ..options(1) };
        Outgoing::open(&address, &session(), memory.clone(), CancelFlag::new(), brief)
    };
    assert_eq!(connect(&deaf).expect_err("deaf").reason(), "DATA_TIMEOUT");
    // Introduced, then silent.
    let incoming = bind();
    let address = incoming.local_address().expect("address");
    let thread = std::thread::spawn(move || incoming.run(CancelFlag::new(), &AtomicU64::new(0)));
    let out = Outgoing::connect(&address, &session(), 1, memory.clone(), 0, CancelFlag::new(), DEADLINE)
        .expect("connect");
    assert_eq!(thread.join().expect("no panic").expect_err("silent").reason(), "DATA_TIMEOUT");
    drop(out);
    // Nobody listens at all.
    let gone = bind().local_address().expect("address");
    let error = Outgoing::connect(&gone, &session(), 1, memory.clone(), 0, CancelFlag::new(), DEADLINE)
        .expect_err("gone");
    assert_eq!(error.reason(), "DATA_CONNECT_FAILED");
}

#[test]
fn a_rejected_or_lost_state_is_seen_by_the_source() {
    for reject in [true, false] {
        let source = filled();
        let destination = destination(&tcp(), 1, 64 * MIB);
        let mut out = destination.connect(1, &source);
        out.send_round(1, &PageBitmap::new(source.pages()), false).expect("round");
        out.finish(b"state").expect("finish");
        let mut received = destination.join().expect("received");
        if reject {
            received.reject("vCPU 1: KVM_SET_XSAVE: invalid argument");
            assert_eq!(received.acknowledge().expect_err("answered").reason(), "DATA_USAGE");
        }
        drop(received);
        match out.await_applied(DEADLINE).expect_err("not applied") {
            DataplaneError::Refused { code: ErrorCode::NotApplied, message } => {
                assert!(reject && message.contains("KVM_SET_XSAVE"), "{message}");
            }
            error => assert!(!reject && error.reason() == "DATA_PEER_CLOSED", "{error}"),
        }
    }
}

#[test]
fn misuse_is_refused_and_changes_nothing() {
    let source = filled();
    let destination = destination(&tcp(), 1, 64 * MIB);
    for connections in [0, 17] {
        let error = destination.try_connect(&session(), connections, &source, &CancelFlag::new());
        assert_eq!(error.expect_err("bounds").reason(), "DATA_CONNECTIONS_INVALID");
        let error = Incoming::bind(&tcp(), session(), connections, source.clone()).expect_err("bounds");
        assert_eq!(error.reason(), "DATA_CONNECTIONS_INVALID");
    }
    let used = Incoming::bind(&tcp(), session(), 1, source.clone()).expect_err("not zero");
    assert_eq!(used.reason(), "DATA_MEMORY_NOT_ZERO");
    let mut out = destination.connect(1, &source);
    let none = PageBitmap::new(source.pages());
    assert_eq!(out.finish(b"s").expect_err("no round yet").reason(), "DATA_USAGE");
    assert_eq!(out.await_applied(DEADLINE).expect_err("no state yet").reason(), "DATA_USAGE");
    assert_eq!(out.send_round(2, &none, true).expect_err("hole").reason(), "DATA_USAGE");
    assert_eq!(out.send_round(1, &PageBitmap::new(1), true).expect_err("size").reason(), "DATA_USAGE");
    out.send_round(1, &none, true).expect("round");
    assert_eq!(out.finish(&[]).expect_err("empty").reason(), "DATA_STATE_SIZE");
    assert_eq!(out.finish(&vec![0; (64 * MIB + 1) as usize]).expect_err("large").reason(), "DATA_STATE_SIZE");
    out.finish(b"s").expect("finish");
    assert_eq!(out.finish(b"s").expect_err("twice").reason(), "DATA_USAGE");
    assert_eq!(destination.join().expect("received").state, b"s");
}

#[test]
fn addresses_are_parsed_and_printed() {
    for good in ["unix:/run/x.sock", "tcp:127.0.0.1:80", "tcp:[::1]:0"] {
        assert_eq!(good.parse::<DataAddress>().expect("good").to_string(), good);
    }
    let long = format!("unix:/{}", "x".repeat(107));
    for bad in
        ["", "unix:", "tcp:", "tcp:localhost:1", "tcp:1.2.3.4", "vsock:3:4", "unix:a\0b", long.as_str()]
    {
        assert_eq!(bad.parse::<DataAddress>().expect_err("bad").reason(), "DATA_ADDRESS_INVALID", "{bad:?}");
    }
    let error = Incoming::bind(
        &"unix:/nonexistent/dir/s".parse().expect("good"),
        session(),
        1,
        GuestMemory::new("m", 2 * MIB).expect("memory"),
    );
    assert_eq!(error.expect_err("no directory").reason(), "DATA_LISTENER_FAILED");
}
