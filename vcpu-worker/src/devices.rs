//! The devices of a virtual machine: a 16550 serial port, and the ports that end it.
//!
//! Everything is handled on the vCPU thread that accessed it, without blocking. Ports that nobody answers read as
//! all ones. A missing console reader never holds the guest up; input waits in a bounded queue.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vpmu_proto::worker::StatePiece;

use crate::console::Console;
use crate::error::WorkerError;
use crate::hypervisor::Vm;

mod serial;

use serial::SerialPort;

/// COM1.
const SERIAL: std::ops::Range<u16> = 0x3f8..0x400;
/// Keyboard controller: status and command.
const I8042_COMMAND: u16 = 0x64;
/// "Pulse the reset line".
const I8042_RESET: u32 = 0xfe;
/// Reset control register of PC chipsets.
const RESET_CONTROL: u16 = 0xcf9;
/// Bit that makes a write to it a reset.
const RESET_NOW: u32 = 1 << 2;
/// Power management port of a PC without ACPI tables, as small monitors and test guests use it.
const POWER_OFF: u16 = 0x604;
/// "Sleep state 5, now".
const POWER_OFF_NOW: u32 = 0x2000;

/// How the guest asked to be ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
}

/// All devices of one machine.
pub struct Devices {
    serial: Mutex<SerialPort>,
}

impl Devices {
    /// Devices in their reset state.
    pub fn new(vm: Arc<dyn Vm>, console: Arc<Console>) -> Self {
        Self { serial: Mutex::new(SerialPort::new(vm, console)) }
    }

    /// IN of `size` bytes.
    pub fn port_in(&self, port: u16, size: u8) -> u64 {
        let mut value = 0u64;
        for i in 0..size.min(8) {
            let byte = match port.wrapping_add(u16::from(i)) {
                p if SERIAL.contains(&p) => self.lock().read((p - SERIAL.start) as u8),
                // Nothing waits and nothing is full: drivers that poll before a command go on at once.
                I8042_COMMAND => 0,
                _ => 0xff,
            };
            value |= u64::from(byte) << (8 * u32::from(i));
        }
        value
    }

    /// OUT of `size` bytes; says so if the guest wants to end.
    #[inline]
    pub fn port_out(&self, port: u16, size: u8, data: u32) -> Option<Asked> {
        match port {
            I8042_COMMAND if data & 0xff == I8042_RESET => return Some(Asked::Reset),
            RESET_CONTROL if data & RESET_NOW != 0 => return Some(Asked::Reset),
            POWER_OFF if data & 0xffff == POWER_OFF_NOW => return Some(Asked::Shutdown),
            _ => {}
        }
        for i in 0..size.min(4) {
            let p = port.wrapping_add(u16::from(i));
            if SERIAL.contains(&p) {
                self.serial_out((p - SERIAL.start) as u8, (data >> (8 * u32::from(i))) as u8);
            }
        }
        None
    }

    fn serial_out(&self, register: u8, byte: u8) {
        self.lock().write(register, byte);
    }

    /// Load from an address with nothing behind it.
    pub fn mmio_read(&self, _addr: u64, size: u8) -> u64 {
        if size >= 8 { u64::MAX } else { (1u64 << (8 * u32::from(size))) - 1 }
    }

    /// Console input; returns how many bytes were taken.
    pub fn input(&self, data: &[u8]) -> usize {
        self.lock().input(data)
    }

    /// State of every device.
    pub fn save(&self) -> Vec<StatePiece> {
        vec![self.lock().save()]
    }

    /// Sets the state of every device; unknown pieces are refused before anything is set.
    pub fn restore(&self, pieces: &[StatePiece]) -> Result<(), WorkerError> {
        if let Some(piece) = pieces.iter().find(|p| p.kind != serial::KIND) {
            return Err(WorkerError::BadState {
                field: "devices",
                problem: format!("there is no device {:?}", piece.kind.chars().take(32).collect::<String>()),
            });
        }
        pieces.iter().try_for_each(|piece| self.lock().restore(piece))
    }

    fn lock(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
