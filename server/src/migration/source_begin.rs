//! The source before anything is changed: the check at the destination, admission, and the durable beginning.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vpmu_proto::api::migration::State;
use vpmu_proto::api::migration_spec::Mode;
use vpmu_proto::api::{
    Migration, MigrationAction, MigrationMismatch, MigrationSpec, VirtualMachine, memory_backing,
};
use vpmu_proto::peer::Requirements;
use vpmu_proto::store::MigrationRecord;

use super::check::refuse;
use super::force::Ear;
use super::source::{Source, Work};
use crate::config::Address;
use crate::daemon::Daemon;
use crate::handover::Handover;
use crate::handover::source::Source as Machine;
use crate::names::MigrationName;
use crate::ops::Seed;
use crate::peer::Peer;
use crate::status::ApiError;
use crate::store::Batch;
use crate::vm::command::{Command, Outcome};
use crate::vm::registry::VmHandle;

/// What was found before anything is changed.
pub struct Checked {
    peer: Peer,
    requirements: Requirements,
    /// The destination's host id.
    pub destination_host: String,
    /// Memory is handed over instead of copied.
    local: bool,
    /// It would be, were it not for what the memory is made of.
    copied_for: Option<&'static str>,
    /// What does not fit.
    pub mismatches: Vec<MigrationMismatch>,
}

/// Asks the destination what would keep the machine from moving.
pub async fn check(
    daemon: &Daemon,
    handle: &VmHandle,
    spec: &MigrationSpec,
    address: &Address,
) -> Result<Checked, ApiError> {
    let view = handle.view();
    let peer = Peer::connect(address, &daemon.peering).await?;
    let asked = super::check::wall_clock_us();
    let who = peer.negotiate(&daemon.host.host_id).await?;
    let clocks = (asked, who.wall_clock_us, super::check::wall_clock_us());
    let backing = backing(&view.vm);
    let near = is_local(daemon, spec, address, &who.boot_id);
    let local = near && (backing.is_none() || spec.mode() == Mode::Local);
    let pmu = match &view.worker {
        // A machine without a PMU need not be asked for its counters.
        Some(worker) if view.pmu_shape.is_some() => worker.pmu().await?,
        _ => Vec::new(),
    };
    let requirements = Requirements {
        vm: Some(view.vm.clone()),
        pmu_shape: view.pmu_shape.clone(),
        hypervisor: daemon.host.hypervisor.to_owned(),
        pmu_mode: daemon.host.pmu_mode.to_owned(),
        spec: Some(spec.clone()),
        cpuid: daemon.host.cpuid.clone(),
        pmu,
        local_boot_id: if local { daemon.host.boot_id.clone() } else { String::new() },
        tsc_khz: daemon.host.tsc_khz,
    };
    let mismatches = if who.host_id == daemon.host.host_id {
        vec![MigrationMismatch {
            rule: "SAME_HOST".to_owned(),
            message: format!("{address} is this very host ({})", who.host_id),
            remedy: "name another host's peer listener".to_owned(),
            warning: false,
        }]
    } else {
        let mut mismatches = peer.check(requirements.clone()).await?.mismatches;
        if let Some(backing) = backing.filter(|_| local) {
            mismatches.push(MigrationMismatch {
                rule: "MEMORY_BACKING".to_owned(),
                message: format!("the machine's memory is {backing}, which cannot be handed over yet"),
                remedy: "use mode auto, which copies such memory".to_owned(),
                warning: false,
            });
        }
        // A destination that says no boot id does not know the mode and finds nothing wrong with it.
        mismatches.extend(super::check::wall_clocks(clocks));
        mismatches.extend(super::check::versions(env!("CARGO_PKG_VERSION"), &who.daemon_version));
        if daemon.peering.way_back(&peer).is_none() {
            mismatches.push(MigrationMismatch {
                rule: "NO_WAY_BACK".to_owned(),
                message: format!("this host has no peer listener that {address} could ask about a migration that was cut off"),
                remedy: "start vpmud here with --peer-listen tcp:ADDR:PORT, an address that the destination reaches".to_owned(),
                warning: false,
            });
        }
        if local && who.boot_id.is_empty() {
            mismatches.push(super::check::other_boot(&daemon.host.boot_id, ""));
        }
        mismatches
    };
    let copied_for = backing.filter(|_| near && !local);
    Ok(Checked { peer, requirements, destination_host: who.host_id, local, copied_for, mismatches })
}

