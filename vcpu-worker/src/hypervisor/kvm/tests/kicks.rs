//! Leaving KVM_RUN from outside: kicks, and the ticks that interrupt a guest which spins.

use super::*;

/// A kick at any moment gets the vCPU out, and none is lost or doubled by clearing.
#[test]
fn kicks_are_never_lost() {
    if !require_kvm() {
        return;
    }
    let memory = memory(2 * MIB);
    let (send, receive) = std::sync::mpsc::channel();
    let answered = Arc::new(AtomicU64::new(0));
    let wanted = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let thread = {
        let (answered, wanted, stop) = (Arc::clone(&answered), Arc::clone(&wanted), Arc::clone(&stop));
        std::thread::spawn(move || {
            let (_vm, mut vcpu) = start(&memory, guest::spin(), EntryMode::LongUser);
            send.send(vcpu.kicker()).expect("sent");
            while !stop.load(Ordering::Acquire) {
                assert_eq!(vcpu.run().expect("run"), Exit::Interrupted);
                vcpu.clear_kick();
                answered.store(wanted.load(Ordering::Acquire), Ordering::Release);
            }
        })
    };
    let kicker = receive.recv().expect("kicker");
    for round in 1..=500u64 {
        wanted.store(round, Ordering::Release);
        kicker.kick();
        let deadline = Instant::now() + Duration::from_secs(20);
        while answered.load(Ordering::Acquire) != round {
            assert!(Instant::now() < deadline, "kick {round} was lost");
            // Vary the distance between kicks, so that they hit every part of the loop.
            if round % 3 == 0 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
    stop.store(true, Ordering::Release);
    kicker.kick();
    thread.join().expect("vcpu thread");
    kicker.kick();
}

#[test]
fn a_kick_holds_until_it_is_cleared() {
    if !require_kvm() {
        return;
    }
    let memory = memory(2 * MIB);
    let (_vm, mut vcpu) = start(&memory, guest::doorbell(), EntryMode::Long);
    let kicker = vcpu.kicker();
    kicker.kick();
    kicker.kick();
    for _ in 0..3 {
        assert_eq!(vcpu.run().expect("run"), Exit::Interrupted);
    }
    vcpu.clear_kick();
    assert!(matches!(vcpu.run().expect("run"), Exit::PioOut { port: 0x80, .. }));
}

#[test]
fn ticks_interrupt_a_spinning_guest() {
    use crate::host::TickTimer;
    if !require_kvm() {
        return;
    }
    let memory = memory(2 * MIB);
    let (_vm, mut vcpu) = start(&memory, guest::spin(), EntryMode::LongUser);
    let period = Duration::from_millis(1);
    for mut timer in [TickTimer::new(period).expect("timer"), TickTimer::new_posix(period).expect("timer")] {
        timer.arm().expect("armed");
        let begin = crate::host::thread_cpu_ns();
        let mut ticks = 0u64;
        while crate::host::thread_cpu_ns() - begin < 100_000_000 {
            assert_eq!(vcpu.run().expect("run"), Exit::Interrupted);
            vcpu.clear_kick();
            ticks += 1;
        }
        timer.disarm().expect("disarmed");
        println!("{timer:?}: {ticks} ticks in 100 ms of CPU time");
        // The POSIX timer's grain is the kernel's tick, up to 10 ms, if that finds the thread running.
        let least = if timer.source() == "perf cpu-clock" { 50 } else { 3 };
        assert!((least..=150).contains(&ticks), "{timer:?}: {ticks}");
        drop(timer);
        vcpu.clear_kick();
    }
}
