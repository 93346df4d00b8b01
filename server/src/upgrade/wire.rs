//! What `vpmud upgrade` and the daemon say to each other: one JSON object a line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Version of `vpmu.worker.v1` that both ends of a worker's socket must speak.
const WORKER_PROTOCOL: u32 = 1;

/// What a binary speaks and reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of the program.
    pub version: String,
    /// Daemon to worker.
    pub worker_protocol: u32,
    /// Daemon to daemon.
    pub peer_protocol: u32,
    /// Records of the store and the journal.
    pub store: u32,
    /// A machine's state on its way.
    pub state: u32,
}

impl Version {
    /// This binary's.
    pub fn own() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            worker_protocol: WORKER_PROTOCOL,
            peer_protocol: crate::peer::VERSION,
            store: u32::from(crate::store::SCHEMA),
            state: vcpu_worker::machine::snapshot::VERSION,
        }
    }

    /// Whether a daemon and workers of this version can go on as those of `next`: each version reads the one before, and
    /// while machines move this daemon commands workers of the next.
    ///
    /// # Errors
    /// What does not fit, with both values.
    pub fn can_become(&self, next: &Self) -> Result<(), String> {
        if next.worker_protocol != self.worker_protocol {
            let (own, theirs) = (self.worker_protocol, next.worker_protocol);
            return Err(format!("its workers speak protocol {theirs}, this daemon {own}"));
        }
        for (what, own, theirs) in
            [("the store's records", self.store, next.store), ("a machine's state", self.state, next.state)]
        {
            if theirs != own && Some(theirs) != own.checked_add(1) {
                return Err(format!("it reads version {theirs} of {what}, and this is {own}"));
            }
        }
        Ok(())
    }
}

/// To the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// Who are you?
    Hello,
    /// Become this binary.
    Upgrade {
        /// Absolute path.
        binary: PathBuf,
    },
}

/// From the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum Say {
    /// Who it is.
    Hello {
        /// What it speaks.
        version: Version,
        /// Its process.
        pid: u32,
        /// Grows with each start.
        term: u64,
        /// What it was started from.
        binary: PathBuf,
    },
    /// What became of one machine.
    Machine {
        /// Full name.
        name: String,
        /// What.
        #[serde(flatten)]
        outcome: Outcome,
    },
    /// The machines are done; the daemon ends and the new binary takes its place.
    Switching,
    /// It does not go on: why.
    Refused {
        /// A stable code.
        reason: String,
        /// In words.
        message: String,
    },
}

/// What an upgrade made of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// A worker of the new binary has it.
    Moved {
        /// The worker.
        pid: u32,
        /// vCPUs stopped to running, microseconds; of a paused machine, until its vCPUs could run.
        blackout_us: u64,
        /// All of it, microseconds.
        total_us: u64,
    },
    /// It has no worker: there is nothing to move.
    Idle,
    /// It stays where it is, or its new worker does not answer yet.
    Stayed {
        /// The process of the worker that has it; 0 for threads of the daemon.
        pid: u32,
        /// A stable code.
        reason: String,
        /// In words.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_version_fits_and_others_do_not() {
        let own = Version::own();
        assert_eq!(own.can_become(&own), Ok(()));
        assert_eq!(own.can_become(&Version { store: own.store + 1, ..own.clone() }), Ok(()));
        for other in [
            Version { worker_protocol: 2, ..own.clone() },
            Version { store: own.store + 2, ..own.clone() },
            Version { state: own.state - 1, ..own.clone() },
        ] {
            assert!(own.can_become(&other).is_err(), "{other:?}");
        }
    }

    #[test]
    fn lines_are_read_back() {
        let outcome = Outcome::Moved { pid: 7, blackout_us: 2000, total_us: 9000 };
        let say = Say::Machine { name: "projects/p/virtualMachines/v".to_owned(), outcome };
        let line = serde_json::to_string(&say).expect("encodes");
        assert!(line.contains("\"say\":\"machine\"") && line.contains("\"outcome\":\"moved\""), "{line}");
        assert_eq!(serde_json::from_str::<Say>(&line).expect("decodes"), say);
        assert!(serde_json::from_str::<Ask>("{\"ask\":\"upgrade\"}").is_err(), "a binary must be named");
    }
}
