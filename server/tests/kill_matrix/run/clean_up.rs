//! The end: everything can be removed, and then nothing is left of it, neither process, memory nor file.

use std::time::{Duration, Instant};

use vpmu_proto::api::*;

use super::super::cell::{Cell, Fault, Got};
use super::memory::Copy;
use super::processes::alive;
use super::{DEADLINE, Extra, World, options};

impl World {
    /// Everything can be removed, and then nothing is left.
    pub(super) async fn clean_up(&mut self, cell: Cell, extra: Extra, got: Got) {
        if let Fault::Disk(who) = cell.fault {
            // A store whose writes failed only reads until its daemon is started again.
            let options = options(cell, extra);
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            self.host(who).kill().await;
            self.host(who).restart_with(&options).await;
        }
        for host in [&self.a, &self.b] {
            let begin = Instant::now();
            for vm in host.list().await {
                // A source that was restarted may still be waiting for the destination's word.
                let deleted = loop {
                    let request = DeleteVirtualMachineRequest { name: vm.name.clone(), ..Default::default() };
                    match host.vms().await.delete_virtual_machine(request).await {
                        Ok(deleted) => break deleted,
                        Err(refused) => {
                            assert!(begin.elapsed() < DEADLINE, "it cannot be deleted: {refused:?}");
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                };
                host.finish(deleted.into_inner()).await.expect("deleted");
            }
        }
        for host in [&mut self.a, &mut self.b] {
            assert!(host.list().await.is_empty(), "{got:?}");
            let memory = Copy::all(host.child.id().expect("running")).len();
            assert_eq!(memory, 0, "guest memory is left in a daemon");
            let (begin, dir) = (Instant::now(), host.dir.clone());
            while !alive(&dir).is_empty() {
                assert!(begin.elapsed() < DEADLINE, "workers are left: {:?}", alive(&dir));
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(host.terminate().await, 0);
            let run = std::fs::read_dir(dir.join("state/run")).into_iter().flatten().flatten();
            let left: Vec<_> = run.map(|e| e.path()).collect();
            assert!(left.is_empty(), "runtime directories are left: {left:?}");
            let files = std::fs::read_dir(dir.join("state")).expect("there").flatten().map(|e| e.path());
            let sockets: Vec<_> = files.filter(|p| p.extension().is_some_and(|e| e == "sock")).collect();
            assert!(sockets.is_empty(), "sockets are left: {sockets:?}");
        }
    }
}
