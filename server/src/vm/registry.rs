//! Machines by name. Holding the lock, a name is given to at most one actor; everything slow happens in the actor.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot, watch};
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::store::{OwnershipRecord, VmRecord};

use super::actor::Actor;
use super::command::{Command, Mail};
use super::view::VmView;
use crate::daemon::Daemon;
use crate::names::VmName;
use crate::status::ApiError;

/// Machines on one host, tombstones included.
pub const MAX_VMS: usize = 1024;
/// Commands that wait in one mailbox.
const MAILBOX: usize = 32;

/// Machines by name.
#[derive(Default)]
pub struct Registry {
    vms: Mutex<BTreeMap<VmName, VmHandle>>,
    /// How many have been inserted, for those who wait for one.
    inserted: watch::Sender<u64>,
}

/// An actor as others hold it.
#[derive(Clone)]
pub struct VmHandle {
    /// Full name.
    pub name: VmName,
    /// Uid.
    pub uid: String,
    sender: mpsc::Sender<Mail>,
    view: watch::Receiver<Arc<VmView>>,
    /// Somebody has the input side of its console.
    typing: Arc<AtomicBool>,
}

/// The input side of a machine's console, for as long as it lives.
#[derive(Debug)]
pub struct ConsoleInput(Arc<AtomicBool>);

impl Drop for ConsoleInput {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl VmHandle {
    /// Takes the input side of its console, if nobody has it.
    pub fn console_input(&self) -> Result<ConsoleInput, ApiError> {
        if self.typing.swap(true, Ordering::AcqRel) {
            return Err(ApiError::precondition(
                "CONSOLE_TAKEN",
                &self.name.to_string(),
                format!(
                    "another client has the input of {}'s console; attach without write (vpmuctl: --read-only) to look on, or end that one first",
                    self.name
                ),
            ));
        }
        Ok(ConsoleInput(Arc::clone(&self.typing)))
    }

    /// Snapshot; never waits.
    pub fn view(&self) -> Arc<VmView> {
        self.view.borrow().clone()
    }

    /// Changes of the snapshot.
    pub fn watch(&self) -> watch::Receiver<Arc<VmView>> {
        self.view.clone()
    }

    /// Sends a command and waits for its answer.
    pub async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, ApiError>>) -> Command,
    ) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        // A full mailbox is refused at once: queueing more would only make everybody wait longer.
        match self.sender.try_send(Box::new(command(reply))) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                return Err(ApiError::exhausted(
                    "VM_BUSY",
                    format!("{} has {MAILBOX} commands waiting; ask again later", self.name),
                ));
            }
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(self.gone()),
        }
        answer.await.map_err(|_| self.gone())?
    }

    /// The same for what must not be refused: waits for room.
    pub async fn tell<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, ApiError>>) -> Command,
    ) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.sender.send(Box::new(command(reply))).await;
        sent.map_err(|_| self.gone())?;
        answer.await.map_err(|_| self.gone())?
    }

    fn gone(&self) -> ApiError {
        ApiError::aborted(
            "VM_GONE",
            &self.name.to_string(),
            format!("{} ended meanwhile; look again", self.name),
        )
    }

    /// Tells the actor that the daemon ends and waits for it.
    pub async fn end(&self) {
        let (reply, answer) = oneshot::channel();
        if self.sender.send(Box::new(Command::End { reply })).await.is_ok() {
            let _ = answer.await;
        }
    }
}

impl Registry {
    fn vms(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmName, VmHandle>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A machine by name.
    pub fn get(&self, name: &VmName) -> Result<VmHandle, ApiError> {
        self.vms().get(name).cloned().ok_or_else(|| {
            ApiError::not_found(
                "VirtualMachine",
                &name.to_string(),
                "list the machines of this host, or create it",
            )
        })
    }

    /// A machine by name, as soon as there is one.
    pub async fn wait_for(&self, name: &VmName) -> VmHandle {
        let mut inserted = self.inserted.subscribe();
        loop {
            if let Ok(handle) = self.get(name) {
                return handle;
            }
            // Cannot fail: the sender lives as long as this.
            let _ = inserted.changed().await;
        }
    }

    /// A machine by uid.
    pub fn by_uid(&self, uid: &str) -> Option<VmHandle> {
        self.vms().values().find(|h| h.uid == uid).cloned()
    }

    /// Machines of a project, or all, by name.
    pub fn list(&self, project: Option<&str>) -> Vec<VmHandle> {
        self.vms().values().filter(|h| project.is_none_or(|p| h.name.project() == p)).cloned().collect()
    }

    /// Takes a name for a new machine and starts its actor, which waits for `Create` or `Receive`.
    pub fn insert(
        &self,
        daemon: &Arc<Daemon>,
        name: &VmName,
        record: VmRecord,
        ownership: OwnershipRecord,
        born: bool,
    ) -> Result<VmHandle, ApiError> {
        if daemon.shutdown.is_cancelled() {
            return Err(ApiError::shutting_down());
        }
        let mut vms = self.vms();
        if vms.contains_key(name) {
            return Err(ApiError::already_exists(
                "VirtualMachine",
                &name.to_string(),
                "choose another id, or delete that one first",
            ));
        }
        if vms.len() >= MAX_VMS {
            return Err(ApiError::exhausted(
                "TOO_MANY_VMS",
                format!("this host has {MAX_VMS} machines, which is the bound; delete one first"),
            ));
        }
        let uid = record.vm.as_ref().map(|vm| vm.uid.clone()).unwrap_or_default();
        let (sender, mailbox) = mpsc::channel(MAILBOX);
        let vm: VirtualMachine = record.vm.clone().unwrap_or_default();
        let view = VmView { vm, pmu_shape: record.pmu_shape.clone(), ..VmView::default() };
        let (publish, view) = watch::channel(Arc::new(view));
        let handle = VmHandle { name: name.clone(), uid, sender, view, typing: Arc::default() };
        let actor = Actor::new(
            Arc::clone(daemon),
            name.clone(),
            record,
            ownership,
            born,
            mailbox,
            handle.sender.downgrade(),
            publish,
        );
        daemon.tasks.spawn(actor.run());
        vms.insert(name.clone(), handle.clone());
        drop(vms);
        self.inserted.send_modify(|count| *count += 1);
        Ok(handle)
    }

    /// Gives a name free, if it still belongs to that uid.
    pub fn remove(&self, name: &VmName, uid: &str) {
        let mut vms = self.vms();
        if vms.get(name).is_some_and(|h| h.uid == uid) {
            vms.remove(name);
        }
    }
}
