//! Many machines: created and run, and listed.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use vcpu_worker::floor::bare::BareHost;
use vpmu_client::Client;

use super::error::{BenchError, Step as _};
use super::figure::{Figure, Samples, Target};
use super::site::{self, Site, ms};

const MEMORY_MIB: u64 = 16;
const IDLE: &str = "mode=h";
const FLOOR: &str = "the bare ioctls for as many, to each one's first byte, on one thread";
const LISTS: usize = 20;

/// `vms` machines, `at_once` calls under way, on a new host each time; the floor is measured in turns with them.
pub(super) async fn run(vms: u32, at_once: u32, runs: u32) -> Result<Vec<Figure>, BenchError> {
    super::say(&format!("many: {vms} machines of 16 MiB created and run, {runs} times"));
    let (mut took, mut floor, mut lists) = (Samples::default(), Samples::default(), Samples::default());
    for run in 1..=runs {
        let site = Site::new()?;
        floor.push(bare(&site, vms).await?);
        let host = site.host("many", "thread").await?;
        took.push(create(&site, &host.client, vms, at_once).await?);
        list(&host.client, vms, &mut lists).await?;
        // On a busy machine so many may take longer than a host is given; what was measured stands.
        if let Err(error) = host.end().await {
            super::say(&error.to_string());
        }
        super::say(&format!("many: run {run} of {runs} is over"));
    }
    Ok(vec![
        Figure::of(
            format!("{vms} machines created and run"),
            "ms",
            &took,
            Some((FLOOR, &floor)),
            Target::Times(1.5),
        ),
        Figure::of(format!("list of {vms}"), "ms", &lists, None, Target::AtMost(5.0)),
    ])
}

/// Milliseconds until all of them run.
async fn create(site: &Site, client: &Client, vms: u32, at_once: u32) -> Result<f64, BenchError> {
    let begin = Instant::now();
    let turns = Arc::new(Semaphore::new(at_once as usize));
    let mut calls = JoinSet::new();
    for n in 0..vms {
        let (client, turns) = (client.clone(), Arc::clone(&turns));
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
    Ok(ms(begin.elapsed()))
}

async fn list(client: &Client, vms: u32, lists: &mut Samples) -> Result<(), BenchError> {
    for _ in 0..LISTS {
        let begin = Instant::now();
        let found = client.list_vms().await.step("list the machines")?.len();
        lists.push(ms(begin.elapsed()));
        if found != vms as usize {
            return Err(BenchError::Missing(format!("{found} of {vms} machines are listed")));
        }
    }
    Ok(())
}

async fn bare(site: &Site, vms: u32) -> Result<f64, BenchError> {
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
        Ok(ms(begin.elapsed()))
    });
    measured.await.map_err(|e| BenchError::io("measure the bare ioctls", std::io::Error::other(e)))?
}
