//! Whether the kernel shares the processors fairly between sessions (sched(7), autogroup), which is tried, not guessed.
//!
//! Linux from 6.13 on (6d71a9c61604, "Fix EEVDF entity placement bug"; seen on 6.18.44) reckons wrongly when the group that
//! runs changes its weight, as it does whenever one of its threads wakes or sleeps and the group has work on more than one
//! processor: it is owed more each time. A session of threads that take turns, 2 ms each, then keeps a core for seconds, and
//! other sessions, whose threads only compute, and the kernel's own threads get a thousandth of it. Guests' vCPUs on one
//! core take such turns. Two daemons with fifty machines in threads stood still for ten seconds and more; with
//! `kernel.sched_autogroup_enabled=0` they did four times as much. Groups by the cgroup controller cpu share the fault.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub mod rival;

use rival::Role;

/// Where the kernel says whether it shares by session; absent without CONFIG_SCHED_AUTOGROUP.
const SWITCH: &str = "/proc/sys/kernel/sched_autogroup_enabled";
/// What an operator may do.
pub const REMEDY: &str =
    "sysctl -w kernel.sched_autogroup_enabled=0, then start vpmud anew; deploy/60-vpmud.conf does it at boot";
/// How long two sessions compete.
pub const TRIAL: Duration = Duration::from_secs(1);
/// The kernel is unfair where one session has less than this of what the other has.
const FAIR: f64 = 0.25;

/// What two sessions got of a core that both wanted all the time, in ns of processor time: one computes, the threads of
/// the other take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trial {
    /// Of the session that computes.
    pub computing: u64,
    /// Of the session whose threads take turns.
    pub turns: u64,
}

impl Trial {
    /// Whether both got about the same, as they should.
    pub fn is_fair(self) -> bool {
        self.computing as f64 >= FAIR * self.turns as f64
    }

    /// Share of the session that computes, in hundredths.
    pub fn percent(self) -> f64 {
        100.0 * self.computing as f64 / (self.computing + self.turns).max(1) as f64
    }
}

/// Whether the processors are shared by session.
pub fn by_session() -> bool {
    std::fs::read_to_string(SWITCH).is_ok_and(|text| text.trim() == "1")
}

/// Whether the kernel is one of those known to share unfairly between groups; patched ones may be among them.
pub fn kernel_is_suspect() -> bool {
    suspect(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

/// 6.13 to 6.19: the fault came with 6.13-rc7 and was still in mainline while 7.0 was made.
fn suspect(release: &str) -> bool {
    matches!(vcpu_worker::host::kernel_version(release), (6, 13..=19))
}

/// Lets two sessions compete for the first of these cores for [`TRIAL`].
///
/// # Errors
/// What stands against it, in words: fewer than two processors (the fault needs two), or no process of this program.
pub fn try_it(cores: &[u32]) -> Result<Trial, String> {
    let &[core, other, ..] = cores else {
        return Err("it takes two processors to try".to_owned());
    };
    let start = |role| Rival::start(role, core, other);
    let (mut computing, mut turns) = (start(Role::Compute)?, start(Role::Turns)?);
    computing.go()?;
    turns.go()?;
    Ok(Trial { computing: computing.result()?, turns: turns.result()? })
}

/// A process that competes; killed when it is not wanted any more.
struct Rival {
    process: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Rival {
    /// Starts it and waits until it is ready.
    fn start(role: Role, core: u32, other: u32) -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("a process to try it with: {e}");
        let program = std::env::current_exe().map_err(failed)?;
        let mut process = Command::new(program)
            .args(["host", "rival", "--role", role.name()])
            .args(["--core", &core.to_string(), "--other-core", &other.to_string()])
            .args(["--milliseconds", &TRIAL.as_millis().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let Some(stdout) = process.stdout.take() else { return Err("it has no output".to_owned()) };
        let mut rival = Self { process, answers: BufReader::new(stdout) };
        match rival.line()?.as_str() {
            "ready" => Ok(rival),
            other => Err(format!("a process to try it with said {other:?}")),
        }
    }

    fn go(&mut self) -> Result<(), String> {
        let Some(mut stdin) = self.process.stdin.take() else { return Err("it has no input".to_owned()) };
        stdin.write_all(b"go\n").map_err(|e| format!("a process to try it with: {e}"))
    }

    fn result(&mut self) -> Result<u64, String> {
        let line = self.line()?;
        line.parse().map_err(|_| format!("a process to try it with said {line:?}"))
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) => Err("a process to try it with ended".to_owned()),
            Ok(_) => Ok(line.trim().to_owned()),
            Err(error) => Err(format!("a process to try it with: {error}")),
        }
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_known_to_be_unfair() {
        for (release, wanted) in [
            ("6.12.30-generic", false),
            ("6.13.0", true),
            ("6.18.44-fc-v669", true),
            ("6.19-rc1", true),
            ("7.0.1", false),
            ("5.15.0-91-generic", false),
            ("", false),
            ("six", false),
        ] {
            assert_eq!(suspect(release), wanted, "{release}");
        }
    }

    #[test]
    fn what_is_fair() {
        assert!(Trial { computing: 490, turns: 510 }.is_fair());
        assert!(!Trial { computing: 4, turns: 996 }.is_fair());
        assert!(Trial { computing: 0, turns: 0 }.is_fair(), "neither ran: nothing is known");
        assert!((Trial { computing: 4, turns: 996 }.percent() - 0.4).abs() < 1e-9);
    }
}
