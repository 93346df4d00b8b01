//! What a worker's process may still do: capabilities, limits, descriptors and, for each kind of thread, a seccomp filter.
//!
//! Order in [`confine`], on the main thread before any other exists: descriptors closed → no_new_privs → limits →
//! capabilities → filter of [`Kind::Control`], which every later thread inherits → [`enter`] in a thread that needs less
//! adds its own. A filter can only be added to, so what a thread opens while it starts it opens under the wider one.
//!
//! A call that is not allowed is not made. In [`Mode::Enforce`] it raises SIGSYS, whose handler writes the call and the
//! thread into the runtime directory's `violation` file and ends the process: the daemon shows that one machine as
//! FAILED, SECCOMP_VIOLATION. In thread isolation nothing here is in force: those threads are the daemon's.
//!
//! | kind | threads | besides memory, clocks, futexes and its own signals it may |
//! |---|---|---|
//! | control | main, async runtime, blocking helpers, all others | open files, sockets and KVM; start threads; no exec, no fork, no other process, no executable memory |
//! | vCPU | `vm-NAME/N`, once its vCPU is made | a listed set of KVM and perf requests, write to what is open; no files, sockets or threads |
//! | data | `vpmud-out`, `vpmud-in` and the connections they start, `vpmud-pages`, `lazy-faults`, `lazy-prefetch` | sockets, positioned I/O, dirty logs, userfaultfd; no file opened |

mod filter;
mod privileges;
mod table;

use std::io;
use std::path::Path;
use std::sync::OnceLock;

use seccompiler::BpfProgram;

/// What a forbidden system call leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Mode {
    /// The worker ends.
    #[default]
    Enforce,
    /// The kernel logs it (audit, or dmesg) and goes on.
    Log,
    /// There is no filter.
    Off,
}

impl Mode {
    /// As on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Log => "log",
            Self::Off => "off",
        }
    }
}

/// Kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Main, runtime, blocking helpers, and whatever does not say otherwise.
    Control,
    /// A vCPU.
    Vcpu,
    /// Migration data.
    Data,
}

struct Active {
    vcpu: BpfProgram,
    data: BpfProgram,
    violate: Option<Kind>,
}

/// Set once this process is confined.
static ACTIVE: OnceLock<Active> = OnceLock::new();

/// File in the runtime directory that says which forbidden call ended the worker; empty while none has.
pub const VIOLATION: &str = "violation";

/// Confines this process; `rawio` leaves it CAP_SYS_RAWIO, which the msr driver asks for. Must be called on the main thread while it is the only one.
///
/// # Errors
/// If a step that the kernel offers fails: a worker that cannot be confined does not run.
pub fn confine(mode: Mode, violate: Option<Kind>, runtime_dir: Option<&Path>, rawio: bool) -> io::Result<()> {
    privileges::drop_all(rawio)?;
    // Read once and remembered; a vCPU thread may not open the file.
    let _ = crate::host::boot_id();
    quiet_panics();
    crate::host::heap::without_files();
    if mode == Mode::Off {
        return Ok(());
    }
    let filter::Programs { no_clone3, control, vcpu, data } = filter::compile(mode)?;
    if mode == Mode::Enforce {
        let report = runtime_dir.map(|dir| std::fs::File::create(dir.join(VIOLATION))).transpose()?;
        crate::sys::confine::report_violations(report)?;
    }
    let active = Active { vcpu, data, violate };
    if ACTIVE.set(active).is_err() {
        return Err(io::Error::other("confined already"));
    }
    for program in [&no_clone3, &control] {
        seccompiler::apply_filter(program).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Narrows the calling thread to its kind, for good. Where the process is not confined there is no filter.
///
/// Either way a vCPU and a data thread leave the process's own signals to the others: the handler of SIGTERM writes to the
/// runtime's socket pair, which a vCPU's filter forbids, and the kernel may pick any thread that does not block it.
///
/// # Errors
/// If the kernel refuses the filter: the thread must not go on.
pub fn enter(kind: Kind) -> io::Result<()> {
    if kind != Kind::Control {
        crate::sys::confine::leave_signals_to_others()?;
    }
    let Some(active) = ACTIVE.get() else { return Ok(()) };
    let program = match kind {
        Kind::Control => return Ok(()),
        Kind::Vcpu => &active.vcpu,
        Kind::Data => &active.data,
    };
    seccompiler::apply_filter(program).map_err(io::Error::other)
}

/// For tests: makes a forbidden call on a thread of the kind that `--violate` names. Called where each kind comes along
/// when a test wants it to: a vCPU at a pause, control at console input, data at the start of a migration.
pub fn hook(kind: Kind) {
    if ACTIVE.get().is_some_and(|active| active.violate == Some(kind)) {
        // Harmless where it is let through.
        let made =
            rustix::net::socket(rustix::net::AddressFamily::NETLINK, rustix::net::SocketType::RAW, None);
        tracing::error!(?kind, made = made.is_ok(), "a forbidden call was let through");
    }
}

/// What a runtime directory says about a forbidden call, for people; none if there was none.
pub fn violation(dir: &Path) -> Option<String> {
    let path = dir.join(VIOLATION);
    let known = std::fs::metadata(&path).ok()?;
    if known.len() == 0 || known.len() > 4096 {
        return None;
    }
    let text = String::from_utf8_lossy(&std::fs::read(path).ok()?).into_owned();
    let mut words = text.trim().splitn(2, ' ');
    let number: i64 = words.next()?.parse().ok()?;
    let thread = words.next().unwrap_or("?");
    let name = table::name(number).map_or_else(|| number.to_string(), |name| format!("{name} ({number})"));
    Some(format!(
        "thread {thread} made the system call {name} in a way that its seccomp filter does not allow; the worker was ended"
    ))
}

/// A panic's message without a backtrace, for which a thread would have to open files.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "panic")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_is_told_for_people() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(violation(dir.path()), None);
        std::fs::write(dir.path().join(VIOLATION), "").unwrap();
        assert_eq!(violation(dir.path()), None, "an empty file is what a worker begins with");
        std::fs::write(dir.path().join(VIOLATION), "59 vm-web/0\n").unwrap();
        let told = violation(dir.path()).unwrap();
        assert!(told.contains("thread vm-web/0") && told.contains("execve (59)"), "{told}");
        std::fs::write(dir.path().join(VIOLATION), "4000 x\n").unwrap();
        assert!(violation(dir.path()).unwrap().contains("system call 4000 "));
        std::fs::write(dir.path().join(VIOLATION), "nonsense").unwrap();
        assert_eq!(violation(dir.path()), None);
    }

    #[test]
    fn an_unconfined_process_is_left_alone() {
        enter(Kind::Vcpu).unwrap();
        hook(Kind::Vcpu);
        assert!(std::fs::metadata("/").is_ok(), "no filter was put on this thread");
    }
}
