//! Commands to a worker's machine, and questions about it.
//!
//! Invariant: where its vCPUs are is known (`cores`, and the grant with them) or, after a move that may have been made
//! in part, both places stay taken.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vpmu_proto::api::{ProbeReport, VirtualMachineStats};
use vpmu_proto::worker::command_request::Command;
use vpmu_proto::worker::command_response::Outcome;
use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::*;

use super::lane::confused;
use super::wire::{self, Way, streaming, unary};
use super::{Told, WorkerLink};
use crate::status::ApiError;

impl WorkerLink {
    /// Moves its vCPUs to other cores of this host; returns where they are.
    pub async fn place(
        &self,
        wanted: &crate::placement::Wanted,
        fifo_priority: u32,
    ) -> Result<Vec<u32>, ApiError> {
        let moving = {
            let grant = self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = || ApiError::aborted("VM_GONE", "", "the machine ended meanwhile; look again");
            grant.as_ref().ok_or_else(ended)?.begin_move(wanted)?
        };
        let cores = moving.cores.clone();
        let request =
            UpdatePlacementRequest { fence: self.fence(), vcpu_cores: cores.clone(), fifo_priority };
        let error = match unary!(self, self.inner.command, update_placement, request) {
            Ok(answer) if answer.vcpu_cores == cores => {
                moving.keep();
                *self.inner.cores.lock().unwrap_or_else(PoisonError::into_inner) = cores.as_slice().into();
                return Ok(cores);
            }
            Ok(answer) => {
                let found = answer.vcpu_cores;
                ApiError::internal(
                    "PLACEMENT_UNCERTAIN",
                    format!(
                        "the worker says that its vCPUs are on {found:?} instead of {cores:?}; stop the machine"
                    ),
                )
            }
            Err(error) => error,
        };
        // Only a worker that refused, or moved everything back, is known to be where it was.
        if !matches!(error.code(), tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument) {
            moving.leave_both();
        }
        Err(error)
    }

    /// Gives the right to run at `epoch`, and runs at once if asked. Returns the monotonic time of the first entry, ns.
    pub async fn grant(&self, epoch: u64, run: bool) -> Result<u64, ApiError> {
        let seq = self.inner.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let request = GrantRequest { fence: self.fence(), epoch, seq, deadline_boottime_ns: 0, run };
        match self.command(Command::Grant(request), self.inner.command).await? {
            Outcome::Grant(answer) => Ok(answer.running_monotonic_ns),
            _ => Err(confused()),
        }
    }

    /// Takes every right to run at `epoch` and below.
    pub async fn seal(&self, migration_id: &str, epoch: u64) -> Result<(), ApiError> {
        let request = SealRequest { fence: self.fence(), migration_id: migration_id.to_owned(), epoch };
        unary!(self, self.inner.command, seal, request).map(drop)
    }

    /// Lets a paused machine run on.
    pub async fn run(&self) -> Result<(), ApiError> {
        let outcome =
            self.command(Command::Run(RunRequest { fence: self.fence() }), self.inner.command).await?;
        self.open_lane();
        match outcome {
            Outcome::Run(_) => Ok(()),
            _ => Err(confused()),
        }
    }

    /// Gets every vCPU out and returns the PMU images.
    pub async fn pause(&self) -> Result<Vec<PmuImage>, ApiError> {
        let request = PauseRequest { fence: self.fence() };
        let outcome = self.command(Command::Pause(request), self.inner.command).await?;
        self.open_lane();
        match outcome {
            Outcome::Pause(answer) => Ok(answer.pmu),
            _ => Err(confused()),
        }
    }

    /// On the stream of commands if it is open, else as a call.
    pub(super) async fn command(&self, command: Command, deadline: Duration) -> Result<Outcome, ApiError> {
        if matches!(self.inner.way, Way::There(_)) {
            self.attached().await?;
            if let Some(answered) = self.inner.lane.command(deadline, &command).await {
                return answered;
            }
        }
        Ok(match command {
            Command::Run(request) => Outcome::Run(unary!(self, deadline, run, request)?),
            Command::Pause(request) => Outcome::Pause(unary!(self, deadline, pause, request)?),
            Command::Grant(request) => Outcome::Grant(unary!(self, deadline, grant, request)?),
            Command::Finish(request) => Outcome::Finish(unary!(self, deadline, finish_migration, request)?),
        })
    }

    /// Has the stream of commands opened, behind the caller's back, if it is not: commands that must be quick may follow.
    pub(super) fn open_lane(&self) {
        if let Way::There(client) = &self.inner.way {
            self.inner.lane.open(client.clone(), self.inner.command);
        }
    }

    /// Begins to write the paused machine to a file. Dropping the stream cancels it.
    pub async fn save_snapshot(
        &self,
        path: String,
        manifest: SnapshotManifest,
    ) -> Result<Told<SnapshotProgress>, ApiError> {
        let request = SaveSnapshotRequest { fence: self.fence(), path, manifest: Some(manifest) };
        streaming!(self, save_snapshot, request)
    }

    /// What the worker is.
    pub async fn status(&self) -> Result<WorkerStatus, ApiError> {
        unary!(self, self.inner.command, get_status, GetStatusRequest { fence: self.fence() })
    }

    /// PMU images now.
    pub async fn pmu(&self) -> Result<Vec<PmuImage>, ApiError> {
        Ok(unary!(self, self.inner.command, get_pmu, GetPmuRequest { fence: self.fence() })?.pmu)
    }

    /// Registers of its vCPUs' cores that somebody else wrote.
    pub async fn audit_pmu(&self) -> Result<Vec<CoreAudit>, ApiError> {
        Ok(unary!(self, self.inner.command, audit_pmu, AuditPmuRequest { fence: self.fence() })?.vcpus)
    }

    /// Where its threads that run no vCPU may be.
    pub async fn set_housekeeping(&self, cores: Vec<u32>) -> Result<(), ApiError> {
        let request = SetHousekeepingRequest { fence: self.fence(), cores };
        unary!(self, self.inner.command, set_housekeeping, request).map(drop)
    }

    /// Figures, read without stopping the guest.
    pub async fn stats(&self) -> Result<VirtualMachineStats, ApiError> {
        unary!(self, self.inner.command, get_stats, GetStatsRequest { fence: self.fence() })
    }

    /// The probe guest's report.
    pub async fn probe_report(&self) -> Result<ProbeReport, ApiError> {
        unary!(self, self.inner.command, get_probe_report, GetProbeReportRequest { fence: self.fence() })
    }
}
