//! PMU images on their way to the store: at a checkpoint, at a pause, at the end.
//!
//! Invariant: of images that a full disk refused the newest are kept in memory, until it takes writes again.

use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::worker::PmuImage;

use super::Actor;
use crate::status::ApiError;
use crate::store::Batch;

impl Actor {
    /// Stores PMU images.
    pub(super) async fn store_pmu(
        &mut self,
        images: Vec<PmuImage>,
        cores: &[u32],
        cause: &str,
    ) -> Result<(), ApiError> {
        if images.is_empty() {
            return Ok(());
        }
        let batch = self.with_pmu(Batch::new(), images, cores, cause)?;
        self.commit_pmu(batch).await
    }

    /// Commits a batch with PMU images. What a full disk refuses is kept, until it takes writes again or newer ones come.
    pub(super) async fn commit_pmu(&mut self, batch: Batch) -> Result<(), ApiError> {
        let stored = self.daemon.store.commit(batch.clone()).await;
        match &stored {
            Ok(()) => self.unstored = None,
            Err(error) if crate::ops::is_failing(error) => self.unstored = Some(batch),
            Err(_) => {}
        }
        stored?;
        Ok(())
    }

    /// Adds PMU images to a batch.
    pub(super) fn with_pmu(
        &self,
        batch: Batch,
        images: Vec<PmuImage>,
        cores: &[u32],
        cause: &str,
    ) -> Result<Batch, ApiError> {
        let mode = self.daemon.host.pmu_mode;
        let records =
            crate::pmu_view::records(&self.vm.uid, images, cores, self.ownership.epoch, cause, mode);
        Ok(records.iter().try_fold(batch, Batch::put_pmu)?)
    }

    pub(super) async fn checkpoint(&mut self) {
        let Some(worker) = self.worker.clone().filter(|_| self.state() == State::Running) else { return };
        let stored = match worker.pmu().await {
            Ok(images) => self.store_pmu(images, &worker.cores(), "checkpoint").await,
            Err(error) => Err(error),
        };
        if let Err(error) = stored {
            tracing::warn!(vm = %self.name, %error, "PMU checkpoint failed");
        }
    }
}
