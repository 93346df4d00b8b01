//! Live migration beside QEMU, in the same run: the same guest with the same command line, TCP over loopback, in turns.
//!
//! What the guest sees is the first hole in its own TSC series that it reports at the destination, to the microsecond, on
//! both sides. Total time is from accepted to released: until the source's process has ended. QEMU's is its `total-time` and
//! how long its source then takes to `quit`; its destination's process is there before, ours is made within the time.
//! Bytes are those on the wire. QEMU's bandwidth cap is lifted.

mod cell;
mod floors;
mod ours;
mod qemu;
mod table;

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::error::BenchError;
use super::site::Site;
use super::{Output, say};
use cell::{Cell, Run};
pub(super) use table::Table;

/// Options of `vpmud bench migrate`.
#[derive(Debug, Clone, Args)]
pub struct MigrateArgs {
    /// Migrations of each side in each cell; medians are printed.
    #[arg(long, default_value = "5", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Guest memory in MiB; repeatable.
    #[arg(long, value_delimiter = ',', default_value = "256,1024", value_name = "MIB", value_parser = clap::value_parser!(u64).range(128..=65536))]
    memory: Vec<u64>,
    /// What the guest does; repeatable.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "idle,filled,dirty100,dirty500,dirtymax")]
    load: Vec<Load>,
    /// Allowed standstill in ms; repeatable.
    #[arg(long, value_delimiter = ',', default_value = "20,300", value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: Vec<u32>,
    /// Data connections of ours and channels of QEMU's multifd; 1 is QEMU without multifd.
    #[arg(long, default_value = "1", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    connections: u32,
    /// How ours moves: plaintext beside QEMU, with TLS beside our own plaintext, or handed over within the host; repeatable.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "plain")]
    way: Vec<Way>,
    /// Our machines in threads of the daemon, or in processes.
    #[arg(long, value_enum, default_value = "process")]
    isolation: Isolation,
    /// Leave QEMU out and print ours alone.
    #[arg(long)]
    without_qemu: bool,
    /// QEMU's program.
    #[arg(long, default_value = "qemu-system-x86_64", value_name = "FILE")]
    qemu: PathBuf,
    /// How the result is printed: a table for people, or one JSON object.
    #[arg(long, value_enum, default_value = "text")]
    pub(super) output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Isolation {
    /// Threads of the daemon.
    Thread,
    /// A process for each machine.
    Process,
}

/// How ours moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Way {
    /// TCP without TLS.
    Plain,
    /// TCP with TLS 1.3.
    Tls,
    /// Mode local: memory is not copied.
    Local,
}

/// What the guest does while it moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Load {
    /// Computes; writes next to nothing.
    Idle,
    /// The same, with nearly all of its memory filled before.
    Filled,
    /// Writes to 64 MiB in turn, 100 MB/s in whole pages.
    Dirty100,
    /// 500 MB/s.
    Dirty500,
    /// As fast as it can.
    Dirtymax,
}

impl Load {
    /// The guest's command line.
    fn cmdline(self, memory_mib: u64) -> String {
        let fill = if self == Self::Filled {
            memory_mib.saturating_sub(if memory_mib > 256 { 64 } else { 32 })
        } else {
            0
        };
        let (mode, rate) = match self {
            Self::Idle | Self::Filled => ('s', 100),
            Self::Dirty100 => ('d', 100),
            Self::Dirty500 => ('d', 500),
            Self::Dirtymax => ('d', 0),
        };
        let khz = vcpu_worker::host::probe().tsc_khz;
        format!("mode={mode} ws=64 rate={rate} fill={fill} hb=1000 gap=500 khz={khz}")
    }

    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Filled => "filled",
            Self::Dirty100 => "64 MiB at 100 MB/s",
            Self::Dirty500 => "64 MiB at 500 MB/s",
            Self::Dirtymax => "64 MiB unthrottled",
        }
    }
}

/// Runs all cells.
pub(super) async fn run(args: &MigrateArgs) -> Result<Table, BenchError> {
    let site = Site::new()?;
    let floors = floors::measure(&site).await?;
    if !args.without_qemu && args.way.contains(&Way::Plain) {
        qemu::check(&args.qemu).await?;
    }
    let isolation = if args.isolation == Isolation::Thread { "thread" } else { "process" };
    let mut cells = Vec::new();
    for &memory_mib in &args.memory {
        for &load in &args.load {
            for &limit_ms in &args.limit {
                for &way in &args.way {
                    let cell = Cell { memory_mib, load, limit_ms, connections: args.connections, way };
                    let (mut ours, mut beside) = (Vec::new(), Vec::new());
                    for run in 0..args.runs {
                        say(&format!("{}: run {} of {}", cell.name(), run + 1, args.runs));
                        ours.push(Box::pin(ours::run(&site, isolation, &cell)).await?);
                        match way {
                            Way::Plain if !args.without_qemu => {
                                beside.push(qemu::run(&site, &args.qemu, &cell).await?);
                            }
                            Way::Tls => {
                                let plain = Cell { way: Way::Plain, ..cell };
                                beside.push(Box::pin(ours::run(&site, isolation, &plain)).await?);
                            }
                            Way::Plain | Way::Local => {}
                        }
                    }
                    cells.push(table::Row::new(cell, &ours, &beside));
                }
            }
        }
    }
    Ok(Table::new(floors, cells))
}

/// Runs of one side that did not end well are shown, and left out of the medians.
fn completed(runs: &[Run]) -> impl Iterator<Item = &Run> {
    runs.iter().filter(|run| run.problem.is_none())
}
