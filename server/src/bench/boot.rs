//! From the call that creates and starts a machine until a client holds its first serial byte. The client has attached to
//! the console before it creates (`await_machine`), as somebody who reads a peer's serial file has opened that before.

use std::time::Instant;

use vcpu_worker::floor::bare::BareHost;
use vpmu_client::{Client, ConsoleOptions};

use super::error::{BenchError, Step as _};
use super::figure::{Figure, Samples, Target};
use super::site::{self, Site, ms};

const MEMORY_MIB: u64 = 256;
const FLOOR: &str = "memory, kernel file, bare ioctls and KVM_RUN to the same byte";

/// A host has made its next spare worker in this time: machines are not created back to back here.
const SPARE: std::time::Duration = std::time::Duration::from_millis(400);

/// Thread and process isolation, with a spare worker and without, in turns.
pub(super) async fn run(runs: u32) -> Result<Vec<Figure>, BenchError> {
    super::say("boot: create and start to the first serial byte, 256 MiB, 1 vCPU");
    let site = Site::new()?;
    let threads = site.host("threads", "thread").await?;
    let processes = site.host_with_spare("procs").await?;
    let alone = site.host("alone", "process").await?;
    let (mut thread, mut process, mut cold) = (Both::default(), Both::default(), Both::default());
    let mut floor = Samples::default();
    // The first of each pays for what is made once.
    for turn in 0..=runs {
        let name = format!("boot-{turn}");
        let in_thread = boot(&site, &threads.client, &name).await?;
        tokio::time::sleep(SPARE).await;
        let in_process = boot(&site, &processes.client, &name).await?;
        tokio::time::sleep(SPARE).await;
        let without_spare = boot(&site, &alone.client, &name).await?;
        let bare = bare(&site).await?;
        if turn > 0 {
            thread.add(in_thread);
            process.add(in_process);
            cold.add(without_spare);
            floor.push(bare);
        }
    }
    threads.end().await?;
    processes.end().await?;
    alone.end().await?;
    let floor = Some((FLOOR, &floor));
    Ok(vec![
        Figure::of("boot to first byte, thread", "ms", &thread.byte, floor, Target::AtMost(3.0)),
        Figure::of("  its call has returned", "ms", &thread.call, None, Target::None),
        Figure::of("boot to first byte, process", "ms", &process.byte, floor, Target::AtMost(6.0)),
        Figure::of("  its call has returned", "ms", &process.call, None, Target::None),
        Figure::of("  without a spare worker", "ms", &cold.byte, floor, Target::None),
    ])
}

#[derive(Default)]
struct Both {
    call: Samples,
    byte: Samples,
}

impl Both {
    fn add(&mut self, (call, byte): (f64, f64)) {
        self.call.push(call);
        self.byte.push(byte);
    }
}

/// Milliseconds until the call returns and until the byte is there.
async fn boot(site: &Site, client: &Client, name: &str) -> Result<(f64, f64), BenchError> {
    let request = site::create_and_start(name, site.spec(MEMORY_MIB, "mode=h"));
    let options = ConsoleOptions { await_machine: true, ..ConsoleOptions::default() };
    let mut console = client.attach_console(name, options).await.step("attach to the console")?;
    let begin = Instant::now();
    let (called, byte) = tokio::join!(
        async {
            let operation = client.create_vm_with(request).await.step("create a machine")?;
            Ok::<_, BenchError>((ms(begin.elapsed()), operation))
        },
        async { Ok::<_, BenchError>((first_byte(&mut console).await?, ms(begin.elapsed()))) },
    );
    let ((call, operation), (byte, took)) = (called?, byte?);
    if !operation.done {
        client.wait_operation(operation, site::OPERATION, |_| {}).await.step("start a machine")?;
    }
    drop(console);
    site::delete(client, name).await?;
    if byte == b'A' {
        Ok((call, took))
    } else {
        Err(BenchError::Missing(format!("the guest's first byte is {byte:#x} instead of 'A'")))
    }
}

async fn first_byte(console: &mut vpmu_client::ConsoleSession) -> Result<u8, BenchError> {
    loop {
        let piece = console.next().await.step("read the console")?;
        let piece =
            piece.ok_or_else(|| BenchError::Missing("the console ended without a byte".to_owned()))?;
        if let Some(first) = piece.data.first() {
            return Ok(*first);
        }
    }
}

async fn bare(site: &Site) -> Result<f64, BenchError> {
    let kernel = site.kernel("mode=h");
    let measured = tokio::task::spawn_blocking(move || {
        let host = BareHost::open()?;
        let begin = Instant::now();
        let mut vm = host.boot(MEMORY_MIB << 20, &kernel)?;
        vm.first_byte()?;
        Ok(ms(begin.elapsed()))
    });
    measured.await.map_err(|e| BenchError::io("measure the bare ioctls", std::io::Error::other(e)))?
}
