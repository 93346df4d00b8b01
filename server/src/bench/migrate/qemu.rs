//! One migration of QEMU's: two processes, driven over QMP.

use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::cell::{Cell, Run, first_gap};
use super::ours::{AFTER, SETTLE};
use crate::bench::error::BenchError;
use crate::bench::site::{Site, ms};

const ANSWER: Duration = Duration::from_secs(20);
const MIGRATION: Duration = Duration::from_secs(30);
/// In bytes a second: no cap.
const UNLIMITED: u64 = 100_000_000_000;

/// Whether there is a QEMU at all.
pub(super) async fn check(qemu: &Path) -> Result<(), BenchError> {
    let output = Command::new(qemu).arg("--version").stdin(Stdio::null()).output().await.map_err(|e| {
        BenchError::io(
            format!("run {} (Debian: apt-get install qemu-system-x86; or --without-qemu)", qemu.display()),
            e,
        )
    })?;
    let first = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned();
    crate::bench::say(&first);
    Ok(())
}

pub(super) async fn run(site: &Site, qemu: &Path, cell: &Cell) -> Result<Run, BenchError> {
    let kernel = site.kernel(&cell.load.cmdline(cell.memory_mib));
    let mut source =
        Machine::start(site, qemu, "qemu-src", cell.memory_mib, &kernel.path, &kernel.cmdline, false).await?;
    let mut target =
        Machine::start(site, qemu, "qemu-dst", cell.memory_mib, &kernel.path, &kernel.cmdline, true).await?;
    let result = migrate(&mut source, &mut target, cell).await;
    source.end().await;
    target.end().await;
    result
}

async fn migrate(source: &mut Machine, target: &mut Machine, cell: &Cell) -> Result<Run, BenchError> {
    let mut capabilities = vec![json!({"capability": "events", "state": true})];
    if cell.connections > 1 {
        capabilities.push(json!({"capability": "multifd", "state": true}));
    }
    for machine in [&mut *source, &mut *target] {
        machine.call("migrate-set-capabilities", json!({"capabilities": capabilities})).await?;
        if cell.connections > 1 {
            machine.call("migrate-set-parameters", json!({"multifd-channels": cell.connections})).await?;
        }
    }
    let parameters = json!({"downtime-limit": cell.limit_ms, "max-bandwidth": UNLIMITED});
    source.call("migrate-set-parameters", parameters).await?;
    let uri = format!("tcp:127.0.0.1:{}", super::super::site::free_port()?);
    target.call("migrate-incoming", json!({"uri": uri})).await?;
    source.wait_for(b'R').await?;
    sleep(SETTLE).await;
    source.call("migrate", json!({"uri": uri})).await?;
    let status = match timeout(MIGRATION, source.migration_end()).await {
        Ok(status) => status?,
        Err(_) => return Ok(Run { problem: Some("it did not converge".to_owned()), ..Run::default() }),
    };
    if status != "completed" {
        return Ok(Run { problem: Some(status), ..Run::default() });
    }
    // It says so before it has filled in the totals.
    sleep(AFTER).await;
    let info = source.call("query-migrate", json!({})).await?;
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let output = target.output();
    if output.is_empty() {
        return Ok(Run {
            problem: Some("the guest is silent at the destination".to_owned()),
            ..Run::default()
        });
    }
    let migrated = number(&info["total-time"]);
    Ok(Run {
        // Ours ends with the source's process too.
        total_ms: migrated + ms(source.quit().await?),
        migrated_ms: Some(migrated),
        gap_ms: first_gap(&output),
        reported_ms: number(&info["downtime"]),
        bytes: info["ram"]["transferred"].as_u64().unwrap_or_default(),
        rounds: info["ram"]["dirty-sync-count"].as_u64().unwrap_or_default(),
        parts_us: None,
        problem: None,
    })
}

/// A QEMU process.
struct Machine {
    child: Child,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    serial: Arc<Mutex<Vec<u8>>>,
    events: Vec<Value>,
}

