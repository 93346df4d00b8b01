//! `vpmuctl migration ...`: migrations after they were started. `vpmuctl migrate` starts them.

use super::failure::Failure;
use super::{Context, migrate, output};
use clap::{Args, Subcommand};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;
use vpmu_client::api::Migration;
use vpmu_client::names;
use vpmu_client::progress::describe;
use vpmu_client::view::MigrationView;

/// A watch has no end of its own but the migration's; this bounds one that will never come.
const WATCH_DEADLINE: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Subcommand)]
pub(crate) enum MigrationCommand {
    /// List migrations, newest first.
    List(ListArgs),
    /// Show one migration.
    Get(IdArgs),
    /// Follow a migration to its end.
    Watch(IdArgs),
    /// Cancel a migration; works until it is committed.
    Cancel(IdArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Of this machine; of all if not given.
    name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    /// The machine.
    name: String,
    /// The migration's id; the newest if not given.
    id: Option<String>,
}

pub(crate) async fn run(context: &Context, command: MigrationCommand) -> Result<ExitCode, Failure> {
    let client = &context.client;
    match command {
        MigrationCommand::List(args) => {
            let migrations = client.list_migrations(args.name.as_deref()).await?;
            let views: Vec<MigrationView> = migrations.iter().map(MigrationView::from).collect();
            if context.json() {
                output::json(&json!({ "migrations": views }))?;
            } else {
                let mut table =
                    output::table(&["id", "vm", "state", "total", "blackout", "rounds", "reason"]);
                for view in views {
                    let time = |ms: Option<f64>| ms.map(|ms| format!("{ms:.1} ms")).unwrap_or_default();
                    table.add_row([
                        names::short(&view.name).to_owned(),
                        view.vm,
                        view.state.to_lowercase(),
                        time(view.total_ms),
                        time(view.blackout_ms),
                        view.rounds.to_string(),
                        view.reason,
                    ]);
                }
                output::print(&table)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        MigrationCommand::Get(args) => {
            let migration = client.get_migration(&resolve(context, &args).await?).await?;
            migrate::show(context, &migration)?;
            Ok(ExitCode::SUCCESS)
        }
        MigrationCommand::Watch(args) => {
            let name = resolve(context, &args).await?;
            let mut broken = None;
            let last = client
                .follow_migration(&name, WATCH_DEADLINE, |migration| {
                    if broken.is_none() {
                        broken = print(context, migration).err();
                    }
                })
                .await?;
            if let Some(error) = broken {
                return Err(error.into());
            }
            Ok(migrate::verdict(&last))
        }
        MigrationCommand::Cancel(args) => {
            let name = resolve(context, &args).await?;
            client.cancel_migration(&name).await?;
            if context.json() {
                output::json(&json!({ "name": name, "cancel_requested": true }))?;
            } else {
                output::line(&format!("{}: cancellation asked for", names::short(&name)))?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn print(context: &Context, migration: &Migration) -> std::io::Result<()> {
    if context.json() {
        output::json(&MigrationView::from(migration))
    } else {
        output::line(&describe(migration))
    }
}

/// The full name of the migration that was meant.
async fn resolve(context: &Context, args: &IdArgs) -> Result<String, Failure> {
    if let Some(id) = &args.id {
        return Ok(names::migration(&args.name, id));
    }
    let newest = context.client.list_migrations(Some(&args.name)).await?.into_iter().next();
    newest.map(|migration| migration.name).ok_or_else(|| {
        Failure::Client(vpmu_client::ClientError::Refused(Box::new(vpmu_client::Refusal::not_found(
            format!("{} has no migration", args.name),
        ))))
    })
}
