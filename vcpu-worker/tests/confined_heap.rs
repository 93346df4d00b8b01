//! The allocator in threads that may not open files: glibc reads one when a process needs its ninth heap and one when it first
//! shrinks a heap, in whichever thread that happens. In a process of its own, since a filter is for good.
//!
//! Without the test harness: [`vcpu_worker::sandbox::confine`] wants the only thread.

use std::sync::{Arc, Barrier};

use vcpu_worker::sandbox::{Kind, Mode, confine, enter, violation};

/// More than glibc has heaps at first.
const THREADS: usize = 12;
/// Below and above what glibc takes from a heap rather than from a mapping of its own.
const BLOCKS: [usize; 3] = [48 << 10, 100 << 10, 300 << 10];
/// Of each size: more than a heap keeps at its end.
const HELD: usize = 64;

fn main() {
    let name = "a_confined_thread_may_give_memory_back";
    println!("\nrunning 1 test");
    // What a forbidden call ends is a child: the parent says which it was.
    let Some(dir) = std::env::args().skip_while(|arg| arg != "--confined").nth(1) else {
        let dir = tempfile::tempdir().expect("tempdir");
        let own = std::env::current_exe().expect("path");
        let ended =
            std::process::Command::new(own).arg("--confined").arg(dir.path()).status().expect("starts");
        let why = violation(dir.path()).unwrap_or_default();
        assert!(ended.success(), "{name}: {ended}: {why}");
        println!("test {name} ... ok\n\ntest result: ok. 1 passed; 0 failed");
        return;
    };
    confine(Mode::Enforce, None, Some(dir.as_ref()), false).expect("confined");
    let together = Arc::new(Barrier::new(THREADS));
    let threads: Vec<_> = (0..THREADS)
        .map(|n| {
            let together = Arc::clone(&together);
            std::thread::spawn(move || {
                if let Err(error) = enter(if n % 2 == 0 { Kind::Data } else { Kind::Vcpu }) {
                    eprintln!("not confined: {error}");
                    // The others wait for this one.
                    std::process::exit(1);
                }
                together.wait();
                for size in BLOCKS {
                    let held: Vec<Vec<u8>> = (0..HELD).map(|_| vec![1; size]).collect();
                    together.wait();
                    // From the end backwards, so that the heap's end becomes free.
                    held.into_iter().rev().for_each(drop);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("it ends in order");
    }
}
