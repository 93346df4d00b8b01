//! `vpmuctl vm console` at a terminal: raw while it is attached, and as it was on every way out.

mod fake;

use fake::FakeHost;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

const DEADLINE: Duration = Duration::from_secs(20);

/// A terminal with vpmuctl on it.
struct Session {
    keyboard: File,
    terminal: File,
    before: Termios,
    child: Child,
}

/// How the session is ended.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Escape,
    By(Signal),
    StreamEnds,
}

impl Session {
    async fn attach(host: &FakeHost) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let path = ptsname(&master, Vec::new()).expect("has a name").into_string().expect("UTF-8");
        let terminal = File::options().read(true).write(true).open(path).expect("opens");
        let before = tcgetattr(&terminal).expect("a terminal");
        let side = || OwnedFd::from(terminal.try_clone().expect("clones"));
        let child = Command::new(env!("CARGO_BIN_EXE_vpmuctl"))
            .args(["--host", &host.endpoint().to_string(), "vm", "console", "a"])
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .kill_on_drop(true)
            .spawn()
            .expect("starts");
        let session = Self { keyboard: File::from(master), terminal, before, child };
        // Drains what it prints: a full terminal would block it.
        let mut screen = session.keyboard.try_clone().expect("clones");
        std::thread::spawn(move || while screen.read(&mut [0; 256]).is_ok_and(|read| read > 0) {});
        session.until("raw mode", |now| !now.local_modes.contains(LocalModes::ICANON)).await;
        session
    }

    async fn until(&self, what: &str, holds: impl Fn(&Termios) -> bool) {
        let begin = Instant::now();
        while !holds(&tcgetattr(&self.terminal).expect("a terminal")) {
            assert!(begin.elapsed() < DEADLINE, "{what} did not come");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn leaves_the_terminal_as_it_was(leave: Leave) {
    let host = FakeHost::serve();
    let mut session = Session::attach(&host).await;
    // Ctrl-C belongs to the guest: it must not end the session.
    session.keyboard.write_all(b"abc\x03").expect("types");
    let host = match leave {
        Leave::Escape => {
            session.keyboard.write_all(b"\x1d").expect("types");
            Some(host)
        }
        Leave::By(signal) => {
            let pid = session.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("runs");
            kill_process(pid, signal).expect("signals");
            Some(host)
        }
        Leave::StreamEnds => {
            drop(host);
            None
        }
    };
    let status = tokio::time::timeout(DEADLINE, session.child.wait()).await.expect("ends").expect("waits");
    let after = tcgetattr(&session.terminal).expect("a terminal");
    assert_eq!(format!("{after:?}"), format!("{:?}", session.before), "{leave:?}");
    if host.is_some() {
        assert_eq!(status.code(), Some(0), "{leave:?}");
    } else {
        assert_eq!(status.code(), Some(1), "a lost host is a failure");
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
async fn a_lost_host() {
    leaves_the_terminal_as_it_was(Leave::StreamEnds).await;
}
