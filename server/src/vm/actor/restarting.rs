//! The actor's side of the restart policy ([`crate::vm::restart`]): what an end means for it, and the start when it is due.
//!
//! Nothing is started while a migration is open, before recovery is complete, or where the journal does not say that the
//! machine is owned here.

use std::time::Duration;

use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::virtual_machine_spec::RestartPolicy;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::store::ownership_record::Phase;

use super::Actor;
use crate::status::ApiError;
use crate::vm::restart::{Event, MOST, Memory, step};

/// Reasons after which a machine is not started by itself: its copy may live elsewhere, or a worker of it here.
const NEVER_AFTER: [&str; 6] =
    ["OWNERSHIP_UNCERTAIN", "LOST", "POSTCOPY_SOURCE_LOST", "WORKER_UNKNOWN", "SHUTTING_DOWN", "FORCED"];

/// Wall clock, ms.
pub(crate) fn wall_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn to_ms(at: &prost_types::Timestamp) -> u64 {
    u64::try_from(at.seconds).unwrap_or(0).saturating_mul(1000)
        + u64::try_from(at.nanos).unwrap_or(0) / 1_000_000
}

fn from_ms(ms: u64) -> prost_types::Timestamp {
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    prost_types::Timestamp { seconds, nanos: i32::try_from(ms % 1000 * 1_000_000).unwrap_or(0) }
}

fn policy(vm: &VirtualMachine) -> RestartPolicy {
    vm.spec.as_ref().map_or(RestartPolicy::Unspecified, vpmu_proto::api::VirtualMachineSpec::restart_policy)
}

/// Lets the policy know; the result is in the machine's record.
pub(super) fn note(vm: &mut VirtualMachine, event: Event) {
    let memory = Memory {
        count: vm.restart_count,
        row: vm.restart_row,
        next: vm.next_restart_time.as_ref().map(to_ms),
        began: vm.last_start_time.as_ref().map(to_ms),
    };
    let memory = step(policy(vm), memory, event);
    vm.restart_count = memory.count;
    vm.restart_row = memory.row;
    vm.next_restart_time = memory.next.map(from_ms);
    vm.last_start_time = memory.began.map(from_ms);
}

/// It ended by itself.
pub(super) fn note_end(vm: &mut VirtualMachine, state: State, reason: &str) {
    let wanted = vm.desired_state() == DesiredState::Running && !NEVER_AFTER.contains(&reason);
    let (chance, _) = uuid::Uuid::new_v4().as_u64_pair();
    note(vm, Event::Ended { failed: state == State::Failed, wanted, now: wall_ms(), chance });
}

impl Actor {
    /// When the policy starts it; none if it does not.
    pub(super) fn restart_in(&self) -> Option<Duration> {
        let here = matches!(self.ownership.phase(), Phase::Owned | Phase::Entered);
        let down = matches!(self.state(), State::Stopped | State::Failed);
        if !here
            || !down
            || self.migration.is_some()
            || self.worker.is_some()
            || self.waiting.is_some()
            || self.gone
        {
            return None;
        }
        match &self.vm.next_restart_time {
            // A clock that was set back does not keep it down for longer than any wait.
            Some(at) => {
                Some(Duration::from_millis(to_ms(at).saturating_sub(wall_ms()).min(MOST.saturating_mul(2))))
            }
            // It ended with the last daemon, which could not say so.
            None if self.vm.reason == "HOST_RESTARTED"
                && self.vm.desired_state() == DesiredState::Running
                && policy(&self.vm) == RestartPolicy::Always =>
            {
                Some(Duration::ZERO)
            }
            None => None,
        }
    }

    /// The wait is over.
    pub(super) async fn restart(&mut self) {
        if self.restart_in().is_none() || self.daemon.shutdown.is_cancelled() {
            return;
        }
        tracing::info!(vm = %self.name, count = self.vm.restart_count + 1, "the restart policy starts it again");
        note(&mut self.vm, Event::Begun);
        if let Err(error) = self.do_start().await {
            tracing::warn!(vm = %self.name, %error, "the restart policy could not start it");
            self.restart_failed(&error).await;
        }
    }

    async fn restart_failed(&mut self, error: &ApiError) {
        let (state, reason, message) = (self.state(), self.vm.reason.clone(), self.vm.message.clone());
        // Also when it is what it was before: the host was short of something.
        note_end(&mut self.vm, State::Failed, error.reason());
        if let Err(error) = self.change(state, &reason, &message, Kind::Updated, |_| {}).await {
            tracing::error!(vm = %self.name, %error, "the next start's time could not be stored");
        }
    }
}

/// Sleeps until the policy is due; for ever if it is not.
pub(super) async fn due(recovered: tokio_util::sync::CancellationToken, wait: Option<Duration>) {
    match wait {
        Some(wait) => {
            recovered.cancelled().await;
            tokio::time::sleep(wait).await;
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_in_the_record() {
        let spec = vpmu_proto::api::VirtualMachineSpec {
            restart_policy: RestartPolicy::OnFailure.into(),
            ..Default::default()
        };
        let mut vm = VirtualMachine { spec: Some(spec), ..VirtualMachine::default() };
        vm.set_desired_state(DesiredState::Running);
        note(&mut vm, Event::Running { now: 1_700_000_000_123 });
        assert_eq!(vm.last_start_time.as_ref().map(to_ms), Some(1_700_000_000_123));
        note_end(&mut vm, State::Failed, "WORKER_DIED");
        assert!(vm.next_restart_time.is_some() && vm.restart_row == 1);
        note(&mut vm, Event::Begun);
        assert_eq!((vm.restart_count, vm.next_restart_time.is_none()), (1, true));
        for reason in NEVER_AFTER {
            note_end(&mut vm, State::Failed, reason);
            assert!(vm.next_restart_time.is_none(), "{reason}");
        }
        vm.set_desired_state(DesiredState::Paused);
        note_end(&mut vm, State::Failed, "WORKER_DIED");
        assert!(vm.next_restart_time.is_none(), "a paused machine is not made to run");
        note(&mut vm, Event::ByUser);
        assert_eq!((vm.restart_count, vm.restart_row), (0, 0));
    }
}
