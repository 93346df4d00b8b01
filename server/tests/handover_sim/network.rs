//! The stream between the two daemons: what is on it arrives in order, or is lost with a cut that both sides see.

use super::Side::Dst;
use super::{Digest, Sim, handover};
use vpmu_server::handover::destination::{self as d, Destination};
use vpmu_server::handover::source as s;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Msg {
    Prepare,
    Accepted,
    Go(u64, Digest),
    Abort(u64),
    Released,
    Ready(Digest),
    Entered,
    Returned,
    Failed,
    Aborted,
}

impl Sim {
    pub(super) fn cut(&mut self) {
        self.to_dd.clear();
        self.to_sd.clear();
        self.src(s::Event::PeerLost);
        self.dst(d::Event::SourceLost);
    }

    pub(super) fn deliver_to_source(&mut self) {
        let Some(message) = self.to_sd.pop_front() else { return };
        match message {
            Msg::Accepted => self.src(s::Event::PrepareAccepted),
            Msg::Ready(digest) => self.src(s::Event::ReadyReceived(digest)),
            Msg::Entered => self.src(s::Event::EnteredReceived),
            Msg::Returned => self.src(s::Event::ReturnedReceived),
            Msg::Failed => self.src(s::Event::PeerFailed),
            _ => {}
        }
    }

    pub(super) fn deliver_to_destination(&mut self) {
        let Some(message) = self.to_dd.pop_front() else { return };
        let forced = |m: &Destination| {
            matches!(m.outcome(), Some(d::Outcome::Forced | d::Outcome::ForcedDead | d::Outcome::Superseded))
        };
        if matches!(message, Msg::Go(..)) && self.dd.machine.as_ref().is_none_or(forced) {
            // Nobody is there to whom a stream could be opened: the source asks.
            return self.src(s::Event::PeerLost);
        }
        match message {
            Msg::Prepare if self.dd.machine.is_none() && self.dd.durable.is_none() => {
                self.dd.machine = Some(Destination::new(handover(Dst)));
                self.dst(d::Event::Begin);
            }
            Msg::Prepare => self.to_sd.push_back(Msg::Failed),
            Msg::Go(epoch, digest) => self.dst(d::Event::GoReceived { epoch, digest }),
            Msg::Abort(epoch) => self.dst(d::Event::AbortReceived { epoch }),
            Msg::Released => self.dst(d::Event::ReleasedReceived),
            _ => {}
        }
    }
}
