//! Two hosts with addresses of their own: network namespaces, joined by a veth pair or by a link that delays, drops,
//! limits and stalls as it is told.

use std::io::{BufRead as _, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Addresses of the two hosts.
pub const ADDRESS: [&str; 2] = ["10.93.7.1", "10.93.7.2"];

/// Two namespaces and what joins them; all of it goes when dropped.
pub struct Net {
    /// Names of the namespaces.
    pub host: [String; 2],
    device: [String; 2],
    slow: Option<(Child, ChildStdin)>,
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|e| format!("ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

/// Says why a test does not run; VPMU_REQUIRE_NETNS=1 makes that a failure.
fn skipped(why: &str) {
    let required = std::env::var_os("VPMU_REQUIRE_NETNS").is_some_and(|v| v == "1");
    assert!(!required, "network namespaces are required and not to be had: {why}");
    println!("skipped: no network namespaces ({why})");
}

impl Net {
    fn namespaces() -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let tag = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let device = ["a", "b"].map(|side| format!("v{tag}{side}"));
        let net = Self { host: ["a", "b"].map(|side| format!("vpmud-{tag}{side}")), device, slow: None };
        for host in &net.host {
            ip(&["netns", "add", host])?;
            ip(&["-n", host, "link", "set", "lo", "up"])?;
        }
        Ok(net)
    }

    fn address(&self) -> Result<(), String> {
        for ((host, device), address) in self.host.iter().zip(&self.device).zip(ADDRESS) {
            ip(&["-n", host, "addr", "add", &format!("{address}/24"), "dev", device])?;
            ip(&["-n", host, "link", "set", device, "up"])?;
        }
        Ok(())
    }

    /// Joined by a veth pair. None: no namespaces can be made here, and it says so.
    pub fn veth() -> Option<Self> {
        let made = Self::namespaces().and_then(|net| {
            let ([a, b], [da, db]) = (&net.host, &net.device);
            ip(&["link", "add", da, "netns", a, "type", "veth", "peer", "name", db, "netns", b])?;
            net.address()?;
            Ok(net)
        });
        made.inspect_err(|why| skipped(why)).ok()
    }

    /// Joined by a link in user space, see slow_link.py: not every kernel has netem.
    pub fn slow() -> Option<Self> {
        let made = Self::namespaces().and_then(|mut net| {
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/slow_link.py");
            let mut command = Command::new("python3");
            command.arg(script).args(&net.device).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().map_err(|e| format!("python3: {e}"))?;
            let (input, output) = (child.stdin.take(), child.stdout.take());
            net.slow = Some((child, input.ok_or("no input")?));
            let mut said = String::new();
            let output = output.ok_or("no output")?;
            std::io::BufReader::new(output).read_line(&mut said).map_err(|e| e.to_string())?;
            if said.trim() != "ready" {
                return Err(format!("slow_link.py: {said:?}"));
            }
            for (host, device) in net.host.iter().zip(&net.device) {
                ip(&["link", "set", device, "netns", host, "mtu", "9000"])?;
            }
            net.address()?;
            Ok(net)
        });
        made.inspect_err(|why| skipped(why)).ok()
    }

    /// Cuts the link, or mends it.
    pub fn set_up(&self, up: bool) {
        let state = if up { "up" } else { "down" };
        ip(&["-n", &self.host[0], "link", "set", &self.device[0], state]).expect("link");
    }

    /// Kills every TCP connection of the first host. Whether this kernel can.
    pub fn kill_connections(&self) -> bool {
        let mut ss = Command::new("ip");
        ss.args(["netns", "exec", &self.host[0], "ss", "-K", "dst", ADDRESS[1]]);
        let said = ss.output().expect("ss");
        said.status.success() && String::from_utf8_lossy(&said.stdout).contains(ADDRESS[1])
    }

    /// Tells the slow link what it is to be like.
    pub fn be(&mut self, what: &serde_json::Value) {
        let (_, input) = self.slow.as_mut().expect("a slow link");
        writeln!(input, "{what}").and_then(|()| input.flush()).expect("the link lives");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Some((mut child, input)) = self.slow.take() {
            drop(input);
            let _ = child.kill();
            let _ = child.wait();
        }
        for host in &self.host {
            let _ = ip(&["netns", "del", host]);
        }
    }
}
