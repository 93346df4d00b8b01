//! TCP between test hosts: where they listen, and how a connection of theirs is cut.

use super::Host;

/// Where it listens for other hosts over TCP.
pub fn tcp(host: &Host) -> String {
    let listening = host.ready["peer_listen"].as_array().expect("addresses").iter();
    let mut tcp = listening.filter_map(|a| a.as_str()).filter(|a| a.starts_with("tcp:"));
    tcp.next().expect("a TCP peer listener").to_owned()
}

/// Shuts every TCP connection of a process down, as if the network had cut them.
pub fn cut(process: u32) -> usize {
    let number = rustix::process::Pid::from_raw(process.cast_signed()).expect("a pid");
    let open = |path: &str| std::fs::read_to_string(path).expect("the kernel's list");
    let list = open("/proc/net/tcp");
    let known: Vec<&str> = list.lines().filter_map(|line| line.split_whitespace().nth(9)).collect();
    let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty());
    let pidfd = pidfd.expect("a process of ours");
    let entries = std::fs::read_dir(format!("/proc/{process}/fd")).expect("a process of ours").flatten();
    let sockets = entries.filter(|entry| {
        let name = std::fs::read_link(entry.path()).unwrap_or_default();
        let name = name.to_string_lossy();
        name.strip_prefix("socket:[").and_then(|n| n.strip_suffix(']')).is_some_and(|n| known.contains(&n))
    });
    let mut cut = 0;
    for entry in sockets {
        let number = entry.file_name().to_string_lossy().parse().expect("a number");
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let socket = rustix::process::pidfd_getfd(&pidfd, number, flags).expect("its socket");
        cut += usize::from(rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).is_ok());
    }
    cut
}
