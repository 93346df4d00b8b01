//! Where `unsafe` is: in the files named here and nowhere else, each block, implementation and function with its reason.
//!
//! A file that is to hold some must be added here, so that it is seen in review; one that no longer does must go.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Files of this crate that hold `unsafe`.
const FILES: &[&str] = &[
    "src/floor/bare.rs",
    "src/host/clock.rs",
    "src/host/heap.rs",
    "src/host/schedule.rs",
    "src/host/tick.rs",
    "src/hypervisor/kvm/dirty.rs",
    "src/hypervisor/kvm/tests/guest.rs",
    "src/memory/io.rs",
    "src/memory/loader.rs",
    "src/memory/mapping.rs",
    "src/memory/numa.rs",
    "src/probe/blob.rs",
    "src/sys.rs",
    "src/sys/confine.rs",
    "src/sys/kick.rs",
    "src/sys/ring.rs",
    "src/sys/run_page.rs",
    "src/sys/stacks.rs",
    "src/sys/stats.rs",
    "src/sys/thread.rs",
    "src/sys/uffd.rs",
];

/// Lines above a use in which its reason must begin, comments and attributes left out.
const REACH: usize = 3;

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            if !path.ends_with("target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The code of a line: without its comment and without what is between quotes.
fn code(line: &str) -> String {
    let line = line.split("//").next().unwrap_or_default();
    line.split('"').step_by(2).collect::<Vec<_>>().join(" ")
}

/// Whether a line begins something unsafe: a block, an implementation, a function, an extern block.
fn uses(line: &str) -> bool {
    let code = code(line);
    let mut words = code.split(|c: char| !(c.is_alphanumeric() || c == '_'));
    words.any(|word| word == "unsafe")
}

/// Whether the comment that stands above a line, or beside it, gives the reason. A function says in its documentation what
/// its callers must hold (`# Safety`).
fn is_reasoned(lines: &[&str], at: usize) -> bool {
    let says = |line: &str| line.contains("SAFETY:") || line.contains("# Safety");
    if says(lines[at]) {
        return true;
    }
    let mut code_lines = 0;
    for line in lines[..at].iter().rev() {
        if says(line) {
            return true;
        }
        let text = line.trim_start();
        if !(text.starts_with("//") || text.starts_with("#[") || text.is_empty()) {
            code_lines += 1;
        }
        if code_lines > REACH {
            return false;
        }
    }
    false
}

#[test]
fn unsafe_is_where_it_is_said_to_be_and_each_use_has_its_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    sources(&root.join("tests"), &mut files);
    let mut found = BTreeMap::new();
    let mut bare = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).expect("readable");
        let lines: Vec<&str> = text.lines().collect();
        let name = path.strip_prefix(root).expect("below").display().to_string();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| uses(line)) {
            *found.entry(name.clone()).or_insert(0) += 1;
            if !is_reasoned(&lines, at) {
                bare.push(format!("{name}:{}: {}", at + 1, line.trim()));
            }
        }
    }
    for (name, count) in &found {
        println!("{count:>4} {name}");
    }
    println!("{:>4} in {} files", found.values().sum::<i32>(), found.len());
    assert!(bare.is_empty(), "without a SAFETY line:\n{}", bare.join("\n"));
    let found: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(found, FILES, "the files that hold unsafe are not those that this test names");
}

#[test]
fn the_other_crates_forbid_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for lib in ["pmu", "proto", "server", "client"] {
        let mut roots = Vec::new();
        for file in ["src/lib.rs", "src/main.rs"] {
            let path = root.join(lib).join(file);
            if path.exists() {
                roots.push(path);
            }
        }
        assert!(!roots.is_empty(), "{lib}");
        for path in roots {
            let text = std::fs::read_to_string(&path).expect("readable");
            assert!(
                text.contains("#![forbid(unsafe_code)]"),
                "{} does not forbid unsafe code",
                path.display()
            );
        }
    }
}
