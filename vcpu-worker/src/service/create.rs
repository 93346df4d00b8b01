//! CreateVm: checks what is asked for, builds it on a blocking thread.

use std::sync::Arc;

use vpmu_proto::worker::{CreateVmRequest, CreateVmResponse};

use super::{Inner, events, snapshot};
use crate::error::WorkerError;
use crate::machine::build::{BuildOptions, Plan, build};
use crate::pmu_glue::shape_to_proto;

pub(super) async fn create(
    inner: &Arc<Inner>,
    request: CreateVmRequest,
) -> Result<CreateVmResponse, WorkerError> {
    let _control = inner.control.lock().await;
    if let Some(machine) = &inner.held().machine {
        return Err(WorkerError::Occupied { name: machine.name().to_owned() });
    }
    if inner.shutdown.is_cancelled() {
        return Err(WorkerError::Cancelled { what: "creating the VM" });
    }
    let plan = Plan::new(&request, &inner.cores)?;
    let housekeeping = request.placement.map(|p| p.housekeeping_cores).unwrap_or_default();
    // Only shown, by ps and top; cut to 15 bytes by the kernel.
    let shown = inner.own_process.then(|| format!("vm-{}", request.vm_name));
    let options = BuildOptions {
        right: Arc::clone(&inner.right),
        rates: inner.rates,
        console: Arc::clone(&inner.console),
    };
    let building = move || {
        // Here, because each hand-over to another thread may take as long as all of this.
        if !housekeeping.is_empty() {
            super::placement::move_housekeeping(&housekeeping)?;
        }
        if let Some(shown) = shown {
            drop(std::fs::write("/proc/self/comm", shown));
        }
        build(plan, &options)
    };
    let built = tokio::task::spawn_blocking(building)
        .await
        .map_err(|e| WorkerError::Thread { thread: "building the VM".to_owned(), problem: e.to_string() })?;
    let (machine, loads, warnings) = built?;
    let machine = Arc::new(machine);
    let loaded = match request.restore {
        Some(from) => snapshot::restore(&machine, from).await,
        None => machine.load(loads).await,
    };
    if let Err(error) = loaded {
        // The threads end before the answer goes out.
        if let Err(stop) = machine.stop().await {
            tracing::error!(error = %stop, "after a failed load");
        }
        return Err(error);
    }
    let pmu_shape = machine.shape().map(shape_to_proto);
    let cpuid_differences = crate::machine::options::differences(&machine.vm().cpuid_differences());
    events::follow(inner, &machine);
    inner.held().machine = Some(machine);
    Ok(CreateVmResponse { pmu_shape, cpuid_differences, warnings })
}
