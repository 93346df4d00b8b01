//! Where a host listens: `unix:PATH` or `tcp:ADDR:PORT`, the two forms that every command and flag of vpmud uses.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Longest path of a Unix socket in bytes: `sockaddr_un.sun_path` has 108, the last is the terminating zero (unix(7)).
pub const MAX_UNIX_PATH: usize = 107;

/// Where a host's API (or peer) listener is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP address, IPv6 in brackets.
    Tcp(SocketAddr),
}

/// Why a text is not an endpoint. Every variant carries the text as given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It has neither of the two forms.
    #[error("\"{text}\" is not an endpoint: write unix:PATH or tcp:ADDR:PORT")]
    Form {
        /// As given.
        text: String,
    },
    /// `tcp:` without a literal address and a port.
    #[error(
        "\"{text}\" is not a TCP endpoint: write tcp:ADDR:PORT with a numeric address, e.g. tcp:127.0.0.1:7070"
    )]
    Tcp {
        /// As given.
        text: String,
    },
    /// The path is longer than the kernel's socket address.
    #[error(
        "the socket path of \"{text}\" has {length} bytes, the limit is {MAX_UNIX_PATH}: use a shorter directory"
    )]
    TooLong {
        /// As given.
        text: String,
        /// Its length in bytes.
        length: usize,
    },
}

impl EndpointError {
    /// Stable code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Form { .. } => "ENDPOINT_FORM",
            Self::Tcp { .. } => "ENDPOINT_TCP",
            Self::TooLong { .. } => "ENDPOINT_PATH_TOO_LONG",
        }
    }
}

impl Endpoint {
    /// The Unix socket at `path`, checked for length.
    pub fn unix(path: &Path) -> Result<Self, EndpointError> {
        format!("unix:{}", path.display()).parse()
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.contains('\0') {
                return Err(EndpointError::Form { text: text.to_owned() });
            }
            if path.len() > MAX_UNIX_PATH {
                return Err(EndpointError::TooLong { text: text.to_owned(), length: path.len() });
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if let Some(address) = text.strip_prefix("tcp:") {
            let address = address
                .strip_prefix("localhost:")
                .map_or_else(|| address.to_owned(), |port| format!("127.0.0.1:{port}"));
            return match address.parse::<SocketAddr>() {
                Ok(address) if address.port() != 0 => Ok(Self::Tcp(address)),
                _ => Err(EndpointError::Tcp { text: text.to_owned() }),
            };
        }
        Err(EndpointError::Form { text: text.to_owned() })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_read_and_print_back() {
        for text in ["unix:/run/v.sock", "unix:relative.sock", "tcp:127.0.0.1:7070", "tcp:[::1]:7070"] {
            let endpoint: Endpoint = text.parse().expect(text);
            assert_eq!(endpoint.to_string(), text);
        }
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let long = format!("unix:/{}", "a".repeat(MAX_UNIX_PATH));
        for (text, reason) in [
            ("", "ENDPOINT_FORM"),
            ("/run/v.sock", "ENDPOINT_FORM"),
            ("unix:", "ENDPOINT_FORM"),
            ("http://localhost:1", "ENDPOINT_FORM"),
            ("tcp:example.org:7070", "ENDPOINT_TCP"),
            ("tcp:127.0.0.1", "ENDPOINT_TCP"),
            ("tcp:127.0.0.1:0", "ENDPOINT_TCP"),
            ("tcp:127.0.0.1:70700", "ENDPOINT_TCP"),
            (long.as_str(), "ENDPOINT_PATH_TOO_LONG"),
        ] {
            let error = text.parse::<Endpoint>().expect_err(text);
            assert_eq!(error.reason(), reason, "{text}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn localhost_is_loopback() {
        assert_eq!(
            "tcp:localhost:7070".parse::<Endpoint>().expect("parses").to_string(),
            "tcp:127.0.0.1:7070"
        );
    }

    #[test]
    fn the_longest_path_is_accepted() {
        let text = format!("unix:/{}", "a".repeat(MAX_UNIX_PATH - 1));
        assert!(text.parse::<Endpoint>().is_ok());
    }
}
