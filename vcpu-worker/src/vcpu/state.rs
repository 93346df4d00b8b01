//! The life of one vCPU thread as a pure table.
//!
//! ```text
//!              Run                    GuestEnded
//!   ┌────────┐ ────────────▶ ┌─────────┐ ────────▶ ┌───────┐
//!   │ Paused │               │ Running │           │ Ended │
//!   └────────┘ ◀──────────── └─────────┘           └───────┘
//!      │   Pause, RightLost      │ Stop                │ Stop
//!      └──────── Stop ───────────┴──────▶ Gone ◀───────┘
//! ```
//!
//! Going to another core (`Place`) leaves the state what it is, with the PMU put on the old one first.
//!
//! Invariants: every way out of Running finishes a half-done instruction (which may touch the PMU) and then puts
//! the PMU; state is read and written in Paused only; Gone is final.

use super::request::RequestKind;

/// Where a vCPU thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Out of the guest, PMU put, waiting for requests.
    Paused,
    /// In the run loop.
    Running,
    /// The guest ended by itself; registers can still be described, nothing runs again.
    Ended,
    /// The thread is ending.
    Gone,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A request arrived.
    Request(RequestKind),
    /// The guest shut down, reset, or could not go on.
    GuestEnded,
    /// The right to run is over.
    RightLost,
}

/// What the thread does about it, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Put the PMU and give up the core token.
    Put,
    /// Let a half-done instruction finish.
    FinishPending,
    /// Publish the PMU image without putting.
    Sync,
    /// Do what the request asks and answer it.
    Serve,
    /// Tell the machine that this vCPU left the guest by itself.
    Announce,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{asked:?} is not possible while the vCPU is {state:?}: {remedy}")]
pub struct Refusal {
    /// What was asked.
    pub asked: RequestKind,
    /// Where the vCPU was.
    pub state: State,
    /// What to do.
    pub remedy: &'static str,
}

impl Refusal {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self.state {
            State::Paused => "VCPU_PAUSED",
            State::Running => "VCPU_RUNNING",
            State::Ended => "GUEST_ENDED",
            State::Gone => "VCPU_GONE",
        }
    }
}

/// One step: where it goes and what it does, or why not (then it stays).
pub fn step(state: State, event: Event) -> Result<(State, &'static [Effect]), Refusal> {
    use Effect::{Announce, FinishPending, Put, Serve, Sync};
    use RequestKind::{Audit, Load, Look, Pause, Place, Run, Save, Stop};
    let refuse = |asked, remedy| Err(Refusal { asked, state, remedy });
    match (state, event) {
        (State::Paused, Event::Request(Pause | Look | Save | Load | Place | Audit)) => {
            Ok((State::Paused, &[Serve]))
        }
        (State::Paused | State::Ended, Event::Request(Stop)) => Ok((State::Gone, &[Serve])),

        (State::Paused | State::Running, Event::Request(Run)) => Ok((State::Running, &[Serve])),
        (State::Running, Event::Request(Look)) => Ok((State::Running, &[Sync, Serve])),
        (State::Running, Event::Request(Place | Audit)) => Ok((State::Running, &[Put, Serve])),
        (State::Running, Event::Request(Pause)) => Ok((State::Paused, &[FinishPending, Put, Serve])),
        (State::Running, Event::Request(Stop)) => Ok((State::Gone, &[FinishPending, Put, Serve])),
        (State::Running, Event::Request(asked @ (Save | Load))) => refuse(asked, "pause it first"),
        (State::Running, Event::GuestEnded) => Ok((State::Ended, &[Put, Announce])),
        (State::Running, Event::RightLost) => Ok((State::Paused, &[FinishPending, Put, Announce])),

        (State::Ended, Event::Request(Pause | Look | Audit)) => Ok((State::Ended, &[Serve])),
        (State::Ended, Event::Request(asked)) => refuse(asked, "the guest has ended: start the VM again"),
        (State::Gone, Event::Request(asked)) => refuse(asked, "its thread has ended"),
        // Only a running vCPU can end or lose its right; anything else already is where that leads.
        (State::Paused | State::Ended | State::Gone, Event::GuestEnded | Event::RightLost) => {
            Ok((state, &[]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use RequestKind::{Audit, Load, Look, Pause, Place, Run, Save, Stop};

    const STATES: [State; 4] = [State::Paused, State::Running, State::Ended, State::Gone];
    const EVENTS: [Event; 10] = [
        Event::Request(Run),
        Event::Request(Pause),
        Event::Request(Look),
        Event::Request(Save),
        Event::Request(Load),
        Event::Request(Place),
        Event::Request(Audit),
        Event::Request(Stop),
        Event::GuestEnded,
        Event::RightLost,
    ];

    #[test]
    fn leaving_the_guest_puts_the_pmu() {
        for event in EVENTS {
            if let Ok((next, effects)) = step(State::Running, event)
                && next != State::Running
            {
                let rest: Vec<_> = effects.iter().filter(|e| **e != Effect::FinishPending).collect();
                assert_eq!(rest.first(), Some(&&Effect::Put), "{event:?}");
                assert!(!effects.iter().skip(1).any(|e| *e == Effect::FinishPending), "{event:?}");
            }
        }
    }

    /// State may be read in Paused: what an exit left half done is finished on every way there.
    #[test]
    fn nothing_is_half_done_where_state_may_be_read() {
        for event in EVENTS {
            if let Ok((State::Paused | State::Gone, effects)) = step(State::Running, event) {
                assert_eq!(effects.first(), Some(&Effect::FinishPending), "{event:?}");
            }
        }
        let ways =
            EVENTS.iter().filter(|event| matches!(step(State::Running, **event), Ok((State::Paused, _))));
        assert_eq!(ways.count(), 2, "a pause, and the right that is lost");
    }

    #[test]
    fn a_core_is_left_with_its_pmu_put() {
        assert_eq!(
            step(State::Running, Event::Request(Place)),
            Ok((State::Running, [Effect::Put, Effect::Serve].as_slice()))
        );
        assert!(step(State::Ended, Event::Request(Place)).is_err());
    }

    #[test]
    fn state_is_touched_only_when_paused() {
        for state in STATES {
            for kind in [Save, Load] {
                assert_eq!(
                    step(state, Event::Request(kind)).is_ok(),
                    state == State::Paused,
                    "{state:?} {kind:?}"
                );
            }
        }
    }

    #[test]
    fn gone_is_final_and_ended_never_runs_again() {
        for event in EVENTS {
            if let Ok((next, _)) = step(State::Gone, event) {
                assert_eq!(next, State::Gone);
            }
            if let Ok((next, _)) = step(State::Ended, event) {
                assert!(matches!(next, State::Ended | State::Gone));
            }
        }
    }

    #[test]
    fn every_accepted_request_is_answered_exactly_once() {
        for state in STATES {
            for event in EVENTS {
                if let Ok((_, effects)) = step(state, event) {
                    let served = effects.iter().filter(|e| **e == Effect::Serve).count();
                    assert_eq!(
                        served,
                        usize::from(matches!(event, Event::Request(_))),
                        "{state:?} {event:?}"
                    );
                    assert!(served == 0 || effects.last() == Some(&Effect::Serve));
                }
            }
        }
    }
}
