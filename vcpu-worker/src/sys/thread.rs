//! A thread on a stack of ours ([`stacks`](super::stacks)): what `std::thread` gives to a vCPU, without the mappings that
//! it makes for each of its threads.
//!
//! Invariant: the stack is given back only after the thread has ended, which [`Thread::join`] waits for; so does the drop
//! of one that was not joined. A panic stays in the thread and is reported by `join`.
//!
//! What is missing of std's: its name in a panic's message (the kernel has it, and the vCPU's loop logs it), and the line
//! about a stack that overflowed, for which std keeps a signal stack: such a process dies of SIGSEGV.

use std::mem::ManuallyDrop;
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
    /// Given back once the thread was joined, and not at all if that failed.
    stack: ManuallyDrop<Stack>,
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
            Ok(id) => Ok(Self { id, end, joined: false, stack: ManuallyDrop::new(stack) }),
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
        if self.end.load(Ordering::Acquire) == RETURNED { Ok(()) } else { Err(Panicked) }
    }

    fn wait(&mut self) {
        if std::mem::replace(&mut self.joined, true) {
            return;
        }
        // SAFETY: a thread that was made joinable and is joined once.
        let result = unsafe { libc::pthread_join(self.id, std::ptr::null_mut()) };
        if result == 0 {
            // SAFETY: dropped once, because `joined` was false; not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.stack) };
        } else {
            // A thread that waits for itself (EDEADLK): it goes on running on that stack.
            let error = std::io::Error::from_raw_os_error(result);
            tracing::error!(%error, "a thread could not be waited for; its stack is not used again");
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.wait();
    }
}

/// A thread's body panicked, or is the one that waits for itself.
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
    fn it_has_its_name_thread_locals_and_room_for_deep_calls() {
        thread_local!(static MINE: std::cell::Cell<u32> = const { std::cell::Cell::new(1) });
        MINE.set(7);
        let name = ended(|| {
            assert_eq!(MINE.replace(2), 1);
            std::fs::read_to_string("/proc/thread-self/comm").expect("comm")
        });
        assert_eq!(name, "test\n");
        fn depth(frames: usize) -> usize {
            let frame = std::hint::black_box([frames; 128]);
            if frames > 1 { depth(frames - 1) + usize::from(frame[0] == frames) } else { 1 }
        }
        assert_eq!(ended(|| depth(512)), 512);
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
    fn a_thread_that_drops_itself_keeps_its_stack() {
        let (give, get) = sync_channel::<Thread>(1);
        let (say, hear) = sync_channel(1);
        let thread = Thread::spawn("itself", move || {
            drop(get.recv().expect("itself"));
            say.send(std::hint::black_box([1u8; 64]).iter().map(|b| u32::from(*b)).sum::<u32>())
                .expect("heard");
        });
        let thread = thread.expect("spawn");
        let at = thread.stack.usable().0;
        give.send(thread).expect("taken");
        assert_eq!(hear.recv().expect("it goes on"), 64);
        let later: Vec<_> = (0..40).map(|_| Stack::take().expect("stack")).collect();
        assert!(later.iter().all(|stack| stack.usable().0 != at), "nobody gets the stack that it runs on");
    }
}
