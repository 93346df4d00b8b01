//! Names of the points of a handover at which a process can be held or killed: before and after each durable write,
//! message, seal and grant. `--hold-at before:source-persist-handed-over` makes a process print one JSON line and stop
//! itself there; the kill matrix walks through all of them.

use super::{destination, source};
use std::fmt;
use std::str::FromStr;
use vpmu_proto::store::ownership_record::Phase;

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// One step of a handover.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum HandoverStep {
            $($(#[$doc])* $name,)*
        }

        impl HandoverStep {
            /// All steps, the source's first.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name on the command line.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

steps! {
    /// The source journals Open.
    SourcePersistOpen = "source-persist-open",
    /// The source asks the destination to prepare.
    SourceSendPrepare = "source-send-prepare",
    /// The source's worker begins to copy.
    SourceStartCopy = "source-start-copy",
    /// The source journals Quiesced.
    SourcePersistQuiesced = "source-persist-quiesced",
    /// The source's worker pauses, is sealed and sends the rest.
    SourceSeal = "source-seal",
    /// The source stores the PMU state at the stop.
    SourcePersistPmu = "source-persist-pmu",
    /// The source journals HandedOver: the decision.
    SourcePersistHandedOver = "source-persist-handed-over",
    /// The source sends Go.
    SourceSendGo = "source-send-go",
    /// The source ends its worker.
    SourceRelease = "source-release",
    /// The source journals Released.
    SourcePersistReleased = "source-persist-released",
    /// The source sends Released.
    SourceSendReleased = "source-send-released",
    /// The source journals Owned: an abort or a return.
    SourcePersistOwned = "source-persist-owned",
    /// The source sends Abort.
    SourceSendAbort = "source-send-abort",
    /// The source's worker gets a grant.
    SourceGrant = "source-grant",
    /// The destination journals Incoming.
    DestinationPersistIncoming = "destination-persist-incoming",
    /// The destination starts its worker and answers Prepare.
    DestinationStartWorker = "destination-start-worker",
    /// The destination sends Ready.
    DestinationSendReady = "destination-send-ready",
    /// The destination journals Entered.
    DestinationPersistEntered = "destination-persist-entered",
    /// The destination's worker gets its grant.
    DestinationGrant = "destination-grant",
    /// The destination sends Entered.
    DestinationSendEntered = "destination-send-entered",
    /// The destination's worker is sealed, to give the machine back.
    DestinationSeal = "destination-seal",
    /// The destination journals Returned.
    DestinationPersistReturned = "destination-persist-returned",
    /// The destination sends Returned.
    DestinationSendReturned = "destination-send-returned",
    /// The destination journals Aborted.
    DestinationPersistAborted = "destination-persist-aborted",
    /// The destination journals Owned.
    DestinationPersistOwned = "destination-persist-owned",
}

impl HandoverStep {
    /// The step that an effect of the source is.
    pub fn of_source(effect: &source::Effect) -> Option<Self> {
        use source::Effect as E;
        Some(match effect {
            E::Persist(record) => match record.phase() {
                Phase::Open => Self::SourcePersistOpen,
                Phase::Quiesced => Self::SourcePersistQuiesced,
                Phase::HandedOver => Self::SourcePersistHandedOver,
                Phase::Released => Self::SourcePersistReleased,
                Phase::Owned => Self::SourcePersistOwned,
                _ => return None,
            },
            E::Prepare => Self::SourceSendPrepare,
            E::StartCopy => Self::SourceStartCopy,
            E::FinishCopy { .. } | E::SealWorker { .. } => Self::SourceSeal,
            E::PersistPmu => Self::SourcePersistPmu,
            E::SendGo { .. } => Self::SourceSendGo,
            E::SendAbort { .. } => Self::SourceSendAbort,
            E::SendReleased { .. } => Self::SourceSendReleased,
            E::Grant { .. } => Self::SourceGrant,
            E::EndWorker => Self::SourceRelease,
            E::AskPeer | E::CancelCopy | E::RefuseCancel | E::Done(_) => return None,
        })
    }

    /// The step that an effect of the destination is.
    pub fn of_destination(effect: &destination::Effect) -> Option<Self> {
        use destination::Effect as E;
        Some(match effect {
            E::Persist(record) => match record.phase() {
                Phase::Incoming => Self::DestinationPersistIncoming,
                Phase::Entered => Self::DestinationPersistEntered,
                Phase::Returned => Self::DestinationPersistReturned,
                Phase::Aborted => Self::DestinationPersistAborted,
                Phase::Owned => Self::DestinationPersistOwned,
                _ => return None,
            },
            E::StartWorker => Self::DestinationStartWorker,
            E::SendReady { .. } => Self::DestinationSendReady,
            E::SendEntered { .. } => Self::DestinationSendEntered,
            E::SendReturned { .. } => Self::DestinationSendReturned,
            E::Grant { .. } => Self::DestinationGrant,
            E::SealWorker { .. } => Self::DestinationSeal,
            E::SendFailed | E::SendAborted { .. } | E::AskSource | E::EndWorker | E::Done(_) => return None,
        })
    }
}

/// Before or after a step is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HoldPoint {
    /// After the step, else before it.
    pub after: bool,
    /// The step.
    pub step: HandoverStep,
}

impl fmt::Display for HoldPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", if self.after { "after" } else { "before" }, self.step.name())
    }
}

impl FromStr for HoldPoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            let names: Vec<_> = HandoverStep::ALL.iter().map(|s| s.name()).collect();
            format!(
                "{text:?} is no hold point; use before:STEP or after:STEP with one of {}",
                names.join(", ")
            )
        };
        let (side, name) = text.split_once(':').ok_or_else(bad)?;
        let after = match side {
            "before" => false,
            "after" => true,
            _ => return Err(bad()),
        };
        let step = HandoverStep::ALL.iter().copied().find(|s| s.name() == name).ok_or_else(bad)?;
        Ok(Self { after, step })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_has_a_name_of_its_own() {
        for &step in HandoverStep::ALL {
            for after in [false, true] {
                let point = HoldPoint { after, step };
                assert_eq!(point.to_string().parse(), Ok(point));
            }
        }
        assert!(
            "before:nothing".parse::<HoldPoint>().is_err() && "source-seal".parse::<HoldPoint>().is_err()
        );
    }
}
