//! Where the machine came to: both hosts say so, they agree, and it is what the cell expects. At no time runs it on both.

use std::time::{Duration, Instant};

use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

use super::super::cell::{Cell, Fault, Got, Scene};
use super::{DEADLINE, Extra, Host, World, name, one, options};

impl World {
    /// Waits until both say where it is, and they agree.
    pub(super) async fn settle(&mut self, cell: Cell, extra: Extra) -> (Got, String) {
        let begin = Instant::now();
        let (mut last, mut restarted) = (None, false);
        let at_rest = |s: State| matches!(s, State::Stopped | State::Failed | State::Running | State::Paused);
        loop {
            let (a, b) = (one(&self.a).await, one(&self.b).await);
            let state = |vm: &Option<VirtualMachine>| vm.as_ref().map(VirtualMachine::observed_state);
            let (sa, sb) = (state(&a), state(&b));
            assert!(
                sa != Some(State::Running) || sb != Some(State::Running),
                "{cell}: it runs on both hosts: {a:?} {b:?}"
            );
            let owner = match (sa, sb) {
                (Some(State::Moved), Some(s)) if at_rest(s) && seen(b.as_ref()) => Some((Got::Dst, s, &b)),
                (Some(s), None | Some(State::Moved)) if at_rest(s) && seen(a.as_ref()) => {
                    Some((Got::Src, s, &a))
                }
                _ => None,
            };
            // With pages to come it is not known yet whether they do.
            let owner = match owner {
                Some((Got::Dst, State::Running, _))
                    if cell.scene == Scene::Follow && !self.is_whole(&self.b).await =>
                {
                    None
                }
                owner => owner,
            };
            // Twice the same, a little apart: states in passing are no answer.
            let shown = (owner.as_ref().map(|(got, s, _)| (*got, *s)), sa, sb);
            let steady = last.replace(shown) == Some(shown);
            if let Some((got, s, vm)) = owner.filter(|_| steady) {
                let got = if s == State::Running { got } else { Got::Lost };
                let reason = vm.as_ref().map(|vm| vm.reason.clone()).unwrap_or_default();
                assert!(
                    cell.expected().contains(&got),
                    "{cell}: expected {:?}, and it is {got:?}: source {sa:?}, destination {sb:?} {reason}",
                    cell.expected()
                );
                return (got, reason);
            }
            assert!(
                begin.elapsed() < DEADLINE,
                "{cell}: it does not settle: source {a:?}, destination {b:?}"
            );
            if let Fault::Disk(who) = cell.fault
                && !restarted
                && begin.elapsed() > Duration::from_secs(3)
            {
                // A store whose writes failed only reads until its daemon is started again.
                restarted = true;
                let options = options(cell, extra);
                let options: Vec<_> = options.iter().map(String::as_str).collect();
                self.host(who).kill().await;
                self.host(who).restart_with(&options).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Whether all of its memory has followed.
    async fn is_whole(&self, host: &Host) -> bool {
        let request = GetVirtualMachineStatsRequest { name: name("vm") };
        let stats = host.vms().await.get_virtual_machine_stats(request).await;
        stats.is_ok_and(|s| s.into_inner().arriving_memory.is_some_and(|m| m.missing_pages == 0))
    }
}

/// What is shown is not older than the worker's death.
fn seen(vm: Option<&VirtualMachine>) -> bool {
    vm.is_none_or(|vm| vm.worker_pid == 0 || Identity::of(vm.worker_pid).is_ok())
}
