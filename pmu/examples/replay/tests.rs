//! The documented examples, replayed.

use serde_json::{Value, json};

use crate::engine::Engine;

fn run(lines: &[Value]) -> Vec<Value> {
    let mut engine = Engine::default();
    lines.iter().map(|line| engine.line(&line.to_string()).to_json()).collect()
}

const INSTRUCTIONS: u64 = 0x43_00C0;

fn host() -> Value {
    json!({"op":"host","vendor":"intel","version":5,"gp":8,"fixed":4,"gp_width":48,"fixed_width":48})
}

fn guest(id: &str, policy: &str) -> Value {
    json!({"op":"guest","id":id,"gp":8,"fixed":3,"policy":policy})
}

fn wr(id: &str, msr: u32, value: u64) -> Value {
    json!({"op":"guest_wrmsr","id":id,"msr":msr,"value":value})
}

fn rd(id: &str, msr: u32) -> Value {
    json!({"op":"guest_rdmsr","id":id,"msr":msr})
}

#[test]
fn one_counter_from_clean_start_to_scrub() {
    let out = run(&[
        host(),
        guest("a", "strict"),
        wr("a", 0x186, INSTRUCTIONS),
        wr("a", 0x38F, 1),
        json!({"op":"load","id":"a"}),
        json!({"op":"count","events":{"instructions":1000}}),
        rd("a", 0xC1),
        json!({"op":"put","id":"a"}),
        rd("a", 0xC1),
        json!({"op":"hw_read","msr":0x186}),
        json!({"op":"load","id":"a"}),
    ]);
    assert_eq!(out[2], json!({"ok":true,"accesses":[],"pmi":0}));
    let clean = out[4]["accesses"].as_array().expect("accesses");
    assert_eq!(clean.first(), Some(&json!(["wrmsr", 0x38F, 0])));
    // K, 8 selectors, fixed control, 8 + 4 counters, status read; then the selector and K.
    assert_eq!(clean.len(), 1 + 8 + 1 + 12 + 1 + 2);
    assert_eq!(clean[clean.len() - 2..], [json!(["wrmsr", 0x186, INSTRUCTIONS]), json!(["wrmsr", 0x38F, 1])]);
    assert_eq!(out[6], json!({"ok":true,"value":1000,"accesses":[["rdpmc",0,1000]],"pmi":0}));
    assert_eq!(
        out[7]["accesses"],
        json!([["wrmsr", 0x38F, 0], ["rdpmc", 0, 1000], ["wrmsr", 0x186, 0], ["wrmsr", 0x4C1, 0]])
    );
    assert_eq!(out[8], json!({"ok":true,"value":1000,"accesses":[],"pmi":0}));
    assert_eq!(out[9]["value"], 0);
    assert_eq!(
        out[10]["accesses"],
        json!([["wrmsr", 0x4C1, 1000], ["wrmsr", 0x186, INSTRUCTIONS], ["wrmsr", 0x38F, 1]])
    );
}

#[test]
fn an_overflow_interrupts_once() {
    let out = run(&[
        host(),
        guest("a", "strict"),
        wr("a", 0x186, INSTRUCTIONS | 1 << 20),
        wr("a", 0x4C1, (1 << 48) - 100),
        wr("a", 0x38F, 1),
        json!({"op":"load","id":"a"}),
        json!({"op":"count","events":{"instructions":150}}),
        rd("a", 0x38E),
        json!({"op":"put","id":"a"}),
        rd("a", 0x38E),
        wr("a", 0x390, 1),
        rd("a", 0x38E),
    ]);
    assert_eq!(out[7]["value"], 1);
    assert_eq!(out[8]["pmi"], 1);
    assert_eq!(out[9]["value"], 1);
    assert_eq!(out[11]["value"], 0);
}

