//! `vpmud host check` tries whether the kernel shares processors fairly between sessions, where it shares by session.

#![allow(missing_docs)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use serde_json::Value;

fn vpmud() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vpmud"))
}

#[test]
fn the_check_says_what_two_sessions_got() {
    let output =
        vpmud().args(["host", "check", "--pmu", "model", "--output", "json"]).output().expect("runs");
    assert!(output.status.success(), "{output:?}");
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let lines = all["lines"].as_array().expect("lines");
    let line = lines.iter().find(|line| line["id"] == "session_shares").expect("session_shares");
    let (level, message) =
        (line["level"].as_str().expect("level"), line["message"].as_str().expect("message"));
    let switch = std::fs::read_to_string("/proc/sys/kernel/sched_autogroup_enabled").unwrap_or_default();
    if switch.trim() != "1" {
        assert_eq!((level, message), ("ok", "the processors are not shared by session"));
    } else if vcpu_worker::host::probe().allowed_cores.len() < 2 {
        assert_eq!(level, "warning");
        assert!(message.ends_with("it takes two processors to try"), "{message}");
    } else {
        let words: Vec<_> = message.split(' ').collect();
        let at = words.iter().position(|word| word.starts_with('%')).expect("a share in hundredths");
        let percent: f64 = words[at - 1].parse().expect("a number");
        // Of two that get the same this one has 50; a quarter of the other's is 20.
        assert_eq!(level, if percent >= 20.0 { "ok" } else { "warning" }, "{message}");
        let remedy = line["remedy"].as_str().expect("remedy");
        assert_eq!(level == "warning", remedy.contains("kernel.sched_autogroup_enabled=0"), "{remedy}");
    }
}

#[test]
fn a_rival_competes_when_it_is_told_and_ends_with_who_started_it() {
    let core = vcpu_worker::host::probe().allowed_cores[0].to_string();
    for role in ["compute", "turns"] {
        for told in [true, false] {
            let mut rival = vpmud()
                .args(["host", "rival", "--role", role, "--core", &core, "--other-core", &core])
                .args(["--milliseconds", "50"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("runs");
            let mut input = rival.stdin.take().expect("input");
            let mut said = BufReader::new(rival.stdout.take().expect("output")).lines();
            assert_eq!(said.next().expect("a line").expect("read"), "ready");
            if told {
                input.write_all(b"go\n").expect("written");
            }
            drop(input);
            let got = said.next().map(|line| line.expect("read").parse::<u64>().expect("ns"));
            assert!(rival.wait().expect("ends").success());
            assert_eq!(got.is_some(), told, "{role}");
            assert!(got.is_none_or(|ns| ns > 0), "{role}: {got:?}");
        }
    }
}

#[test]
fn what_deploy_sets_is_a_switch_of_the_kernel() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/60-vpmud.conf");
    let text = std::fs::read_to_string(file).expect("the file");
    let set: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(set, ["kernel.sched_autogroup_enabled = 0"]);
}
