//! Memory of a machine beyond its guest's pages, from /proc.
//!
//! Thread isolation: what the daemon grows by with each machine. Process isolation: anonymous and shared memory of a worker's process.
//! Guest memory is the mapping of a memory file, and is left out in both.

use std::path::Path;

use vcpu_worker::floor::bare::BareHost;

use super::error::{BenchError, Step as _};
use super::figure::{Figure, Samples, Target};
use super::site::{self, Site};

const VMS: u32 = 32;
const MEMORY_MIB: u64 = 64;
const IDLE: &str = "mode=h";
const FLOOR: &str = "a bare machine's mappings in a process";

/// In both isolations.
pub(super) async fn run() -> Result<Vec<Figure>, BenchError> {
    super::say("memory: a machine beyond its guest's pages, 64 MiB, 1 vCPU");
    let site = Site::new()?;
    let bare = bare(&site)?;
    let floor = Some((FLOOR, &bare));

    let host = site.host("threads", "thread").await?;
    // The first ones fill pools that later ones share.
    for n in 0..4 {
        site::launch(&host.client, &format!("warm-{n}"), site.spec(MEMORY_MIB, IDLE)).await?;
    }
    let before = beyond_guest(host.pid())?;
    for n in 0..VMS {
        site::launch(&host.client, &format!("vm-{n}"), site.spec(MEMORY_MIB, IDLE)).await?;
    }
    let grown: Samples = [(beyond_guest(host.pid())? - before) / f64::from(VMS)].into_iter().collect();
    host.end().await?;

    let host = site.host("procs", "process").await?;
    let mut each = Samples::default();
    for n in 0..VMS.min(12) {
        let name = format!("vm-{n}");
        site::launch(&host.client, &name, site.spec(MEMORY_MIB, IDLE)).await?;
        let pid = host.client.get_vm(&name).await.step("get a machine")?.worker_pid;
        each.push(beyond_guest(pid)?);
    }
    host.end().await?;
    Ok(vec![
        Figure::of("memory beyond the guest's, thread", "MiB", &grown, floor, Target::AtMost(0.5)),
        Figure::of("memory beyond the guest's, process", "MiB", &each, floor, Target::AtMost(3.0)),
    ])
}

fn bare(site: &Site) -> Result<Samples, BenchError> {
    let host = BareHost::open()?;
    let me = std::process::id();
    let mut vms = Vec::new();
    for _ in 0..4 {
        vms.push(host.boot(MEMORY_MIB << 20, &site.kernel(IDLE))?);
    }
    let before = beyond_guest(me)?;
    for _ in 0..VMS {
        let mut vm = host.boot(MEMORY_MIB << 20, &site.kernel(IDLE))?;
        vm.first_byte()?;
        vms.push(vm);
    }
    let after = beyond_guest(me)?;
    Ok([(after - before) / f64::from(VMS)].into_iter().collect())
}

/// MiB of anonymous and shared memory of a process that are not a guest's.
fn beyond_guest(pid: u32) -> Result<f64, BenchError> {
    let path = format!("/proc/{pid}/smaps");
    let text =
        std::fs::read_to_string(Path::new(&path)).map_err(|e| BenchError::io(format!("read {path}"), e))?;
    Ok(kib_beyond_guest(&text) as f64 / 1024.0)
}

/// Kind of a mapping by its line in smaps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mapping {
    Guest,
    Shared,
    Other,
}

fn kib_beyond_guest(smaps: &str) -> u64 {
    let mut kind = Mapping::Other;
    let mut kib = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some(field) = first.strip_suffix(':') {
            let value = words.next().and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
            kib += match (kind, field) {
                (Mapping::Shared, "Rss") | (Mapping::Other, "Anonymous") => value,
                _ => 0,
            };
        } else {
            // address perms offset device inode path
            let path = words.nth(4).unwrap_or_default();
            kind = match path {
                p if p.starts_with("/memfd:") => Mapping::Guest,
                p if p.starts_with("/dev/zero") || p.starts_with("/dev/shm/") || p.starts_with("/SYSV") => {
                    Mapping::Shared
                }
                _ => Mapping::Other,
            };
        }
    }
    kib
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_left_out() {
        let smaps = "7f00-7f10 rw-s 00000000 00:01 12 /memfd:vm (deleted)\nRss: 4096 kB\nAnonymous: 0 kB\n\
                     7f10-7f20 rw-p 00000000 00:00 0 [heap]\nRss: 300 kB\nAnonymous: 200 kB\n\
                     7f20-7f30 r-xp 00000000 08:01 99 /usr/bin/x\nRss: 900 kB\nAnonymous: 8 kB\n\
                     7f30-7f40 rw-s 00000000 00:01 13 /dev/zero (deleted)\nRss: 16 kB\nAnonymous: 0 kB\n";
        assert_eq!(kib_beyond_guest(smaps), 200 + 8 + 16);
    }
}
