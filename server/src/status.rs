//! Typed API errors: every error that leaves this daemon is an [`ApiError`].
//!
//! Invariants: it carries a stable `reason` code (google.rpc.ErrorInfo, domain "vpmud"), a message that names the
//! field or resource, the value and the remedy, and, by kind, a BadRequest field violation, a PreconditionFailure or
//! a ResourceInfo. Values that came from outside are clipped, so that an error always fits a response header.

use std::collections::HashMap;
use std::fmt::Write as _;

use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use vpmu_proto::google::rpc;

/// The `domain` of every ErrorInfo.
pub const DOMAIN: &str = "vpmud";

/// Longest message in bytes; the details repeat parts of it and all must fit the header list of common clients (8 KiB).
const MAX_MESSAGE: usize = 1024;

/// A refusal or failure as the caller sees it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", inner.message)]
pub struct ApiError {
    // Boxed: results stay small.
    inner: Box<Inner>,
}

#[derive(Debug, Clone)]
struct Inner {
    code: Code,
    reason: String,
    message: String,
    metadata: HashMap<String, String>,
    field: Option<(String, String)>,
    precondition: Option<String>,
    resource: Option<(String, String)>,
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "callers give what they have: numbers, strings, references"
)]
impl ApiError {
    fn new(code: Code, reason: &str, message: impl AsRef<str>) -> Self {
        let inner = Inner {
            code,
            reason: reason.to_owned(),
            message: clip(message.as_ref(), MAX_MESSAGE),
            metadata: HashMap::new(),
            field: None,
            precondition: None,
            resource: None,
        };
        Self { inner: Box::new(inner) }
    }

    /// INVALID_ARGUMENT: `field` has `value`, which is wrong for `problem`; `remedy` says what to send instead.
    pub fn invalid(field: &str, value: impl ToString, reason: &str, problem: &str, remedy: &str) -> Self {
        let value = clip(&value.to_string(), 96);
        let mut error =
            Self::new(Code::InvalidArgument, reason, format!("{field}: {value:?} {problem}; {remedy}"));
        error.inner.field = Some((field.to_owned(), clip(&format!("{problem}; {remedy}"), 256)));
        error.with("field", field).with("value", value)
    }

    /// NOT_FOUND of a resource.
    pub fn not_found(kind: &str, name: &str, remedy: &str) -> Self {
        let name = clip(name, 200);
        let reason = format!("{}_NOT_FOUND", screaming(kind));
        let mut error =
            Self::new(Code::NotFound, &reason, format!("{kind} {name:?} does not exist here; {remedy}"));
        error.inner.resource = Some((format!("vpmu.v1/{kind}"), name.clone()));
        error.with("resource", name)
    }

    /// ALREADY_EXISTS of a resource.
    pub fn already_exists(kind: &str, name: &str, remedy: &str) -> Self {
        let name = clip(name, 200);
        let reason = format!("{}_ALREADY_EXISTS", screaming(kind));
        let mut error =
            Self::new(Code::AlreadyExists, &reason, format!("{kind} {name:?} exists already; {remedy}"));
        error.inner.resource = Some((format!("vpmu.v1/{kind}"), name.clone()));
        error.with("resource", name)
    }

    /// FAILED_PRECONDITION: `subject` is not in a state for this.
    pub fn precondition(reason: &str, subject: &str, message: impl AsRef<str>) -> Self {
        let mut error = Self::new(Code::FailedPrecondition, reason, message);
        error.inner.precondition = Some(clip(subject, 200));
        error.with("subject", clip(subject, 200))
    }

    /// ABORTED: somebody else is at it.
    pub fn aborted(reason: &str, subject: &str, message: impl AsRef<str>) -> Self {
        let mut error = Self::new(Code::Aborted, reason, message);
        error.inner.resource = Some(("vpmu.v1/Resource".to_owned(), clip(subject, 200)));
        error.with("subject", clip(subject, 200))
    }

    /// UNAVAILABLE: may be retried.
    pub fn unavailable(reason: &str, message: impl AsRef<str>) -> Self {
        Self::new(Code::Unavailable, reason, message)
    }

    /// RESOURCE_EXHAUSTED: the host has no more of it.
    pub fn exhausted(reason: &str, message: impl AsRef<str>) -> Self {
        Self::new(Code::ResourceExhausted, reason, message)
    }

    /// UNIMPLEMENTED: known, not there yet.
    pub fn unimplemented(reason: &str, message: impl AsRef<str>) -> Self {
        Self::new(Code::Unimplemented, reason, message)
    }

    /// CANCELLED by request.
    pub fn cancelled(reason: &str, message: impl AsRef<str>) -> Self {
        Self::new(Code::Cancelled, reason, message)
    }

    /// INTERNAL: something of ours failed.
    pub fn internal(reason: &str, message: impl AsRef<str>) -> Self {
        Self::new(Code::Internal, reason, message)
    }

    /// The daemon is ending.
    pub fn shutting_down() -> Self {
        Self::unavailable("SHUTTING_DOWN", "this vpmud is shutting down; ask again when it is back")
    }

    /// What another gRPC server (a worker, a peer) answered, under a heading of ours; its reason is kept.
    pub fn from_status(what: &str, status: &Status) -> Self {
        let details = status.get_error_details();
        let reason = details.error_info().map_or_else(
            || format!("{}_{}", screaming(what), screaming(&format!("{:?}", status.code()))),
            |info| info.reason.clone(),
        );
        // A connection that broke says why only in what it was caused by.
        let cause = root_cause(status).filter(|cause| !status.message().contains(cause.as_str()));
        let cause = cause.map(|cause| format!(" ({cause})")).unwrap_or_default();
        let message = format!("{what}: {}{cause}", status.message());
        let mut error = Self::new(status.code(), &clip(&reason, 64), message);
        if let Some(info) = details.error_info() {
            for (key, value) in info.metadata.iter().take(16) {
                error.inner.metadata.insert(clip(key, 64), clip(value, 200));
            }
        }
        if let Some(violation) = details.bad_request().and_then(|b| b.field_violations.first()) {
            error.inner.field = Some((clip(&violation.field, 128), clip(&violation.description, 256)));
        }
        error
    }

