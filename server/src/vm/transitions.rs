//! The one table of legal life-cycle transitions; pure.
//!
//! ```text
//! Creating -> Stopped -> Starting -> Running <-> Paused
//!                ^                     |  \        |
//!                |                     |   `-> MigratingOut -> Moved
//!                +------ Stopping <----+-----------+   |  ^       |
//!                |                                     |  |       v
//!              Failed <--------------------------------+  +-- Incoming -> Running | Paused
//! ```
//! Invariant: an action that is not in the table is refused and changes nothing.

use vpmu_proto::api::virtual_machine::State;

use crate::status::ApiError;

/// What a user, the guest or a migration wants to do with a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Pause it.
    Pause,
    /// Resume it.
    Resume,
    /// Delete it.
    Delete,
    /// Give its vCPUs other cores.
    Place,
    /// Move it away.
    Migrate,
    /// Let a copy arrive under this name and uid.
    Receive,
    /// Write it to a file.
    Snapshot,
}

impl Action {
    /// Every action.
    pub const ALL: [Self; 9] = [
        Self::Start,
        Self::Stop,
        Self::Pause,
        Self::Resume,
        Self::Delete,
        Self::Place,
        Self::Migrate,
        Self::Receive,
        Self::Snapshot,
    ];

    /// The verb, for messages.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
            Self::Place => "place",
            Self::Migrate => "migrate",
            Self::Receive => "receive",
            Self::Snapshot => "snapshot",
        }
    }
}

/// What the table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on, through this state.
    Via(State),
    /// An open migration must be aborted first; then ask again.
    AfterAbort,
    /// Not in this state.
    Illegal,
}

/// The table.
#[expect(clippy::match_same_arms, reason = "one row an action")]
pub fn verdict(state: State, action: Action) -> Verdict {
    use Action as A;
    use State as S;
    match (state, action) {
        (S::Stopped | S::Failed, A::Start) => Verdict::Via(S::Starting),
        (S::Running | S::Paused | S::Failed, A::Stop) => Verdict::Via(S::Stopping),
        (S::Running, A::Pause) => Verdict::Via(S::Paused),
        (S::Paused, A::Resume) => Verdict::Via(S::Running),
        (S::Stopped | S::Failed | S::Running | S::Paused | S::Moved, A::Delete) => Verdict::Via(S::Stopping),
        (S::Stopped | S::Failed | S::Running | S::Paused, A::Place) => Verdict::Via(state),
        (S::Running | S::Paused, A::Migrate) => Verdict::Via(S::MigratingOut),
        // It is what it was afterwards.
        (S::Running | S::Paused, A::Snapshot) => Verdict::Via(state),
        (S::Moved, A::Receive) => Verdict::Via(S::Incoming),
        (S::MigratingOut, A::Stop | A::Delete) => Verdict::AfterAbort,
        _ => Verdict::Illegal,
    }
}

/// The refusal of an action that is not legal, with what is.
pub fn refusal(name: &str, state: State, action: Action, moved_to: &str) -> ApiError {
    let legal: Vec<&str> = Action::ALL
        .into_iter()
        .filter(|a| *a != Action::Receive && verdict(state, *a) != Verdict::Illegal)
        .map(Action::verb)
        .collect();
    let shown = state_name(state);
    if state == State::MigratingOut && action == Action::Migrate {
        return ApiError::aborted(
            "MIGRATION_IN_PROGRESS",
            name,
            format!(
                "{name} is being migrated already; watch that migration or cancel it before you start another"
            ),
        );
    }
    let remedy = match state {
        State::Moved => format!("it went to host {moved_to}; ask there"),
        _ if legal.is_empty() => "wait until this ends".to_owned(),
        _ => format!("what it can do now: {}", legal.join(", ")),
    };
    let verb = action.verb();
    ApiError::precondition(
        "ILLEGAL_TRANSITION",
        name,
        format!("cannot {verb} {name}: it is {shown}; {remedy}"),
    )
    .with("state", shown)
    .with("action", verb)
}

/// The state's name as the API spells it.
pub fn state_name(state: State) -> &'static str {
    state.as_str_name()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 11] = [
        State::Unspecified,
        State::Creating,
        State::Stopped,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopping,
        State::MigratingOut,
        State::Incoming,
        State::Failed,
        State::Moved,
    ];

    #[test]
    fn a_stopped_machine_can_only_start_or_go() {
        let legal: Vec<_> =
            Action::ALL.into_iter().filter(|a| verdict(State::Stopped, *a) != Verdict::Illegal).collect();
        assert_eq!(legal, [Action::Start, Action::Delete, Action::Place]);
        let error = refusal("projects/default/virtualMachines/a", State::Stopped, Action::Resume, "");
        assert_eq!(error.reason(), "ILLEGAL_TRANSITION");
        assert!(error.message().contains("start, delete"), "{}", error.message());
    }

    #[test]
    fn states_in_passing_admit_no_action() {
        for state in [State::Unspecified, State::Creating, State::Starting, State::Stopping, State::Incoming]
        {
            for action in Action::ALL {
                assert_eq!(verdict(state, action), Verdict::Illegal, "{state:?} {action:?}");
            }
        }
    }

    #[test]
    fn only_running_machines_pause_and_only_paused_ones_resume() {
        for state in STATES {
            assert_eq!(verdict(state, Action::Pause) != Verdict::Illegal, state == State::Running);
            assert_eq!(verdict(state, Action::Resume) != Verdict::Illegal, state == State::Paused);
        }
        assert_eq!(verdict(State::MigratingOut, Action::Stop), Verdict::AfterAbort);
    }
}
