//! What can go wrong between a client and a host: one type, a stable [`ClientError::reason`] for each case, and the
//! server's `google.rpc` details decoded, so that a caller can act on them and a person is told what to do.

use crate::endpoint::{Endpoint, EndpointError};
use prost::Message as _;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vpmu_proto::google::rpc;

/// Everything that a call can fail with.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The endpoint's text is wrong.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// Nothing answers at the endpoint.
    #[error("cannot connect to {endpoint}: {problem}")]
    Connect {
        /// Where.
        endpoint: Box<Endpoint>,
        /// The operating system's or the protocol's words.
        problem: String,
    },
    /// The server refused the request, or the operation it started has failed.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The answer did not come in time.
    #[error("{what} did not finish within {} s", .waited.as_secs_f64())]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The server's answer lacks something that the API promises.
    #[error("unexpected answer from the server: {what}")]
    Protocol {
        /// What is wrong with it.
        what: String,
    },
}

/// A refusal by the server, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The gRPC code.
    pub code: Code,
    /// The message, for people.
    pub message: String,
    /// `google.rpc.ErrorInfo.reason`: a stable code; empty if the server sent none.
    pub reason: String,
    /// `google.rpc.ErrorInfo.metadata`, sorted by key, without the remedy.
    pub metadata: Vec<(String, String)>,
    /// What was wrong with each field (`google.rpc.BadRequest`) or precondition (`google.rpc.PreconditionFailure`).
    pub violations: Vec<Violation>,
    /// What to do about it, where the server says so.
    pub remedy: Option<String>,
    /// After this long a retry may succeed (`google.rpc.RetryInfo`).
    pub retry_after: Option<Duration>,
}

/// One field or precondition that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The field's path, or the precondition's type and subject.
    pub field: String,
    /// What is wrong, with the value.
    pub description: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.message.is_empty() { code_name(self.code) } else { &self.message })
    }
}

impl ClientError {
    /// Stable code of the failure: the server's own reason where it sent one.
    pub fn reason(&self) -> &str {
        match self {
            Self::Endpoint(error) => error.reason(),
            Self::Connect { .. } => "CONNECT_FAILED",
            Self::Refused(refusal) if refusal.reason.is_empty() => code_name(refusal.code),
            Self::Refused(refusal) => &refusal.reason,
            Self::Deadline { .. } => "DEADLINE_EXCEEDED",
            Self::Protocol { .. } => "UNEXPECTED_ANSWER",
        }
    }

    /// The gRPC code that says the same.
    pub fn code(&self) -> Code {
        match self {
            Self::Endpoint(_) => Code::InvalidArgument,
            Self::Connect { .. } => Code::Unavailable,
            Self::Refused(refusal) => refusal.code,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Protocol { .. } => Code::Internal,
        }
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Endpoint(_) | Self::Protocol { .. } => None,
            Self::Connect { endpoint, .. } => Some(format!(
                "check that vpmud serves there: vpmud serve --state-dir DIR --listen {endpoint}"
            )),
            Self::Refused(refusal) => refusal.remedy.clone(),
            Self::Deadline { .. } => {
                Some("the work may still go on: see `vpmuctl operation list`".to_owned())
            }
        }
    }

    /// The decoded refusal, if the server sent one.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Builds the error of a failed operation from its `google.rpc.Status`.
    pub fn from_operation(status: &rpc::Status) -> Self {
        let details = status.encode_to_vec().into();
        Status::with_details(Code::from_i32(status.code), status.message.clone(), details).into()
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(Refusal::decode(&status)))
    }
}

impl Refusal {
    /// The refusal of something that does not exist, where the client itself finds out.
    pub fn not_found(message: String) -> Self {
        Self::decode(&Status::not_found(message))
    }

