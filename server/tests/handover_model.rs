//! The handover model-checked: every order of events with a bounded number of faults, over the daemon's own state
//! machines.
//!
//! `cargo test` explores every order with two faults, once for machines whose memory goes before and once for those whose
//! memory follows (post-copy). `VPMU_MODEL_FAULTS=3 VPMU_MODEL_STATES=10000000 cargo test -p
//! vpmu-server --test handover_model -- --nocapture` goes on to the end and prints the counts.

mod handover_sim;

use handover_sim::{Action, Sim};
use stateright::{Checker, Model, Property};

struct Handover {
    faults: u8,
    /// Memory follows after the machine has moved.
    postcopy: bool,
}

impl Model for Handover {
    type State = Sim;
    type Action = Action;

    fn init_states(&self) -> Vec<Sim> {
        vec![if self.postcopy { Sim::following(self.faults) } else { Sim::new(self.faults) }]
    }

    fn actions(&self, state: &Sim, actions: &mut Vec<Action>) {
        // A world that has gone wrong is looked at, not continued.
        if state.wrong.is_none() {
            actions.extend(state.actions());
        }
    }

    fn next_state(&self, state: &Sim, action: Action) -> Option<Sim> {
        Some(state.next(action)).filter(|next| next != state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::<Self>::always("never two, never old, never before its record", |_, s| {
                s.wrong.is_none()
            }),
            Property::<Self>::always("heals within 300 steps", |_, s| s.heal(300).is_none()),
            Property::<Self>::sometimes("moves", |_, s| s.moved()),
            Property::<Self>::sometimes("is given back", |_, s| s.returned() && s.running_on().is_some()),
            Property::<Self>::sometimes("is lost", |_, s| !s.copy_is_left()),
            Property::<Self>::sometimes("is forced, and the copy goes on", |_, s| {
                s.forced && s.running_on().is_some() && !s.afresh
            }),
            Property::<Self>::sometimes("comes back and gives way", |_, s| s.gave_way),
            Property::<Self>::sometimes("starts afresh", |_, s| s.afresh),
        ];
        if self.postcopy {
            all.push(Property::<Self>::sometimes("is torn", |_, s| s.is_torn()));
            all.push(Property::<Self>::sometimes("ends for want of its memory", |_, s| {
                s.starved && s.running_on().is_none() && !s.copy_is_left()
            }));
            all.push(Property::<Self>::sometimes("starts afresh after it was torn", |_, s| {
                s.starved && s.afresh && s.running_on().is_some()
            }));
        }
        all
    }
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Explores, and fails with the way to what must not be.
fn check(postcopy: bool, states: usize) -> impl Checker<Handover> {
    let faults = u8::try_from(number("VPMU_MODEL_FAULTS", 2)).expect("few faults");
    assert!(faults >= 2, "VPMU_MODEL_FAULTS={faults}: with fewer than 2 not all that must be reachable is");
    let states = number("VPMU_MODEL_STATES", states);
    let started = std::time::Instant::now();
    let model = Handover { faults, postcopy };
    let checker = model.checker().threads(2).target_state_count(states).spawn_bfs().join();
    println!(
        "postcopy {postcopy}, faults {faults}: {} states, {} unique, depth {}, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f64()
    );
    for (name, path) in checker.discoveries() {
        if name.starts_with("never") || name.starts_with("heals") {
            let last = path.last_state().clone();
            panic!("{name}: {:?} / {:?}\n{:?}\n{last:#?}", last.wrong, last.heal(300), path.into_actions());
        }
    }
    checker.assert_any_discovery("moves");
    checker.assert_any_discovery("is lost");
    checker.assert_any_discovery("starts afresh");
    if faults > 2 {
        checker.assert_any_discovery("comes back and gives way");
    }
    checker
}

#[test]
fn the_handover_holds_in_every_order() {
    let checker = check(false, 200_000);
    if checker.model().faults > 2 {
        checker.assert_any_discovery("is forced, and the copy goes on");
    }
}

#[test]
fn a_post_copy_holds_in_every_order() {
    let checker = check(true, 300_000);
    checker.assert_any_discovery("is torn");
    checker.assert_any_discovery("ends for want of its memory");
    checker.assert_any_discovery("starts afresh after it was torn");
}
