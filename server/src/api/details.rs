//! Gives details to errors that tonic makes by itself (a request that is too large, does not decode, or asks for a
//! method that does not exist), so that no error leaves without an ErrorInfo.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use tower::{Layer, Service};

use crate::status::{DOMAIN, clip};

const STATUS: &str = "grpc-status";
const DETAILS: &str = "grpc-status-details-bin";

/// The layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct DetailsLayer;

/// The service.
#[derive(Debug, Clone)]
pub struct Details<S> {
    inner: S,
}

impl<S> Layer<S> for DetailsLayer {
    type Service = Details<S>;

    fn layer(&self, inner: S) -> Details<S> {
        Details { inner }
    }
}

impl<S, A, B> Service<Request<A>> for Details<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let method = clip(request.uri().path(), 160);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut response = answer.await?;
            complete(&mut response, &method);
            Ok(response)
        })
    }
}

fn complete<B>(response: &mut Response<B>, method: &str) {
    if !response.headers().contains_key(STATUS) || response.headers().contains_key(DETAILS) {
        return;
    }
    let Some(bare) = Status::from_header_map(response.headers()).filter(|s| s.code() != Code::Ok) else {
        return;
    };
    let full = explain(&bare, method);
    for name in [STATUS, "grpc-message"] {
        response.headers_mut().remove(name);
    }
    // Cannot fail for a status of our own making; if it did, the bare code would still be there.
    if full.add_header(response.headers_mut()).is_err() {
        response.headers_mut().insert(STATUS, http::HeaderValue::from(bare.code() as i32));
    }
}

/// A status with details for one without. Also used for errors inside request streams.
pub fn explain(bare: &Status, method: &str) -> Status {
    if !bare.details().is_empty() {
        return bare.clone();
    }
    let (code, reason, remedy) = match bare.code() {
        Code::OutOfRange if bare.message().contains("too large") => {
            (Code::ResourceExhausted, "REQUEST_TOO_LARGE", "send at most 4 MiB in one message")
        }
        Code::Unimplemented => {
            (Code::Unimplemented, "METHOD_NOT_FOUND", "ask the reflection service what there is")
        }
        Code::Internal if bare.message().contains("decode") => {
            (Code::InvalidArgument, "MALFORMED_REQUEST", "encode the request as the .proto files say")
        }
        Code::DeadlineExceeded | Code::Cancelled => {
            (bare.code(), "CALL_ENDED", "the caller's deadline passed or it went away; ask again")
        }
        Code::Unavailable => (Code::Unavailable, "UNAVAILABLE", "ask again later"),
        code => (code, "TRANSPORT", "look at the daemon's log"),
    };
    let mut details = ErrorDetails::new();
    let metadata =
        [("method".to_owned(), method.to_owned())].into_iter().collect::<std::collections::HashMap<_, _>>();
    details.set_error_info(reason, DOMAIN, metadata);
    let said = clip(bare.message(), 400);
    let message =
        if said.is_empty() { format!("{method}: {remedy}") } else { format!("{method}: {said}; {remedy}") };
    Status::with_error_details(code, message, details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_status_gets_details_and_a_full_one_is_left_alone() {
        let bare = Status::out_of_range("Error, decoded message length too large: found 104857600 bytes");
        let mut response = bare.into_http::<()>();
        complete(&mut response, "/vpmu.v1.X/Y");
        let status = Status::from_header_map(response.headers()).expect("status");
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.get_error_details().error_info().expect("info").reason, "REQUEST_TOO_LARGE");
        let again = explain(&status, "/other");
        assert_eq!(again.message(), status.message());
    }
}