/// Whether memory is to be handed over: if that was asked for, or if nothing was and it will work: the same boot of the
/// same machine, reached through a Unix socket (so that its workers' sockets are reached too), and allowed here.
fn is_local(daemon: &Daemon, spec: &MigrationSpec, address: &Address, boot_id: &str) -> bool {
    let same = !boot_id.is_empty() && boot_id == daemon.host.boot_id;
    match spec.mode() {
        Mode::Local => true,
        Mode::PrecopyOnly | Mode::Postcopy => false,
        Mode::Unspecified | Mode::Auto => same && daemon.auto_local && matches!(address, Address::Unix(_)),
    }
}

fn copy_instead(backing: &str) -> MigrationAction {
    MigrationAction {
        at_us: 0,
        code: "COPY_INSTEAD".to_owned(),
        detail: format!(
            "both hosts are on this machine, but the memory is {backing}, which cannot be handed over: it is copied"
        ),
    }
}

/// What keeps memory from being handed over: the destination's own would have to be given up for it, and such memory is
/// in use from the start.
fn backing(vm: &VirtualMachine) -> Option<&'static str> {
    let backing = vm.spec.as_ref()?.memory_backing?;
    if backing.huge_pages() == memory_backing::HugePages::Hugetlb {
        return Some("huge pages of the host's pool (hugetlb)");
    }
    backing.prefault.then_some("given out at once (prefault)")
}

/// Begins a migration and returns its operation's id.
pub async fn begin(
    daemon: &Arc<Daemon>,
    handle: &VmHandle,
    spec: MigrationSpec,
    address: &Address,
    seed: impl FnOnce(&Migration) -> Seed,
) -> Result<Uuid, ApiError> {
    let accepted = Instant::now();
    let awake = daemon.awake.hold();
    let create_time = crate::ops::now();
    let checked = Box::pin(check(daemon, handle, &spec, address)).await?;
    refuse(&handle.name.to_string(), &checked.mismatches)?;
    let id = Uuid::new_v4();
    let name = MigrationName { vm: handle.name.clone(), id }.to_string();
    let (cancel, committed) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
    let lease = handle
        .ask(|reply| Command::BeginMigration {
            name: name.clone(),
            cancel: cancel.clone(),
            committed: Arc::clone(&committed),
            reply,
        })
        .await?;
    let migration = Migration {
        name,
        spec: Some(spec.clone()),
        state: State::Preparing as i32,
        phase: "preparing the destination".to_owned(),
        create_time: Some(create_time),
        source_host: daemon.host.host_id.clone(),
        destination_host: checked.destination_host.clone(),
        actions: checked.copied_for.map(copy_instead).into_iter().collect(),
        ..Migration::default()
    };
    let record = MigrationRecord { migration: Some(migration.clone()), vm_uid: handle.uid.clone() };
    let begun = async { seed(&migration).begin_with(Batch::new().put_migration(&record)?).await };
    let running = match begun.await {
        Ok(running) => running,
        Err(error) => {
            let outcome = Outcome::Stayed { ownership: lease.ownership, lost: None };
            handle.ask(|reply| Command::EndMigration { outcome, reply }).await?;
            return Err(error);
        }
    };
    let operation = running.id();
    let (progress, receiver) = watch::channel(migration);
    daemon.migrations.outgoing().insert(id, receiver);
    let machine = Machine::new(Handover {
        vm_uid: handle.uid.clone(),
        migration_id: id.to_string(),
        epoch: lease.ownership.epoch,
        host: daemon.host.host_id.clone(),
        peer_host: checked.destination_host.clone(),
        peer_address: checked.peer.address.to_string(),
        peer_store: checked.destination_host,
        incarnation: lease.ownership.incarnation,
        run: !lease.paused,
    });
    let voice = daemon.migrations.answers.voice(&id.to_string(), machine.answer());
    let source = Source {
        daemon: Arc::clone(daemon),
        handle: handle.clone(),
        ownership: lease.ownership.clone(),
        lease,
        peer: checked.peer,
        requirements: checked.requirements,
        id,
        spec,
        local: checked.local,
        said: checked.copied_for.map(copy_instead).into_iter().collect(),
        accepted,
        cancel,
        committed,
        progress,
        running,
        work: Work::new(machine, voice, Ear::of(daemon, &handle.uid), awake),
    };
    daemon.tasks.spawn(source.run());
    Ok(operation)
}
