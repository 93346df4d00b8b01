//! Compiles the lists of [`super::table`] and the conditions on arguments into BPF.
//!
//! `clone3` hides its flags in memory, where a filter cannot look: it is answered ENOSYS, upon which the C library uses
//! `clone`, whose flags are looked at.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::{Mode, table};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;
/// One comparison: argument, its width, how, with what.
type Check = (u8, Len, Op, u64);

/// `_IOC_TYPE` and `_IOC_NR` of a request.
const TYPE_AND_NR: u64 = 0xffff;
const TYPE: u64 = 0xff00;
const KVM: u64 = 0xae00;
const USERFAULTFD: u64 = 0xaa00;
/// perf events: '$'.
const PERF: u64 = 0x2400;

/// PR_GET_AUXV: where the vDSO is.
const GET_AUXV: libc::c_int = 0x4155_5856;

/// Operations of prctl that threads use of themselves: names of threads and of memory, no_new_privs (only on), and what
/// rustix reads before its first use of the vDSO.
const PRCTL: [libc::c_int; 5] =
    [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA, libc::PR_SET_NO_NEW_PRIVS, GET_AUXV];

fn bad(error: seccompiler::BackendError) -> io::Error {
    io::Error::other(error)
}

fn rule(checks: &[Check]) -> io::Result<SeccompRule> {
    let conditions: Result<Vec<_>, _> = checks
        .iter()
        .map(|(argument, length, op, value)| Condition::new(*argument, length.clone(), op.clone(), *value))
        .collect();
    SeccompRule::new(conditions.map_err(bad)?).map_err(bad)
}

/// Allows a call if one of the alternatives holds.
fn when(rules: &mut Rules, call: i64, alternatives: &[Vec<Check>]) -> io::Result<()> {
    let alternatives: io::Result<Vec<_>> = alternatives.iter().map(|checks| rule(checks)).collect();
    rules.entry(call).or_default().extend(alternatives?);
    Ok(())
}

fn always(rules: &mut Rules, calls: &[table::Call]) {
    for (call, _) in calls {
        rules.insert(*call, Vec::new());
    }
}

fn masked(argument: u8, mask: u64, value: u64) -> Vec<Check> {
    vec![(argument, Len::Dword, Op::MaskedEq(mask), value)]
}

fn equal(argument: u8, value: u64) -> Vec<Check> {
    vec![(argument, Len::Dword, Op::Eq, value)]
}

/// Requests of one list of KVM's.
fn kvm(list: &[(u8, &str)]) -> Vec<Vec<Check>> {
    list.iter().map(|(nr, _)| masked(1, TYPE_AND_NR, KVM | u64::from(*nr))).collect()
}

fn common() -> io::Result<Rules> {
    let mut rules = Rules::new();
    always(&mut rules, table::EVERY);
    // No memory becomes executable any more.
    let executable = libc::PROT_EXEC as u64;
    when(&mut rules, libc::SYS_mmap, &[masked(2, executable, 0)])?;
    when(&mut rules, libc::SYS_mprotect, &[masked(2, executable, 0)])?;
    let operations: Vec<_> = PRCTL.iter().map(|op| equal(0, *op as u64)).collect();
    when(&mut rules, libc::SYS_prctl, &operations)?;
    // Kicks and abort: threads of this process only.
    when(&mut rules, libc::SYS_tgkill, &[equal(0, u64::from(std::process::id()))])?;
    Ok(rules)
}

fn may_start_threads(rules: &mut Rules) -> io::Result<()> {
    let thread = libc::CLONE_THREAD as u64;
    when(rules, libc::SYS_clone, &[masked(0, thread, thread)])
}

fn may_use_sockets(rules: &mut Rules) -> io::Result<()> {
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(|family| equal(0, family as u64));
    when(rules, libc::SYS_socket, &families)?;
    when(rules, libc::SYS_socketpair, &families[..1])
}

fn non_blocking() -> Vec<Check> {
    // FIONBIO.
    equal(1, 0x5421)
}

fn vcpu() -> io::Result<Rules> {
    let mut rules = common()?;
    always(&mut rules, table::VCPU);
    let mut requests = kvm(table::VCPU_KVM);
    requests.push(masked(1, TYPE, PERF));
    when(&mut rules, libc::SYS_ioctl, &requests)?;
    Ok(rules)
}

