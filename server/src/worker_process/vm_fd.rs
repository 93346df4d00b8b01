//! The kernel's VM of a worker that is about to end, held while its process ends.
//!
//! Whoever closes the last descriptor of a VM waits for SRCU grace periods (virt/kvm/kvm_main.c, `kvm_destroy_vm`), about
//! 20 ms; as the last thing that a worker does, everybody who waits for its end waits for that. While this process has a
//! duplicate the worker's ends in 1 ms, and all of the guest's memory is free; what the kernel keeps of the VM and its vCPUs
//! goes with the duplicate, on a thread that nobody waits for.
//!
//! Invariants: a duplicate lets nobody run the guest, whose memory and vCPUs were the worker's (KVM refuses every call from
//! another process with EIO); it is closed when this is dropped; where the kernel does not give one (another user, Yama, a
//! kernel before 5.6), ending takes as long as it does.

use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

/// What /proc shows for a VM.
const VM: &str = "anon_inode:kvm-vm";

/// A worker's VM.
#[derive(Debug)]
pub(super) struct VmFd(Option<OwnedFd>);

impl VmFd {
    /// The VM of that process, if it has one.
    pub(super) fn of(pid: u32, pidfd: BorrowedFd<'_>) -> Option<Self> {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let number =
            entries.flatten().find(|entry| is_vm(&entry.path()))?.file_name().to_str()?.parse().ok()?;
        let fd = pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty());
        let fd = fd.inspect_err(|error| tracing::debug!(pid, %error, "a worker's VM ends with it")).ok()?;
        // That number may have become another's meanwhile.
        let found = is_vm(&PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())));
        found.then_some(Self(Some(fd)))
    }
}

fn is_vm(link: &Path) -> bool {
    std::fs::read_link(link).is_ok_and(|to| to.as_os_str() == VM)
}

impl Drop for VmFd {
    fn drop(&mut self) {
        let fd = self.0.take();
        // Where no thread can be made it is closed here.
        drop(std::thread::Builder::new().name("vm-close".to_owned()).spawn(move || drop(fd)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    fn held() -> usize {
        let open = std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten();
        open.filter(|fd| is_vm(&fd.path())).count()
    }

    /// Of this process, which stands for a worker.
    #[test]
    fn the_vm_of_a_process_is_held_until_dropped() {
        let pid = std::process::id();
        let number = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
        let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()).expect("pidfd");
        let kvm = match kvm_ioctls::Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) if std::env::var_os("VPMU_REQUIRE_KVM").is_none() => {
                println!("skipped: no /dev/kvm ({error})");
                return;
            }
            Err(error) => panic!("/dev/kvm is required: {error}"),
        };
        assert!(VmFd::of(pid, pidfd.as_fd()).is_none(), "there is none");
        let vm = kvm.create_vm().expect("a VM");
        let duplicate = VmFd::of(pid, pidfd.as_fd()).expect("it is found");
        assert_eq!(held(), 2);
        drop(vm);
        assert_eq!(held(), 1, "the duplicate");
        drop(duplicate);
        while held() > 0 {
            std::thread::yield_now();
        }
    }
}
