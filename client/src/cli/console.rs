//! `vpmuctl vm console`: history, then what follows; keys go to the guest where there is a terminal.
//!
//! The terminal is restored on every way out: Ctrl-], the end of the stream, an error, a signal, a panic.

use super::failure::Failure;
use super::raw_mode::RawMode;
use super::{Context, output};
use clap::Args;
use std::io::{self, IsTerminal as _, Read as _};
use std::process::ExitCode;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use vpmu_client::ConsoleOptions;

/// Ctrl-], as telnet has it.
const ESCAPE: u8 = 0x1d;

/// Attach to a machine's serial console; Ctrl-] leaves.
///
/// Where standard input is a terminal, keys go to the guest (one writer at a time; --read-only only looks on).
/// Elsewhere output is streamed, and standard input is sent only with --write.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// The machine.
    name: String,
    /// Print what there is and exit.
    #[arg(long)]
    history: bool,
    /// Only look on, also at a terminal.
    #[arg(long, conflicts_with = "write")]
    read_only: bool,
    /// Send standard input to the guest, also if it is no terminal.
    #[arg(long, conflicts_with = "history")]
    write: bool,
    /// Wait for the machine if there is none of that name yet (a minute at most), so that nothing is missed.
    #[arg(long, conflicts_with = "history")]
    wait: bool,
    /// Offset in the whole output to begin at.
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    from: u64,
}

pub(crate) async fn run(context: &Context, args: ConsoleArgs) -> Result<ExitCode, Failure> {
    let terminal = io::stdin().is_terminal() && !args.history;
    let write = args.write || (terminal && !args.read_only);
    let options =
        ConsoleOptions { offset: args.from, history_only: args.history, write, await_machine: args.wait };
    let mut session = context.client.attach_console(&args.name, options).await?;

    let mut signals = Signals::new()?;
    let raw = if terminal {
        eprintln!("attached to {}; Ctrl-] leaves", args.name);
        Some(RawMode::enter()?)
    } else {
        None
    };
    let mut keys = if write || terminal { read_stdin() } else { None };
    let mut input = Some(session.input());
    let end = loop {
        tokio::select! {
            piece = session.next() => match piece {
                Ok(Some(piece)) => if let Err(error) = output::raw(&piece.data) { break Err(error.into()) },
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            },
            typed = next_keys(&mut keys) => {
                let Some(typed) = typed else {
                    // Nothing more comes from here: another client may type.
                    input = None;
                    session.close_input();
                    continue;
                };
                let (data, leave) = until_escape(&typed, terminal);
                if write && let Some(input) = &input && !input.send(data).await {
                    // The stream is over; why, its output says.
                    keys = None;
                }
                if leave {
                    break Ok(());
                }
            }
            () = signals.any() => break Ok(()),
        }
    };
    drop(raw);
    if terminal {
        eprintln!("\ndetached from {}", args.name);
    }
    end.map(|()| ExitCode::SUCCESS)
}

/// What of the typed bytes goes to the guest, and whether the escape key was among them.
fn until_escape(typed: &[u8], terminal: bool) -> (&[u8], bool) {
    match typed.iter().position(|byte| terminal && *byte == ESCAPE) {
        Some(at) => (&typed[..at], true),
        None => (typed, false),
    }
}

/// Reads standard input on a thread of its own, because a read from a terminal cannot be cancelled; the process does not
/// wait for it at the end.
fn read_stdin() -> Option<mpsc::Receiver<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            let mut buffer = [0; 1024];
            loop {
                match io::stdin().read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(read) => {
                        if sender.blocking_send(buffer[..read].to_vec()).is_err() {
                            return;
                        }
                    }
                }
            }
        })
        .ok()
        .map(|_| receiver)
}

/// The next bytes typed; none once, when standard input ends, and then never anything.
async fn next_keys(keys: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    let Some(receiver) = keys else { return std::future::pending().await };
    let typed = receiver.recv().await;
    if typed.is_none() {
        *keys = None;
    }
    typed
}

/// The signals that end the session in good order.
struct Signals([Signal; 4]);

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
            signal(SignalKind::quit())?,
        ]))
    }

    async fn any(&mut self) {
        let [interrupt, terminate, hangup, quit] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_ends_the_input() {
        assert_eq!(until_escape(b"ab\x1dcd", true), (&b"ab"[..], true));
        assert_eq!(until_escape(b"ab", true), (&b"ab"[..], false));
        assert_eq!(until_escape(b"a\x1db", false), (&b"a\x1db"[..], false));
    }
}
