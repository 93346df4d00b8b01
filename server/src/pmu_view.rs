//! PMU images as the public API shows them, and as the store keeps them.

use std::fmt::Write as _;

use vcpu_worker::pmu_glue;
use vpmu_proto::api::{PmuCounter, PmuRegister, VcpuPmu};
use vpmu_proto::store::PmuVcpuRecord;
use vpmu_proto::worker::PmuImage;

use crate::status::ApiError;

/// One vCPU's image, decoded. Images come from a worker, a peer or the store, so they are checked first.
pub fn decode(image: &PmuImage, core: u32) -> Result<VcpuPmu, ApiError> {
    let checked = pmu_glue::image_from_proto(image).map_err(|e| {
        ApiError::internal("PMU_IMAGE_INVALID", format!("PMU image of vCPU {}: {e}", image.vcpu))
    })?;
    let vendor = checked.shape.vendor;
    Ok(VcpuPmu {
        vcpu: image.vcpu,
        core,
        counters: pmu::counters(&checked)
            .into_iter()
            .map(|c| PmuCounter {
                name: c.name,
                value: c.value,
                selector: c.selector,
                live: c.live,
                overflow: c.overflow,
                pmi_enabled: c.pmi_enabled,
            })
            .collect(),
        registers: checked
            .registers
            .iter()
            .map(|(msr, value)| PmuRegister {
                msr: *msr,
                name: pmu::register_name(*msr, vendor),
                value: *value,
            })
            .collect(),
        pmis: checked.pmis,
        pmi_pending: checked.pmi_pending,
        in_service: checked.in_service,
        digest: hex(&checked.digest()),
    })
}

/// All vCPUs' images; `cores` gives the host core of each, where there is one.
pub fn decode_all(images: &[PmuImage], cores: &[u32]) -> Result<Vec<VcpuPmu>, ApiError> {
    images.iter().map(|image| decode(image, cores.get(image.vcpu as usize).copied().unwrap_or(0))).collect()
}

/// Store records of images; the store numbers them.
pub fn records(
    vm_uid: &str,
    images: Vec<PmuImage>,
    cores: &[u32],
    epoch: u64,
    cause: &str,
    mode: &str,
) -> Vec<PmuVcpuRecord> {
    let capture_time = Some(crate::ops::now());
    images
        .into_iter()
        .map(|image| PmuVcpuRecord {
            vm_uid: vm_uid.to_owned(),
            epoch,
            sequence: 0,
            capture_time,
            cause: cause.to_owned(),
            mode: mode.to_owned(),
            core: cores.get(image.vcpu as usize).copied().unwrap_or(0),
            image: Some(image),
        })
        .collect()
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
