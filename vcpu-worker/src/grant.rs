//! Who may command a worker and whether its vCPUs may run: fences, grants and the one-way seal.
//!
//! Pure but for [`RunRight`], the atomic snapshot that every vCPU reads at its loop head.
//!
//! ```text
//!   attach(term)            grant(e, seq)              deadline passed
//!   none ──────▶ no right ───────────────▶ right(e) ───────────────────▶ no right (a later grant renews it)
//!                   ▲                          │ seal(s), s ≥ e
//!                   └──────────────────────────┘   from then on grants need epoch > s, for ever
//! ```
//!
//! Invariants: the highest term seen, the sealed epoch and the granted epoch never fall; `(term, seq)` of accepted
//! grants never falls; a sealed epoch is never granted again; a command of another VM, incarnation or a lower term
//! changes nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Why a command or a grant is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// No daemon has attached yet, or this one has not at this term.
    #[error("term {term} is not attached to this worker (attached: {attached}): call Attach first")]
    NotAttached {
        /// Term of the command.
        term: u64,
        /// Term attached; 0 for none.
        attached: u64,
    },
    /// A later daemon has taken over.
    #[error(
        "term {term} is fenced by term {current}: this daemon has been replaced and must not act on this VM"
    )]
    Fenced {
        /// Term of the command.
        term: u64,
        /// Highest term seen.
        current: u64,
    },
    /// Term 0 is no term.
    #[error("term is 0: a daemon's first durable term is 1")]
    NoTerm,
    /// Another VM.
    #[error("this worker belongs to VM {own}, not to {asked}")]
    OtherVm {
        /// Whose it is.
        own: String,
        /// Who was asked for.
        asked: String,
    },
    /// Another incarnation.
    #[error("this worker is incarnation {own}, not {asked}: the command was meant for another one")]
    OtherIncarnation {
        /// What it is.
        own: u64,
        /// What was asked for.
        asked: u64,
    },
    /// Another store.
    #[error("this worker belongs to store {own}, not to {asked}")]
    OtherStore {
        /// Whose it is.
        own: String,
        /// Who asked.
        asked: String,
    },
    /// The epoch is sealed.
    #[error(
        "epoch {epoch} is sealed (sealed up to {sealed}): only a later ownership decision can grant again"
    )]
    Sealed {
        /// Epoch of the grant.
        epoch: u64,
        /// Sealed up to.
        sealed: u64,
    },
    /// The grant is older than one already accepted.
    #[error("grant (epoch {epoch}, term {term}, seq {seq}) is older than the one in force")]
    Stale {
        /// Its epoch.
        epoch: u64,
        /// Its term.
        term: u64,
        /// Its number.
        seq: u64,
    },
    /// The deadline has passed.
    #[error("the right to run ended at boot time {deadline_ns} ns (now {now_ns} ns): renew the grant")]
    Expired {
        /// Deadline.
        deadline_ns: u64,
        /// Now.
        now_ns: u64,
    },
    /// No grant.
    #[error("this worker holds no right to run: grant an epoch above {sealed} first")]
    NoGrant {
        /// Sealed up to.
        sealed: u64,
    },
}

impl Refused {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAttached { .. } => "NOT_ATTACHED",
            Self::Fenced { .. } => "TERM_FENCED",
            Self::NoTerm => "NO_TERM",
            Self::OtherVm { .. } => "OTHER_VM",
            Self::OtherIncarnation { .. } => "OTHER_INCARNATION",
            Self::OtherStore { .. } => "OTHER_STORE",
            Self::Sealed { .. } => "EPOCH_SEALED",
            Self::Stale { .. } => "GRANT_STALE",
            Self::Expired { .. } => "GRANT_EXPIRED",
            Self::NoGrant { .. } => "NO_GRANT",
        }
    }
}

/// Who a worker belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Identity of the daemon's store.
    pub store_id: String,
    /// The VM.
    pub vm_uid: String,
    /// The worker's incarnation.
    pub incarnation: u64,
    /// Highest term seen.
    pub term: u64,
}

/// A right to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Epoch of the ownership record behind it.
    pub epoch: u64,
    /// Term of the daemon that gave it.
    pub term: u64,
    /// Grows with every grant of a term.
    pub seq: u64,
    /// CLOCK_BOOTTIME nanoseconds after which it is void; `None` for never.
    pub deadline_ns: Option<u64>,
}

/// Everything that decides who may do what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rights {
    attached: Option<Attached>,
    grant: Option<Grant>,
    last: Option<Grant>,
    sealed: u64,
}

impl Rights {
    /// Binds the worker, or raises its term.
    pub fn attach(
        &mut self,
        store_id: &str,
        vm_uid: &str,
        incarnation: u64,
        term: u64,
    ) -> Result<(), Refused> {
        if term == 0 {
            return Err(Refused::NoTerm);
        }
        match &mut self.attached {
            Some(own) => {
                if own.vm_uid != vm_uid {
                    return Err(Refused::OtherVm { own: own.vm_uid.clone(), asked: vm_uid.to_owned() });
                }
                if own.store_id != store_id {
                    return Err(Refused::OtherStore {
                        own: own.store_id.clone(),
                        asked: store_id.to_owned(),
                    });
                }
                if own.incarnation != incarnation {
                    return Err(Refused::OtherIncarnation { own: own.incarnation, asked: incarnation });
                }
                if term < own.term {
                    return Err(Refused::Fenced { term, current: own.term });
                }
                own.term = term;
            }
            None => {
                self.attached = Some(Attached {
                    store_id: store_id.to_owned(),
                    vm_uid: vm_uid.to_owned(),
                    incarnation,
                    term,
                });
            }
        }
        Ok(())
    }

