//! One exit and one kick of the worker's run loop, in this process, beside bare ones.

use vcpu_worker::error::WorkerError;
use vcpu_worker::floor::loops::{self, Round};

use super::error::BenchError;
use super::figure::{Figure, Samples, Target};

/// The host PMU that the guests are given.
const SHAPE: &str = "intel:v5:8+4:48";

/// Port I/O and a PMU register.
pub(super) async fn exits() -> Result<Vec<Figure>, BenchError> {
    super::say("exit: the worker's run loop beside a bare KVM_RUN loop, in turns on one core");
    let core = cores().0;
    let pio = blocking(move |shape| loops::pio_exit(shape, core)).await?;
    let msr = blocking(move |shape| loops::msr_exit(shape, core)).await?;
    Ok(vec![
        figure("exit: port output, nothing counting", &pio, "a loop of KVM_RUN", Target::Times(1.03)),
        figure(
            "exit: RDMSR of a PMU register",
            &msr,
            "a loop of KVM_RUN that answers a constant",
            Target::Times(1.10),
        ),
    ])
}

/// A kick.
pub(super) async fn kicks() -> Result<Vec<Figure>, BenchError> {
    super::say("kick: from the request to user space, beside a signal to a bare KVM_RUN loop");
    let (core, observer) = cores();
    if core == observer {
        return Err(BenchError::Missing(
            "a kick is measured from a second core, and this process may use one".to_owned(),
        ));
    }
    let kick = blocking(move |shape| loops::kick(shape, core, observer)).await?;
    Ok(vec![figure("kick to user space", &kick, "tgkill to a thread in KVM_RUN", Target::Times(1.1))])
}

fn figure(name: &str, rounds: &[Round], floor_is: &'static str, target: Target) -> Figure {
    let ours: Samples = rounds.iter().map(|r| r.ours).collect();
    let floor: Samples = rounds.iter().map(|r| r.floor).collect();
    Figure::least(format!("{name} (least median)"), "us", &ours, (floor_is, &floor), target)
}

/// Two cores of this process, the same one twice if it has but one.
fn cores() -> (u32, u32) {
    let allowed = vcpu_worker::host::allowed_cores();
    let last = allowed.last().copied().unwrap_or_default();
    (last, allowed.first().copied().unwrap_or(last))
}

async fn blocking(
    body: impl FnOnce(pmu::Shape) -> Result<Vec<Round>, WorkerError> + Send + 'static,
) -> Result<Vec<Round>, BenchError> {
    let shape: pmu::Shape =
        SHAPE.parse().map_err(|e| BenchError::Missing(format!("the PMU shape {SHAPE}: {e}")))?;
    let done = tokio::task::spawn_blocking(move || body(shape)).await;
    Ok(done.map_err(|e| BenchError::io("measure the run loop", std::io::Error::other(e)))??)
}
