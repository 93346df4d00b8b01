//! Whether a migration turns to post-copy: pre-copy cannot meet the goals, it is allowed, and the destination can.
//!
//! ```text
//! Copying ──gave up on time or rounds, or does not converge with all throttling used──▶ On   (allow_postcopy)
//!    └────first round over, goal unmet──▶ On                                                (mode POSTCOPY)
//! ```
//! There is no way back: what was taken from the dirty log then is sent once, after the machine has moved.

use super::actions::Actions;
use super::outgoing::Source;
use crate::dataplane::Outgoing;
use crate::dataplane::frame::Kind;
use crate::dataplane::precopy::{Decision, GiveUp, Verdict};

/// See the module.
pub(super) struct Switch {
    /// Asked for, not only allowed.
    asked: bool,
    allowed: bool,
    on: bool,
}

/// How a decision is called in the history.
fn code(decision: Decision) -> &'static str {
    match decision {
        Decision::NextRound { voluntary: false } => "NEXT_ROUND",
        Decision::NextRound { voluntary: true } => "ANOTHER_ROUND",
        Decision::Converged => "CONVERGED",
        Decision::GiveUp(_) => "GIVE_UP",
    }
}

impl Switch {
    /// Says so if the destination cannot.
    pub(super) fn new(source: &Source, out: &Outgoing, actions: &mut Actions) -> Self {
        let wanted = source.postcopy || source.allow_postcopy;
        let able = out.version() >= Kind::Want.since();
        if wanted && !able {
            let detail = format!(
                "none: the destination speaks data protocol {} (it is older, has no userfaultfd for this machine, or its memory is in huge pages); copying goes on as long as it may",
                out.version()
            );
            actions.note("POSTCOPY_UNAVAILABLE", detail);
        }
        Self { asked: source.postcopy && able, allowed: wanted && able, on: false }
    }

    /// Whether it has turned.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// Takes in a round's verdict and notes it; whether it turns now. `exhausted`: throttling can do no more.
    pub(super) fn step(&mut self, verdict: &Verdict, exhausted: bool, actions: &mut Actions) -> bool {
        if self.on {
            return false;
        }
        actions.note(code(verdict.decision), verdict.why.clone());
        let gave_up = matches!(verdict.decision, Decision::GiveUp(GiveUp::Duration | GiveUp::Rounds));
        let unmet = matches!(verdict.decision, Decision::NextRound { voluntary: false }) || gave_up;
        let hopeless = gave_up || (verdict.stalled && exhausted);
        self.on = unmet && (self.asked || (self.allowed && hopeless));
        if self.on {
            let why = if self.asked { "asked for" } else { "pre-copy cannot meet the goals" };
            let detail =
                format!("the machine moves first and the rest of its memory follows: {why}; {}", verdict.why);
            actions.note("POSTCOPY", detail);
        }
        self.on
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::precopy::Prediction;

    fn verdict(decision: Decision, stalled: bool) -> Verdict {
        Verdict { decision, prediction: Prediction::default(), stalled, why: "because".to_owned() }
    }

    #[test]
    fn it_turns_only_where_it_is_allowed_and_nothing_else_helps() {
        let next = Decision::NextRound { voluntary: false };
        let out_of_time = Decision::GiveUp(GiveUp::Duration);
        let turns = |asked, allowed, verdict: &Verdict, exhausted| {
            Switch { asked, allowed, on: false }.step(verdict, exhausted, &mut Actions::new())
        };
        assert!(turns(false, true, &verdict(next, true), true));
        assert!(!turns(false, true, &verdict(next, true), false), "throttling may still help");
        assert!(!turns(false, true, &verdict(next, false), true), "it may still converge");
        assert!(turns(false, true, &verdict(out_of_time, false), false), "there is no time left");
        assert!(!turns(false, false, &verdict(out_of_time, true), true), "never unless allowed");
        assert!(!turns(false, true, &verdict(Decision::Converged, true), true), "it need not");
        assert!(!turns(false, true, &verdict(Decision::NextRound { voluntary: true }, true), true));
        assert!(
            !turns(true, true, &verdict(Decision::GiveUp(GiveUp::FixedCost), true), true),
            "it would not help"
        );
        assert!(turns(true, true, &verdict(next, false), false), "asked for");
    }

    #[test]
    fn it_says_so_once_and_has_no_way_back() {
        let (mut switch, mut actions) = (Switch { asked: false, allowed: true, on: false }, Actions::new());
        let next = Decision::NextRound { voluntary: false };
        assert!(!switch.step(&verdict(next, false), true, &mut actions));
        assert!(switch.step(&verdict(next, true), true, &mut actions));
        assert!(!switch.step(&verdict(Decision::Converged, false), true, &mut actions) && switch.is_on());
        let codes: Vec<_> = actions.list().into_iter().map(|a| a.code).collect();
        assert_eq!(codes, ["NEXT_ROUND", "POSTCOPY"]);
    }
}
