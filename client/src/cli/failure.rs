//! What a command can fail with, and how it is told: in words with the remedy, or as JSON.

use super::Output;
use serde_json::json;
use std::io;
use std::process::ExitCode;
use vpmu_client::ClientError;
use vpmu_client::view::ErrorView;

/// Refused or failed.
const FAILED: u8 = 1;
/// Wrong usage.
const USAGE: u8 = 2;

/// Everything that ends a command early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The host refused, failed or did not answer.
    Client(ClientError),
    /// The command line does not make sense, found after parsing.
    Usage(String),
    /// Something on this side: the terminal, standard output.
    Io(io::Error),
}

impl Failure {
    /// A usage failure with this message.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reports a failure on standard error and gives the exit code.
pub(crate) fn report(failure: &Failure, output: Output) -> ExitCode {
    match failure {
        // The reader of our output has seen enough (`| head`): not an error.
        Failure::Io(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Failure::Io(error) => {
            local(output, "IO", &error.to_string());
            ExitCode::from(FAILED)
        }
        Failure::Usage(message) => {
            local(output, "USAGE", message);
            ExitCode::from(USAGE)
        }
        Failure::Client(error) => {
            let view = ErrorView::from(error);
            if output == Output::Json {
                eprintln!("{}", json!({ "error": view }));
            } else {
                eprintln!("error: {} [{}]", view.message, view.reason);
                // A violation whose words are in the message already would only say it twice.
                let more = |text: &str| !view.message.contains(text);
                for violation in view.violations.iter().filter(|violation| more(&violation.description)) {
                    eprintln!("  {}: {}", violation.field, violation.description);
                }
                if let Some(remedy) = &view.remedy {
                    eprintln!("  try: {remedy}");
                }
            }
            ExitCode::from(FAILED)
        }
    }
}

/// Reports what clap found; help and version are no errors and go to standard output.
pub(crate) fn report_usage(error: &clap::Error) -> ExitCode {
    let wants_json = error.use_stderr() && json_was_asked(std::env::args());
    if wants_json {
        local(Output::Json, "USAGE", error.to_string().trim());
    } else {
        // Nothing can be done about a closed standard error.
        let _ = error.print();
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE))
}

/// Whether a command line that did not parse asks for JSON.
fn json_was_asked(args: impl Iterator<Item = String>) -> bool {
    let mut previous = String::new();
    for arg in args {
        if arg == "--output=json" || (previous == "--output" && arg == "json") {
            return true;
        }
        previous = arg;
    }
    false
}

fn local(output: Output, reason: &str, message: &str) {
    if output == Output::Json {
        let code = if reason == "USAGE" { "INVALID_ARGUMENT" } else { "UNKNOWN" };
        eprintln!("{}", json!({ "error": { "code": code, "reason": reason, "message": message } }));
    } else {
        eprintln!("error: {message}");
        if reason == "USAGE" {
            eprintln!("  try: vpmuctl --help");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_found_in_any_place() {
        let asked = |line: &str| json_was_asked(line.split(' ').map(str::to_owned));
        assert!(asked("vpmuctl --output json vm"));
        assert!(asked("vpmuctl vm --output=json"));
        assert!(!asked("vpmuctl vm create json --output table"));
    }
}
