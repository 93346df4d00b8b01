//! Requests of several threads to a vCPU thread whose guest never leaves by itself: one that is not noticed is one that
//! is never answered.

use pmu::Shape;

use super::*;
use crate::cores::Backend;
use crate::error::WorkerError;
use crate::vcpu::request::{Answer, LoadFrom, Request};
use crate::vcpu::{VcpuHandle, VcpuLink, bare};

const ROUNDS: u32 = 3000;

fn spinning() -> VcpuHandle {
    let memory = memory(2 * MIB);
    let regs = guest::load(&memory, guest::spin(), EntryMode::LongUser, None);
    let vm: Arc<dyn Vm> = make_vm(&memory, 1);
    let shape: Shape = "intel:v5:4+3:48".parse().expect("a shape");
    let vcpu = bare::spawn(vm, Backend::Model, shape, &bare::granted().1);
    let loaded = vcpu.load(LoadFrom::Initial(Box::new(regs))).expect("sent");
    loaded.blocking_recv().expect("answered").expect("loaded");
    vcpu
}

fn ask<T>(vcpu: &VcpuLink, what: &str, make: impl FnOnce(crate::vcpu::request::Reply<T>) -> Request) {
    let (reply, mut answer): (_, Answer<T>) = tokio::sync::oneshot::channel();
    vcpu.send(make(reply)).expect("sent");
    let until = Instant::now() + Duration::from_secs(30);
    let answer: Result<T, WorkerError> = loop {
        match answer.try_recv() {
            Ok(answer) => break answer,
            Err(tokio::sync::oneshot::error::TryRecvError::Empty) => {
                assert!(Instant::now() < until, "{what} was not noticed");
                std::thread::yield_now();
            }
            Err(error) => panic!("{what}: {error}"),
        }
    };
    if let Err(error) = answer {
        panic!("{what}: {error}");
    }
}

/// A thread that waits gets no kick: whether it does is seen before it runs, or by it when it runs.
#[test]
fn a_request_is_noticed_whenever_it_comes() {
    if !require_kvm() {
        return;
    }
    let vcpu = spinning();
    std::thread::scope(|threads| {
        let (a, b, c) = (vcpu.link(), vcpu.link(), vcpu.link());
        threads.spawn(move || (0..ROUNDS).for_each(|_| ask(&a, "run", Request::Run)));
        threads
            .spawn(move || (0..ROUNDS).for_each(|_| ask(&b, "pause", |reply| Request::Pause(Some(reply)))));
        threads.spawn(move || (0..ROUNDS).for_each(|_| ask(&c, "look", Request::Look)));
    });
    ask(&vcpu.link(), "the last pause", |reply| Request::Pause(Some(reply)));
    assert_eq!(vcpu.state(), crate::vcpu::state::State::Paused);
}
