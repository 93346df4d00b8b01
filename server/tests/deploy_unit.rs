//! The systemd unit as it is shipped: what it promises of machines over a restart of the daemon, that its command lines are
//! ones that this vpmud takes, and which defaults it does not rely on.

use std::path::Path;
use std::process::{Command, Output};

const UNIT: &str = include_str!("../../deploy/vpmud.service");

/// Section, key and value of every setting, continuation lines joined (systemd.syntax(7)).
fn settings(unit: &str) -> Vec<(String, String, String)> {
    let joined = unit.replace("\\\n", " ");
    let mut section = String::new();
    let mut found = Vec::new();
    for line in joined.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
    {
        if let Some(name) = line.strip_prefix('[') {
            name.strip_suffix(']').expect("a section").clone_into(&mut section);
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("no setting: {line}"));
        found.push((section.clone(), key.trim().to_owned(), value.trim().to_owned()));
    }
    found
}

/// The only value of a key of `[Service]`.
fn service(key: &str) -> String {
    let settings = settings(UNIT);
    let values: Vec<_> = settings.iter().filter(|(s, k, _)| s == "Service" && k == key).collect();
    assert_eq!(values.len(), 1, "{key}: {values:?}");
    values[0].2.clone()
}

/// A command line of the unit: its words behind the program, which is where README.md installs it.
fn command(key: &str) -> Vec<String> {
    let line = service(key);
    let mut words = line.split_whitespace().map(str::to_owned);
    assert_eq!(words.next().expect("a program").trim_start_matches('-'), "/usr/local/bin/vpmud");
    words.collect()
}

fn vpmud(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vpmud")).args(args).output().expect("runs")
}

/// The text of an option in `vpmud serve --help`, up to the next one.
fn help_of(flag: &str) -> Option<String> {
    let help = String::from_utf8(vpmud(&["serve", "--help"]).stdout).expect("text");
    let mut lines = help.lines().skip_while(|line| line.split_whitespace().next() != Some(flag));
    let first = lines.next()?;
    let rest = lines.take_while(|line| !line.trim_start().starts_with("--"));
    Some(std::iter::once(first).chain(rest).collect::<Vec<_>>().join("\n"))
}

#[test]
fn machines_outlive_a_restart_of_the_daemon() {
    assert_eq!(service("KillMode"), "process", "workers are not the daemon's to end");
    assert_eq!(service("Delegate"), "yes", "their cgroups are the daemon's to make");
    assert_eq!(service("RuntimeDirectoryPreserve"), "restart");
    assert_eq!(service("KillSignal"), "SIGTERM");
    let serve = command("ExecStart");
    let isolation = serve.iter().position(|word| word == "--isolation").map(|at| serve[at + 1].as_str());
    assert_eq!(isolation, Some("process"), "said by the unit, because it is not the default: {serve:?}");
    assert!(!serve.contains(&"--stop-vms".to_owned()), "{serve:?}");
    // Both or neither: else it cannot be started again beside machines.
    assert!(serve.windows(2).any(|pair| pair == ["--cgroup-controllers", "on"]), "{serve:?}");
    assert_eq!(command("ExecStopPost"), ["host", "release-cgroup"]);
}

#[test]
fn what_it_writes_is_where_it_may_write() {
    let serve = command("ExecStart");
    let value = |flag: &str| {
        let at = serve.iter().position(|word| word == flag).unwrap_or_else(|| panic!("no {flag}"));
        serve[at + 1].clone()
    };
    assert_eq!(service("ProtectSystem"), "strict");
    assert_eq!(value("--state-dir"), format!("/var/lib/{}", service("StateDirectory")));
    let run = format!("/run/{}", service("RuntimeDirectory"));
    for flag in ["--listen", "--peer-listen"] {
        let listener = value(flag);
        let socket = listener.strip_prefix("unix:").expect("a Unix socket");
        assert_eq!(Path::new(socket).parent(), Some(Path::new(&run)), "{flag}");
    }
    for key in ["StateDirectoryMode", "RuntimeDirectoryMode"] {
        assert_eq!(service(key), "0700", "{key}");
    }
}

#[test]
fn its_command_lines_are_taken() {
    let serve = command("ExecStart");
    assert_eq!(serve[0], "serve");
    let flags: Vec<_> = serve.iter().filter(|word| word.starts_with("--")).collect();
    assert!(flags.len() >= 6, "{flags:?}");
    for flag in &flags {
        assert!(help_of(flag).is_some(), "vpmud serve --help does not know {flag}");
    }
    assert!(help_of("--hold-at").is_none(), "what is for tests is not shown");
    // And the values: with one word more it is wrong usage for that word alone, so nothing is started.
    for (key, rest) in [("ExecStart", "serve"), ("ExecStopPost", "host")] {
        let words = command(key);
        let mut args: Vec<&str> = words.iter().map(String::as_str).collect();
        assert_eq!(args[0], rest);
        args.push("--no-such-flag");
        let output = vpmud(&args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{key}: {said}");
        assert!(said.contains("unexpected argument '--no-such-flag'"), "{key}: {said}");
    }
}

/// What README.md and the help say of a vpmud that is started by hand.
#[test]
fn without_options_machines_live_in_threads() {
    let help = help_of("--isolation").expect("shown");
    assert!(help.contains("[default: thread]"), "{help}");
    let readme = include_str!("../../README.md");
    assert!(readme.contains("By default machines run in threads of the daemon and end with it."));
}
