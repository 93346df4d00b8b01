//! Prints output on a thread of its own: a terminal that is held, or a pipe that nobody reads, blocks that thread only.

use super::{GRACE, output};
use std::io::{self, Write as _};
use tokio::sync::{mpsc, oneshot};

/// Pieces that wait for being printed.
const QUEUE: usize = 16;

/// Something to print.
pub(super) enum Piece {
    /// For standard output, as it is.
    Output(Vec<u8>),
    /// For whoever sits there: standard error.
    Note(String),
}

/// The way to the thread.
pub(super) struct Printer {
    /// None: nothing more is printed.
    pieces: Option<mpsc::Sender<Piece>>,
}

/// The thread's end.
pub(super) struct Printed {
    end: oneshot::Receiver<io::Result<()>>,
    /// It was seen.
    seen: bool,
}

/// Starts the thread.
pub(super) fn start() -> io::Result<(Printer, Printed)> {
    let (pieces, mut queue) = mpsc::channel(QUEUE);
    let (ended, end) = oneshot::channel();
    std::thread::Builder::new().name("printer".to_owned()).spawn(move || {
        let mut result = Ok(());
        while let Some(piece) = queue.blocking_recv() {
            match piece {
                Piece::Output(data) => result = output::raw(&data),
                Piece::Note(text) => note(&text),
            }
            if result.is_err() {
                break;
            }
        }
        // Nobody may be there to hear it.
        let _ = ended.send(result);
    })?;
    Ok((Printer { pieces: Some(pieces) }, Printed { end, seen: false }))
}

impl Printer {
    /// Room for one piece; never, once the thread has ended, which [`Printed`] says.
    pub(super) async fn room(&self) -> mpsc::Permit<'_, Piece> {
        if let Some(pieces) = &self.pieces
            && let Ok(room) = pieces.reserve().await
        {
            return room;
        }
        std::future::pending().await
    }

    /// Tells whoever sits there something, if there is room; says whether there was.
    pub(super) fn note(&self, text: &str) -> bool {
        self.pieces.as_ref().is_some_and(|pieces| pieces.try_send(Piece::Note(text.to_owned())).is_ok())
    }

    /// Nothing more comes: the thread ends once all is printed.
    pub(super) fn close(&mut self) {
        self.pieces = None;
    }
}

impl Printed {
    /// Waits until all is printed after [`Printer::close`], or something cannot be.
    pub(super) async fn end(&mut self) -> io::Result<()> {
        let result = (&mut self.end).await;
        self.seen = true;
        result.unwrap_or_else(|_| Err(io::Error::other("the thread that prints has died")))
    }

    /// Prints what has come and these last words, if that is a matter of a moment.
    pub(super) async fn leave(mut self, mut printer: Printer, words: &str) {
        if self.seen {
            note(words);
            return;
        }
        printer.note(words);
        printer.close();
        // A reader that does not read gets no more.
        let _ = tokio::time::timeout(GRACE, self.end()).await;
    }
}

/// Where standard error is gone, nobody is there to be told, and the session is none the worse.
fn note(text: &str) {
    let _ = write!(io::stderr(), "{text}");
}
