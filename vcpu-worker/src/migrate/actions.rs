//! What a migration did and why, for people and for the history: bounded, and the same thing again replaces itself.

use std::time::Instant;

use vpmu_proto::api::MigrationAction;

/// Most entries; the first ones and the newest stay.
const MOST: usize = 64;

/// See the module.
pub(super) struct Actions {
    begin: Instant,
    list: Vec<MigrationAction>,
}

impl Actions {
    pub(super) fn new() -> Self {
        Self { begin: Instant::now(), list: Vec::new() }
    }

    /// Notes something; a repetition of the last code only brings its text up to date.
    pub(super) fn note(&mut self, code: &str, detail: String) {
        let at_us = super::incoming::micros(self.begin.elapsed());
        let action = MigrationAction { at_us, code: code.to_owned(), detail };
        match self.list.last_mut() {
            Some(last) if last.code == code && code != "THROTTLE" => *last = action,
            _ => {
                if self.list.len() == MOST {
                    self.list.remove(MOST / 2);
                }
                self.list.push(action);
            }
        }
    }

    pub(super) fn list(&self) -> Vec<MigrationAction> {
        self.list.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_replace_and_the_list_is_bounded() {
        let mut actions = Actions::new();
        actions.note("NEXT_ROUND", "1".to_owned());
        actions.note("NEXT_ROUND", "2".to_owned());
        assert_eq!(actions.list().iter().map(|a| a.detail.as_str()).collect::<Vec<_>>(), ["2"]);
        for n in 0..1000 {
            actions.note("THROTTLE", n.to_string());
        }
        let list = actions.list();
        assert_eq!(list.len(), MOST);
        assert_eq!((list[0].detail.as_str(), list[MOST - 1].detail.as_str()), ("2", "999"));
    }
}