    /// A field of the request is at fault, whatever the code.
    #[must_use]
    pub fn at_field(mut self, field: &str, value: &str) -> Self {
        self.inner.field = Some((field.to_owned(), clip(&self.inner.message, 256)));
        self.with("field", field).with("value", clip(value, 96))
    }

    /// Adds one metadata entry: dynamic parts of the message for programs.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.inner.metadata.insert(key.to_owned(), clip(&value.to_string(), 200));
        self
    }

    /// gRPC code.
    pub fn code(&self) -> Code {
        self.inner.code
    }

    /// Stable reason code.
    pub fn reason(&self) -> &str {
        &self.inner.reason
    }

    /// Words for people.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// As it is put into an operation.
    pub fn to_rpc(&self) -> rpc::Status {
        let status = Status::from(self.clone());
        rpc::Status::decode(status.details()).unwrap_or_else(|_| rpc::Status {
            code: self.inner.code as i32,
            message: self.inner.message.clone(),
            details: Vec::new(),
        })
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let error = *error.inner;
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason.clone(), DOMAIN, error.metadata.clone());
        if let Some((field, description)) = &error.field {
            details.add_bad_request_violation(field, description);
        }
        if let Some(subject) = &error.precondition {
            details.add_precondition_failure_violation(&error.reason, subject, clip(&error.message, 256));
        }
        if let Some((kind, name)) = &error.resource {
            details.set_resource_info(kind, name, "", clip(&error.message, 256));
        }
        Status::with_error_details(error.code, error.message, details)
    }
}

impl From<crate::store::StoreError> for ApiError {
    fn from(error: crate::store::StoreError) -> Self {
        use crate::store::StoreError as E;
        let code = match &error {
            E::TooLarge { .. } | E::OperationsFull { .. } => Code::ResourceExhausted,
            E::BadField { .. } => Code::InvalidArgument,
            E::ReadOnly { .. } | E::Closed => Code::Unavailable,
            _ => Code::Internal,
        };
        Self::new(code, error.reason(), error.to_string())
    }
}

/// At most `max` bytes of `text`, control characters escaped, with "..." where something was left out.
pub fn clip(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        if out.len() + 8 > max {
            out.push_str("...");
            break;
        }
        if c.is_control() {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// What is at the bottom of an error that was caused by another.
fn root_cause(error: &dyn std::error::Error) -> Option<String> {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.last().map(ToString::to_string)
}

fn screaming(words: &str) -> String {
    let mut out = String::with_capacity(words.len() + 4);
    let mut previous_lower = false;
    for c in words.chars() {
        if c.is_ascii_uppercase() && previous_lower {
            out.push('_');
        }
        previous_lower = c.is_ascii_lowercase() || c.is_ascii_digit();
        out.push(if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_connection_says_why() {
        let status = Status::from_error(Box::new(std::io::Error::other(Broken(std::fmt::Error))));
        let error = ApiError::from_status("destination", &status);
        assert!(error.message().starts_with("destination: "), "{}", error.message());
        assert!(error.message().ends_with(&format!(" ({})", std::fmt::Error)), "{}", error.message());
        // One that has no cause is its own.
        let alone = ApiError::from_status("destination", &Status::from_error(Box::new(std::fmt::Error)));
        assert_eq!(alone.message().matches(&std::fmt::Error.to_string()).count(), 1, "{}", alone.message());
        let plain = ApiError::from_status("destination", &Status::unavailable("busy"));
        assert_eq!(plain.message(), "destination: busy");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("broken")]
    struct Broken(#[source] std::fmt::Error);

    #[test]
    fn details_travel_in_the_status_and_in_the_operation() {
        let error =
            ApiError::invalid("spec.vcpus", 0, "VCPUS_OUT_OF_RANGE", "is not from 1 to 256", "ask for 2");
        assert_eq!(error.to_rpc().code, Code::InvalidArgument as i32);
        assert_eq!(error.to_rpc().details.len(), 2);
        let status = Status::from(error);
        let details = status.get_error_details();
        let info = details.error_info().expect("error info");
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("VCPUS_OUT_OF_RANGE", DOMAIN));
        assert_eq!(info.metadata["field"], "spec.vcpus");
        assert_eq!(details.bad_request().expect("bad request").field_violations[0].field, "spec.vcpus");
    }

    #[test]
    fn a_hostile_value_is_clipped_and_escaped() {
        let error = ApiError::not_found("VirtualMachine", &"x\n".repeat(1_000_000), "list them");
        assert!(error.message().len() <= MAX_MESSAGE);
        assert!(!error.message().contains('\n'));
        assert_eq!(error.reason(), "VIRTUAL_MACHINE_NOT_FOUND");
        assert!(Status::from(error).details().len() < 4096);
    }

    #[test]
    fn a_workers_reason_is_kept() {
        let status = Status::from(ApiError::precondition("SEALED", "vm", "sealed at 3"));
        let error = ApiError::from_status("worker", &status);
        assert_eq!((error.reason(), error.code()), ("SEALED", Code::FailedPrecondition));
        let bare = ApiError::from_status("worker", &Status::deadline_exceeded("late"));
        assert_eq!(bare.reason(), "WORKER_DEADLINE_EXCEEDED");
    }
}
