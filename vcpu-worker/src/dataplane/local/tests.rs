use std::os::unix::net::UnixStream;
use std::path::Path;

use super::*;

const MIB: u64 = 1 << 20;

fn session(token: u8) -> SessionId {
    SessionId { migration_id: [3; 16], attempt: 1, token: [token; 32] }
}

fn memory() -> GuestMemory {
    GuestMemory::new("local", 4 * MIB).expect("memory")
}

fn address(dir: &Path) -> DataAddress {
    DataAddress::Unix(dir.join("data"))
}

/// A destination on a thread of its own.
fn listening(dir: &Path, memory: &GuestMemory) -> (CancelFlag, std::thread::JoinHandle<Result<()>>) {
    let incoming = Incoming::bind(&address(dir), session(7), 1, memory.clone()).expect("bound");
    let cancel = CancelFlag::new();
    let thread = std::thread::spawn({
        let cancel = cancel.clone();
        move || incoming.receive_memory(&cancel)
    });
    (cancel, thread)
}

fn offer(dir: &Path, session: &SessionId, memory: &GuestMemory) -> Result<()> {
    hand_over(&address(dir), session, memory, &CancelFlag::new(), Duration::from_secs(10))
}

#[test]
fn the_memory_itself_arrives_and_is_not_written_before_the_grant() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (source, destination) = (memory(), memory());
    source.write_at(MIB, b"before").expect("written");
    let (_, thread) = listening(dir.path(), &destination);
    offer(dir.path(), &session(7), &source).expect("mapped");
    thread.join().expect("joined").expect("received");
    source.write_at(2 * MIB, b"after").expect("written");
    let mut seen = [0; 6];
    destination.read_at(MIB, &mut seen).expect("read");
    assert_eq!(&seen, b"before");
    destination.read_at(2 * MIB, &mut seen[..5]).expect("read");
    assert_eq!(&seen[..5], b"after", "it is one memory, not a copy");
    assert_eq!(destination.resident_pages().expect("known").count(), 2);

    assert_eq!(destination.write_at(0, b"x").expect_err("locked").reason(), "MEMORY_LOCKED");
    assert_eq!(destination.store_u64(0, 1).expect_err("locked").reason(), "MEMORY_LOCKED");
    assert_eq!(destination.discard(0, MIB).expect_err("locked").reason(), "MEMORY_LOCKED");
    assert!(maps_read_only(&destination), "KVM could not write it either");
    destination.unlock().expect("unlocked");
    assert!(!maps_read_only(&destination));
    destination.write_at(0, b"granted").expect("written");
    drop(source);
    let mut seen = [0; 7];
    destination.read_at(0, &mut seen).expect("read");
    assert_eq!(&seen, b"granted", "it outlives its source");
}

/// Whether every mapping of this memory in this process is without write permission.
fn maps_read_only(memory: &GuestMemory) -> bool {
    let region = memory.regions()[0];
    let start = format!("{:x}-", memory.host_address(&region));
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let line = maps.lines().find(|line| line.starts_with(&start)).expect("it is mapped");
    line.split_whitespace().nth(1).expect("permissions").starts_with("r--s")
}

#[test]
fn a_stranger_gets_nothing_and_the_rightful_source_is_not_kept_out() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (source, destination) = (memory(), memory());
    let (_, thread) = listening(dir.path(), &destination);
    let code = |result: Result<()>| match result.expect_err("refused") {
        DataplaneError::Refused { code, .. } => code,
        other => panic!("{other}"),
    };
    assert_eq!(code(offer(dir.path(), &session(8), &source)), ErrorCode::Unauthorized);
    let other = SessionId { attempt: 2, ..session(7) };
    assert_eq!(code(offer(dir.path(), &other, &source)), ErrorCode::WrongSession);
    let larger = GuestMemory::new("larger", 6 * MIB).expect("memory");
    assert_eq!(code(offer(dir.path(), &session(7), &larger)), ErrorCode::Mismatch);
    // One that says nothing of use, and one that brings no descriptor.
    drop(UnixStream::connect(dir.path().join("data")).expect("connects"));
    let mut bare = UnixStream::connect(dir.path().join("data")).expect("connects");
    let bytes = Offer { session: session(7), memory_bytes: 4 * MIB, boot_id: own_boot_id() }.encode();
    std::io::Write::write_all(&mut bare, &bytes).expect("sent");
    let mut told = Vec::new();
    std::io::Read::read_to_end(&mut bare, &mut told).expect("answered");
    assert_eq!(told.first(), Some(&REFUSED));
    assert!(destination.resident_pages().expect("known").is_empty());
    offer(dir.path(), &session(7), &source).expect("mapped");
    thread.join().expect("joined").expect("received");
}

#[test]
fn a_memory_that_could_shrink_is_refused() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(4 * MIB).expect("sized");
    assert_eq!(memory().take_over(file.into()).expect_err("refused").reason(), "MEMORY_FOREIGN");
    let fd = rustix::fs::memfd_create("open", rustix::fs::MemfdFlags::ALLOW_SEALING).expect("memfd");
    rustix::fs::ftruncate(&fd, 4 * MIB).expect("sized");
    let error = memory().take_over(fd).expect_err("refused");
    assert!(error.to_string().contains("not sealed"), "{error}");
    let (source, used) = (memory(), memory());
    let mut pair =
        [source.fd().try_clone_to_owned().expect("dup"), source.fd().try_clone_to_owned().expect("dup")]
            .into_iter();
    used.write_at(0, b"x").expect("written");
    let fd = pair.next().expect("two");
    assert_eq!(used.take_over(fd).expect_err("in use").reason(), "MEMORY_FOREIGN");
    // What was made here cannot change its size any more.
    assert!(rustix::fs::ftruncate(source.fd(), MIB).is_err());
    assert!(rustix::fs::fcntl_add_seals(source.fd(), rustix::fs::SealFlags::WRITE).is_err());
}

#[test]
fn a_cancel_ends_both_waits() {
    let dir = tempfile::tempdir().expect("tempdir");
    let destination = memory();
    let (cancel, thread) = listening(dir.path(), &destination);
    cancel.cancel();
    let ended = thread.join().expect("joined").expect_err("cancelled");
    assert_eq!(ended.reason(), "DATA_CANCELLED");

    // A destination that listens and never answers.
    let silent = tempfile::tempdir().expect("tempdir");
    let _listener = std::os::unix::net::UnixListener::bind(silent.path().join("data")).expect("bound");
    let cancel = CancelFlag::new();
    let thread = std::thread::spawn({
        let (cancel, address) = (cancel.clone(), address(silent.path()));
        move || hand_over(&address, &session(7), &memory(), &cancel, Duration::from_secs(60))
    });
    cancel.cancel();
    assert_eq!(thread.join().expect("joined").expect_err("cancelled").reason(), "DATA_CANCELLED");
}

#[test]
fn tcp_hands_nothing_over() {
    let error = hand_over(
        &"tcp:127.0.0.1:1".parse().expect("address"),
        &session(7),
        &memory(),
        &CancelFlag::new(),
        Duration::from_secs(1),
    );
    assert_eq!(error.expect_err("refused").reason(), "DATA_REFUSED");
}
