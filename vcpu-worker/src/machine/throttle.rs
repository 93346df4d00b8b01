//! The one who ticks while a machine is slowed down, and makes sure that it is not for ever.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Instant;

use super::Machine;
use crate::error::WorkerError;
use crate::vcpu::throttle::{PERIOD, Throttle};

/// Slows a machine down for as long as it lives.
pub struct Throttling {
    machine: Arc<Machine>,
    highest: u32,
    rested_before_us: u64,
    thread: Option<(Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Throttling {
    /// Of a machine that runs at full speed.
    pub fn new(machine: Arc<Machine>) -> Self {
        let rested_before_us = machine.throttle().rested_us();
        Self { machine, highest: 0, rested_before_us, thread: None }
    }

    /// Lets each vCPU rest for `percent` of the time.
    ///
    /// # Errors
    /// If the thread that ticks cannot be started; then nothing is slowed down.
    pub fn set(&mut self, percent: u32) -> Result<(), WorkerError> {
        if self.thread.is_none() && percent > 0 {
            let (stop, stopped) = channel();
            let machine = Arc::clone(&self.machine);
            let body = move || {
                let mut next = Instant::now();
                loop {
                    machine.throttle().tick();
                    machine.vcpus.iter().for_each(|vcpu| vcpu.link().nudge());
                    // Late ticks are not caught up: two at once would be one.
                    next = (next + PERIOD).max(Instant::now());
                    match stopped.recv_timeout(next.saturating_duration_since(Instant::now())) {
                        Err(RecvTimeoutError::Timeout) => {}
                        Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                    }
                }
            };
            let name = "vpmud-throttle".to_owned();
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(body)
                .map_err(|e| WorkerError::Thread { thread: name, problem: e.to_string() })?;
            self.thread = Some((stop, thread));
        }
        self.machine.throttle().set_percent(percent);
        self.highest = self.highest.max(percent);
        Ok(())
    }

    /// The share now, in hundredths.
    pub fn percent(&self) -> u32 {
        self.machine.throttle().percent()
    }

    /// The highest share so far.
    pub fn highest(&self) -> u32 {
        self.highest
    }

    /// Microseconds that vCPUs have rested since, all together.
    pub fn rested_us(&self) -> u64 {
        self.machine.throttle().rested_us().saturating_sub(self.rested_before_us)
    }

    /// Full speed again.
    pub fn end(&mut self) {
        self.machine.throttle().set_percent(0);
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            if thread.join().is_err() {
                tracing::error!("the throttle's thread panicked");
            }
        }
    }
}

impl Drop for Throttling {
    fn drop(&mut self) {
        self.end();
    }
}

impl Machine {
    /// What its vCPUs rest by.
    pub fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }
}
