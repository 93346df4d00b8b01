//! Pause and resume of a busy guest through the API, beside a bare unary call on the same connection.
//!
//! A pause makes the PMU's state durable before it is answered; a guest without a PMU has none, so that the two
//! machines together show what the record costs.

use std::time::Instant;

use super::error::{BenchError, Step as _};
use super::figure::{Figure, Samples, Target};
use super::site::{self, Site, ms};

const FLOOR: &str = "GetVirtualMachine of the same machine on the same connection";
/// Both machines spin.
const BUSY: &str = "mode=s";

/// In both isolations.
pub(super) async fn run(runs: u32) -> Result<Vec<Figure>, BenchError> {
    super::say("pause: pause and resume of a busy guest, 1 vCPU");
    let runs = runs.max(10) * 10;
    let site = Site::new()?;
    let mut figures = Vec::new();
    for (isolation, calls) in [("thread", 1.0), ("process", 2.0)] {
        let host = site.host(if calls > 1.0 { "procs" } else { "threads" }, isolation).await?;
        let client = &host.client;
        site::launch(client, "plain", site::without_pmu(site.spec(64, BUSY))).await?;
        let plain = measure(client, "plain", runs).await?;
        site::delete(client, "plain").await?;
        site::launch(client, "pmu", site.spec(64, BUSY)).await?;
        let pmu = measure(client, "pmu", runs).await?;
        host.end().await?;
        let target = |call: &Samples| Target::Over(0.10 + (calls - 1.0) * call.median());
        let floor = Some((FLOOR, &plain.call));
        figures.push(Figure::of(
            format!("pause, {isolation}"),
            "ms",
            &plain.pause,
            floor,
            target(&plain.call),
        ));
        let floor = Some((FLOOR, &pmu.call));
        figures.push(Figure::of(
            format!("pause with the durable PMU record, {isolation}"),
            "ms",
            &pmu.pause,
            floor,
            Target::None,
        ));
        figures.push(Figure::of(format!("resume, {isolation}"), "ms", &pmu.resume, floor, target(&pmu.call)));
    }
    Ok(figures)
}

#[derive(Default)]
struct Turn {
    call: Samples,
    pause: Samples,
    resume: Samples,
}

async fn measure(client: &vpmu_client::Client, vm: &str, runs: u32) -> Result<Turn, BenchError> {
    let mut turn = Turn::default();
    for round in 0..=runs {
        let begin = Instant::now();
        client.get_vm(vm).await.step("get a machine")?;
        let call = ms(begin.elapsed());
        let begin = Instant::now();
        client.pause_vm(vm).await.step("pause a machine")?;
        let pause = ms(begin.elapsed());
        let begin = Instant::now();
        client.resume_vm(vm).await.step("resume a machine")?;
        let resume = ms(begin.elapsed());
        if round > 0 {
            turn.call.push(call);
            turn.pause.push(pause);
            turn.resume.push(resume);
        }
    }
    Ok(turn)
}
