//! `vpmuctl vm console`: history, then what follows; keys go to the guest where there is a terminal.
//!
//! Invariants
//! - The terminal is restored on every way out: Ctrl-], the end of the stream, an error, a signal, a panic; and for as long
//!   as SIGTSTP has stopped the process.
//! - Ctrl-] and signals are always heard: nothing here waits without a bound for the host, or for whoever reads the output.
//!   What is typed meanwhile is kept within a bound ([`typed`]), output is printed by a thread ([`printer`]).
//! - What was typed before Ctrl-] has a moment ([`GRACE`]) to get to the guest, and its answer to be shown. No host says what
//!   it has fed to the guest, so the moment is over when the host ends the stream, or by the clock.

mod printer;
mod signals;
mod typed;

use super::failure::Failure;
use super::raw_mode::RawMode;
use super::{Context, output};
use clap::Args;
use printer::{Piece, Printed, Printer};
use signals::{Signals, Told};
use std::io::{self, IsTerminal as _, Read as _};
use std::process::ExitCode;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use typed::Typed;
use vpmu_client::{ConsoleInput, ConsoleOptions, ConsoleSession};

/// Ctrl-], as telnet has it.
const ESCAPE: u8 = 0x1d;

/// How long what is on its way, to the guest and to whoever reads, may take to arrive once somebody leaves.
const GRACE: Duration = Duration::from_millis(500);

/// Attach to a machine's serial console; Ctrl-] leaves.
///
/// Where standard input is a terminal, keys go to the guest (one writer at a time; --read-only only looks on). While the
/// host takes none, 256 KiB of them are kept, and what is typed beyond that is dropped, which is said. Elsewhere output is
/// streamed, and standard input is sent only with --write, as fast as the host takes it.
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
    let session = context.client.attach_console(&args.name, options).await?;

    let signals = Signals::new(terminal)?;
    let (mut printer, mut printed) = printer::start()?;
    let raw = if terminal {
        eprintln!("attached to {}; Ctrl-] leaves", args.name);
        Some(RawMode::enter()?)
    } else {
        None
    };
    let keys = if write || terminal { read_stdin() } else { None };
    let input = write.then(|| session.input());
    let ends = Ends { session, keys, input, typed: Typed::default(), last_key: None, signals };
    let end = ends.join(&mut printer, &mut printed, raw.as_ref()).await;
    drop(raw);
    let words = if terminal { format!("\ndetached from {}\n", args.name) } else { String::new() };
    printed.leave(printer, &words).await;
    end.map(|()| ExitCode::SUCCESS)
}

/// What the session is between.
struct Ends {
    session: ConsoleSession,
    keys: Option<mpsc::Receiver<Vec<u8>>>,
    /// None where nothing is sent, or nothing more.
    input: Option<ConsoleInput>,
    typed: Typed,
    /// When something was last typed for the guest.
    last_key: Option<Instant>,
    signals: Signals,
}

impl Ends {
    /// Until the stream ends and is printed, or somebody leaves.
    async fn join(
        mut self,
        printer: &mut Printer,
        printed: &mut Printed,
        raw: Option<&RawMode>,
    ) -> Result<(), Failure> {
        let mut over = None;
        let mut all_typed = false;
        let mut leave_at = None;
        loop {
            tokio::select! {
                told = self.signals.next() => match told {
                    Told::Leave => return over.unwrap_or(Ok(())),
                    Told::Suspend => if let Some(raw) = raw { raw.suspend() },
                    Told::Continue => if let Some(raw) = raw { raw.again() },
                },
                // A terminal is always read, for the escape key; else what was read is sent before more is.
                keys = next_keys(&mut self.keys), if raw.is_some() || self.typed.is_empty() => match keys {
                    Some(keys) => {
                        let (data, leave) = until_escape(&keys, raw.is_some());
                        if self.input.is_some() && !data.is_empty() {
                            self.typed.push(data, |note| printer.note(note));
                            self.last_key = Some(Instant::now());
                        }
                        if leave {
                            if over.is_some() || self.input.is_none() {
                                return over.unwrap_or(Ok(()));
                            }
                            leave_at = Some(self.arrives_by());
                            (self.keys, all_typed) = (None, true);
                        }
                    }
                    None => all_typed = true,
                },
                sent = send(self.input.as_ref(), self.typed.next()), if !self.typed.is_empty() => {
                    if sent {
                        self.typed.sent();
                    } else {
                        // The stream is over; why, its output says.
                        (self.input, self.typed) = (None, Typed::default());
                    }
                },
                more = pass_on(&mut self.session, printer), if over.is_none() => {
                    if let Some(end) = more.map(|more| (!more).then_some(())).transpose() {
                        over = Some(end);
                        printer.close();
                    }
                },
                all = printed.end() => {
                    all?;
                    return over.unwrap_or(Ok(()));
                }
                () = until(leave_at) => return over.unwrap_or(Ok(())),
            }
            if all_typed && self.typed.is_empty() && self.input.take().is_some() {
                // Nothing more comes from here: another client may type.
                self.session.close_input();
            }
        }
    }

    /// When what was typed is taken to have arrived, or never to: in the past, if the last of it was sent long ago.
    fn arrives_by(&self) -> Instant {
        let now = Instant::now();
        let from = if self.typed.is_empty() { self.last_key } else { Some(now) };
        from.map_or(now, |from| from + GRACE)
    }
}

/// Never, if there is no such moment.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Passes one piece of output on, once there is room for it; false at the stream's end. Cancelled, it loses none.
async fn pass_on(session: &mut ConsoleSession, printer: &Printer) -> Result<bool, Failure> {
    let room = printer.room().await;
    let Some(piece) = session.next().await? else { return Ok(false) };
    room.send(Piece::Output(piece.data));
    Ok(true)
}

/// Whether a piece, at most one message, could be sent. Cancelled, nothing of it was.
async fn send(input: Option<&ConsoleInput>, piece: &[u8]) -> bool {
    match input {
        Some(input) => input.send(piece).await,
        None => false,
    }
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
