//! Why cores are refused: what exactly is short or wrong, and what to do.

use vcpu_worker::host::topology::show_list;

use crate::status::ApiError;

/// A refusal; nothing was granted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Not enough whole cores are free.
    #[error(
        "{vcpus} whole cores are needed and {free} can be had: of {usable} cores {dedicated} are dedicated, {shared} carry shared vCPUs, and one is \
         left to the host itself; stop or move a machine, or ask for policy SHARED"
    )]
    Cores {
        /// Needed.
        vcpus: usize,
        /// Free.
        free: usize,
        /// Whole cores of which vCPUs may use a thread.
        usable: usize,
        /// Dedicated to machines.
        dedicated: usize,
        /// In use by shared vCPUs.
        shared: usize,
    },
    /// No node has enough.
    #[error(
        "{vcpus} whole cores on one NUMA node are needed; node {node} has the most free ones, {free} (all nodes together {total}); ask without \
         numa_local or for fewer vCPUs"
    )]
    Node {
        /// Needed.
        vcpus: usize,
        /// The node that has the most.
        node: u32,
        /// Free on it.
        free: usize,
        /// Free on all nodes.
        total: usize,
    },
    /// The daemon itself would have no core left.
    #[error(
        "{vcpus} dedicated cores would leave none to the host itself, which may use {own}: at most {most} more can be dedicated; name \
         fewer or ask for policy SHARED"
    )]
    Host {
        /// Needed.
        vcpus: usize,
        /// Cores that can be dedicated now.
        most: usize,
        /// What the daemon may use, in list format.
        own: String,
    },
    /// Every usable core is dedicated.
    #[error("all {usable} usable cores are dedicated to machines: none is left to share; stop or move one")]
    NoneShared {
        /// Usable CPUs.
        usable: usize,
    },
    /// A core of the list belongs to somebody.
    #[error("core {cpu} {}; choose another, or stop or move that machine", taken(.owner, *.dedicated, *.thread))]
    Taken {
        /// Asked for.
        cpu: u32,
        /// Machine that has it.
        owner: String,
        /// It is dedicated to that machine.
        dedicated: bool,
        /// What is in use is another thread of the same core.
        thread: bool,
    },
    /// No such core.
    #[error("core {cpu} is not there; online are {}", show_list(.online))]
    Unknown {
        /// Asked for.
        cpu: u32,
        /// What there is.
        online: Vec<u32>,
    },
    /// It is there, but offline.
    #[error(
        "core {cpu} is offline; write 1 to /sys/devices/system/cpu/cpu{cpu}/online and restart vpmud, or choose another"
    )]
    Offline {
        /// Asked for.
        cpu: u32,
    },
    /// vCPUs may not use it.
    #[error("core {cpu} is not among those that vCPUs may use here, {} (vpmud serve --cores)", show_list(.usable))]
    NotUsable {
        /// Asked for.
        cpu: u32,
        /// What they may use.
        usable: Vec<u32>,
    },
    /// Named twice.
    #[error("core {cpu} is named twice; name each once (shared vCPUs take the list in turn)")]
    Twice {
        /// The core.
        cpu: u32,
    },
    /// Two threads of one core.
    #[error(
        "cores {sibling} and {cpu} are threads of one physical core, which a dedicated vCPU has for itself; name one of them"
    )]
    Siblings {
        /// The later one.
        cpu: u32,
        /// The earlier one.
        sibling: u32,
    },
    /// The list is too long or too short.
    #[error("{given} cores for {vcpus} vCPUs: give {}", if *.dedicated { "exactly one a vCPU" } else { "at most one a vCPU" })]
    Count {
        /// Given.
        given: usize,
        /// vCPUs.
        vcpus: usize,
        /// Dedicated.
        dedicated: bool,
    },
    /// The list is not on one node.
    #[error(
        "core {cpu} is on NUMA node {node} and the first one on node {first}; name cores of one node or leave numa_local out"
    )]
    SpansNodes {
        /// The core.
        cpu: u32,
        /// Its node.
        node: u32,
        /// The first core's.
        first: u32,
    },
}

fn taken(owner: &str, dedicated: bool, thread: bool) -> String {
    let what = if thread { "is a thread of a core that" } else { "" };
    let how = if dedicated { "is dedicated to" } else { "carries vCPUs of" };
    format!("{what} {how} machine {owner}").trim_start().to_owned()
}

impl Refusal {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Cores { .. } | Self::Node { .. } | Self::Host { .. } | Self::NoneShared { .. } => {
                "CORES_EXHAUSTED"
            }
            Self::Taken { .. } => "CORE_TAKEN",
            Self::Unknown { .. } => "CORE_UNKNOWN",
            Self::Offline { .. } => "CORE_OFFLINE",
            Self::NotUsable { .. } => "CORE_NOT_USABLE",
            Self::Twice { .. } | Self::Siblings { .. } => "CORES_OVERLAP",
            Self::Count { .. } => "CORES_COUNT",
            Self::SpansNodes { .. } => "CORES_SPAN_NODES",
        }
    }

    /// The core that it is about, if it is about one.
    pub fn cpu(&self) -> Option<u32> {
        match self {
            Self::Taken { cpu, .. }
            | Self::Unknown { cpu, .. }
            | Self::Offline { cpu }
            | Self::NotUsable { cpu, .. }
            | Self::Twice { cpu }
            | Self::Siblings { cpu, .. }
            | Self::SpansNodes { cpu, .. } => Some(*cpu),
            _ => None,
        }
    }

    /// As the refusal of a request's field, for what [`super::examine`] finds.
    pub fn invalid(&self, field: &str) -> ApiError {
        let value = self.cpu().map_or_else(String::new, |cpu| cpu.to_string());
        let text = self.to_string();
        let (problem, remedy) = text.split_once("; ").unwrap_or((&text, "correct the list"));
        ApiError::invalid(field, value, self.reason(), &format!("cannot be had: {problem}"), remedy)
    }

    /// As the refusal of something that would be right if less were in use.
    pub fn exhausted(&self) -> ApiError {
        let error = ApiError::exhausted(self.reason(), format!("no cores for this machine: {self}"));
        match self.cpu() {
            Some(cpu) => error.with("core", cpu),
            None => error,
        }
    }
}
