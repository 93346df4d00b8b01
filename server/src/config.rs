//! What `vpmud serve` was asked for, parsed and bounded; nothing here touches the host.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Longest path of a Unix socket: `sun_path` is 108 bytes with its final zero (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// Where to listen or to connect: `unix:PATH` or `tcp:ADDR:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// Why an address or an option is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Neither form.
    #[error(
        "address {0:?}: write unix:PATH or tcp:ADDR:PORT, e.g. unix:/run/vpmud/vpmud.sock or tcp:127.0.0.1:7400"
    )]
    Address(String),
    /// Too long for the kernel.
    #[error(
        "socket path {0:?} is {1} bytes long and the kernel takes {MAX_SOCKET_PATH}; choose a shorter one"
    )]
    PathTooLong(String, usize),
    /// TCP beyond this machine.
    #[error(
        "--peer-listen tcp:{0}: other machines are served with mutual TLS only; give --peer-tls-ca, --peer-tls-cert and \
         --peer-tls-key, or --peer-plaintext on a network that nobody else is on, or listen on tcp:127.0.0.1:PORT or unix:PATH"
    )]
    TlsRequired(SocketAddr),
    /// The API beyond this machine.
    #[error(
        "--listen tcp:{0}: the API is served on this machine only; listen on tcp:127.0.0.1:PORT or on unix:PATH (other \
         hosts come to --peer-listen; for people, ssh -L forwards either)"
    )]
    NotLoopback(SocketAddr),
    /// Files of TLS.
    #[error("{}", .0.message)]
    Tls(TlsProblem),
    /// No address at all.
    #[error("no --listen: give at least one, e.g. --listen unix:/run/vpmud/vpmud.sock")]
    NoListener,
    /// A PMU mode that cannot work here.
    #[error("--pmu {mode} cannot be used: {why}; use --pmu model (or auto), which counts in a software PMU")]
    PmuMode {
        /// The mode.
        mode: &'static str,
        /// Why not.
        why: String,
    },
    /// A model that is none.
    #[error("--model-pmu {value:?}: {problem}; write e.g. intel:v5:8+4:48 or amd:v2:6:48")]
    ModelPmu {
        /// As given.
        value: String,
        /// What is wrong.
        problem: String,
    },
    /// Cores that are not there.
    #[error("--cores {given:?}: {problem}; this process may use {allowed:?}")]
    Cores {
        /// As asked.
        given: Vec<u32>,
        /// What is wrong.
        problem: String,
        /// What it may use.
        allowed: Vec<u32>,
    },
    /// KVM was asked for and is not there.
    #[error("--hypervisor kvm: {0}; give this user access to /dev/kvm, or use --hypervisor simulated")]
    NoKvm(String),
}

/// What is wrong with TLS's files, in a form that compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsProblem {
    /// Stable reason code.
    pub reason: &'static str,
    /// In words.
    pub message: String,
}

impl From<crate::peer::tls::TlsError> for ConfigError {
    fn from(error: crate::peer::tls::TlsError) -> Self {
        Self::Tls(TlsProblem { reason: error.reason(), message: error.to_string() })
    }
}

impl ConfigError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Address(_) => "BAD_ADDRESS",
            Self::PathTooLong(..) => "SOCKET_PATH_TOO_LONG",
            Self::TlsRequired(_) => "TLS_REQUIRED",
            Self::NotLoopback(_) => "LOOPBACK_ONLY",
            Self::Tls(problem) => problem.reason,
            Self::NoListener => "NO_LISTENER",
            Self::PmuMode { .. } => "PMU_MODE_UNAVAILABLE",
            Self::ModelPmu { .. } => "BAD_MODEL_PMU",
            Self::Cores { .. } => "BAD_CORES",
            Self::NoKvm(_) => "NO_KVM",
        }
    }
}

impl FromStr for Address {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.contains('\0') {
                return Err(ConfigError::Address(crate::status::clip(text, 128)));
            }
            if path.len() > MAX_SOCKET_PATH {
                return Err(ConfigError::PathTooLong(crate::status::clip(path, 128), path.len()));
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        text.strip_prefix("tcp:")
            .and_then(|rest| {
                let rest = rest
                    .strip_prefix("localhost:")
                    .map_or_else(|| rest.to_owned(), |p| format!("127.0.0.1:{p}"));
                rest.parse().ok()
            })
            .map(Self::Tcp)
            .ok_or_else(|| ConfigError::Address(crate::status::clip(text, 128)))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(addr) => write!(f, "tcp:{addr}"),
        }
    }
}

impl Address {
    /// The socket address if others than this machine get there.
    fn beyond(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) if !addr.ip().is_loopback() => Some(*addr),
            _ => None,
        }
    }
}

/// What runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum HypervisorKind {
    /// Linux KVM.
    Kvm,
    /// A scripted guest on the same threads, switcher, memory and migration; nothing real runs.
    Simulated,
}

