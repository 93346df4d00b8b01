//! vpmuctl, the command line of vpmud.
//!
//! Standard output carries the answer and nothing else: with `--output json` one object (streams: one object a line).
//! Errors go to standard error, as JSON too when asked. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
#![forbid(unsafe_code)]

mod cli;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return cli::failure::report_usage(&error),
    };
    let output = cli.output;
    // vpmuctl waits far more than it computes: one thread is enough.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return cli::failure::report(&error.into(), output),
    };
    match runtime.block_on(cli::run(cli)) {
        Ok(code) => code,
        Err(error) => cli::failure::report(&error, output),
    }
}
