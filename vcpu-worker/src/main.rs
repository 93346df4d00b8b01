//! `vcpu-worker`: one virtual machine in a process of its own, served on a Unix socket.

use clap::Parser;

/// Runs one virtual machine and serves vpmu.worker.v1 on a Unix socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    args: vcpu_worker::process::Args,
}

fn main() -> anyhow::Result<()> {
    Ok(vcpu_worker::process::main(&Cli::parse().args)?)
}
