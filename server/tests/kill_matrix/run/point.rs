//! The way to the point at which the fault happens: the migration is asked for, and the point waited for.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

use super::super::cell::{Cell, Fault, Scene};
use super::super::support::wire::tcp;
use super::processes::{alive, pid, until_gone};
use super::{DEADLINE, LINK, World, list, name, one};

impl World {
    /// Asks for the migration; the source may be stopped before it answers.
    pub(super) async fn migrate(&self, cell: Cell) {
        // Out of reach; more than the fixed cost where memory is to follow.
        let nanos = if cell.scene == Scene::Follow { 100_000_000 } else { 1000 };
        let goal = prost_types::Duration { seconds: 0, nanos };
        let follow = cell.scene == Scene::Follow;
        let over_tcp = matches!(cell.fault, Fault::CutData | Fault::Part);
        let spec = MigrationSpec {
            destination: if over_tcp { tcp(&self.b) } else { self.b.peer() },
            max_bandwidth: if follow { LINK } else { 0 },
            mode: if follow { migration_spec::Mode::Postcopy.into() } else { 0 },
            // One that is to be cancelled must not be over before.
            max_blackout: (follow || cell.scene == Scene::Cancel).then_some(goal),
            max_duration: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
            ..MigrationSpec::default()
        };
        let request = CreateMigrationRequest {
            parent: name("vm"),
            spec: Some(spec),
            ..CreateMigrationRequest::default()
        };
        let mut client = self.a.migrations().await;
        let asked = tokio::spawn(async move { client.create_migration(request).await.map(drop) });
        if cell.scene != Scene::Cancel {
            return;
        }
        asked.await.expect("no panic").expect("accepted");
        let begin = Instant::now();
        loop {
            // It gives up by itself, too, once it sees that pre-copy cannot meet the goal.
            if self.a.is_held() || self.b.is_held() {
                return;
            }
            let Ok(list) = tokio::time::timeout(Duration::from_millis(200), list(&self.a)).await else {
                continue;
            };
            if list[0].progress.as_ref().is_some_and(|p| p.round > 0) {
                let request = CancelMigrationRequest { name: list[0].name.clone() };
                let mut client = self.a.migrations().await;
                // The source may be stopped before it answers this, too.
                tokio::spawn(async move { client.cancel_migration(request).await.map(drop) });
                return;
            }
            assert!(begin.elapsed() < DEADLINE, "pre-copy does not begin: {list:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the point is reached.
    pub(super) async fn reach(&mut self, cell: Cell) {
        if cell.scene == Scene::Return {
            self.a.until_held().await;
            for dw in alive(&self.b.dir) {
                kill_process(pid(dw.pid), Signal::KILL).expect("killed");
                until_gone(&dw).await;
            }
            self.a.signal(Signal::CONT);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if cell.scene == Scene::Follow {
            return self.until_following().await;
        }
        if cell.source_holds() { self.a.until_held().await } else { self.b.until_held().await }
    }

    /// Waits until it runs on the destination, and pages of it are still at the source.
    async fn until_following(&self) {
        let begin = Instant::now();
        loop {
            let now = list(&self.a).await.into_iter().next().unwrap_or_default();
            let missing = now.progress.as_ref().map_or(0, |p| p.missing_pages);
            let there = one(&self.b).await.is_some_and(|vm| vm.observed_state() == State::Running);
            if now.state() == migration::State::Postcopy && missing > 0 && there {
                return;
            }
            assert!(now.end_time.is_none(), "it is over before anything happened to it: {now:?}");
            assert!(begin.elapsed() < DEADLINE, "its memory does not follow: {now:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
