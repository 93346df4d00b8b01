//! Everything about a machine but its memory, out and in.
//!
//! Saving asks every vCPU thread at once; restoring sets vCPUs first, then interrupt controllers and clock (kvm-facts
//! section 7), then devices, and reads each PMU back. The outline of what comes in, and every PMU
//! image, is checked before anything is set; a piece that its owner then refuses leaves a machine that is not fit to run.

use pmu::RestorePolicy;
use vpmu_proto::api::PmuLoss;
use vpmu_proto::worker::{PmuImage, StatePiece, VcpuState, VmState};

use super::{Machine, gather};
use crate::error::WorkerError;
use crate::pmu_glue::{image_from_proto, image_to_proto};
use crate::vcpu::request::{Answer, LoadFrom, Request, Saved};

/// Format of [`VmState`].
pub const VERSION: u32 = 1;

/// Most pieces of one kind of thing; no hypervisor has a quarter of it.
const MAX_PIECES: usize = 64;

/// Most PMU losses that are named; the rest is counted.
const MAX_LOSSES: usize = 128;

/// PMU state as it was set.
#[derive(Debug)]
pub struct PmuArrival {
    /// As read back.
    pub images: Vec<PmuImage>,
    /// Registers that did not come along whole, at most 128.
    pub losses: Vec<PmuLoss>,
    /// How many there were.
    pub total: u32,
}

/// What to load, the digest that each vCPU's PMU must read back with, and what is lost.
type Checked = (Vec<LoadFrom>, Vec<(u32, [u8; 32])>, Vec<PmuLoss>);

/// A save that is under way on the vCPU threads.
pub struct Saving(Vec<Result<Answer<Saved>, WorkerError>>);

impl Machine {
    /// Asks every vCPU for its state; they must be paused.
    pub fn begin_save(&self) -> Saving {
        Saving(self.vcpus.iter().map(|v| v.ask(Request::Save)).collect())
    }

    /// The rest of the save. Makes ioctls: not for a runtime's worker thread without `block_in_place`.
    pub async fn finish_save(&self, saving: Saving, was_paused: bool) -> Result<VmState, WorkerError> {
        let vm = self.vm.save()?;
        let vcpus = gather("saving the vCPUs", saving.0).await?;
        let vcpus = (0u32..)
            .zip(vcpus)
            .map(|(vcpu, (pieces, pmu))| VcpuState {
                vcpu,
                pieces,
                pmu: pmu.map(|image| image_to_proto(vcpu, &image)),
            })
            .collect();
        Ok(VmState {
            version: VERSION,
            hypervisor: self.vm.kind().to_owned(),
            vm,
            vcpus,
            devices: self.devices.save(),
            console: Some(self.console.save()),
            was_paused,
            missing_pages: Vec::new(),
        })
    }

    /// Sets saved state into paused vCPUs; returns the PMU images as read back. After an error the machine is not
    /// fit to run.
    pub async fn restore(&self, state: VmState) -> Result<Vec<PmuImage>, WorkerError> {
        Ok(self.restore_under(state, RestorePolicy::Require).await?.images)
    }

    /// The same under a policy for PMU state that does not fit.
    pub async fn restore_under(
        &self,
        state: VmState,
        policy: RestorePolicy,
    ) -> Result<PmuArrival, WorkerError> {
        let (loads, wanted, lost) = self.check(&state, policy)?;
        let answers = self.vcpus.iter().zip(loads).map(|(vcpu, load)| vcpu.load(load)).collect();
        let images = super::to_proto(gather("restoring the vCPUs", answers).await?);
        self.vm.restore(&state.vm)?;
        self.devices.restore(&state.devices)?;
        if let Some(console) = &state.console {
            self.console.restore(console);
        }
        for (vcpu, digest) in wanted {
            let back = images.iter().find(|image| image.vcpu == vcpu);
            if back.is_none_or(|back| back.digest != digest) {
                return Err(WorkerError::PmuImage {
                    vcpu,
                    message: "what was read back after setting it differs from what arrived".to_owned(),
                });
            }
        }
        let total = u32::try_from(lost.len()).unwrap_or(u32::MAX);
        let losses = lost.into_iter().take(MAX_LOSSES).collect();
        Ok(PmuArrival { images, losses, total })
    }

    /// What each vCPU is loaded with, what its PMU must read back as, and what of it did not come along.
    fn check(&self, state: &VmState, policy: RestorePolicy) -> Result<Checked, WorkerError> {
        let bad = |field, problem| WorkerError::BadState { field, problem };
        if state.version != VERSION {
            return Err(bad("version", format!("it is {}, this build reads {VERSION}", state.version)));
        }
        if state.hypervisor != self.vm.kind() {
            let theirs: String = state.hypervisor.chars().take(32).collect();
            return Err(bad(
                "hypervisor",
                format!("it is of {theirs:?}, this VM is on {:?}", self.vm.kind()),
            ));
        }
        if state.vcpus.len() != self.vcpus.len() {
            return Err(bad(
                "vcpus",
                format!("{} came, this VM has {}", state.vcpus.len(), self.vcpus.len()),
            ));
        }
        bounded("vm", &state.vm)?;
        bounded("devices", &state.devices)?;
        let mut loads = Vec::with_capacity(state.vcpus.len());
        let (mut wanted, mut lost) = (Vec::new(), Vec::new());
        for (index, vcpu) in (0u32..).zip(&state.vcpus) {
            if vcpu.vcpu != index {
                return Err(bad("vcpus", format!("entry {index} is vCPU {}", vcpu.vcpu)));
            }
            bounded("vcpus.pieces", &vcpu.pieces)?;
            let pmu = match &vcpu.pmu {
                Some(image) if image.vcpu != index => {
                    return Err(bad("vcpus.pmu", format!("entry {index} is the PMU of vCPU {}", image.vcpu)));
                }
                Some(image) => {
                    let image = image_from_proto(image)?;
                    let fitted = match policy {
                        RestorePolicy::Require => pmu::compat::Fitted { image, lost: Vec::new() },
                        _ => pmu::compat::fit(&image, self.shape().unwrap_or(&pmu::Shape::none()), policy),
                    };
                    lost.extend(fitted.lost.into_iter().map(|l| PmuLoss {
                        vcpu: index,
                        msr: l.msr,
                        name: l.name,
                        had: l.had,
                        has: l.has,
                    }));
                    // Reset where there is no PMU to reset: there is nothing to load.
                    (policy == RestorePolicy::Require || self.shape().is_some()).then(|| {
                        wanted.push((index, fitted.image.digest()));
                        Box::new(fitted.image)
                    })
                }
                None => None,
            };
            loads.push(LoadFrom::Saved { pieces: vcpu.pieces.clone(), pmu });
        }
        Ok((loads, wanted, lost))
    }
}

fn bounded(field: &'static str, pieces: &[StatePiece]) -> Result<(), WorkerError> {
    if pieces.len() > MAX_PIECES {
        return Err(WorkerError::BadState {
            field,
            problem: format!("{} pieces, at most {MAX_PIECES}", pieces.len()),
        });
    }
    Ok(())
}
