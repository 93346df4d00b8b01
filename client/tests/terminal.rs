//! `vpmuctl vm console` at a terminal: raw while it is attached, and as it was on every way out. The escape key is a way out
//! whatever the host, or the reader of the output, does.

mod fake;

use fake::FakeHost;
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

const DEADLINE: Duration = Duration::from_secs(20);

/// A terminal with vpmuctl on it.
struct Session {
    keyboard: File,
    terminal: File,
    before: Termios,
    child: Child,
    screen: Arc<Mutex<Vec<u8>>>,
}

/// How the session is ended.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Escape,
    By(Signal),
    StreamEnds,
    HostIsLost,
}

impl Session {
    async fn attach(host: &FakeHost, vm: &str) -> Self {
        Self::attach_to(host, vm, None).await
    }

    /// Output goes elsewhere than to the terminal, if that is given.
    async fn attach_to(host: &FakeHost, vm: &str, output: Option<OwnedFd>) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let path = ptsname(&master, Vec::new()).expect("has a name").into_string().expect("UTF-8");
        let terminal = File::options().read(true).write(true).open(path).expect("opens");
        let before = tcgetattr(&terminal).expect("a terminal");
        let side = || Stdio::from(OwnedFd::from(terminal.try_clone().expect("clones")));
        let child = Command::new(env!("CARGO_BIN_EXE_vpmuctl"))
            .args(["--host", &host.endpoint().to_string(), "vm", "console", vm])
            .stdin(side())
            .stdout(output.map_or_else(side, Stdio::from))
            .stderr(side())
            .kill_on_drop(true)
            .spawn()
            .expect("starts");
        let screen = Arc::default();
        let session = Self { keyboard: File::from(master), terminal, before, child, screen };
        // Takes what it prints: a full terminal would block it.
        let (mut glass, shown) = (session.keyboard.try_clone().expect("clones"), Arc::clone(&session.screen));
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(read @ 1..) = glass.read(&mut buffer) {
                shown.lock().expect("not poisoned").extend_from_slice(&buffer[..read]);
            }
        });
        session.until_raw().await;
        session
    }

    async fn until_raw(&self) {
        self.until("raw mode", |now| !now.local_modes.contains(LocalModes::ICANON)).await;
    }

    async fn until(&self, what: &str, holds: impl Fn(&Termios) -> bool) {
        let begin = Instant::now();
        while !holds(&tcgetattr(&self.terminal).expect("a terminal")) {
            assert!(begin.elapsed() < DEADLINE, "{what} did not come");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn until_shown(&self, text: &str) {
        let begin = Instant::now();
        while !self.shown().contains(text) {
            assert!(begin.elapsed() < DEADLINE, "{text:?} is not shown: {:?}", self.shown());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("not poisoned")).into_owned()
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("runs");
        kill_process(pid, signal).expect("signals");
    }

    /// Whether it has been stopped, as by SIGSTOP.
    fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id().expect("runs")));
        // The state follows the name, which is in parentheses.
        stat.expect("ours").rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    }

    fn assert_as_it_was(&self, why: &str) {
        let after = tcgetattr(&self.terminal).expect("a terminal");
        assert_eq!(format!("{after:?}"), format!("{:?}", self.before), "{why}");
    }

    /// Waits for its end; the exit code.
    async fn end(&mut self, why: &str) -> Option<i32> {
        let status = tokio::time::timeout(DEADLINE, self.child.wait()).await.expect(why).expect("waits");
        self.assert_as_it_was(why);
        status.code()
    }
}

async fn leaves_the_terminal_as_it_was(leave: Leave) {
    let host = FakeHost::serve();
    let mut session = Session::attach(&host, "ends").await;
    // Ctrl-C belongs to the guest: it must not end the session.
    session.keyboard.write_all(b"abc\x03").expect("types");
    session.until_shown("ABC").await;
    let mut host = Some(host);
    match leave {
        Leave::Escape => session.keyboard.write_all(b"\x1d").expect("types"),
        Leave::By(signal) => session.signal(signal),
        Leave::StreamEnds => session.keyboard.write_all(b"\x04").expect("types"),
        Leave::HostIsLost => drop(host.take()),
    }
    let code = session.end(&format!("{leave:?}")).await;
    assert_eq!(code, Some(i32::from(host.is_none())), "{leave:?}: only a lost host is a failure");
    if host.is_some() {
        session.until_shown("detached from ends").await;
    }
}

#[tokio::test]
async fn escape() {
    leaves_the_terminal_as_it_was(Leave::Escape).await;
}

#[tokio::test]
async fn signals() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        leaves_the_terminal_as_it_was(Leave::By(signal)).await;
    }
}

#[tokio::test]
async fn the_streams_end() {
    leaves_the_terminal_as_it_was(Leave::StreamEnds).await;
}

#[tokio::test]
async fn a_lost_host() {
    leaves_the_terminal_as_it_was(Leave::HostIsLost).await;
}

#[tokio::test]
async fn suspended_it_gives_the_terminal_back_and_continued_it_takes_it_again() {
    let host = FakeHost::serve();
    let mut session = Session::attach(&host, "a").await;
    for _ in 0..2 {
        session.signal(Signal::TSTP);
        let begin = Instant::now();
        while !session.is_stopped() {
            assert!(begin.elapsed() < DEADLINE, "it is not suspended");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        session.assert_as_it_was("suspended");
        session.signal(Signal::CONT);
        session.until_raw().await;
    }
    session.keyboard.write_all(b"xyz").expect("types");
    session.until_shown("XYZ").await;
    session.keyboard.write_all(b"\x1d").expect("types");
    assert_eq!(session.end("the escape key").await, Some(0));
}

#[tokio::test]
async fn the_escape_key_is_heard_although_the_host_reads_nothing() {
    let host = FakeHost::serve();
    let mut session = Session::attach(&host, "deaf").await;
    let mut keyboard = session.keyboard.try_clone().expect("clones");
    // On a thread: a terminal that is not read blocks whoever types.
    std::thread::spawn(move || {
        // More than the way to the host and the queue before it hold together.
        for _ in 0..2048 {
            keyboard.write_all(&[b'x'; 1024]).expect("types");
        }
        keyboard.write_all(b"\x1d").expect("types");
    });
    assert_eq!(session.end("the escape key").await, Some(0));
    session.until_shown("what is typed is dropped").await;
}

#[tokio::test]
async fn what_was_typed_before_the_escape_key_arrives() {
    let host = FakeHost::serve();
    let mut session = Session::attach(&host, "ends").await;
    session.keyboard.write_all(b"abc\x1ddef").expect("types");
    assert_eq!(session.end("the escape key").await, Some(0));
    assert_eq!(
        String::from_utf8_lossy(&host.typed()),
        "abc",
        "all before the escape key, and nothing after it"
    );
    session.until_shown("ABC").await;
}

#[tokio::test]
async fn the_escape_key_is_heard_although_nobody_reads_the_output() {
    let host = FakeHost::serve();
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let room = rustix::pipe::fcntl_getpipe_size(&reader).expect("its size") as u64;
    let mut session = Session::attach_to(&host, "floods", Some(writer)).await;
    let begin = Instant::now();
    while ioctl_fionread(&reader).expect("a pipe") < room {
        assert!(begin.elapsed() < DEADLINE, "the pipe does not fill");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    session.keyboard.write_all(b"\x1d").expect("types");
    assert_eq!(session.end("the escape key").await, Some(0));
}
