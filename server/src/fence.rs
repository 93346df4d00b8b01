//! `vpmud store fence`: a state directory gives a machine up for good, and prints the token by which one other host may
//! take it. For a host whose vpmud does not come up again, or that must not.
//!
//! Order: the machine's worker is ended and proven gone, then the journal says Superseded, then the token is printed.
//! Asked again for the same host it prints the same token.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::handover::force;
use crate::migration::force::encode;
use crate::output::Output;
use crate::status::ApiError;
use crate::store::Store;
use crate::worker_process::{Found, Processes};

/// Gives a machine up on this host's state directory, so that another host may take it: for a vpmud that is stopped and
/// is not to run the machine again.
///
/// Prints a token. Give it to the other host: `vpmuctl vm force-owner NAME --fence-token TOKEN --reason TEXT`. From then
/// on this directory never runs the machine again, whoever starts vpmud on it.
#[derive(Debug, clap::Args)]
pub struct FenceArgs {
    /// State directory of the vpmud that gives it up; that vpmud must be stopped.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// The machine: its uid or its name.
    #[arg(long, value_name = "UID|NAME")]
    vm: String,
    /// Id of the only host that may take it (`vpmuctl host info` there). Default: the other host of its last migration.
    #[arg(long, value_name = "HOST")]
    to: Option<String>,
    /// End the machine's worker process if it still runs; without this it is refused then.
    #[arg(long)]
    end_worker: bool,
    /// How to print the token.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// What was done.
struct Fenced {
    uid: String,
    to: String,
    epoch: u64,
    token: String,
}

/// Runs it. Exit codes: 0 done, 1 refused.
pub fn main(args: &FenceArgs) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("vpmud: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(args)) {
        Ok(fenced) => {
            match args.output {
                Output::Text => println!("{}", fenced.token),
                Output::Json => println!(
                    "{}",
                    serde_json::json!({
                        "vm_uid": fenced.uid, "to": fenced.to, "epoch": fenced.epoch, "token": fenced.token,
                    })
                ),
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vpmud: [{}] {error}", error.reason());
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &FenceArgs) -> Result<Fenced, ApiError> {
    if !args.state_dir.join("journal").is_dir() {
        let dir = args.state_dir.display().to_string();
        return Err(ApiError::not_found("state directory", &dir, "give the --state-dir of the old vpmud"));
    }
    let dir = args.state_dir.clone();
    let opened = tokio::task::spawn_blocking(move || Store::open(&dir)).await;
    let store = opened.map_err(|e| ApiError::internal("TASK_FAILED", e.to_string()))??;
    let fenced = fence(&store, args).await;
    store.close().await;
    fenced
}

async fn fence(store: &Store, args: &FenceArgs) -> Result<Fenced, ApiError> {
    let named = |r: &vpmu_proto::store::VmRecord| -> Option<String> {
        let vm = r.vm.as_ref()?;
        let short = vm.name.rsplit('/').next() == Some(&args.vm);
        (short || vm.name == args.vm).then(|| vm.uid.clone())
    };
    let uid = store.list_vms().iter().find_map(named).unwrap_or_else(|| args.vm.clone());
    let held = store.ownership(&uid).ok_or_else(|| {
        let vm = crate::status::clip(&args.vm, 64);
        ApiError::not_found("VirtualMachine", &vm, "give its uid as `vpmuctl vm get` shows it")
    })?;
    let to = match &args.to {
        Some(to) => uuid::Uuid::try_parse(to).map(|id| id.to_string()).map_err(|_| {
            ApiError::invalid(
                "--to",
                to,
                "BAD_ID",
                "is not a host id",
                "see `vpmuctl host info` on that host",
            )
        })?,
        None if !held.peer_host.is_empty() => held.peer_host.clone(),
        None => {
            let remedy = "name the host that is to own it: --to HOST";
            return Err(ApiError::invalid("--to", "", "TO_REQUIRED", "is missing", remedy));
        }
    };
    let record = force::fence(&held, store.store_id(), &to)
        .map_err(|why| ApiError::precondition(why.reason(), &uid, format!("{uid}: {why}")))?;
    end_worker(&args.state_dir, &uid, args.end_worker).await?;
    let record = store.append_ownership(record).await?;
    let token = force::token(&record)
        .ok_or_else(|| ApiError::internal("JOURNAL", "the journal holds another record than was written"))?;
    Ok(Fenced { uid, to, epoch: record.epoch, token: encode(&token) })
}

/// Nothing of it may run when the journal says that it is given up.
async fn end_worker(state_dir: &Path, uid: &str, end: bool) -> Result<(), ApiError> {
    let unknown = |e: std::io::Error| {
        let text = format!("whether the worker of machine {uid} lives cannot be told: {e}");
        ApiError::internal("WORKER_UNKNOWN", text)
    };
    let run_dir = std::path::absolute(state_dir.join("run")).map_err(unknown)?;
    let processes = std::sync::Arc::new(Processes::of_stopped(run_dir));
    if end {
        return processes.end_unheld(uid).await.map_err(unknown);
    }
    for name in processes.uids().map_err(unknown)? {
        if name.split('.').next() != Some(uid) {
            continue;
        }
        if let Found::Live(process) = processes.find(&name).map_err(unknown)? {
            process.keep();
            return Err(ApiError::precondition(
                "WORKER_ALIVE",
                uid,
                format!(
                    "the worker of machine {uid} still runs here (process {}); end it with --end-worker",
                    process.pid()
                ),
            ));
        }
    }
    Ok(())
}
