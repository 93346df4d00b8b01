//! The patch table names tests and lines of the host check: each one must exist, and each patch must have one row.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use pmu::host_check::{Facts, Mode, report};

fn sources(dir: &Path, out: &mut String) {
    for entry in fs::read_dir(dir).expect("directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push_str(&fs::read_to_string(path).expect("source"));
        }
    }
}

/// The words between backquotes.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_patch_has_a_row_and_what_the_row_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    sources(&root.join("src"), &mut code);
    sources(&root.join("tests"), &mut code);
    sources(&root.join("../vcpu-worker/src"), &mut code);
    let lines: BTreeSet<&str> = report(&Facts::default(), Mode::Msr).iter().map(|l| l.id).collect();
    let readme = fs::read_to_string(root.join("README.md")).expect("README.md");
    let mut patches = Vec::new();
    for row in readme.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, number, _, _, shown, _] = cells[..] else { continue };
        let Ok(number) = number.parse::<u8>() else { continue };
        patches.push(number);
        let mut named = 0;
        for name in quoted(shown).filter(|name| !name.starts_with(char::is_uppercase)) {
            named += 1;
            let is_test = code.contains(&format!("fn {name}("));
            assert!(
                is_test || lines.contains(name),
                "row {number:02} names {name}, which is no test and no line of the host check"
            );
        }
        assert!(named > 0, "row {number:02} names nothing that shows it");
    }
    assert_eq!(patches, (1..=41).collect::<Vec<u8>>());
}
