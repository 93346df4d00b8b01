//! `vpmuctl vm ...`.

use super::console::{self, ConsoleArgs};
use super::create::{self, CreateArgs};
use super::failure::Failure;
use super::{Context, output};
use clap::{Args, Subcommand};
use serde_json::json;
use std::fmt::Write as _;
use std::process::ExitCode;
use vpmu_client::api::force_owner_request::{Attestation, Evidence};
use vpmu_client::api::{Snapshot, VirtualMachine};
use vpmu_client::longrunning::Operation;
use vpmu_client::units;
use vpmu_client::view::{BootView, PlacementView, VmEventView, VmView};

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a machine, and start it with --start.
    Create(Box<CreateArgs>),
    /// Start a stopped machine.
    Start(NameArgs),
    /// Stop a machine at once.
    Stop(NameArgs),
    /// Pause a running machine; its PMU state is durable when this returns.
    Pause(NameArgs),
    /// Resume a paused machine.
    Resume(NameArgs),
    /// Write a machine, state and memory, to a file; one that runs is paused for as long as that takes.
    Snapshot(SnapshotArgs),
    /// Make a new machine that goes on where a snapshot was taken.
    Restore(RestoreArgs),
    /// Show a machine's figures: exits, PMIs, and KVM's own statistics; the guest is not stopped for it.
    Stats(NameArgs),
    /// Show one machine.
    Get(NameArgs),
    /// Delete a machine, ending it first if it runs.
    Delete(NameArgs),
    /// Give a machine's vCPUs other host cores; a running one is moved without being stopped, and its counts go on.
    ///
    /// Without an option: shared cores that the host chooses. All threads go, or none.
    Placement(PlaceArgs),
    /// Make this host the owner of a machine that another host may own, against evidence that the other one will not
    /// run it.
    ///
    /// For a migration that stays in doubt because the other host is gone for good, or a machine that moved to a host
    /// which has died. The best evidence is a token of `vpmud store fence` from the old host's state directory; it may also
    /// let the copy here go on. With --dead-host you attest that the host is dead: if that is wrong, two copies can run, and
    /// the machine starts afresh here. The old host, when it comes back, ends what it has of the machine.
    ForceOwner(ForceArgs),
    /// List machines.
    List,
    /// Print machines as they are, then every change, until interrupted.
    Watch(WatchArgs),
    /// Attach to a machine's serial console; Ctrl-] leaves.
    Console(ConsoleArgs),
}

#[derive(Debug, Args)]
pub(crate) struct NameArgs {
    /// The machine.
    name: String,
}

#[derive(Debug, Args)]
pub(crate) struct ForceArgs {
    /// The machine.
    name: String,
    /// What `vpmud store fence` printed on the old host.
    #[arg(long, value_name = "TOKEN", required_unless_present = "dead_host", conflicts_with_all = ["dead_host", "boot_id", "epoch"])]
    fence_token: Option<String>,
    /// Attest that this host (its id) is dead.
    #[arg(long, value_name = "HOST", requires = "boot_id")]
    dead_host: Option<String>,
    /// Boot id of the life of it that has ended.
    #[arg(long, value_name = "BOOT_ID", requires = "dead_host")]
    boot_id: Option<String>,
    /// The highest ownership epoch of the machine that was seen on it.
    #[arg(long, default_value_t = 0, requires = "dead_host")]
    epoch: u64,
    /// Why; kept in the ownership journal.
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    /// The machine.
    name: String,
    /// File name in the host's snapshot directory (vpmud's --snapshot-dir); replaced if it is there. Default: the
    /// machine's name with .vpmusnap behind it.
    #[arg(long, value_name = "FILE")]
    file: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Name of the new machine.
    name: String,
    /// File name in the host's snapshot directory.
    #[arg(long, value_name = "FILE")]
    file: String,
    /// Run at once: read pages as the guest touches them, and the rest in the background. The file must stay as it is
    /// until all are there.
    #[arg(long)]
    lazy: bool,
    /// Leave it paused.
    #[arg(long)]
    paused: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// The machine.
    name: String,
    #[command(flatten)]
    placement: super::placement::PlacementArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// One machine; all if not given.
    name: Option<String>,
}

