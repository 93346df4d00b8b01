//! System calls by kind of thread. A list says who needs a call and why; what is in no list is forbidden.
//!
//! Calls with conditions on their arguments (`ioctl`, `prctl`, `clone`, `socket`, `mmap`, `mprotect`, `tgkill`,
//! `prlimit64`) are in [`super::filter`].

/// A call and its name.
pub(super) type Call = (i64, &'static str);

macro_rules! calls {
    ($($call:ident)*) => { &[$((libc::$call, stringify!($call))),*] };
}

/// Every thread: memory (malloc, stacks), locks, clocks, signals, and its own end. abort and a panic's message need
/// no more (rt_sigaction, tgkill to this process, write).
pub(super) const EVERY: &[Call] = calls![
    SYS_brk SYS_munmap SYS_mremap SYS_madvise
    SYS_futex SYS_sched_yield SYS_membarrier
    SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack SYS_restart_syscall
    SYS_getpid SYS_gettid SYS_getrandom SYS_getcpu SYS_rseq SYS_set_robust_list
    SYS_exit SYS_exit_group
    SYS_read SYS_write SYS_writev SYS_pread64 SYS_close SYS_fcntl SYS_lseek SYS_fstat
    SYS_sched_getaffinity SYS_sched_getscheduler SYS_sched_getparam SYS_sched_getattr SYS_sched_setattr
];

/// vCPU threads: a new place (re-pinning, SCHED_FIFO, memory policy), the tick timer where perf events are refused, and
/// waiting for an answer or a ring (poll). In PMU mode `msr` the core's device is written, which is open already.
pub(super) const VCPU: &[Call] = calls![
    SYS_sched_setaffinity SYS_sched_setscheduler SYS_sched_setparam
    SYS_set_mempolicy SYS_mbind SYS_get_mempolicy
    SYS_timer_create SYS_timer_settime SYS_timer_delete SYS_timer_gettime
    SYS_poll SYS_ppoll SYS_pwrite64
];

/// Migration threads: sockets (tcp, unix, descriptors passed over unix), positioned I/O on guest memory and snapshots,
/// punching holes, page faults answered for a guest (userfaultfd), the threads of further connections, and who this is (memory
/// is handed over within one user only).
pub(super) const DATA: &[Call] = calls![
    SYS_clone3 SYS_set_tid_address
    SYS_bind SYS_listen SYS_accept4 SYS_connect SYS_shutdown
    SYS_getsockname SYS_getpeername SYS_getsockopt SYS_setsockopt
    SYS_recvfrom SYS_sendto SYS_recvmsg SYS_sendmsg
    SYS_readv SYS_pwrite64 SYS_preadv SYS_pwritev SYS_fallocate SYS_ftruncate SYS_fsync SYS_fdatasync
    SYS_poll SYS_ppoll SYS_eventfd2 SYS_memfd_create SYS_userfaultfd
    SYS_statx SYS_newfstatat SYS_unlink SYS_unlinkat
    SYS_sched_setaffinity SYS_set_mempolicy SYS_mbind SYS_get_mempolicy SYS_geteuid
];

/// All others, besides what vCPUs and migrations may: they build the machine (kernel files, KVM, memory, threads), serve
/// the daemon's socket (epoll), and write the exit record. New filters may be added (seccomp), never taken away.
pub(super) const CONTROL: &[Call] = calls![
    SYS_open SYS_openat SYS_statfs SYS_fstatfs SYS_readlink SYS_readlinkat SYS_getdents64 SYS_access SYS_faccessat SYS_faccessat2
    SYS_rename SYS_renameat SYS_renameat2 SYS_chmod SYS_fchmod SYS_fchmodat SYS_mkdir SYS_mkdirat SYS_umask SYS_flock
    SYS_copy_file_range SYS_sendfile SYS_splice SYS_pipe2 SYS_dup
    SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_wait SYS_epoll_pwait SYS_epoll_pwait2
    SYS_timerfd_create SYS_timerfd_settime
    SYS_mlock SYS_mlock2 SYS_munlock SYS_mincore SYS_msync SYS_move_pages
    SYS_perf_event_open SYS_seccomp
    SYS_uname SYS_sysinfo SYS_getrusage SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getppid
];

/// KVM requests (number, name) of vCPU threads: running, its state in and out, interrupts that its exits cause.
/// The number is the low byte; a few stand for two requests of different size, of which KVM takes the one that fits the
/// descriptor.
pub(super) const VCPU_KVM: &[(u8, &str)] = &[
    (0x80, "RUN"),
    (0x61, "IRQ_LINE"),
    (0x67, "IRQ_LINE_STATUS"),
    (0xa5, "SIGNAL_MSI, SET_XSAVE"),
    (0x9a, "NMI"),
    (0x81, "GET_REGS"),
    (0x82, "SET_REGS"),
    (0x83, "GET_SREGS"),
    (0x84, "SET_SREGS"),
    (0xcc, "GET_SREGS2"),
    (0xcd, "SET_SREGS2"),
    (0x85, "TRANSLATE"),
    (0x86, "INTERRUPT"),
    (0x88, "GET_MSRS"),
    (0x89, "SET_MSRS"),
    (0x8c, "GET_FPU"),
    (0x8d, "SET_FPU"),
    (0x8e, "GET_LAPIC"),
    (0x8f, "SET_LAPIC"),
    (0x90, "SET_CPUID2"),
    (0x91, "GET_CPUID2"),
    (0x98, "GET_MP_STATE"),
    (0x99, "SET_MP_STATE"),
    (0x9b, "SET_GUEST_DEBUG"),
    (0x9f, "GET_VCPU_EVENTS, GET_PIT2"),
    (0xa0, "SET_VCPU_EVENTS, SET_PIT2"),
    (0xa1, "GET_DEBUGREGS"),
    (0xa2, "SET_DEBUGREGS, SET_TSC_KHZ"),
    (0xa3, "GET_TSC_KHZ, ENABLE_CAP"),
    (0xa4, "GET_XSAVE"),
    (0xa6, "GET_XCRS"),
    (0xa7, "SET_XCRS"),
    (0xad, "KVMCLOCK_CTRL"),
    (0xb2, "SET_PMU_EVENT_FILTER"),
    (0xbe, "GET_NESTED_STATE"),
    (0xbf, "SET_NESTED_STATE"),
    (0xc7, "RESET_DIRTY_RINGS"),
    (0xce, "GET_STATS_FD"),
    (0xcf, "GET_XSAVE2"),
    (0xe1, "SET_DEVICE_ATTR"),
    (0xe2, "GET_DEVICE_ATTR"),
    (0xe3, "HAS_DEVICE_ATTR"),
    (0x03, "CHECK_EXTENSION"),
    (0x7b, "SET_CLOCK"),
    (0x7c, "GET_CLOCK"),
    (0x62, "GET_IRQCHIP"),
    (0x63, "SET_IRQCHIP"),
];

/// KVM requests of migration threads: memory slots (dirty tracking on and off), dirty logs and rings, the state of the
/// whole machine.
pub(super) const DATA_KVM: &[(u8, &str)] = &[
    (0x42, "GET_DIRTY_LOG"),
    (0xc0, "CLEAR_DIRTY_LOG"),
    (0xc7, "RESET_DIRTY_RINGS"),
    (0x46, "SET_USER_MEMORY_REGION"),
    (0x49, "SET_USER_MEMORY_REGION2"),
    (0xa3, "ENABLE_CAP"),
    (0x03, "CHECK_EXTENSION"),
    (0x7b, "SET_CLOCK"),
    (0x7c, "GET_CLOCK"),
    (0x62, "GET_IRQCHIP"),
    (0x63, "SET_IRQCHIP"),
    (0x9f, "GET_PIT2"),
    (0xa0, "SET_PIT2"),
    (0xa5, "SIGNAL_MSI"),
    (0xce, "GET_STATS_FD"),
];

/// Calls that somebody who breaks in would try first: for the report only.
const TRIED: &[Call] = calls![
    SYS_execve SYS_execveat SYS_fork SYS_vfork SYS_clone SYS_clone3 SYS_socket SYS_socketpair SYS_ptrace SYS_mount
    SYS_umount2 SYS_pivot_root SYS_chroot SYS_setuid SYS_setgid SYS_kill SYS_tgkill SYS_bpf SYS_init_module
    SYS_finit_module SYS_kexec_load SYS_reboot SYS_unshare SYS_setns SYS_mmap SYS_mprotect SYS_prctl SYS_ioctl
    SYS_process_vm_readv SYS_process_vm_writev SYS_keyctl SYS_io_uring_setup SYS_open SYS_prlimit64 SYS_setrlimit
];

/// A call's name, without its prefix.
pub(super) fn name(number: i64) -> Option<&'static str> {
    let lists = [TRIED, EVERY, VCPU, DATA, CONTROL];
    let found = lists.iter().flat_map(|list| list.iter()).find(|(call, _)| *call == number)?;
    Some(found.1.trim_start_matches("SYS_"))
}
