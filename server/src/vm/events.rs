//! The event stream behind WatchVirtualMachines: bounded, with a sequence; a reader that is too slow is told so.

use std::sync::Mutex;
use std::sync::PoisonError;

use tokio::sync::broadcast;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::WatchVirtualMachinesResponse;
use vpmu_proto::api::watch_virtual_machines_response::Kind;

/// Events that a slow reader may lag behind before it loses some.
const CAPACITY: usize = 1024;

/// Fan-out of machine events.
pub struct Events {
    sender: broadcast::Sender<WatchVirtualMachinesResponse>,
    sequence: Mutex<u64>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::channel(CAPACITY).0, sequence: Mutex::new(0) }
    }
}

impl Events {
    /// Tells watchers; never waits.
    pub fn send(&self, kind: Kind, vm: &VirtualMachine) {
        // The lock spans the send, so that sequence numbers arrive in order.
        let mut sequence = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
        *sequence += 1;
        if self.sender.receiver_count() == 0 {
            return;
        }
        let _ = self.sender.send(WatchVirtualMachinesResponse {
            kind: kind as i32,
            virtual_machine: Some(vm.clone()),
            sequence: *sequence,
        });
    }

    /// A new reader.
    pub fn subscribe(&self) -> broadcast::Receiver<WatchVirtualMachinesResponse> {
        self.sender.subscribe()
    }

    /// Sequence of the last event.
    pub fn sequence(&self) -> u64 {
        *self.sequence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