#[test]
fn a_write_to_a_live_counter_is_wrapped() {
    let out = run(&[
        host(),
        guest("a", "strict"),
        wr("a", 0x186, INSTRUCTIONS),
        wr("a", 0x38F, 1),
        json!({"op":"load","id":"a"}),
        json!({"op":"count","events":{"instructions":7}}),
        wr("a", 0x4C1, 500),
        wr("a", 0x187, 0x43_003C),
        wr("a", 0x186, 0),
        rd("a", 0xC1),
    ]);
    assert_eq!(
        out[6]["accesses"],
        json!([["wrmsr", 0x38F, 0], ["rdpmc", 0, 7], ["wrmsr", 0x4C1, 500], ["wrmsr", 0x38F, 1]])
    );
    assert_eq!(out[7]["accesses"], json!([]), "counter 1 has no control bit, so it is not live");
    assert_eq!(out[8]["accesses"], json!([["wrmsr", 0x38F, 0], ["rdpmc", 0, 500], ["wrmsr", 0x186, 0]]));
    assert_eq!(out[9], json!({"ok":true,"value":500,"accesses":[],"pmi":0}));
}

#[test]
fn lazy_guests_take_turns() {
    let program = |id: &str| vec![guest(id, "lazy"), wr(id, 0x186, INSTRUCTIONS), wr(id, 0x38F, 1)];
    let mut lines = vec![host()];
    lines.extend(program("a"));
    lines.extend(program("b"));
    lines.extend([
        json!({"op":"load","id":"a"}),
        json!({"op":"load","id":"b"}),
        json!({"op":"count","events":{"instructions":10}}),
        json!({"op":"put","id":"a"}),
        json!({"op":"load","id":"a"}),
        json!({"op":"put","id":"a"}),
        json!({"op":"load","id":"b"}),
        json!({"op":"count","events":{"instructions":3}}),
        json!({"op":"put","id":"b"}),
        rd("a", 0xC1),
        rd("b", 0xC1),
    ]);
    let out = run(&lines);
    assert_eq!(out[8], json!({"ok":false,"error":"busy","accesses":[],"pmi":0}));
    assert_eq!(out[10]["accesses"], json!([["wrmsr", 0x38F, 0]]));
    assert_eq!(out[11]["accesses"], json!([["wrmsr", 0x38F, 1]]));
    assert_eq!(out[13]["accesses"], json!([["rdpmc", 0, 10], ["wrmsr", 0x4C1, 0], ["wrmsr", 0x38F, 1]]));
    assert_eq!(out[16]["value"], 10);
    assert_eq!(out[17]["value"], 3);
    assert_eq!(out[17]["accesses"], json!([["rdpmc", 0, 3]]));
}

#[test]
fn a_failed_access_is_the_last_one_and_a_retry_repeats() {
    let out = run(&[
        host(),
        guest("a", "strict"),
        wr("a", 0x186, INSTRUCTIONS),
        wr("a", 0x38F, 1),
        json!({"op":"load","id":"a"}),
        json!({"op":"count","events":{"instructions":5}}),
        json!({"op":"fail_access","n":2}),
        json!({"op":"put","id":"a"}),
        json!({"op":"put","id":"a"}),
        rd("a", 0xC1),
    ]);
    assert_eq!(
        out[7],
        json!({"ok":false,"error":"hw","accesses":[["wrmsr",0x38F,0],["rdpmc",0,null]],"pmi":0})
    );
    assert_eq!(out[8]["ok"], true);
    assert_eq!(out[9]["value"], 5);
}

#[test]
fn a_pmi_that_the_guest_has_cleared_already_is_not_in_service() {
    let count = |n: u64| json!({"op":"count","events":{"instructions":n}});
    let out = run(&[
        host(),
        guest("a", "strict"),
        wr("a", 0x186, INSTRUCTIONS | 1 << 20),
        wr("a", 0x4C1, (1 << 48) - 100),
        wr("a", 0x38F, 1),
        json!({"op":"load","id":"a"}),
        count(150),
        wr("a", 0x390, 1),
        wr("a", 0x4C1, (1 << 48) - 100),
        count(150),
        json!({"op":"put","id":"a"}),
    ]);
    assert_eq!((&out[7]["pmi"], &out[10]["pmi"]), (&json!(1), &json!(1)));
}

