//! Between the switcher and everything else: PMU images and shapes as protocol messages, checked on the way in.

use pmu::{Image, Shape, Vendor};
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
