//! `vpmud host check`: what this host can do for guests' PMUs, one line a fact, each with its remedy.

use std::fmt::Write as _;
use std::process::ExitCode;

use pmu::host_check::{Level, Line, Mode, report};

use crate::config::PmuMode;
use crate::output::Output;
use crate::sharing::{self, Trial};

/// Options of `vpmud host check`.
#[derive(Debug, clap::Args)]
pub struct HostCheckArgs {
    /// The PMU mode that the host is judged for; auto is the one that `serve` would choose.
    #[arg(long, value_enum, default_value = "auto")]
    pmu: PmuMode,
    /// The modelled host PMU.
    #[arg(long, value_name = "SHAPE", default_value = "intel:v5:8+4:48")]
    model_pmu: String,
    /// Text for people, JSON for programs.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Runs the check. Exit codes: 0 no error, 1 some line is an error, 2 wrong usage.
pub fn main(args: &HostCheckArgs) -> ExitCode {
    let model: pmu::Shape = match args.model_pmu.parse() {
        Ok(shape) => shape,
        Err(error) => {
            eprintln!("vpmud: --model-pmu: {error}");
            return ExitCode::from(2);
        }
    };
    let host = vcpu_worker::host::probe();
    let mode = match args.pmu {
        PmuMode::Auto => {
            let offers = crate::pmu_mode::look(&host, model, host.kvm.is_ok());
            match crate::pmu_mode::choose(PmuMode::Auto, &offers).map_or("model", |chosen| chosen.mode) {
                "kvm" => Mode::Kvm,
                "msr" => Mode::Msr,
                _ => Mode::Model,
            }
        }
        PmuMode::Model => Mode::Model,
        PmuMode::Msr => Mode::Msr,
        PmuMode::Kvm => Mode::Kvm,
    };
    let facts = vcpu_worker::host::pmu::facts(&host, Some(model));
    let mut lines = report(&facts, mode);
    lines.push(topology_line(&vcpu_worker::host::Topology::of_this_host()));
    lines.push(sharing_line(sharing::by_session().then(|| sharing::try_it(&host.allowed_cores))));
    match args.output {
        Output::Text => print!("{}", text(&lines)),
        Output::Json => println!("{}", json(&lines, mode)),
    }
    if lines.iter().any(|line| line.level == Level::Error) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What machines can be placed on.
fn topology_line(topology: &vcpu_worker::host::Topology) -> Line {
    let isolated = topology.isolated().count();
    let advice = if isolated == 0 {
        "; dedicated cores would still be used by other programs of the host: isolcpus keeps them off"
    } else {
        ""
    };
    let message = format!("{}{advice}", topology.summary());
    Line { id: "topology", level: Level::Ok, message, remedy: String::new(), patches: &[] }
}

/// Whether sessions get their shares of a core; `trial` is what was seen, none where processors are not shared by session.
fn sharing_line(trial: Option<Result<Trial, String>>) -> Line {
    let line = |level, message, remedy: &str| Line {
        id: "session_shares",
        level,
        message,
        remedy: remedy.to_owned(),
        patches: &[],
    };
    match trial {
        None => line(Level::Ok, "the processors are not shared by session".to_owned(), ""),
        Some(Err(problem)) => {
            let message =
                format!("the processors are shared by session, whether fairly is not known: {problem}");
            line(Level::Warning, message, "look for a daemon that says in its log that it was held up")
        }
        Some(Ok(trial)) if trial.is_fair() => {
            let message =
                format!("sessions share a core fairly: one that computes got {:.1} %", trial.percent());
            line(Level::Ok, message, "")
        }
        Some(Ok(trial)) => {
            let message = format!(
                "the kernel lets a session starve another: of a core that two wanted, one that computes got {:.1} %, one \
                 whose threads take turns, as guests on one core do, the rest (a fault of Linux from 6.13 on, 6d71a9c61604)",
                trial.percent()
            );
            line(Level::Warning, message, sharing::REMEDY)
        }
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Error => "error",
    }
}

fn text(lines: &[Line]) -> String {
    let mut out = String::new();
    for line in lines {
        let _ = writeln!(out, "{:<8} {:<22} {}", level(line.level), line.id, line.message);
        if !line.remedy.is_empty() {
            let _ = writeln!(out, "{:<8} {:<22} remedy: {}", "", "", line.remedy);
        }
    }
    out
}

fn json(lines: &[Line], mode: Mode) -> serde_json::Value {
    let mode = match mode {
        Mode::Model => "model",
        Mode::Msr => "msr",
        Mode::Kvm => "kvm",
    };
    let lines: Vec<_> = lines
        .iter()
        .map(|l| {
            serde_json::json!({
                "id": l.id, "level": level(l.level), "message": l.message, "remedy": l.remedy, "patches": l.patches,
            })
        })
        .collect();
    serde_json::json!({ "mode": mode, "lines": lines })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<Line> {
        vec![
            Line {
                id: "kvm",
                level: Level::Ok,
                message: "KVM works".into(),
                remedy: String::new(),
                patches: &[],
            },
            Line {
                id: "nmi_watchdog",
                level: Level::Error,
                message: "it is on".into(),
                remedy: "switch it off".into(),
                patches: &[3],
            },
        ]
    }

    #[test]
    fn people_read_one_line_a_fact_and_its_remedy() {
        let shown = text(&lines());
        assert_eq!(shown.lines().count(), 3);
        assert!(
            shown.starts_with("ok       kvm")
                && shown.contains("error    nmi_watchdog")
                && shown.contains("remedy: switch it off")
        );
    }

    #[test]
    fn the_topology_is_one_line() {
        let line = topology_line(&vcpu_worker::host::Topology::plain(4));
        assert_eq!((line.id, line.level), ("topology", Level::Ok));
        assert!(
            line.message
                .starts_with("1 package, 1 NUMA node, 1 last-level cache, 4 cores, 4 threads; dedicated"),
            "{}",
            line.message
        );
    }

    #[test]
    fn how_sessions_share_is_one_line() {
        assert_eq!(sharing_line(None).level, Level::Ok);
        let fair = sharing_line(Some(Ok(Trial { computing: 480, turns: 520 })));
        assert!(fair.level == Level::Ok && fair.message.contains("48.0 %"), "{}", fair.message);
        let unfair = sharing_line(Some(Ok(Trial { computing: 4, turns: 996 })));
        assert!(unfair.level == Level::Warning && unfair.message.contains("got 0.4 %"), "{}", unfair.message);
        assert!(unfair.remedy.contains("kernel.sched_autogroup_enabled=0"));
        let unknown = sharing_line(Some(Err("it takes two processors to try".to_owned())));
        assert!(unknown.level == Level::Warning && unknown.message.contains("two processors"));
    }

    #[test]
    fn programs_read_json() {
        let shown = json(&lines(), Mode::Msr);
        assert_eq!(shown["mode"], "msr");
        assert_eq!(shown["lines"][1]["level"], "error");
        assert_eq!(shown["lines"][1]["patches"][0], 3);
    }
}
