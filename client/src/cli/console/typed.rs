//! What was typed and is not sent yet: bounded, in order, and sent in pieces of one message.
//!
//! Invariant: a piece that does not fit is dropped whole, and the first of a row of such is told of.

use std::collections::VecDeque;

/// Most bytes that wait: more than a person types, or pastes, while a host is slow.
const MOST: usize = 256 << 10;

/// Told when the first piece is dropped.
const FULL: &str = "\n[the host takes no input: what is typed is dropped until it does; Ctrl-] leaves]\n";

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Typed {
    pieces: VecDeque<Vec<u8>>,
    bytes: usize,
    /// It was told that pieces are dropped, and it has not been empty since.
    told: bool,
}

impl Typed {
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Adds a piece, or drops it; `tell` says whether it could.
    pub(super) fn push(&mut self, piece: &[u8], tell: impl FnOnce(&str) -> bool) {
        if piece.is_empty() {
            return;
        }
        if self.bytes + piece.len() > MOST {
            self.told = self.told || tell(FULL);
            return;
        }
        self.bytes += piece.len();
        self.pieces.push_back(piece.to_vec());
    }

    /// The first piece; nothing if it is empty.
    pub(super) fn next(&self) -> &[u8] {
        self.pieces.front().map_or(&[], Vec::as_slice)
    }

    /// The first piece was sent.
    pub(super) fn sent(&mut self) {
        self.bytes -= self.pieces.pop_front().map_or(0, |piece| piece.len());
        self.told = self.told && !self.is_empty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_says_so_once() {
        let (mut typed, mut told) = (Typed::default(), 0);
        for _ in 0..MOST / 1000 + 5 {
            typed.push(&[b'x'; 1000], |_| {
                told += 1;
                // Where nobody can be told now, the next piece tries again.
                told > 1
            });
        }
        assert_eq!((typed.bytes, typed.pieces.len(), told), (MOST / 1000 * 1000, MOST / 1000, 2));
        typed.sent();
        for _ in 0..2 {
            typed.push(&[b'y'; 1000], |_| panic!("there is room for one, and the next is of the same row"));
        }
        assert_eq!(typed.bytes, MOST / 1000 * 1000);
        while !typed.is_empty() {
            typed.sent();
        }
        assert_eq!((typed.bytes, typed.next()), (0, &b""[..]));
        typed.push(&vec![b'z'; MOST + 1], |_| {
            told += 1;
            true
        });
        assert_eq!((told, typed.bytes), (3, 0), "a new row is told of again");
    }

    #[test]
    fn it_keeps_the_order() {
        let mut typed = Typed::default();
        for piece in [&b"a"[..], b"", b"bc"] {
            typed.push(piece, |_| true);
        }
        assert_eq!(typed.next(), b"a");
        typed.sent();
        assert_eq!(typed.next(), b"bc");
    }
}
