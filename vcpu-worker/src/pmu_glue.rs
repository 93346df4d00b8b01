//! Between the switcher and everything else: PMU images and shapes as protocol messages, checked on the way in.

use pmu::{Image, RestorePolicy, Shape, Vendor};
use vpmu_proto::api;
use vpmu_proto::worker::{PmuImage, PmuImageRegister};

use crate::error::WorkerError;

/// More registers than any PMU has.
const MAX_REGISTERS: usize = 256;

/// A shape as a message.
pub fn shape_to_proto(shape: &Shape) -> api::PmuShape {
    api::PmuShape {
        vendor: shape.vendor.as_str().to_owned(),
        version: u32::from(shape.version),
        gp_bitmap: shape.gp,
        fixed_bitmap: shape.fixed,
        gp_width: u32::from(shape.gp_width),
        fixed_width: u32::from(shape.fixed_width),
        perf_capabilities: shape.perf_capabilities,
    }
}

/// A shape from a message; only what is representable is checked here, `Image::validate` checks the rest.
pub fn shape_from_proto(shape: &api::PmuShape) -> Result<Shape, String> {
    let vendor = match shape.vendor.as_str() {
        "intel" => Vendor::Intel,
        "amd" => Vendor::Amd,
        other => {
            return Err(format!(
                "vendor {:?} is neither intel nor amd",
                other.chars().take(16).collect::<String>()
            ));
        }
    };
    let small =
        |name: &str, value: u32| u8::try_from(value).map_err(|_| format!("{name} {value} is above 255"));
    Ok(Shape {
        vendor,
        version: small("version", shape.version)?,
        gp: shape.gp_bitmap,
        fixed: shape.fixed_bitmap,
        gp_width: small("gp_width", shape.gp_width)?,
        fixed_width: small("fixed_width", shape.fixed_width)?,
        perf_capabilities: shape.perf_capabilities,
    })
}

/// A restore policy from a message; unset means require.
#[must_use]
pub fn policy_from_proto(policy: api::migration_spec::PmuRestore) -> RestorePolicy {
    match policy {
        api::migration_spec::PmuRestore::BestEffort => RestorePolicy::BestEffort,
        api::migration_spec::PmuRestore::Reset => RestorePolicy::Reset,
        api::migration_spec::PmuRestore::Unspecified | api::migration_spec::PmuRestore::Require => {
            RestorePolicy::Require
        }
    }
}

/// An image as a message, with its digest.
pub fn image_to_proto(vcpu: u32, image: &Image) -> PmuImage {
    PmuImage {
        vcpu,
        shape: Some(shape_to_proto(&image.shape)),
        registers: image
            .registers
            .iter()
            .map(|(msr, value)| PmuImageRegister { msr: *msr, value: *value })
            .collect(),
        in_service: image.in_service,
        pmi_pending: image.pmi_pending,
        pmis: image.pmis,
        digest: image.digest().to_vec(),
    }
}

/// An image from a message: bounded, valid, and with the digest that it claims.
pub fn image_from_proto(message: &PmuImage) -> Result<Image, WorkerError> {
    let vcpu = message.vcpu;
    let bad = |message: String| WorkerError::PmuImage { vcpu, message };
    if message.registers.len() > MAX_REGISTERS {
        return Err(bad(format!("{} registers, at most {MAX_REGISTERS}", message.registers.len())));
    }
    let shape = message.shape.as_ref().ok_or_else(|| bad("it has no shape".to_owned()))?;
    let image = Image {
        shape: shape_from_proto(shape).map_err(bad)?,
        registers: message.registers.iter().map(|r| (r.msr, r.value)).collect(),
        in_service: message.in_service,
        pmi_pending: message.pmi_pending,
        pmis: message.pmis,
    };
    image.validate().map_err(|e| bad(e.to_string()))?;
    if message.digest != image.digest() {
        return Err(bad("its digest does not match its contents".to_owned()));
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmu::{EventFilter, GuestId, GuestPmu, Policy};
    use proptest::prelude::*;

    fn image() -> Image {
        let shape = "intel:v5:8+4:48".parse().unwrap();
        GuestPmu::new(GuestId(1), shape, Policy::Strict, EventFilter::allow_all()).image()
    }

    #[test]
    fn an_image_survives_the_wire() {
        let image = image();
        assert_eq!(image_from_proto(&image_to_proto(3, &image)).unwrap(), image);
    }

    #[test]
    fn what_was_changed_on_the_way_is_refused() {
        let good = image_to_proto(0, &image());
        let changes: [fn(&mut PmuImage); 8] = [
            |m| m.registers[0].value ^= 1,
            |m| m.pmis += 1,
            |m| m.in_service = true,
            |m| m.digest.clear(),
            |m| m.shape = None,
            |m| m.shape.as_mut().unwrap().gp_width = 300,
            |m| m.shape.as_mut().unwrap().vendor = "via".to_owned(),
            |m| m.registers.resize(5000, PmuImageRegister::default()),
        ];
        for (i, change) in changes.into_iter().enumerate() {
            let mut message = good.clone();
            change(&mut message);
            assert_eq!(image_from_proto(&message).unwrap_err().reason(), "PMU_IMAGE_REJECTED", "change {i}");
        }
    }

    proptest! {
        /// Whatever arrives: an answer, not a panic.
        #[test]
        fn any_message_is_answered(
            registers in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..40),
            version in any::<u32>(),
            gp in any::<u64>(),
            fixed in any::<u64>(),
            widths in (any::<u32>(), any::<u32>()),
            amd in any::<bool>(),
        ) {
            let message = PmuImage {
                vcpu: 0,
                shape: Some(api::PmuShape {
                    vendor: if amd { "amd" } else { "intel" }.to_owned(),
                    version: version % 8,
                    gp_bitmap: gp,
                    fixed_bitmap: fixed,
                    gp_width: widths.0 % 300,
                    fixed_width: widths.1 % 300,
                    perf_capabilities: gp,
                }),
                registers: registers.into_iter().map(|(msr, value)| PmuImageRegister { msr, value }).collect(),
                in_service: false,
                pmi_pending: false,
                pmis: 0,
                digest: vec![],
            };
            prop_assert!(image_from_proto(&message).is_err());
        }
    }
}
