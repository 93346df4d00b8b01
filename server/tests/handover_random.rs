//! Random walks through the handover's world: deep ones, with any number of faults.

mod handover_sim;

use handover_sim::{Action, Side, Sim};
use proptest::prelude::*;

/// Walks by the numbers; returns the world and the way to it.
fn walk(choices: &[u16], mut sim: Sim) -> (Sim, Vec<Action>) {
    let mut path = Vec::new();
    for &choice in choices {
        let actions = sim.actions();
        let Some(&action) = actions.get(usize::from(choice) % actions.len().max(1)) else { break };
        path.push(action);
        sim = sim.next(action);
        if sim.wrong.is_some() {
            break;
        }
    }
    (sim, path)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn never_two_and_never_none(choices in prop::collection::vec(any::<u16>(), 0..70), faults in 0u8..6) {
        for begin in [Sim::new(faults), Sim::following(faults)] {
            let (sim, path) = walk(&choices, begin);
            prop_assert_eq!(sim.wrong, None, "after {:?}\n{:#?}", path, sim);
            prop_assert_eq!(sim.heal(300), None, "after {:?}\n{:#?}", path, sim);
        }
    }
}

#[test]
fn without_faults_it_moves() {
    for mut sim in [Sim::new(0), Sim::following(0)] {
        sim = sim.next(Action::Begin);
        for _ in 0..100 {
            let Some(action) = sim.actions().into_iter().find(|a| !matches!(a, Action::Execute(_))) else {
                break;
            };
            sim = sim.next(action);
            assert_eq!(sim.wrong, None);
        }
        assert!(sim.moved() && sim.running_on() == Some(Side::Dst), "{sim:#?}");
    }
}
