//! Keeps every thread that runs no vCPU off dedicated cores: this process's, and those of workers in processes of their own.
//!
//! vCPU threads pin themselves and are never touched. Workers are told when the set changes and, in case that one was
//! being made or did not answer at that moment, are looked at again from time to time. Spare workers, which take no orders
//! yet, are moved as this process's threads are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use vcpu_worker::host::affinity;
use vcpu_worker::host::topology::show_list;

use crate::daemon::Daemon;

/// How often workers are looked at that have not been told.
const LOOK: Duration = Duration::from_secs(5);

/// Runs until the daemon ends. `own` are the cores that it may use at all.
pub async fn keep(daemon: Arc<Daemon>, own: Vec<u32>) {
    let mut changes = daemon.capacity.changes();
    let mut now = own;
    // What each worker process was told last.
    let mut told: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut due = true;
    loop {
        let wanted = daemon.capacity.housekeeping();
        if wanted != now {
            move_own(&daemon, &wanted).await;
            (now, due) = (wanted, true);
        }
        // A new worker begins on the right cores: most changes of what is granted are nothing to the others.
        if std::mem::take(&mut due) {
            tell_workers(&daemon, &now, &mut told).await;
        }
        tokio::select! {
            () = daemon.shutdown.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
            _ = look.tick() => due = true,
        }
    }
}

async fn move_own(daemon: &Daemon, cores: &[u32]) {
    if cores.is_empty() {
        // Only if machines that run already were adopted on every core; there is nowhere to go.
        tracing::warn!("every core is dedicated: vpmud's own threads share them");
        return;
    }
    let set = {
        let (cores, processes) = (cores.to_vec(), Arc::clone(&daemon.workers.processes));
        tokio::task::spawn_blocking(move || {
            let moved = affinity::set_housekeeping(&cores);
            processes.spares.keep_to(&cores);
            moved
        })
        .await
    };
    let shown = show_list(cores);
    match set.map_err(std::io::Error::other).and_then(std::convert::identity) {
        Ok(threads) => {
            tracing::info!(cores = %shown, threads, "threads that run no vCPU are kept on these cores");
        }
        Err(error) => tracing::error!(cores = %shown, %error, "threads that run no vCPU cannot be moved"),
    }
}

async fn tell_workers(daemon: &Daemon, now: &[u32], told: &mut BTreeMap<u32, Vec<u32>>) {
    if now.is_empty() {
        return;
    }
    let views: Vec<_> = daemon.registry.list(None).iter().map(crate::vm::registry::VmHandle::view).collect();
    let arriving: Vec<_> = daemon.migrations.arriving().values().cloned().collect();
    let here = views.iter().filter_map(|view| view.worker.clone()).chain(arriving);
    // One that has just arrived may be there twice.
    let workers: BTreeMap<u32, _> =
        here.filter(|w| w.pid() != 0 && !w.has_departed()).map(|w| (w.pid(), w)).collect();
    told.retain(|pid, _| workers.contains_key(pid));
    let untold = workers.values().filter(|w| told.get(&w.pid()).map(Vec::as_slice) != Some(now));
    let tell = untold.map(|worker| async { (worker.pid(), worker.set_housekeeping(now.to_vec()).await) });
    for (pid, answer) in futures_util::future::join_all(tell).await {
        match answer {
            Ok(()) => {
                told.insert(pid, now.to_vec());
            }
            Err(error) => tracing::warn!(pid, %error, "a worker's threads are not moved; asked again later"),
        }
    }
}
