//! Many machines: created and run, and listed.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use vcpu_worker::floor::bare::BareHost;

use super::error::{BenchError, Step as _};
use super::figure::{Figure, Samples, Target};
use super::site::{self, Site, ms};

const MEMORY_MIB: u64 = 16;
const IDLE: &str = "mode=h";
const FLOOR: &str = "the bare ioctls for as many, to each one's first byte, on one thread";
const LISTS: usize = 20;

/// `vms` machines, `at_once` calls under way.
pub(super) async fn run(vms: u32, at_once: u32) -> Result<Vec<Figure>, BenchError> {
    super::say(&format!("many: {vms} machines of 16 MiB created and run"));
    let site = Site::new()?;
    let bare = bare(&site, vms).await?;
    let host = site.host("many", "thread").await?;
    let begin = Instant::now();
    let turns = Arc::new(Semaphore::new(at_once as usize));
    let mut calls = JoinSet::new();
    for n in 0..vms {
        let (client, turns) = (host.client.clone(), Arc::clone(&turns));
        let spec = site.spec(MEMORY_MIB, IDLE);
        calls.spawn(async move {
            // Never closed.
            let _turn = turns.acquire().await;
            site::launch(&client, &format!("vm-{n}"), spec).await
        });
    }
    while let Some(call) = calls.join_next().await {
        call.map_err(|e| BenchError::io("create machines", std::io::Error::other(e)))??;
    }
    let took: Samples = [ms(begin.elapsed())].into_iter().collect();
    let mut lists = Samples::default();
    for _ in 0..LISTS {
        let begin = Instant::now();
        let found = host.client.list_vms().await.step("list the machines")?.len();
        lists.push(ms(begin.elapsed()));
        if found != vms as usize {
            return Err(BenchError::Missing(format!("{found} of {vms} machines are listed")));
        }
    }
    // On a busy machine so many may take longer than a host is given; what was measured stands.
    if let Err(error) = host.end().await {
        super::say(&error.to_string());
    }
    Ok(vec![
        Figure::of(
            format!("{vms} machines created and run"),
            "ms",
            &took,
            Some((FLOOR, &bare)),
            Target::Times(1.5),
        ),
        Figure::of(format!("list of {vms}"), "ms", &lists, None, Target::AtMost(5.0)),
    ])
}

async fn bare(site: &Site, vms: u32) -> Result<Samples, BenchError> {
    let kernel = site.kernel(IDLE);
    let measured = tokio::task::spawn_blocking(move || {
        let host = BareHost::open()?;
        let begin = Instant::now();
        let mut made = Vec::with_capacity(vms as usize);
        for _ in 0..vms {
            let mut vm = host.boot(MEMORY_MIB << 20, &kernel)?;
            vm.first_byte()?;
            made.push(vm);
        }
        Ok([ms(begin.elapsed())].into_iter().collect())
    });
    measured.await.map_err(|e| BenchError::io("measure the bare ioctls", std::io::Error::other(e)))?
}
