//! The serial port: vm-superio's 16550 with a console behind it and a bounded input queue before its FIFO.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vpmu_proto::worker::StatePiece;

use crate::console::Console;
use crate::error::WorkerError;
use crate::hypervisor::Vm;

/// Kind of its state piece.
pub(super) const KIND: &str = "serial";
/// Layout: nine register bytes, u16 length and bytes of the FIFO, u16 length and bytes of the input queue.
const VERSION: u32 = 1;
/// Interrupt line of COM1.
const IRQ: u32 = 4;
/// Bytes of input that wait for the guest.
const INPUT: usize = 4096;
/// Receive buffer register.
const DATA: u8 = 0;
/// vm-superio's FIFO.
const FIFO: usize = 64;

/// Raises IRQ 4 as an edge.
struct Line(Arc<dyn Vm>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        let set = |level| self.0.set_irq_line(IRQ, level).map_err(io::Error::other);
        set(true)?;
        set(false)
    }
}

/// Where transmitted bytes go.
struct Sink(Arc<Console>);

impl io::Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// COM1.
pub(super) struct SerialPort {
    port: Serial<Line, NoEvents, Sink>,
    waiting: VecDeque<u8>,
    vm: Arc<dyn Vm>,
    console: Arc<Console>,
}

impl SerialPort {
    pub(super) fn new(vm: Arc<dyn Vm>, console: Arc<Console>) -> Self {
        let port = Serial::new(Line(Arc::clone(&vm)), Sink(Arc::clone(&console)));
        Self { port, waiting: VecDeque::new(), vm, console }
    }

    pub(super) fn read(&mut self, offset: u8) -> u8 {
        let value = self.port.read(offset);
        if offset == DATA && !self.waiting.is_empty() {
            self.refill();
        }
        value
    }

    pub(super) fn write(&mut self, offset: u8, value: u8) {
        // Only the interrupt can fail, and a guest that polls does not need it.
        if let Err(error) = self.port.write(offset, value) {
            tracing::debug!(?error, "serial port");
        }
    }

    pub(super) fn input(&mut self, data: &[u8]) -> usize {
        let take = data.len().min(INPUT.saturating_sub(self.waiting.len()));
        self.waiting.extend(data.iter().take(take));
        self.refill();
        take
    }

    fn refill(&mut self) {
        let n = self.port.fifo_capacity().min(self.waiting.len());
        if n == 0 {
            return;
        }
        let next: Vec<u8> = self.waiting.iter().take(n).copied().collect();
        match self.port.enqueue_raw_bytes(&next) {
            Ok(taken) => drop(self.waiting.drain(..taken.min(n))),
            // The bytes are in the FIFO; only the interrupt failed.
            Err(error) => {
                self.waiting.drain(..n);
                tracing::debug!(?error, "serial input");
            }
        }
    }

    pub(super) fn save(&self) -> StatePiece {
        let s = self.port.state();
        let mut data = vec![
            s.baud_divisor_low,
            s.baud_divisor_high,
            s.interrupt_enable,
            s.interrupt_identification,
            s.line_control,
            s.line_status,
            s.modem_control,
            s.modem_status,
            s.scratch,
        ];
        put_bytes(&mut data, s.in_buffer.iter().copied());
        put_bytes(&mut data, self.waiting.iter().copied());
        StatePiece { kind: KIND.to_owned(), version: VERSION, data }
    }

    pub(super) fn restore(&mut self, piece: &StatePiece) -> Result<(), WorkerError> {
        let bad = |problem: String| WorkerError::BadState { field: "devices.serial", problem };
        if piece.version != VERSION {
            return Err(bad(format!("layout {} is not known (this build reads {VERSION})", piece.version)));
        }
        let (state, waiting) =
            parse(&piece.data).ok_or_else(|| bad("it is cut short or too long".to_owned()))?;
        let line = Line(Arc::clone(&self.vm));
        let port = Serial::from_state(&state, line, NoEvents, Sink(Arc::clone(&self.console)))
            .map_err(|e| bad(format!("{e:?}")))?;
        self.port = port;
        self.waiting = waiting.into();
        Ok(())
    }
}

/// Length and bytes; both queues are bounded far below 65536.
fn put_bytes(into: &mut Vec<u8>, bytes: impl ExactSizeIterator<Item = u8>) {
    into.extend((bytes.len() as u16).to_le_bytes());
    into.extend(bytes);
}

fn parse(data: &[u8]) -> Option<(SerialState, Vec<u8>)> {
    let (registers, rest) = data.split_first_chunk::<9>()?;
    let (in_buffer, rest) = take_bytes(rest, FIFO)?;
    let (waiting, rest) = take_bytes(rest, INPUT)?;
    let [low, high, ier, iir, lcr, lsr, mcr, msr, scratch] = *registers;
    rest.is_empty().then(|| {
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer,
        };
        (state, waiting)
    })
}

fn take_bytes(data: &[u8], max: usize) -> Option<(Vec<u8>, &[u8])> {
    let (len, rest) = data.split_first_chunk::<2>()?;
    let len = usize::from(u16::from_le_bytes(*len));
    if len > max {
        return None;
    }
    let (bytes, rest) = rest.split_at_checked(len)?;
    Some((bytes.to_vec(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Nothing from outside can make it panic, and what it takes is what it would write.
        #[test]
        fn parsing_is_total(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some((state, waiting)) = parse(&data) {
                prop_assert!(state.in_buffer.len() <= FIFO && waiting.len() <= INPUT);
                let mut again = data[..9].to_vec();
                put_bytes(&mut again, state.in_buffer.iter().copied());
                put_bytes(&mut again, waiting.iter().copied());
                prop_assert_eq!(again, data);
            }
        }
    }
}