impl Machine {
    async fn start(
        site: &Site,
        qemu: &Path,
        name: &str,
        memory_mib: u64,
        kernel: &str,
        cmdline: &str,
        incoming: bool,
    ) -> Result<Self, BenchError> {
        let socket = site.path().join(format!("{name}.qmp"));
        // Of the run before.
        let _ = std::fs::remove_file(&socket);
        let log = std::fs::File::create(site.path().join(format!("{name}.log")))
            .map_err(|e| BenchError::io("make a log", e))?;
        let mut command = Command::new(qemu);
        command
            .args(["-M", "microvm", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-smp", "1"])
            .args(["-m", &memory_mib.to_string(), "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-serial", "stdio", "-no-reboot", "-kernel", kernel, "-append", cmdline])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| BenchError::io(format!("start {}", qemu.display()), e))?;
        let serial = Arc::new(Mutex::new(Vec::new()));
        if let Some(mut out) = child.stdout.take() {
            let serial = Arc::clone(&serial);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = out.read(&mut buffer).await {
                    let new = buffer.get(..n).unwrap_or_default();
                    serial.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(new);
                }
            });
        }
        let connected = timeout(ANSWER, async {
            loop {
                match UnixStream::connect(&socket).await {
                    Ok(stream) => return stream,
                    Err(_) => sleep(Duration::from_millis(5)).await,
                }
            }
        });
        let stream = connected
            .await
            .map_err(|_| BenchError::Missing(format!("QEMU does not listen; see {name}.log with --keep")))?;
        let (reader, writer) = stream.into_split();
        let mut machine = Self { child, reader: BufReader::new(reader), writer, serial, events: Vec::new() };
        // Its greeting.
        machine.line().await?;
        machine.call("qmp_capabilities", json!({})).await?;
        Ok(machine)
    }

    async fn line(&mut self) -> Result<Value, BenchError> {
        let mut line = String::new();
        let read = timeout(MIGRATION + ANSWER, self.reader.read_line(&mut line)).await;
        match read {
            Ok(Ok(1..)) => serde_json::from_str(&line)
                .map_err(|e| BenchError::Missing(format!("QEMU said something that is not JSON: {e}"))),
            Ok(Ok(0)) => Err(BenchError::Missing("QEMU ended".to_owned())),
            Ok(Err(e)) => Err(BenchError::io("read from QEMU", e)),
            Err(_) => Err(BenchError::Missing("QEMU does not answer".to_owned())),
        }
    }

    async fn call(&mut self, command: &str, arguments: Value) -> Result<Value, BenchError> {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        self.writer.write_all(text.as_bytes()).await.map_err(|e| BenchError::io("write to QEMU", e))?;
        loop {
            let mut answer = self.line().await?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(BenchError::Missing(format!("QEMU refuses {command}: {error}")));
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// How its migration ended.
    async fn migration_end(&mut self) -> Result<String, BenchError> {
        let mut seen = 0;
        loop {
            while let Some(event) = self.events.get(seen) {
                seen += 1;
                let status = event["data"]["status"].as_str().unwrap_or_default();
                if event["event"] == "MIGRATION" && matches!(status, "completed" | "failed" | "cancelled") {
                    return Ok(status.to_owned());
                }
            }
            let event = self.line().await?;
            self.events.push(event);
        }
    }

    fn output(&self) -> Vec<u8> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn wait_for(&self, byte: u8) -> Result<(), BenchError> {
        let there = async {
            while !self.output().contains(&byte) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(60), there)
            .await
            .map_err(|_| BenchError::Missing("the guest in QEMU was not set up in time".to_owned()))
    }

    /// Tells it to quit, and how long that took.
    async fn quit(&mut self) -> Result<Duration, BenchError> {
        let begin = Instant::now();
        self.call("quit", json!({})).await?;
        match timeout(ANSWER, self.child.wait()).await {
            Ok(Ok(_)) => Ok(begin.elapsed()),
            Ok(Err(e)) => Err(BenchError::io("wait for QEMU", e)),
            Err(_) => Err(BenchError::Missing("QEMU does not quit".to_owned())),
        }
    }

    async fn end(&mut self) {
        // Killed and reaped; the drop would do it too, but later.
        let _ = self.child.kill().await;
    }
}
