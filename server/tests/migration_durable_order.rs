//! What the journal's promise rests on, seen from outside: the kernel has answered fdatasync of the decision before a
//! byte of Go leaves the source, and fdatasync of the entry before the destination's worker is granted anything. Real
//! processes under strace; without it the test says so (VPMU_REQUIRE_STRACE=1 makes that a failure).

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use prost::Message as _;
use support::*;
use vpmu_proto::api::*;
use vpmu_proto::worker::{Fence, GrantRequest};

const CALLS: &str = "trace=fdatasync,pwrite64,pwritev,pwritev2,write,writev,sendto,sendmsg";

/// strace, attached to a daemon and its threads and children.
struct Trace(Child, std::path::PathBuf);

impl Trace {
    fn attach(host: &Host, out: &Path) -> Self {
        let pid = host.child.id().expect("running").to_string();
        let child = Command::new("strace")
            .args(["-f", "-y", "-xx", "-s", "100000", "-e", CALLS, "-e", "signal=none", "-p", &pid, "-o"])
            .arg(out)
            .stderr(Stdio::null())
            .spawn()
            .expect("strace starts");
        let begin = Instant::now();
        // Every thread is attached once the kernel says who traces it.
        let attached = || {
            std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten().all(|task| {
                let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
                status.lines().any(|l| l.starts_with("TracerPid:") && !l.ends_with("\t0"))
            })
        };
        while !attached() {
            assert!(begin.elapsed() < DEADLINE, "strace does not attach");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self(child, out.to_owned())
    }

    /// Detaches and returns the calls, in the order in which the kernel was entered and left.
    fn lines(mut self) -> Vec<String> {
        let pid = rustix::process::Pid::from_raw(self.0.id().cast_signed()).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("detaches");
        self.0.wait().expect("ends");
        std::fs::read_to_string(&self.1).expect("a trace").lines().map(str::to_owned).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "\\x{b:02x}");
        out
    })
}

fn journal(line: &str) -> bool {
    // -xx writes paths in hexadecimal, too.
    line.contains(".seg") || line.contains(&hex(b".seg"))
}

/// Where the write of these bytes to the journal is, and where the next fdatasync of the journal has returned.
fn durable(lines: &[String], record: &str) -> (usize, usize) {
    let written = lines.iter().position(|l| l.contains("pwrite") && journal(l) && l.contains(record));
    let written = written.expect("the record is written to the journal");
    let thread = lines[written].split_whitespace().next().expect("a thread").to_owned();
    let synced = lines.iter().enumerate().skip(written + 1).find(|(_, l)| {
        let ours = l.split_whitespace().next() == Some(thread.as_str());
        // A call that others interrupted ends in a line of its own.
        let begun = l.contains(" fdatasync(") && journal(l) && !l.contains("<unfinished");
        let ended = l.contains("fdatasync resumed");
        ours && (begun || ended) && l.ends_with("= 0")
    });
    (written, synced.expect("the journal is synced").0)
}

/// Where these bytes enter the kernel towards a socket.
fn sent(lines: &[String], bytes: &str) -> Vec<usize> {
    let send = |l: &str| {
        [" write(", " writev(", " sendto(", " sendmsg("].iter().any(|call| l.contains(call)) && !journal(l)
    };
    (0..lines.len()).filter(|i| send(&lines[*i]) && lines[*i].contains(bytes)).collect()
}

#[tokio::test]
async fn a_decision_is_durable_before_anything_follows_from_it() {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        assert!(std::env::var_os("VPMU_REQUIRE_STRACE").is_none(), "strace is required and not there");
        println!("skipped: no strace (apt-get install strace)");
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let options = ["--hypervisor", "simulated", "--isolation", "process"];
    let a = Host::start(&dir.path().join("a"), &options).await;
    let b = Host::start(&dir.path().join("b"), &options).await;
    a.create("vm", probe_spec(1, 16)).await;
    let vm = a.start_vm("vm").await;
    a.until_counting("vm").await;
    let traces =
        [("a", &a), ("b", &b)].map(|(name, host)| Trace::attach(host, &dir.path().join(name).join("trace")));
    let operation = a.migrate("vm", b.arrival()).await;
    a.finish(operation).await.expect("migrated");
    let [source, destination] = traces.map(Trace::lines);

    // The source: HandedOver is the one record of the source's with a digest (field 9, 32 bytes), and Go carries it.
    let digests: Vec<String> = source
        .iter()
        .filter(|l| l.contains("pwrite") && journal(l))
        .filter_map(|l| {
            let at = l.find(&hex(&[9 << 3 | 2, 32]))?;
            l.get(at + 8..at + 8 + 32 * 4).map(str::to_owned)
        })
        .collect();
    let digest = digests.first().expect("the decision has a digest");
    let (_, decided) = durable(&source, digest);
    let gone = sent(&source, digest);
    assert!(!gone.is_empty(), "Go leaves the source");
    assert!(gone.iter().all(|at| *at > decided), "Go at {gone:?}, the decision is durable at {decided}");

    // The destination: Entered carries the same digest; the grant is known to the byte.
    let (_, entered) = durable(&destination, digest);
    let grant = GrantRequest {
        fence: Some(Fence { vm_uid: vm.uid, incarnation: 1, term: 1 }),
        epoch: 2,
        seq: 1,
        deadline_boottime_ns: 0,
        run: true,
    };
    let granted = sent(&destination, &hex(&grant.encode_to_vec()));
    assert!(!granted.is_empty(), "the worker is granted the right to run");
    assert!(
        granted.iter().all(|at| *at > entered),
        "granted at {granted:?}, the entry is durable at {entered}"
    );
    println!(
        "Go {} calls after the decision's fdatasync, the grant {} calls after the entry's",
        gone[0] - decided,
        granted[0] - entered
    );
    for (host, id) in [(&a, "vm"), (&b, "vm")] {
        let request = DeleteVirtualMachineRequest { name: name(id), ..Default::default() };
        let deleted = host.vms().await.delete_virtual_machine(request).await.expect("accepted");
        host.finish(deleted.into_inner()).await.expect("deleted");
    }
}
