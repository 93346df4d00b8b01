//! What must hold: in every state, and in the one that a world comes to without more faults.
//!
//! Some faults are seen only where they are made, and noted there: see [`Sim::wrong`].

use super::Side::{Dst, Src};
use super::Sim;
use super::actions::Action;
use super::actors::Task;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::force;

impl Sim {
    /// What must hold in every state.
    pub(super) fn look(&mut self) {
        if self.sw.running && self.dw.running {
            self.wrong = Some("two live grants");
        }
        for worker in [&self.sw, &self.dw] {
            if worker.running && worker.copy != Some(self.newest) {
                self.wrong = Some("runs from an older state");
            }
        }
    }

    /// From here without faults: `None` if all is well within so many steps, else what is not.
    pub(crate) fn heal(&self, steps: usize) -> Option<&'static str> {
        use Action as A;
        let (mut sim, torn) = (self.clone(), self.is_torn() && !self.given_up);
        for n in 0..steps {
            if sim.wrong.is_some() {
                return sim.wrong;
            }
            let mut next: Vec<_> = sim
                .actions()
                .into_iter()
                .filter(|a| !a.is_fault() && !matches!(a, A::Begin | A::Execute(_)))
                .collect();
            // Questions are repeated for ever: everything else first, then both sides in turn.
            next.sort_by_key(|a| match a {
                A::Restart(_) => 0,
                A::Task(_, Task::Ask) => 2,
                _ => 1,
            });
            let asks = next.iter().all(|a| matches!(a, A::Task(_, Task::Ask)));
            let Some(&action) = next.get(if asks { n % next.len().max(1) } else { 0 }) else { break };
            sim = sim.next(action);
        }
        if sim.wrong.is_some() {
            return sim.wrong;
        }
        if sim.held(Src).is_some_and(|r| r.phase() == Phase::HandedOver) {
            return Some("a tombstone waits for ever");
        }
        if torn && (sim.running_on().is_some() || sim.dw.alive) {
            return Some("it goes on without a part of its memory");
        }
        if sim.running_on().is_some() && sim.waits_for_pages() {
            return Some("its memory never follows");
        }
        match (sim.running_on(), sim.copy_is_left()) {
            (Some(Src), _) if sim.dw.alive => Some("a copy is left over at the destination"),
            (Some(Dst), _) if sim.sw.alive => Some("a copy is left over at the source"),
            (None, _) if sim.given_up => None,
            // Its last owner's directory gave it up, and says so.
            (None, false) if [Src, Dst].iter().any(|s| sim.held(*s).and_then(force::token).is_some()) => None,
            (None, true) => Some("a current copy exists and nobody runs it"),
            (None, false) if !sim.sd.failed && !sim.dd.failed && !sim.arrived_dead() => {
                Some("lost, and nobody says so")
            }
            _ => None,
        }
    }
}
