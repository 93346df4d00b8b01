//! The fault itself, and what heals it: the dead are started again, the silent go on, links and disks recover.
//!
//! Who was held at the point goes on after the fault; if it is the victim itself, when it is healed.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vcpu_worker::process::Identity;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::State;

use super::super::cell::{Cell, Fault, Who};
use super::super::link::Link;
use super::super::support::wire::cut;
use super::disk::fill;
use super::processes::{alive, pid, until_gone};
use super::{Extra, World, hasty, options};

impl World {
    pub(super) async fn fault(&mut self, cell: Cell, extra: Extra, sw: Option<&Identity>) {
        let holder = if cell.source_holds() { Who::SD } else { Who::DD };
        match cell.fault {
            Fault::Kill(who) => {
                for who in who {
                    self.kill(*who, sw).await;
                }
                if !who.contains(&holder) {
                    self.host(holder).signal(Signal::CONT);
                }
                // What must come of it without the daemon comes of it first.
                let dead: Vec<_> =
                    [Who::SD, Who::DD].into_iter().filter(|daemon| who.contains(daemon)).collect();
                if let [one] = dead[..] {
                    self.until_quiet(one).await;
                }
                for one in dead {
                    let options = options(cell, extra);
                    let options: Vec<_> = options.iter().map(String::as_str).collect();
                    self.host(one).restart_with(&options).await;
                    if let Some(after) = extra.again {
                        tokio::time::sleep(after).await;
                        self.host(one).kill().await;
                        self.host(one).restart_with(&options).await;
                    }
                }
            }
            Fault::Stop(who) => {
                let stopped: Vec<Pid> = match who {
                    Who::SD | Who::DD => vec![pid(self.host(who).child.id().expect("running"))],
                    Who::SW => vec![pid(sw.expect("a worker").pid)],
                    Who::DW => alive(&self.b.dir).iter().map(|w| pid(w.pid)).collect(),
                };
                for victim in &stopped {
                    kill_process(*victim, Signal::STOP).expect("stopped");
                }
                if who != holder {
                    self.host(holder).signal(Signal::CONT);
                }
                tokio::time::sleep(silence()).await;
                for victim in stopped {
                    // It may have been ended meanwhile.
                    let _ = kill_process(victim, Signal::CONT);
                }
            }
            Fault::Cut | Fault::OneWay => {
                let links = self.links.take().expect("there");
                if cell.fault == Fault::Cut {
                    links.iter().for_each(Link::cut);
                } else {
                    links[0].mute();
                    links[1].deafen();
                }
                self.host(holder).signal(Signal::CONT);
                tokio::time::sleep(silence()).await;
                links.iter().for_each(Link::heal);
                self.links = Some(links);
            }
            Fault::CutData | Fault::Part => {
                let sw = pid(sw.expect("a worker").pid);
                let away = cell.fault == Fault::Part;
                // Before the cut, so that it cannot come back at once.
                if away {
                    kill_process(sw, Signal::STOP).expect("stopped");
                }
                assert_eq!(cut(sw.as_raw_nonzero().get().cast_unsigned()), 1, "the one data connection");
                if away {
                    tokio::time::sleep(silence()).await;
                    kill_process(sw, Signal::CONT).expect("goes on");
                }
            }
            Fault::Disk(who) => {
                let full = self.host(who).dir.join("full");
                fill(&full);
                self.host(holder).signal(Signal::CONT);
                tokio::time::sleep(Duration::from_secs(2)).await;
                std::fs::remove_file(&full).expect("room again");
            }
        }
    }

    async fn kill(&mut self, who: Who, sw: Option<&Identity>) {
        let workers = match who {
            Who::SD | Who::DD => return self.host(who).kill().await,
            Who::SW => sw.cloned().into_iter().collect(),
            Who::DW => alive(&self.b.dir),
        };
        assert!(!workers.is_empty(), "{who:?} is not there");
        for worker in workers {
            kill_process(pid(worker.pid), Signal::KILL).expect("killed");
            until_gone(&worker).await;
        }
    }

    /// Waits until the other daemon has nothing to do any more, or waits for the dead one.
    async fn until_quiet(&self, dead: Who) {
        let other = if dead == Who::SD { &self.b } else { &self.a };
        let (begin, patience) = (Instant::now(), Duration::from_millis(1500));
        loop {
            let states: Vec<_> = other.list().await.iter().map(VirtualMachine::observed_state).collect();
            let busy = states.iter().any(|s| matches!(s, State::MigratingOut | State::Incoming));
            if !busy || begin.elapsed() > patience {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn silence() -> Duration {
    Duration::from_millis(hasty() * 33 / 10)
}