impl HypervisorKind {
    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Simulated => "simulated",
        }
    }
}

/// Who holds the guests' PMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PmuMode {
    /// The best that this host has: kvm, else msr, else model.
    Auto,
    /// A register-accurate software PMU per core.
    Model,
    /// The hardware, through /dev/cpu/N/msr.
    Msr,
    /// The host kernel's vPMU.
    Kvm,
}

/// Where workers live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Isolation {
    /// In this process.
    Thread,
    /// One child process a machine.
    Process,
}

/// When a machine's memory is handed over to another vpmud on this machine instead of being copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LocalMigration {
    /// In mode auto where it works, and in mode local.
    Auto,
    /// In mode local only.
    Asked,
}

/// Everything `serve` needs to know.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Store, journal, sockets of the data plane.
    pub state_dir: PathBuf,
    /// Public API, and the peer service too.
    pub listen: Vec<Address>,
    /// Peer service and health only.
    pub peer_listen: Vec<Address>,
    /// What TLS between hosts is made with; none: there is none.
    pub peer_tls: Option<crate::peer::tls::Files>,
    /// Other machines are talked to without TLS.
    pub peer_plaintext: bool,
    /// Cores that vCPUs may use; empty means all this process may use.
    pub cores: Vec<u32>,
    /// Worker isolation.
    pub isolation: Isolation,
    /// Hypervisor; none means KVM where it works, else simulated.
    pub hypervisor: Option<HypervisorKind>,
    /// PMU mode.
    pub pmu: PmuMode,
    /// The modelled host PMU.
    pub model_pmu: String,
    /// End process-isolated machines at SIGTERM; thread-isolated ones always end with the daemon.
    pub stop_vms: bool,
    /// What a forbidden system call of a worker process leads to.
    pub seccomp: vcpu_worker::sandbox::Mode,
    /// When workers' cgroups get controllers.
    pub cgroup_controllers: crate::cgroup::controllers::Controllers,
    /// Whether processors are kept from sleeping in moments that must be short.
    pub keep_awake: crate::awake::KeepAwake,
    /// Worker processes kept ready for machines to come; process isolation only.
    pub spare_workers: u32,
    /// Threads that serve the API; none for a quarter of the processors.
    pub api_threads: Option<u32>,
    /// For tests: worker threads of this kind make a forbidden call.
    pub worker_violates: Option<vcpu_worker::sandbox::Kind>,
    /// When memory is handed over instead of copied.
    pub local_migration: LocalMigration,
    /// End when standard input ends.
    pub exit_with_parent: bool,
    /// Where snapshots are written and read; none means `snapshots` in the state directory.
    pub snapshot_dir: Option<PathBuf>,
    /// How long another host or a worker may be silent in a handover, in milliseconds.
    pub handover_timeout: u32,
    /// For tests: stop this process at these points of a handover, once at each.
    pub hold_at: Vec<crate::handover::step::HoldPoint>,
}

impl ServeConfig {
    /// What migrations wait for, and how long.
    pub fn limits(&self) -> crate::migration::limits::Limits {
        crate::migration::limits::Limits::of(std::time::Duration::from_millis(self.handover_timeout.into()))
    }

    /// What can be judged without looking at the host.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.listen.is_empty() {
            return Err(ConfigError::NoListener);
        }
        if let Some(addr) = self.listen.iter().find_map(Address::beyond) {
            return Err(ConfigError::NotLoopback(addr));
        }
        if self.peer_tls.is_none()
            && !self.peer_plaintext
            && let Some(addr) = self.peer_listen.iter().find_map(Address::beyond)
        {
            return Err(ConfigError::TlsRequired(addr));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip_and_bad_ones_are_refused() {
        for good in ["unix:/run/v.sock", "tcp:127.0.0.1:0", "tcp:[::1]:7400"] {
            assert_eq!(good.parse::<Address>().expect(good).to_string(), good);
        }
        for bad in ["", "unix:", "tcp:", "tcp:127.0.0.1", "http://x", "/run/v.sock", "tcp:host:1"] {
            assert_eq!(bad.parse::<Address>().expect_err(bad).reason(), "BAD_ADDRESS");
        }
        let long = format!("unix:/{}", "x".repeat(MAX_SOCKET_PATH));
        assert_eq!(long.parse::<Address>().expect_err("too long").reason(), "SOCKET_PATH_TOO_LONG");
    }

    #[test]
    fn what_others_reach_is_told_from_what_they_do_not() {
        for (text, others) in [
            ("tcp:0.0.0.0:1", true),
            ("tcp:10.0.0.1:1", true),
            ("tcp:127.9.9.9:1", false),
            ("unix:/p", false),
        ] {
            let address: Address = text.parse().expect("address");
            assert_eq!(address.beyond().is_some(), others, "{text}");
        }
    }
}
