//! A thread on a stack of ours ([`stacks`](super::stacks)): what `std::thread` gives to a vCPU, without the mappings that
//! it makes for each of its threads.
//!
//! Invariant: the stack is given back only after the thread has ended, which [`Thread::join`] waits for; so does the drop
//! of one that was not joined. A panic stays in the thread and is reported by `join`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::stacks::Stack;

const RUNS: u8 = 0;
const RETURNED: u8 = 1;
const PANICKED: u8 = 2;

/// A thread that was started and not yet waited for.
pub(crate) struct Thread {
    id: libc::pthread_t,
    end: Arc<AtomicU8>,
    joined: bool,
    _stack: Stack,
}

struct Start {
    name: std::ffi::CString,
    body: Box<dyn FnOnce() + Send>,
    end: Arc<AtomicU8>,
}

/// Body of the thread.
extern "C" fn begin(start: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: the pointer is of the box that `spawn` gave up for this thread, which takes it once.
    let Start { name, body, end } = *unsafe { Box::from_raw(start.cast::<Start>()) };
    // SAFETY: this thread's own handle and a terminated string of at most 15 bytes.
    unsafe { libc::pthread_setname_np(libc::pthread_self(), name.as_ptr()) };
    let how = if catch_unwind(AssertUnwindSafe(body)).is_ok() { RETURNED } else { PANICKED };
    end.store(how, Ordering::Release);
    std::ptr::null_mut()
}

impl Thread {
    /// Starts one; of `name` the kernel keeps 15 bytes.
    ///
    /// # Errors
    /// If the system has no thread or no memory left.
    pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let name: Vec<u8> = name.bytes().filter(|b| *b != 0).take(15).collect();
        let name = std::ffi::CString::new(name).map_err(std::io::Error::other)?;
        let stack = Stack::take()?;
        let end = Arc::new(AtomicU8::new(RUNS));
        let start = Box::into_raw(Box::new(Start { name, body: Box::new(body), end: Arc::clone(&end) }));
        let (at, size) = stack.usable();
        // SAFETY: the attributes are initialised before use and destroyed after; the stack is `size` bytes of memory that
        // is this thread's alone until it was joined. The new thread takes the box, if there is one.
        let made = unsafe {
            let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
            let mut id = 0;
            let mut result = libc::pthread_attr_init(&raw mut attributes);
            if result == 0 {
                result = libc::pthread_attr_setstack(&raw mut attributes, at, size);
                if result == 0 {
                    result = libc::pthread_create(&raw mut id, &raw const attributes, begin, start.cast());
                }
                libc::pthread_attr_destroy(&raw mut attributes);
            }
            if result == 0 { Ok(id) } else { Err(std::io::Error::from_raw_os_error(result)) }
        };
        match made {
            Ok(id) => Ok(Self { id, end, joined: false, _stack: stack }),
            Err(error) => {
                // SAFETY: no thread was made, so the box is still ours.
                drop(unsafe { Box::from_raw(start) });
                Err(error)
            }
        }
    }

    /// Whether its body has returned, or panicked.
    pub(crate) fn is_finished(&self) -> bool {
        self.end.load(Ordering::Acquire) != RUNS
    }

    /// Waits for its end. Blocks. Says whether it panicked.
    pub(crate) fn join(mut self) -> Result<(), Panicked> {
        self.wait();
        if self.end.load(Ordering::Acquire) == PANICKED { Err(Panicked) } else { Ok(()) }
    }

    fn wait(&mut self) {
        if !std::mem::replace(&mut self.joined, true) {
            // SAFETY: a thread that was made joinable and is joined once.
            let result = unsafe { libc::pthread_join(self.id, std::ptr::null_mut()) };
            // It may only fail for a thread that joins itself, which would give back the stack that it runs on.
            assert_eq!(result, 0, "pthread_join: {}", std::io::Error::from_raw_os_error(result));
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.wait();
    }
}

/// A thread's body panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Panicked;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    fn ended<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
        let (send, receive) = sync_channel(1);
        let thread = Thread::spawn("test", move || drop(send.send(body()))).expect("spawn");
        thread.join().expect("no panic");
        receive.recv().expect("sent")
    }

    #[test]
    fn it_has_its_name_thread_locals_and_all_of_its_stack() {
        thread_local!(static MINE: std::cell::Cell<u32> = const { std::cell::Cell::new(1) });
        MINE.set(7);
        let name = ended(|| {
            assert_eq!(MINE.replace(2), 1);
            std::fs::read_to_string("/proc/thread-self/comm").expect("comm")
        });
        assert_eq!(name, "test\n");
        fn sum(frames: usize) -> usize {
            let frame = std::hint::black_box([1u8; 1024]);
            let below = if frames > 1 { sum(frames - 1) } else { 0 };
            below + frame.iter().map(|b| usize::from(*b)).sum::<usize>()
        }
        assert_eq!(ended(|| sum(512)), 512 << 10);
    }

    #[test]
    fn a_panic_ends_the_thread_and_is_reported() {
        let thread = Thread::spawn("panics", || panic!("on purpose")).expect("spawn");
        assert_eq!(thread.join(), Err(Panicked));
    }

    #[test]
    fn one_that_is_dropped_is_waited_for() {
        let done = Arc::new(AtomicU8::new(0));
        let (go, wait) = sync_channel::<()>(1);
        let thread = Thread::spawn("dropped", {
            let done = Arc::clone(&done);
            move || {
                wait.recv().expect("told to go on");
                done.store(1, Ordering::SeqCst);
            }
        });
        let thread = thread.expect("spawn");
        assert!(!thread.is_finished());
        go.send(()).expect("it waits");
        drop(thread);
        assert_eq!(done.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn below_a_stack_nothing_can_be_written() {
        let stack = Stack::take().expect("stack");
        let (zero, room) = (std::fs::File::open("/dev/zero").expect("zero"), 16);
        let lowest = stack.usable().0;
        let read = |at: *mut libc::c_void| {
            // SAFETY: where it may be written, the memory is the slot's own, which no thread runs on.
            unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), at, room) }
        };
        assert_eq!(read(lowest), 16);
        assert_eq!(read(lowest.wrapping_byte_sub(16)), -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn nothing_of_one_threads_stack_is_left_for_the_next() {
        const PATTERN: u64 = 0x5eed_5eed_5eed_5eed;
        let stack = Stack::take().expect("stack");
        let (at, size) = stack.usable();
        let words = size / size_of::<u64>();
        // SAFETY: the slot's own memory, which no thread runs on.
        let memory = unsafe { std::slice::from_raw_parts_mut(at.cast::<u64>(), words) };
        memory.fill(PATTERN);
        drop(stack);
        let mut held = Vec::new();
        let again = loop {
            let stack = Stack::take().expect("stack");
            if stack.usable().0 == at {
                break stack;
            }
            held.push(stack);
            assert!(held.len() < 4096, "the slot never came back");
        };
        // SAFETY: as above.
        let memory = unsafe { std::slice::from_raw_parts(at.cast::<u64>(), words) };
        assert!(memory.iter().all(|word| *word == 0));
        drop(again);
    }
}
