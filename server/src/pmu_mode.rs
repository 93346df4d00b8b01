//! Which PMU back end a host gets: what was asked for against what the host check finds. [`choose`] is pure; [`look`] gathers.
//!
//! Auto takes the first that can be used of `kvm` (the kernel counts, Linux guests can use RDPMC), `msr` (the processor's
//! counters, on cores prepared for it) and `model` (always), and notes why the others are not it.

use pmu::Shape;
use pmu::host_check::{Facts, Level, Mode, report};
use vcpu_worker::host::HostFacts;

use crate::config::{ConfigError, PmuMode};

/// The back end, and the PMU that guests can get of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// "model", "msr" or "kvm".
    pub mode: &'static str,
    /// The host's PMU, or its model.
    pub shape: Shape,
    /// Why this one, and why not the others; one line each.
    pub notes: Vec<String>,
}

/// What each back end would offer, or why it cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offers {
    /// KVM's own vPMU.
    pub kvm: Result<Shape, String>,
    /// The processor's, through the msr driver.
    pub msr: Result<Shape, String>,
    /// The software PMU.
    pub model: Shape,
}

/// Asks the host. `with_kvm`: guests run on KVM. Opens files; blocks.
pub fn look(host: &HostFacts, model: Shape, with_kvm: bool) -> Offers {
    let facts = vcpu_worker::host::pmu::facts(host, Some(model));
    let errors = |mode| -> Result<(), String> {
        let lines = report(&facts, mode);
        let bad = lines.iter().filter(|line| line.level == Level::Error);
        let bad: Vec<String> = bad.map(|line| format!("{} ({})", line.message, line.remedy)).collect();
        if bad.is_empty() { Ok(()) } else { Err(bad.join("; ")) }
    };
    let kvm = if with_kvm {
        // The more particular refusal first.
        vcpu_worker::kvm_pmu::detect::detect(host, &facts)
            .map_err(|e| e.to_string())
            .and_then(|found| errors(Mode::Kvm).map(|()| found.shape))
    } else {
        Err("guests do not run on KVM here".to_owned())
    };
    Offers { kvm, msr: errors(Mode::Msr).and_then(|()| own_shape(&facts)), model }
}

fn own_shape(facts: &Facts) -> Result<Shape, String> {
    match &facts.pmu {
        Some(Ok(found)) => Ok(found.shape),
        Some(Err(problem)) => Err(problem.clone()),
        None => Err("the host's PMU was not probed".to_owned()),
    }
}

/// Decides.
pub fn choose(asked: PmuMode, offers: &Offers) -> Result<Chosen, ConfigError> {
    let of = |mode: &'static str, shape: Shape, notes| Ok(Chosen { mode, shape, notes });
    let cannot = |mode, why: &String| Err(ConfigError::PmuMode { mode, why: why.clone() });
    let why = |mode: &str, offer: &Result<Shape, String>| match offer {
        Ok(shape) => format!("{mode}: offers {shape}; vpmud serve --pmu {mode} uses it"),
        Err(why) => format!("{mode}: {why}"),
    };
    let others = || vec![why("kvm", &offers.kvm), why("msr", &offers.msr)];
    match asked {
        PmuMode::Model => of("model", offers.model, others()),
        PmuMode::Kvm => match &offers.kvm {
            Ok(shape) => of("kvm", *shape, vec![why("msr", &offers.msr)]),
            Err(why) => cannot("kvm", why),
        },
        PmuMode::Msr => match &offers.msr {
            Ok(shape) => of("msr", *shape, vec![why("kvm", &offers.kvm)]),
            Err(why) => cannot("msr", why),
        },
        PmuMode::Auto => {
            let (mode, shape, not) = match (&offers.kvm, &offers.msr) {
                (Ok(shape), _) => ("kvm", *shape, Vec::new()),
                (Err(no), Ok(shape)) => ("msr", *shape, vec![format!("kvm: {no}")]),
                (Err(_), Err(_)) => ("model", offers.model, others()),
            };
            let mut notes = vec![format!("auto chose {mode}, the best that this host has")];
            notes.extend(not);
            of(mode, shape, notes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(text: &str) -> Shape {
        text.parse().expect("a shape")
    }

    fn offers(kvm: bool, msr: bool) -> Offers {
        let offer = |there, text: &str, why: &str| if there { Ok(shape(text)) } else { Err(why.to_owned()) };
        Offers {
            kvm: offer(kvm, "intel:v2:4+3:48", "kvm.enable_pmu is N"),
            msr: offer(msr, "intel:v4:8+3:48", "the NMI watchdog holds one counter of every core"),
            model: shape("intel:v5:8+4:48"),
        }
    }

    #[test]
    fn auto_takes_the_best_and_says_why_not_the_others() {
        let chosen = |kvm, msr| choose(PmuMode::Auto, &offers(kvm, msr)).expect("something always can");
        let best = chosen(true, true);
        assert_eq!((best.mode, best.shape.to_string().as_str()), ("kvm", "intel:v2:4+3:48"));
        let next = chosen(false, true);
        assert_eq!((next.mode, next.shape.to_string().as_str()), ("msr", "intel:v4:8+3:48"));
        assert!(next.notes.iter().any(|n| n.contains("enable_pmu is N")), "{:?}", next.notes);
        let last = chosen(false, false);
        assert_eq!((last.mode, last.shape.to_string().as_str()), ("model", "intel:v5:8+4:48"));
        assert!(
            last.notes.len() == 3 && last.notes[2].starts_with("msr: the NMI watchdog"),
            "{:?}",
            last.notes
        );
    }

    #[test]
    fn what_was_asked_for_is_had_or_refused_by_name() {
        for (asked, mode) in [(PmuMode::Kvm, "kvm"), (PmuMode::Msr, "msr"), (PmuMode::Model, "model")] {
            assert_eq!(choose(asked, &offers(true, true)).expect("there").mode, mode);
        }
        for asked in [PmuMode::Kvm, PmuMode::Msr] {
            let error = choose(asked, &offers(false, false)).expect_err("not there");
            assert_eq!(error.reason(), "PMU_MODE_UNAVAILABLE");
            assert!(
                error.to_string().contains(if asked == PmuMode::Kvm { "enable_pmu" } else { "watchdog" }),
                "{error}"
            );
        }
        assert_eq!(choose(PmuMode::Model, &offers(false, false)).expect("always").mode, "model");
    }

    #[test]
    fn this_host_offers_what_its_host_check_says() {
        let host = vcpu_worker::host::probe();
        let offers = look(&host, shape("intel:v5:8+4:48"), host.kvm.is_ok());
        let facts = vcpu_worker::host::pmu::facts(&host, None);
        let fine = |mode| report(&facts, mode).iter().all(|line| line.level != Level::Error);
        assert_eq!(offers.msr.is_ok(), fine(Mode::Msr), "{offers:?}");
        assert!(offers.kvm.is_err() || fine(Mode::Kvm), "{offers:?}");
        assert!(look(&host, shape("intel:v5:8+4:48"), false).kvm.is_err());
    }
}
