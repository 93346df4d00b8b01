//! `vpmuctl operation ...`.

use super::failure::Failure;
use super::{Context, output};
use clap::{Args, Subcommand};
use serde_json::json;
use std::process::ExitCode;
use vpmu_client::api::{Migration, OperationMetadata};
use vpmu_client::longrunning::Operation;
use vpmu_client::view::OperationView;
use vpmu_client::{names, wait};

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations, newest first.
    List,
    /// Show one operation.
    Get(IdArgs),
    /// Wait until an operation is done; fails as it fails.
    Wait(IdArgs),
    /// Ask for a running operation to be cancelled.
    Cancel(IdArgs),
    /// Delete the record of a finished operation.
    Delete(IdArgs),
}

#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    /// The operation's id.
    id: String,
}

pub(crate) async fn run(context: &Context, command: OperationCommand) -> Result<ExitCode, Failure> {
    let client = &context.client;
    match command {
        OperationCommand::List => {
            let operations = client.list_operations().await?;
            let views: Vec<OperationView> = operations.iter().map(OperationView::from).collect();
            if context.json() {
                output::json(&json!({ "operations": views }))?;
            } else {
                let mut table = output::table(&["id", "state", "about"]);
                for (operation, view) in operations.iter().zip(&views) {
                    table.add_row([names::short(&view.name).to_owned(), state(view), about(operation)]);
                }
                output::print(&table)?;
            }
        }
        OperationCommand::Get(args) => show(context, &client.get_operation(&args.id).await?)?,
        OperationCommand::Wait(args) => {
            let operation = client.get_operation(&args.id).await?;
            show(context, &client.wait_operation(operation, context.timeout, |_| {}).await?)?;
        }
        OperationCommand::Cancel(args) => {
            client.cancel_operation(&args.id).await?;
            done(context, &args.id, "cancel_requested", "cancellation asked for")?;
        }
        OperationCommand::Delete(args) => {
            client.delete_operation(&args.id).await?;
            done(context, &args.id, "deleted", "deleted")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(context: &Context, operation: &Operation) -> Result<(), Failure> {
    let view = OperationView::from(operation);
    if context.json() {
        output::json(&view)?;
        return Ok(());
    }
    output::facts(&[
        ("operation", names::short(&view.name).to_owned()),
        ("state", state(&view)),
        ("about", about(operation)),
        (
            "error",
            view.error.map(|error| format!("{} [{}]", error.message, error.reason)).unwrap_or_default(),
        ),
    ])?;
    Ok(())
}

fn done(context: &Context, id: &str, key: &str, words: &str) -> Result<(), Failure> {
    if context.json() {
        output::json(&json!({ "name": names::operation(id), key: true }))?;
    } else {
        output::line(&format!("{}: {words}", names::short(id)))?;
    }
    Ok(())
}

fn state(view: &OperationView) -> String {
    match (&view.error, view.done) {
        (Some(error), _) => format!("failed [{}]", error.reason),
        (None, true) => "done".to_owned(),
        (None, false) => "running".to_owned(),
    }
}

/// What the operation does to what, as far as its metadata tells.
fn about(operation: &Operation) -> String {
    let Some(metadata) = &operation.metadata else { return String::new() };
    match metadata.type_url.rsplit('/').next().unwrap_or_default() {
        "vpmu.v1.OperationMetadata" => wait::unpack::<OperationMetadata>(metadata)
            .map(|metadata| format!("{} {}", metadata.verb, names::short(&metadata.target)))
            .unwrap_or_default(),
        "vpmu.v1.Migration" => wait::unpack::<Migration>(metadata)
            .map(|migration| format!("migrate {}", names::vm_of(&migration.name)))
            .unwrap_or_default(),
        other => other.to_owned(),
    }
}
