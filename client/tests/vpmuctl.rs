//! The binary, as scripts call it: what is on standard output, what is on standard error, and the exit code.

mod fake;

use fake::FakeHost;
use serde_json::Value;
use std::process::Output;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

const DEADLINE: Duration = Duration::from_secs(20);

async fn vpmuctl(host: &FakeHost, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vpmuctl"))
        .env_remove("VPMU_HOST")
        .args(["--host", &host.endpoint().to_string()])
        .args(line.split(' '))
        .stdin(std::process::Stdio::null())
        .output()
        .await
        .expect("runs")
}

fn json(bytes: &[u8]) -> Value {
    let text = String::from_utf8_lossy(bytes);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[tokio::test]
async fn get_is_one_flat_object() {
    let host = FakeHost::serve();
    let output = vpmuctl(&host, "--output json vm get a").await;
    assert_eq!(output.status.code(), Some(0));
    let vm = json(&output.stdout);
    assert_eq!(vm["name"], "a");
    assert_eq!((&vm["desired_state"], &vm["observed_state"]), (&"RUNNING".into(), &"RUNNING".into()));
    assert_eq!((&vm["vcpus"], &vm["memory_bytes"]), (&2.into(), &(256 << 20).into()));
    assert!(output.stderr.is_empty());

    let output = vpmuctl(&host, "vm get a").await;
    assert!(String::from_utf8_lossy(&output.stdout).contains("modelled counts, not hardware"));
}

#[tokio::test]
async fn refusals_are_told_and_end_with_1() {
    let host = FakeHost::serve();
    let output = vpmuctl(&host, "vm get nobody --output json").await;
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let error = &json(&output.stderr)["error"];
    assert_eq!((&error["code"], &error["reason"]), (&"NOT_FOUND".into(), &"VM_NOT_FOUND".into()));
    assert_eq!(error["remedy"], "see `vpmuctl vm list`");

    let output = vpmuctl(&host, "vm create a --vcpus 10000 --memory 256MiB --probe").await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("VCPUS_OUT_OF_RANGE") && text.contains("10000 is not in 1..=256"), "{text}");
}

#[tokio::test]
async fn wrong_usage_ends_with_2() {
    let host = FakeHost::serve();
    for line in
        ["vm create a --vcpus 2", "vm", "nonsense", "migrate a --to nowhere", "pmu watch a --interval 1ms"]
    {
        let output = vpmuctl(&host, line).await;
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{line}");
    }
    let output = vpmuctl(&host, "--output json vm create a --vcpus 2").await;
    assert_eq!(json(&output.stderr)["error"]["reason"], "USAGE");
    let output = Command::new(env!("CARGO_BIN_EXE_vpmuctl"))
        .env_remove("VPMU_HOST")
        .args(["vm", "list"])
        .output()
        .await
        .expect("runs");
    assert_eq!(output.status.code(), Some(2));
}

#[tokio::test]
async fn create_start_and_list() {
    let host = FakeHost::serve();
    let output = vpmuctl(
        &host,
        "--output json vm create a --vcpus 2 --memory 256MiB --probe --pmu-gp 8 --pmu-fixed 3 --start",
    )
    .await;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(json(&output.stdout)["observed_state"], "RUNNING");
    let output = vpmuctl(&host, "--output json vm list").await;
    assert_eq!(json(&output.stdout)["virtual_machines"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn migrate_reports_what_it_cost() {
    let host = FakeHost::serve();
    let output = vpmuctl(&host, "--output json migrate a --to unix:/b.sock --max-blackout 20ms").await;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let migration = json(&output.stdout);
    for (key, value) in [
        ("total_ms", Value::from(1.5)),
        ("blackout_ms", 0.25.into()),
        ("guest_gap_ms", 0.3.into()),
        ("bytes", 77.into()),
        ("rounds", 2.into()),
        ("mode", "precopy".into()),
        ("transport", "unix".into()),
        ("state", "SUCCEEDED".into()),
    ] {
        assert_eq!(migration[key], value, "{key}");
    }
    let output = vpmuctl(&host, "--output json migrate a --to unix:/nowhere --max-blackout 20ms").await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json(&output.stderr)["error"]["reason"], "NO_CORES");
    let output = vpmuctl(&host, "--output json migrate a --to unix:/b.sock --check").await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json(&output.stdout)["mismatches"][0]["rule"], "C2");
}

#[tokio::test]
async fn registers_console_and_watch() {
    let host = FakeHost::serve();
    let output = vpmuctl(&host, "--output json pmu show a --persisted").await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("\"value\":18446744073709551615"), "{text}");
    let output = vpmuctl(&host, "vm console a --history").await;
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"hello\n"[..]));
    let output = vpmuctl(&host, "--output json vm watch").await;
    let kinds: Vec<Value> =
        output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(json).collect();
    assert_eq!((&kinds[0]["kind"], &kinds[1]["kind"]), (&"EXISTING".into(), &"SYNCED".into()));
    assert_eq!(kinds[0]["vm"]["name"], "a");
}

#[tokio::test]
async fn a_pipe_is_sent_whole_and_as_fast_as_the_host_takes_it() {
    let host = FakeHost::serve();
    // More than is on the way and may wait together: what a host that is late cannot take is not read.
    let input: Vec<u8> = (0..4_u32 << 20).map(|at| b'a' + (at % 23) as u8).collect();
    let expected = [&b"hello\n"[..], &input.to_ascii_uppercase()].concat();
    let mut child = Command::new(env!("CARGO_BIN_EXE_vpmuctl"))
        .args(["--host", &host.endpoint().to_string(), "vm", "console", "late", "--write"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("runs");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = child.stdout.take().expect("piped");
    let write = async {
        stdin.write_all(&input).await.expect("written");
        stdin
    };
    let mut got = vec![0; expected.len()];
    let read = stdout.read_exact(&mut got);
    let (stdin, read) =
        tokio::time::timeout(DEADLINE, async { tokio::join!(write, read) }).await.expect("goes");
    read.expect("read");
    assert!(got == expected, "something is missing, or in another order");
    drop(stdin);
    child.kill().await.expect("ended");
}