pub(crate) async fn run(context: &Context, command: VmCommand) -> Result<ExitCode, Failure> {
    let client = &context.client;
    match command {
        VmCommand::Create(args) => return Box::pin(create::run(context, *args)).await,
        VmCommand::Console(args) => return console::run(context, args).await,
        VmCommand::Start(args) => {
            let operation = client.start_vm(&args.name).await?;
            show(context, &finish(context, operation).await?)?;
        }
        VmCommand::Stop(args) => {
            let operation = client.stop_vm(&args.name).await?;
            show(context, &finish(context, operation).await?)?;
        }
        VmCommand::Snapshot(args) => snapshot(context, args).await?,
        VmCommand::Restore(args) => {
            let operation = client.restore_vm(&args.name, &args.file, args.lazy, args.paused).await?;
            show(context, &finish(context, operation).await?)?;
        }
        VmCommand::Stats(args) => super::stats::run(context, &args.name).await?,
        VmCommand::Pause(args) => show(context, &client.pause_vm(&args.name).await?)?,
        VmCommand::Resume(args) => show(context, &client.resume_vm(&args.name).await?)?,
        VmCommand::Placement(args) => {
            show(context, &client.update_placement(&args.name, args.placement.spec()).await?)?;
        }
        VmCommand::Get(args) => get(context, &client.get_vm(&args.name).await?)?,
        VmCommand::Delete(args) => {
            let operation = client.delete_vm(&args.name).await?;
            client.wait_operation(operation, context.timeout, |_| {}).await?;
            if context.json() {
                output::json(&json!({ "name": args.name, "deleted": true }))?;
            } else {
                output::line(&format!("{}: deleted", args.name))?;
            }
        }
        VmCommand::ForceOwner(args) => {
            let evidence = match args.fence_token {
                Some(token) => Evidence::FenceToken(token),
                None => Evidence::Attestation(Attestation {
                    host_id: args.dead_host.unwrap_or_default(),
                    boot_id: args.boot_id.unwrap_or_default(),
                    epoch: args.epoch,
                }),
            };
            show(context, &context.client.force_owner(&args.name, evidence, &args.reason).await?)?;
        }
        VmCommand::List => list(context).await?,
        VmCommand::Watch(args) => watch(context, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits for an operation whose response is a machine.
pub(crate) async fn finish(context: &Context, operation: Operation) -> Result<VirtualMachine, Failure> {
    Ok(context.client.wait_for(operation, context.timeout).await?)
}

/// Prints a machine after a command: one line, or the whole as JSON.
pub(crate) fn show(context: &Context, vm: &VirtualMachine) -> Result<(), Failure> {
    let view = VmView::from(vm);
    if context.json() {
        output::json(&view)?;
    } else {
        output::line(&summary(&view))?;
    }
    Ok(())
}

/// One line about a machine.
fn summary(vm: &VmView) -> String {
    let mut text = format!("{}: {}", vm.name, vm.observed_state.to_lowercase());
    if !vm.reason.is_empty() {
        let _ = write!(text, " [{}] {}", vm.reason, vm.message);
    }
    let mut parts = Vec::new();
    if !vm.hypervisor.is_empty() {
        parts.push(vm.hypervisor.clone());
    }
    if !vm.pmu_mode.is_empty() {
        parts.push(format!("PMU {}", mode_text(&vm.pmu_mode)));
    }
    if !vm.vcpu_cores.is_empty() {
        parts.push(format!("cores {}", cores(&vm.vcpu_cores)));
    }
    if !parts.is_empty() {
        let _ = write!(text, " ({})", parts.join(", "));
    }
    text
}

/// The PMU mode, with the word that `model` must never be shown without.
pub(crate) fn mode_text(mode: &str) -> String {
    if mode == "model" { "model (modelled counts, not hardware)".to_owned() } else { mode.to_owned() }
}

fn cores(cores: &[u32]) -> String {
    cores.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn get(context: &Context, vm: &VirtualMachine) -> Result<(), Failure> {
    let view = VmView::from(vm);
    if context.json() {
        output::json(&view)?;
        return Ok(());
    }
    let boot = match &view.boot {
        BootView::None => String::new(),
        BootView::Probe { working_set_bytes, .. } if *working_set_bytes > 0 => {
            format!("probe guest, working set {} a vCPU", units::bytes(*working_set_bytes))
        }
        BootView::Probe { .. } => "probe guest".to_owned(),
        BootView::Kernel { path, cmdline, .. } => format!("{path} {cmdline}").trim().to_owned(),
    };
    let pmu = if view.pmu.disabled {
        "none".to_owned()
    } else if view.pmu.gp_counters == 0 && view.pmu.fixed_counters == 0 {
        "the host's default".to_owned()
    } else {
        format!("{} general-purpose, {} fixed counters", view.pmu.gp_counters, view.pmu.fixed_counters)
    };
    let worker_pid = if view.worker_pid == 0 { String::new() } else { view.worker_pid.to_string() };
    let policy = view.restart_policy.to_lowercase().replace('_', "-");
    let restarts = match (policy.as_str(), &view.next_restart_time) {
        ("" | "never" | "unspecified", _) => String::new(),
        (policy, None) => format!("{policy}, {} so far", view.restart_count),
        (policy, Some(at)) => format!("{policy}, {} so far, next at {at}", view.restart_count),
    };
    let reason =
        if view.reason.is_empty() { String::new() } else { format!("[{}] {}", view.reason, view.message) };
    output::facts(&[
        ("name", view.name),
        ("uid", view.uid),
        ("state", view.observed_state.to_lowercase()),
        ("desired", view.desired_state.to_lowercase()),
        ("reason", reason),
        ("vcpus", view.vcpus.to_string()),
        ("cores", cores(&view.vcpu_cores)),
        ("placement", placement(&view.placement)),
        ("memory", units::bytes(view.memory_bytes)),
        ("boot", boot),
        ("hypervisor", view.hypervisor),
        ("pmu mode", mode_text(&view.pmu_mode)),
        ("pmu asked for", pmu),
        ("epoch", format!("{}, incarnation {}", view.epoch, view.incarnation)),
        ("worker pid", worker_pid),
        ("sandbox", view.sandbox.clone()),
        ("restarts", restarts),
        ("migration", view.migration),
        ("moved to", view.moved_to),
        ("cpuid", view.cpuid_differences.join("; ")),
        ("created", view.create_time.unwrap_or_default()),
        ("changed", view.update_time.unwrap_or_default()),
    ])?;
    Ok(())
}

/// `dedicated, packed, one NUMA node, SCHED_FIFO 10`
fn placement(view: &PlacementView) -> String {
    let mut parts = vec![view.policy.to_lowercase()];
    if !view.cores.is_empty() {
        parts.push(format!("cores {}", cores(&view.cores)));
    } else if !view.arrangement.is_empty() {
        parts.push(view.arrangement.to_lowercase());
    }
    if view.numa_local {
        parts.push("one NUMA node".to_owned());
    }
    if view.fifo_priority != 0 {
        parts.push(format!("SCHED_FIFO {}", view.fifo_priority));
    }
    parts.join(", ")
}

async fn snapshot(context: &Context, args: SnapshotArgs) -> Result<(), Failure> {
    let file = args.file.unwrap_or_else(|| format!("{}.vpmusnap", vpmu_client::names::short(&args.name)));
    let operation = context.client.snapshot_vm(&args.name, &file).await?;
    let snapshot: Snapshot = context.client.wait_for(operation, context.timeout).await?;
    if context.json() {
        output::json(&json!({
            "file": snapshot.file,
            "vm_uid": snapshot.vm_uid,
            "memory_bytes": snapshot.memory_bytes,
            "file_bytes": snapshot.file_bytes,
            "pages": snapshot.pages,
            "pause_us": snapshot.pause_us,
        }))?;
    } else {
        output::line(&format!(
            "{}: written to {}, {} of {} of memory, guest out for {:.1} ms",
            args.name,
            snapshot.file,
            units::bytes(snapshot.pages * 4096),
            units::bytes(snapshot.memory_bytes),
            snapshot.pause_us as f64 / 1000.0
        ))?;
    }
    Ok(())
}

async fn list(context: &Context) -> Result<(), Failure> {
    let vms: Vec<VmView> = context.client.list_vms().await?.iter().map(VmView::from).collect();
    if context.json() {
        output::json(&json!({ "virtual_machines": vms }))?;
        return Ok(());
    }
    if vms.is_empty() {
        output::line(
            "no machines; make one: vpmuctl vm create NAME --vcpus 1 --memory 256MiB --probe --start",
        )?;
        return Ok(());
    }
    let mut table =
        output::table(&["name", "state", "desired", "vcpus", "memory", "cores", "runs on", "pmu", "reason"]);
    for vm in vms {
        table.add_row([
            vm.name,
            vm.observed_state.to_lowercase(),
            vm.desired_state.to_lowercase(),
            vm.vcpus.to_string(),
            units::bytes(vm.memory_bytes),
            cores(&vm.vcpu_cores),
            vm.hypervisor,
            vm.pmu_mode,
            vm.reason,
        ]);
    }
    output::print(&table)?;
    Ok(())
}

async fn watch(context: &Context, args: WatchArgs) -> Result<(), Failure> {
    let mut stream = context.client.watch_vms(args.name.as_deref()).await?;
    loop {
        let message = stream.message().await.map_err(vpmu_client::ClientError::from)?;
        let Some(event) = message else { return Ok(()) };
        let view = VmEventView::from(&event);
        if context.json() {
            output::json(&view)?;
            continue;
        }
        let kind = view.kind.to_lowercase();
        match &view.vm {
            Some(vm) => output::line(&format!("{kind:8} {}", summary(vm)))?,
            None if kind == "lagged" => output::line("lagged   some changes were missed: list again")?,
            None => output::line(&kind)?,
        }
    }
}
