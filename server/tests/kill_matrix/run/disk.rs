//! A host's small file system, for the cells with a full disk. Mounting needs root.

use std::path::Path;

/// File system of a host in the cells with a full disk.
const DISK: &str = "size=24m";

/// Whether file systems can be mounted here.
pub fn can_mount() -> bool {
    let dir = tempfile::tempdir().expect("tempdir");
    let mounted = try_mount(dir.path());
    if mounted {
        unmount(dir.path());
    }
    mounted
}

fn try_mount(path: &Path) -> bool {
    let mut mount = std::process::Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", DISK, "tmpfs"]).arg(path).stderr(std::process::Stdio::null());
    mount.status().is_ok_and(|status| status.success())
}

pub(super) fn unmount(path: &Path) {
    let _ = std::process::Command::new("umount").arg("--lazy").arg(path).status();
}

pub(super) fn mount(path: &Path) {
    assert!(try_mount(path), "a small tmpfs");
}

/// Takes all room that is left.
pub(super) fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).expect("one more file");
    for size in [1 << 20, 4096, 1] {
        let piece = vec![0x5a; size];
        while file.write_all(&piece).is_ok() {}
    }
}
