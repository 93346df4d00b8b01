//! A data thread that waits for its work, confined already.
//!
//! Putting a filter on a thread takes the kernel a millisecond: it is compiled, and tried out for each system call there is.
//! A thread inherits that of the one which starts it. So in a confined process one thread of [`Kind::Data`] waits, and
//! when its work is over it starts the next one. Who finds none waiting makes one on the spot.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::{Kind, enter};

/// What it does; it is told whether the thread is confined as it has to be, and must do nothing else if not.
type Body = Box<dyn FnOnce(io::Result<()>) + Send>;

struct Waiting {
    work: SyncSender<(String, Body)>,
    handle: JoinHandle<()>,
}

static WAITING: Mutex<Option<Waiting>> = Mutex::new(None);

fn waiting() -> MutexGuard<'static, Option<Waiting>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes sure that one waits, in a process that is confined.
pub fn prepare() {
    if super::ACTIVE.get().is_some() {
        await_work(false);
    }
}

/// Starts one that waits if there is none. `inherits`: the caller is one itself.
fn await_work(inherits: bool) {
    let mut waiting = waiting();
    if waiting.is_some() {
        return;
    }
    let (work, given) = sync_channel(1);
    match Builder::new().name("data-ready".to_owned()).spawn(move || wait(&given, inherits)) {
        Ok(handle) => *waiting = Some(Waiting { work, handle }),
        Err(error) => tracing::debug!(%error, "no thread waits for a migration: it will be made then"),
    }
}

fn wait(given: &Receiver<(String, Body)>, inherits: bool) {
    let confined = if inherits { Ok(()) } else { enter(Kind::Data) };
    // An error: nobody has the other end, which nobody gives up.
    let Ok((name, body)) = given.recv() else { return };
    if let Ok(name) = std::ffi::CString::new(name) {
        // Cut to 15 bytes by the kernel; only shown.
        let _ = rustix::thread::set_name(&name);
    }
    let inherits = confined.is_ok();
    body(confined);
    await_work(inherits);
}

/// Runs `body` on a data thread of this name.
///
/// # Errors
/// If the kernel starts none.
pub fn spawn(name: &str, body: impl FnOnce(io::Result<()>) + Send + 'static) -> io::Result<JoinHandle<()>> {
    let Some(Waiting { work, handle }) = waiting().take() else {
        return Builder::new().name(name.to_owned()).spawn(move || body(enter(Kind::Data)));
    };
    // There is room for one, and it waits for that.
    match work.send((name.to_owned(), Box::new(body))) {
        Ok(()) => Ok(handle),
        Err(_) => Err(io::Error::other("the thread that waited for work is gone")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The one test that uses what all of a process have in common.
    #[test]
    fn one_that_waits_is_taken_and_makes_the_next() {
        let (say, said) = sync_channel(1);
        let ask = |name: &str| {
            let say = say.clone();
            let handle = spawn(name, move |confined| {
                let name = rustix::thread::name().unwrap().into_string().unwrap();
                say.send((confined.is_ok(), name)).unwrap();
            });
            handle.unwrap().join().unwrap();
            said.recv().unwrap()
        };
        prepare();
        assert!(waiting().is_none(), "this process is not confined");
        assert_eq!(ask("on-the-spot"), (true, "on-the-spot".to_owned()));
        assert!(waiting().is_none());
        await_work(false);
        let first = waiting().as_ref().unwrap().handle.thread().id();
        await_work(false);
        assert_eq!(waiting().as_ref().unwrap().handle.thread().id(), first, "one is enough");
        assert_eq!(ask("taken"), (true, "taken".to_owned()));
        let second = waiting().as_ref().unwrap().handle.thread().id();
        assert_ne!(first, second, "its work done, it made another");
        let panicked = spawn("panics", |_| panic!("as a test wants")).unwrap().join();
        assert!(panicked.is_err() && waiting().is_none(), "none after a panic");
        assert!(ask("on-the-spot").0);
    }
}
