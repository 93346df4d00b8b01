//! Requests and events, and the effects of the steps that they make (`vcpu::state`).

use super::Driver;
use crate::error::WorkerError;
use crate::host::boottime_ns;
use crate::vcpu::Left;
use crate::vcpu::request::Request;
use crate::vcpu::state::{Effect, Event, State, step};

impl Driver {
    pub(super) fn on_event(&mut self, event: Event, left: &Left) {
        // Events are never refused, only ignored.
        let Ok((next, effects)) = step(self.state, event) else { return };
        for effect in effects {
            match effect {
                Effect::Announce => {
                    self.set_state(next);
                    self.listener.left(self.index, left.clone());
                }
                other => {
                    if let Err(error) = self.effect(*other) {
                        tracing::error!(vcpu = self.index, %error, "leaving the guest");
                    }
                }
            }
        }
        self.set_state(next);
        for reply in self.run_replies.drain(..) {
            drop(reply.send(Err(WorkerError::State {
                what: "running",
                state: format!("{next:?}"),
                remedy: "the guest was not entered: it has no right to run, or has ended",
            })));
        }
    }

    pub(super) fn on_request(&mut self, request: Request) {
        let (next, effects) = match step(self.state, Event::Request(request.kind())) {
            Ok(step) => step,
            Err(refusal) => return request.refuse(refusal.into()),
        };
        for effect in effects {
            if *effect == Effect::Serve {
                break;
            }
            if let Err(error) = self.effect(*effect) {
                // Left half-way: the values that were committed are in the image, the guest does not run again.
                let message = error.to_string();
                self.fail(&error);
                return request.refuse(WorkerError::Pmu { vcpu: self.index, message });
            }
            if *effect == Effect::FinishPending && self.must_go_on(&request) {
                return request.refuse(WorkerError::Unsettled { vcpu: self.index });
            }
        }
        // Finishing an instruction may have ended the guest, and that stands.
        if !(self.state == State::Ended && next == State::Paused) {
            self.set_state(next);
        }
        if next != State::Running {
            // Overtaken by this request before the first entry: what was asked was done, and undone.
            self.answer_runs();
        }
        if matches!(request, Request::Pause(_)) {
            crate::sandbox::hook(crate::sandbox::Kind::Vcpu);
        }
        self.serve(request);
    }

    fn effect(&mut self, effect: Effect) -> Result<(), WorkerError> {
        match effect {
            Effect::Put => {
                self.disarm();
                self.counting.put()
            }
            Effect::FinishPending => {
                self.finishing = true;
                let done = self.settle();
                self.finishing = false;
                done
            }
            Effect::Sync => self.counting.image().map(drop),
            Effect::Serve | Effect::Announce => Ok(()),
        }
    }

    /// Whether a pause is refused: who asks for one may read the state next. A guest that ends, or has no right to run,
    /// stops all the same.
    fn must_go_on(&self, request: &Request) -> bool {
        let refusable = matches!(request, Request::Pause(Some(_)));
        let refused =
            refusable && !self.whole && self.state == State::Running && self.right.allows(boottime_ns);
        if refused {
            tracing::warn!(
                vcpu = self.index,
                "the guest does not get past a software exception: it is not paused"
            );
        }
        refused
    }

    fn serve(&mut self, request: Request) {
        match request {
            Request::Run(reply) => self.run_replies.push(reply),
            Request::Pause(reply) | Request::Stop(reply) => {
                if let Some(reply) = reply {
                    drop(reply.send(self.image()));
                }
            }
            Request::Look(reply) => drop(reply.send(self.image())),
            Request::Save(reply) => drop(reply.send(self.save())),
            Request::Place(place, reply) => drop(reply.send(self.place(*place))),
            Request::Audit(reply) => drop(reply.send(self.counting.audit())),
            Request::Load(from, reply) => drop(reply.send(self.load(from))),
        }
    }
}
