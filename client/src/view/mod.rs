//! The flat forms that `--output json` prints: short names, enum values without their prefix, times as RFC 3339 text,
//! microseconds as milliseconds with a fraction, 64-bit registers as plain integers. Scripts read these, so fields are
//! added and never renamed.

mod error;
mod migration;
mod operation;
mod pmu;
mod vm;

pub use error::{ErrorView, ViolationView};
pub use migration::{BreakdownView, CheckView, MigrationView, MismatchView};
pub use operation::OperationView;
pub use pmu::{
    CounterView, ForeignWriteView, HostCpuView, HostView, PmuAuditView, PmuStateView, PmuView, ProbeView,
    RegisterView, RestoredView, ShapeView, VcpuView, shape_text,
};
pub use vm::{BootView, PlacementView, PmuSpecView, VmEventView, VmView};

/// Microseconds as milliseconds, exact to the microsecond.
pub fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

/// An enum's proto name without its type's prefix: `DESIRED_STATE_RUNNING` becomes `RUNNING`.
fn bare(name: &str, prefix: &str) -> String {
    let name = name.strip_prefix(prefix).unwrap_or(name);
    if name == "UNSPECIFIED" || name == "STATE_UNSPECIFIED" { String::new() } else { name.to_owned() }
}

fn time(stamp: Option<&prost_types::Timestamp>) -> Option<String> {
    stamp.map(ToString::to_string)
}