    /// Whether a command may act. Changes nothing.
    pub fn check(&self, vm_uid: &str, incarnation: u64, term: u64) -> Result<(), Refused> {
        let Some(own) = &self.attached else {
            return Err(Refused::NotAttached { term, attached: 0 });
        };
        if own.vm_uid != vm_uid {
            return Err(Refused::OtherVm { own: own.vm_uid.clone(), asked: vm_uid.to_owned() });
        }
        if own.incarnation != incarnation {
            return Err(Refused::OtherIncarnation { own: own.incarnation, asked: incarnation });
        }
        if term < own.term {
            return Err(Refused::Fenced { term, current: own.term });
        }
        if term > own.term {
            return Err(Refused::NotAttached { term, attached: own.term });
        }
        Ok(())
    }

    /// Takes a grant. The same grant again is accepted (a repeated message), also with a new deadline.
    pub fn grant(&mut self, grant: Grant, now_ns: u64) -> Result<(), Refused> {
        let Grant { epoch, term, seq, .. } = grant;
        if epoch <= self.sealed {
            return Err(Refused::Sealed { epoch, sealed: self.sealed });
        }
        if let Some(last) = self.last
            && (epoch < last.epoch || (term, seq) < (last.term, last.seq))
        {
            return Err(Refused::Stale { epoch, term, seq });
        }
        if let Some(deadline_ns) = grant.deadline_ns
            && deadline_ns <= now_ns
        {
            return Err(Refused::Expired { deadline_ns, now_ns });
        }
        self.grant = Some(grant);
        self.last = Some(grant);
        Ok(())
    }

    /// Seals an epoch and all below for good; returns up to which epoch it is sealed now.
    pub fn seal(&mut self, epoch: u64) -> u64 {
        self.sealed = self.sealed.max(epoch);
        if self.grant.is_some_and(|g| g.epoch <= self.sealed) {
            self.grant = None;
        }
        self.sealed
    }

    /// Whether vCPUs may enter the guest at this moment.
    pub fn may_run(&self, now_ns: u64) -> Result<(), Refused> {
        let Some(grant) = self.grant else {
            return Err(Refused::NoGrant { sealed: self.sealed });
        };
        match grant.deadline_ns {
            Some(deadline_ns) if deadline_ns <= now_ns => Err(Refused::Expired { deadline_ns, now_ns }),
            _ => Ok(()),
        }
    }

    /// Whom it belongs to.
    pub fn attached(&self) -> Option<&Attached> {
        self.attached.as_ref()
    }

    /// The grant in force, expired or not.
    pub fn current(&self) -> Option<Grant> {
        self.grant
    }

    /// Sealed up to this epoch; 0 for none.
    pub fn sealed(&self) -> u64 {
        self.sealed
    }

    /// The word that [`RunRight`] publishes.
    fn word(&self) -> u64 {
        match self.grant {
            None => RunRight::NONE,
            // A deadline of the two reserved values is moved by at most a nanosecond, to the safe side.
            Some(Grant { deadline_ns: Some(ns), .. }) => ns.clamp(1, RunRight::FOREVER - 1),
            Some(_) => RunRight::FOREVER,
        }
    }
}

/// The right to run as one word, read by vCPUs at the loop head without a lock, and who may make use of it.
#[derive(Debug, Default)]
pub struct RunRight {
    word: AtomicU64,
    threads: TaskTracker,
}

impl RunRight {
    const NONE: u64 = 0;
    const FOREVER: u64 = u64::MAX;

    /// Publishes what `rights` says now. Callers hold the lock of `rights`, so that words appear in order.
    pub fn publish(&self, rights: &Rights) {
        self.word.store(rights.word(), Ordering::SeqCst);
    }

    /// Whether a vCPU may enter the guest. `now_ns` is only asked for if there is a deadline.
    pub fn allows(&self, now_ns: impl FnOnce() -> u64) -> bool {
        match self.word.load(Ordering::SeqCst) {
            Self::NONE => false,
            Self::FOREVER => true,
            deadline => now_ns() < deadline,
        }
    }

    /// A vCPU thread lives for as long as it has this.
    pub fn enter(&self) -> TaskTrackerToken {
        self.threads.token()
    }

    /// Returns once no vCPU thread is left that could use it.
    pub async fn unused(&self) {
        self.threads.close();
        self.threads.wait().await;
    }

    /// CLOCK_BOOTTIME nanoseconds at which the right ends; `None` if there is no right or no end.
    pub fn deadline(&self) -> Option<u64> {
        match self.word.load(Ordering::SeqCst) {
            Self::NONE | Self::FOREVER => None,
            deadline => Some(deadline),
        }
    }
}

#[cfg(test)]
mod tests;