    /// Decodes a status and its details; details that do not decode are left out, the message never is.
    pub fn decode(status: &Status) -> Self {
        let details = status.get_error_details();
        let mut refusal = Self {
            code: status.code(),
            message: status.message().to_owned(),
            reason: String::new(),
            metadata: Vec::new(),
            violations: Vec::new(),
            remedy: None,
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
        };
        if let Some(info) = details.error_info() {
            refusal.reason.clone_from(&info.reason);
            for (key, value) in &info.metadata {
                if key == "remedy" {
                    refusal.remedy = Some(value.clone());
                } else {
                    refusal.metadata.push((key.clone(), value.clone()));
                }
            }
            refusal.metadata.sort();
        }
        if let Some(bad) = details.bad_request() {
            refusal.violations.extend(
                bad.field_violations
                    .iter()
                    .map(|v| Violation { field: v.field.clone(), description: v.description.clone() }),
            );
        }
        if let Some(failed) = details.precondition_failure() {
            refusal.violations.extend(failed.violations.iter().map(|v| Violation {
                field: format!("{} {}", v.r#type, v.subject).trim().to_owned(),
                description: v.description.clone(),
            }));
        }
        if let Some(quota) = details.quota_failure() {
            refusal.violations.extend(
                quota
                    .violations
                    .iter()
                    .map(|v| Violation { field: v.subject.clone(), description: v.description.clone() }),
            );
        }
        if refusal.remedy.is_none() {
            refusal.remedy = details
                .help()
                .and_then(|help| help.links.first().map(|link| link.description.clone()))
                .or_else(|| details.localized_message().map(|message| message.message.clone()))
                .filter(|text| !text.is_empty());
        }
        refusal
    }
}

/// The code's name as the gRPC documentation writes it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tonic_types::ErrorDetails;

    #[test]
    fn details_are_decoded() {
        let mut details = ErrorDetails::with_error_info(
            "VCPUS_OUT_OF_RANGE",
            "vpmud",
            HashMap::from([
                ("value".to_owned(), "10000".to_owned()),
                ("remedy".to_owned(), "ask for 1 to 256".to_owned()),
            ]),
        );
        details.add_bad_request_violation("virtual_machine.spec.vcpus", "10000 is not in 1..=256");
        let error: ClientError =
            Status::with_error_details(Code::InvalidArgument, "vcpus is out of range", details).into();
        assert_eq!(error.reason(), "VCPUS_OUT_OF_RANGE");
        assert_eq!(error.code(), Code::InvalidArgument);
        assert_eq!(error.remedy().as_deref(), Some("ask for 1 to 256"));
        let refusal = error.refusal().expect("a refusal");
        assert_eq!(refusal.violations[0].field, "virtual_machine.spec.vcpus");
        assert_eq!(refusal.metadata, [("value".to_owned(), "10000".to_owned())]);
    }

    #[test]
    fn an_operations_status_decodes_like_a_calls() {
        let mut details = ErrorDetails::with_error_info("NO_CORES", "vpmud", HashMap::new());
        details.set_help(vec![tonic_types::HelpLink::new("stop another machine", "")]);
        let status = Status::with_error_details(Code::ResourceExhausted, "no cores", details);
        let status = rpc::Status::decode(status.details()).expect("tonic packs a google.rpc.Status");
        let error = ClientError::from_operation(&status);
        assert_eq!((error.reason(), error.code()), ("NO_CORES", Code::ResourceExhausted));
        assert_eq!(error.remedy().as_deref(), Some("stop another machine"));
        assert_eq!(error.to_string(), "no cores");
    }

    #[test]
    fn a_bare_status_still_has_a_reason() {
        let error = ClientError::from(Status::unavailable("gone"));
        assert_eq!(error.reason(), "UNAVAILABLE");
        assert!(error.remedy().is_none());
    }

    #[test]
    fn garbage_details_are_left_out() {
        let error =
            ClientError::from(Status::with_details(Code::Internal, "m", vec![0xff, 0xff, 0xff].into()));
        assert_eq!((error.reason(), error.to_string().as_str()), ("INTERNAL", "m"));
    }
}
