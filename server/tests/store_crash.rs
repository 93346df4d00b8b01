//! The store under other processes: killed ones and ones that hold the directory.

mod store_common;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use store_common::{operation, owned, pmu, vm};
use vpmu_server::store::{Batch, Store, StoreError};

const CHILD: &str = "VPMU_STORE_TEST_CHILD";

fn child(test: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(CHILD, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn child_dir() -> Option<std::path::PathBuf> {
    std::env::var_os(CHILD).map(Into::into)
}

/// Writes forever; each acknowledged round is printed. Run by `killed_writer_loses_nothing` in a child only.
#[tokio::test]
async fn child_writes_until_killed() {
    let Some(dir) = child_dir() else { return };
    let store = Store::open(&dir).unwrap();
    let first = store.get_vm("vm").map_or(0, |r| r.vm.unwrap().etag.parse::<u64>().unwrap() + 1);
    for n in first.. {
        let epoch = n + 1;
        let batch = Batch::new().put_vm(vm("vm", &n.to_string())).unwrap();
        let batch = batch.put_operation(&operation(&format!("op{n}"), n, true)).unwrap();
        let images = [pmu("vm", 0, n), pmu("vm", 1, n)];
        let (a, b, c) = tokio::join!(
            store.commit(batch),
            store.put_pmu(&images),
            store.append_ownership(owned("vm", epoch, 1))
        );
        a.unwrap();
        b.unwrap();
        c.unwrap();
        println!("ack {n}");
    }
}

#[test]
fn killed_writer_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    for round in 0..4 {
        let mut child = child("child_writes_until_killed", dir.path());
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut seen = 0;
        for n in lines.filter_map(|l| l.split_once("ack ")?.1.trim().parse::<u64>().ok()) {
            acknowledged = n;
            seen += 1;
            if seen == 10 + 7 * round {
                // SIGKILL; what is still in the pipe is read below the loop's end.
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= 10, "the child wrote {seen} rounds");

        let store = Store::open(dir.path()).unwrap();
        assert!(store.damaged().is_empty() && store.journal_recovery().whole);
        let stored: u64 = store.get_vm("vm").unwrap().vm.unwrap().etag.parse().unwrap();
        assert!(stored == acknowledged || stored == acknowledged + 1, "{stored} for {acknowledged}");
        let newest = store.get_pmu("vm");
        assert_eq!(newest.len(), 2);
        for record in newest {
            let value = record.image.as_ref().unwrap().pmis;
            assert!(value == acknowledged || value == acknowledged + 1);
            let whole = pmu("vm", record.image.as_ref().unwrap().vcpu, value).image;
            assert_eq!(record.image, whole, "every register is there");
        }
        for n in 0..=acknowledged {
            assert!(store.get_operation(&format!("op{n}")).is_some(), "operation {n} of {acknowledged}");
        }
        let epoch = store.ownership("vm").unwrap().epoch;
        assert!(epoch == acknowledged + 1 || epoch == acknowledged + 2);
        // The next round begins behind what was stored.
        acknowledged = stored;
    }
}

/// Holds a directory until its standard input closes. Run in a child only.
#[test]
fn child_holds_the_directory() {
    let Some(dir) = child_dir() else { return };
    let _store = Store::open(&dir).unwrap();
    println!("holding");
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn a_held_directory_names_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = child("child_holds_the_directory", dir.path());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().map_while(Result::ok).any(|l| l.contains("holding")));
    let held = Store::open(dir.path()).unwrap_err();
    assert_eq!(held, StoreError::InUse { dir: dir.path().to_owned(), pid: child.id() });
    assert!(held.to_string().contains(&child.id().to_string()) && held.reason() == "STATE_DIR_IN_USE");
    // A killed holder leaves nothing in the way.
    child.kill().unwrap();
    child.wait().unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.term(), 2);
    // Also within one process.
    assert!(
        matches!(Store::open(dir.path()), Err(StoreError::InUse { pid, .. }) if pid == std::process::id())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_writers_share_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let before = store.stats();
    let writers: Vec<_> = (0..200)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let uid = format!("vm{n}");
                let owner = owned(&uid, 1, 1);
                let record = vm(&uid, "1");
                let (a, b) = tokio::join!(store.append_ownership(owner), store.put_vm(record));
                (a.unwrap(), b.unwrap())
            })
        })
        .collect();
    let mut lsns = Vec::new();
    for writer in writers {
        lsns.push(writer.await.unwrap().0.lsn);
    }
    lsns.sort_unstable();
    assert_eq!(lsns, (1..=200).collect::<Vec<_>>());
    let after = store.stats();
    assert_eq!(after.writes - before.writes, 200);
    assert!(after.commits - before.commits < 100, "{after:?}");
    assert!(after.journal_fdatasyncs < 100, "{after:?}");
}