fn data() -> io::Result<Rules> {
    let mut rules = common()?;
    always(&mut rules, table::DATA);
    may_start_threads(&mut rules)?;
    may_use_sockets(&mut rules)?;
    let mut requests = kvm(table::DATA_KVM);
    requests.extend([non_blocking(), masked(1, TYPE, USERFAULTFD)]);
    when(&mut rules, libc::SYS_ioctl, &requests)?;
    Ok(rules)
}

fn control() -> io::Result<Rules> {
    let mut rules = common()?;
    for list in [table::VCPU, table::DATA, table::CONTROL] {
        always(&mut rules, list);
    }
    may_start_threads(&mut rules)?;
    may_use_sockets(&mut rules)?;
    let run = masked(1, TYPE_AND_NR, KVM | 0x80);
    let requests =
        [run, masked(1, TYPE, KVM), masked(1, TYPE, PERF), masked(1, TYPE, USERFAULTFD), non_blocking()];
    when(&mut rules, libc::SYS_ioctl, &requests)?;
    // Limits are read, not set.
    when(&mut rules, libc::SYS_prlimit64, &[vec![(2, Len::Qword, Op::Eq, 0)]])?;
    Ok(rules)
}

fn program(rules: Rules, otherwise: SeccompAction, then: SeccompAction) -> io::Result<BpfProgram> {
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(bad)?;
    SeccompFilter::new(rules, otherwise, then, arch).map_err(bad)?.try_into().map_err(bad)
}

/// The filters of a process.
pub(super) struct Programs {
    /// Answers clone3; goes on first.
    pub(super) no_clone3: BpfProgram,
    /// All threads.
    pub(super) control: BpfProgram,
    /// Added by vCPU threads.
    pub(super) vcpu: BpfProgram,
    /// Added by migration threads.
    pub(super) data: BpfProgram,
}

pub(super) fn compile(mode: Mode) -> io::Result<Programs> {
    let otherwise = || match mode {
        Mode::Log => SeccompAction::Log,
        Mode::Enforce | Mode::Off => SeccompAction::Trap,
    };
    let allow = |rules: Rules| program(rules, otherwise(), SeccompAction::Allow);
    let no_clone3 = Rules::from([(libc::SYS_clone3, Vec::new())]);
    Ok(Programs {
        no_clone3: program(no_clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        control: allow(control()?)?,
        vcpu: allow(vcpu()?)?,
        data: allow(data()?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread's filter is added to control's: what control forbids, no kind can allow.
    #[test]
    fn every_kind_is_within_control() {
        let control = control().unwrap();
        for (kind, rules) in [("vcpu", vcpu().unwrap()), ("data", data().unwrap())] {
            for (call, checks) in rules {
                let outer = control.get(&call).unwrap_or_else(|| panic!("{kind}: control forbids {call}"));
                assert!(outer.is_empty() || !checks.is_empty(), "{kind}: {call} is wider than control's");
            }
        }
    }

    #[test]
    fn filters_are_as_small_as_the_kernel_wants() {
        for mode in [Mode::Enforce, Mode::Log] {
            let Programs { no_clone3, control, vcpu, data } = compile(mode).unwrap();
            for program in [no_clone3, control, vcpu, data] {
                assert!((1..=4096).contains(&program.len()), "{} instructions", program.len());
            }
        }
    }

    #[test]
    fn the_dangerous_calls_are_in_no_list() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_kill,
            libc::SYS_process_vm_readv,
            libc::SYS_io_uring_setup,
            libc::SYS_setuid,
            libc::SYS_unshare,
        ];
        let lists = [control().unwrap(), vcpu().unwrap(), data().unwrap()];
        for call in never {
            assert!(lists.iter().all(|rules| !rules.contains_key(&call)), "{call}");
        }
        for files in [libc::SYS_openat, libc::SYS_socket, libc::SYS_clone] {
            assert!(!lists[1].contains_key(&files), "a vCPU may {files}");
        }
        assert!(!lists[2].contains_key(&libc::SYS_openat));
    }
}