#[test]
fn a_guest_narrower_than_its_host_sees_every_wrap() {
    let count = |n: u64| json!({"op":"count","events":{"instructions":n}});
    let out = run(&[
        host(),
        json!({"op":"guest","id":"a","gp":1,"fixed":0,"gp_width":32,"fixed_width":32}),
        wr("a", 0x186, INSTRUCTIONS),
        wr("a", 0x38F, 1),
        wr("a", 0x4C1, 0xFFFF_FFFF),
        json!({"op":"load","id":"a"}),
        count(1),
        rd("a", 0x38E),
        wr("a", 0x390, 1),
        count(1 << 32),
        rd("a", 0x38E),
        json!({"op":"put","id":"a"}),
        rd("a", 0x38E),
    ]);
    assert_eq!((&out[7]["value"], &out[10]["value"], &out[12]["value"]), (&json!(1), &json!(1), &json!(1)));
}

#[test]
fn bad_lines_are_answered_and_the_stream_goes_on() {
    let mut engine = Engine::default();
    for line in [
        "nonsense",
        "{}",
        r#"{"op":"load"}"#,
        r#"{"op":"load","id":"a"}"#,
        r#"{"op":"fly"}"#,
        r#"{"op":"host","vendor":"via","version":1,"gp":1}"#,
    ] {
        assert_eq!(engine.line(line).to_json()["ok"], false, "{line}");
    }
    assert_eq!(engine.line(&host().to_string()).to_json()["ok"], true);
    assert_eq!(engine.line(r#"{"op":"guest","id":"a","gp":9}"#).to_json()["ok"], false);
    assert_eq!(engine.line(&guest("a", "strict").to_string()).to_json()["ok"], true);
    let fault = engine.line(&wr("a", 0x38E, 1).to_string()).to_json();
    assert_eq!(fault, json!({"ok":false,"fault":"#GP","accesses":[],"pmi":0}));
}

mod random {
    use proptest::prelude::*;
    use serde_json::json;

    use super::{Engine, guest, host};

    fn line() -> impl Strategy<Value = String> {
        let id = prop::sample::select(vec!["a", "b", "c"]);
        let msr = prop::sample::select(vec![
            0xC1u32, 0x4C1, 0x186, 0x309, 0x38D, 0x38E, 0x38F, 0x390, 0x391, 0x392, 0x10,
        ]);
        prop_oneof![
            (id.clone(), msr.clone(), any::<u64>())
                .prop_map(|(id, msr, value)| json!({"op":"guest_wrmsr","id":id,"msr":msr,"value":value}).to_string()),
            (id.clone(), msr.clone()).prop_map(|(id, msr)| json!({"op":"guest_rdmsr","id":id,"msr":msr}).to_string()),
            (id.clone(), any::<bool>())
                .prop_map(|(id, load)| json!({"op": if load { "load" } else { "put" }, "id": id}).to_string()),
            any::<u64>().prop_map(|n| json!({"op":"count","events":{"instructions":n,"cycles":n/2}}).to_string()),
            (msr, any::<u64>()).prop_map(|(msr, value)| json!({"op":"host_set","msr":msr,"value":value}).to_string()),
            (0u64..40).prop_map(|n| json!({"op":"fail_access","n":n}).to_string()),
            ".{0,40}",
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        /// The body of the fuzz target `replay`: every line is answered, and K is 0 whenever nobody is loaded.
        #[test]
        fn every_line_is_answered(lines in prop::collection::vec(line(), 0..60)) {
            let mut engine = Engine::default();
            for line in [host(), guest("a", "strict"), guest("b", "lazy")] {
                engine.line(&line.to_string());
            }
            for line in lines {
                prop_assert!(engine.line(&line).to_json()["ok"].is_boolean());
            }
        }
    }
}
