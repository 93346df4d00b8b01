//! ForceOwner at a machine that no migration's driver has in its hands: a tombstone, or one whose ownership is uncertain.
//! And its other side: a later owner exists, so that nothing runs here any more.

use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{Forced, OwnershipRecord};

use super::Actor;
use super::restarting::note;
use crate::handover::force::Claim;
use crate::status::ApiError;
use crate::vm::restart::Event;

impl Actor {
    /// It is owned here from this record on. There is no copy of it that is known to be the newest.
    pub(super) async fn force(&mut self, claim: Claim, forced: Forced) -> Result<(), ApiError> {
        if self.migration.is_some() {
            return Err(self.busy());
        }
        // What a settled migration has written since is what is overruled.
        let held = self.daemon.store.ownership(&self.vm.uid).unwrap_or_else(|| self.ownership.clone());
        let record = OwnershipRecord {
            epoch: claim.epoch,
            owner_host: self.daemon.host.host_id.clone(),
            phase: Phase::Owned as i32,
            digest: Vec::new(),
            lsn: 0,
            forced: Some(Box::new(forced)),
            ..held
        };
        self.ownership = self.daemon.store.append_ownership(record).await?;
        // A worker that is left of an uncertain machine was sealed, and is stale now.
        self.retire_worker("stop").await;
        self.end_unheld().await?;
        let why = crate::migration::force::fresh();
        let edit = |vm: &mut VirtualMachine| {
            vm.moved_to.clear();
            note(vm, Event::ByUser);
        };
        self.change(State::Failed, why.reason(), why.message(), Kind::Updated, edit).await
    }

    /// A later owner exists: what runs here is ended first, then that is journalled.
    pub(super) async fn give_way(&mut self, epoch: u64, owner: String) -> Result<(), ApiError> {
        if self.migration.is_some() {
            return Err(self.busy());
        }
        if !matches!(self.ownership.phase(), Phase::Owned | Phase::Entered) || epoch <= self.ownership.epoch {
            return Ok(());
        }
        self.show(State::Stopping);
        self.retire_worker("stop").await;
        self.end_unheld().await?;
        let record = OwnershipRecord {
            epoch,
            owner_host: owner.clone(),
            phase: Phase::Superseded as i32,
            lsn: 0,
            ..self.ownership.clone()
        };
        self.ownership = self.daemon.store.append_ownership(record).await?;
        let message = format!("host {owner} owns it by force, at epoch {epoch}; it never runs here again");
        let edit = |vm: &mut VirtualMachine| {
            note(vm, Event::ByUser);
            vm.moved_to = owner;
        };
        self.change(State::Moved, "SUPERSEDED", &message, Kind::Updated, edit).await
    }

    fn busy(&self) -> ApiError {
        ApiError::aborted(
            "MIGRATION_IN_PROGRESS",
            &self.name.to_string(),
            format!("{} is being migrated; ask again once that is over", self.name),
        )
    }
}
