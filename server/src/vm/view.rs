//! What everybody but the actor sees of a machine: a snapshot that is replaced whole, so that reading never waits.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio_util::sync::CancellationToken;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::{PmuShape, VirtualMachine};

use crate::worker_link::{ConsoleHistory, WorkerLink};

/// Snapshot of one machine.
#[derive(Clone, Default)]
pub struct VmView {
    /// The public record.
    pub vm: VirtualMachine,
    /// PMU that the guest got; none before its first start.
    pub pmu_shape: Option<PmuShape>,
    /// Its worker, if it has one.
    pub worker: Option<WorkerLink>,
    /// A worker that is building the machine: its console can be read already.
    pub opening: Option<WorkerLink>,
    /// Console of its last run, once that has ended.
    pub console: Arc<ConsoleHistory>,
    /// The open migration.
    pub migration: Option<ActiveMigration>,
    /// The actor is gone.
    pub deleted: bool,
}

impl VmView {
    /// Its state.
    pub fn state(&self) -> State {
        self.vm.observed_state()
    }
}

/// Leaves out what follows from the rest: the names of the features that CPUID differences are about. A record is copied for
/// each reader and each write, and on a host whose KVM forces features on these are most of its strings.
pub fn brief(vm: &mut VirtualMachine) {
    vm.cpuid_differences.iter_mut().for_each(|difference| difference.features = Vec::new());
}

/// The record as clients of the API get it: with what [`brief`] left out. The store and other hosts have it without.
#[must_use]
pub fn whole(mut vm: VirtualMachine) -> VirtualMachine {
    vm.cpuid_differences.iter_mut().for_each(vcpu_worker::machine::options::spell);
    vm
}

/// An open migration away from here.
#[derive(Clone)]
pub struct ActiveMigration {
    /// Full name.
    pub name: String,
    /// Asks it to stop; obeyed until the commit.
    pub cancel: CancellationToken,
    /// Set right before the commit is written: from then on it cannot be cancelled.
    pub committed: Arc<AtomicBool>,
}

#[cfg(test)]
mod tests {
    use vpmu_proto::api::CpuidDifference;

    use super::*;

    #[test]
    fn names_of_features_are_left_out_and_come_back() {
        let of = |register: &str, asked, stored, features: &[&str]| CpuidDifference {
            leaf: 7,
            subleaf: 0,
            register: register.to_owned(),
            asked,
            stored,
            features: features.iter().map(ToString::to_string).collect(),
        };
        let differences = vec![
            of("ebx", 1 << 3, 1 << 5, &["+avx2", "-bmi1"]),
            of("ebx", 0, 1 << 31, &["+avx512vl"]),
            of("edx", 0, 1, &[]),
            // From another version, or from nobody who means well.
            of("rax", 0, u32::MAX, &[]),
        ];
        let vm = VirtualMachine { cpuid_differences: differences, ..VirtualMachine::default() };
        let mut short = vm.clone();
        brief(&mut short);
        assert!(short.cpuid_differences.iter().all(|difference| difference.features.is_empty()));
        assert_eq!(whole(short), vm);
    }
}
