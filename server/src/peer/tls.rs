//! Mutual TLS 1.3 between hosts: one CA, a certificate for each host.
//!
//! A host that dials checks that the certificate is of the CA and is made out to the very address that it dialled; one
//! that is dialled checks that the caller's is of the CA. Both can be narrowed to certain names. What is agreed on this
//! channel (the certificates and tokens of data connections) is as trustworthy as it.
//!
//! Invariants: nothing of a caller is interpreted before its certificate held; a session is never resumed, so that a
//! certificate that ran out or a name that was taken away counts from the next connection on. Files that change are
//! read anew at the next connection; as long as new ones cannot be used the old ones go on, and the log says why.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::duplex::Duplex;

/// Application protocol: gRPC, and nothing else.
const ALPN: &[u8] = b"h2";
/// Largest file in bytes: a bundle of a hundred certificates is far below it.
const MAX_FILE: u64 = 1 << 20;

/// Where the operator put what TLS needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Certificates that vouch for hosts, PEM.
    pub ca: PathBuf,
    /// This host's certificate, and what leads from it to the CA, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The only names that are accepted; empty: whatever the CA vouches for.
    pub names: Vec<String>,
}

/// Why TLS cannot be had, or a peer is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file.
    #[error("{option} {}: cannot be read: {source}; give a PEM file that this user may read", path.display())]
    Read {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file without what it is for.
    #[error("{option} {}: {problem}; give a PEM file with {wanted}", path.display())]
    Content {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What belongs there.
        wanted: &'static str,
    },
    /// A key that anybody may read.
    #[error("--peer-tls-key {}: every user of this host may read it (mode {mode:o}); chmod 600 it", .0.display(), mode = .1)]
    KeyExposed(PathBuf, u32),
    /// A name that is none.
    #[error(
        "--peer-tls-name {0:?}: is neither a DNS name nor an IP address; write it as certificates do, e.g. host-b.example"
    )]
    Name(String),
    /// Certificate and key that rustls does not take.
    #[error("--peer-tls-cert and --peer-tls-key: {0}; give a certificate and the key that it was made for")]
    Pair(rustls::Error),
    /// The other's certificate holds and its name is not among those that are accepted.
    #[error("the peer's certificate is made out to {found}, and --peer-tls-name accepts only {accepted:?}")]
    Stranger {
        /// Its names.
        found: String,
        /// Ours.
        accepted: Vec<String>,
    },
}

impl TlsError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Read { .. } => "TLS_FILE_UNREADABLE",
            Self::Content { .. } => "TLS_FILE_CONTENT",
            Self::KeyExposed(..) => "TLS_KEY_EXPOSED",
            Self::Name(_) => "BAD_TLS_NAME",
            Self::Pair(_) => "TLS_KEY_MISMATCH",
            Self::Stranger { .. } => "TLS_STRANGER",
        }
    }
}

/// What connections are made with.
#[derive(Debug, Clone)]
pub struct PeerTls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: Files,
    names: Vec<ServerName<'static>>,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Clone)]
struct Loaded {
    stamps: Stamps,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// When each file changed, and how long it is.
type Stamps = [Option<(SystemTime, u64)>; 3];

impl PeerTls {
    /// Reads the files; blocks.
    ///
    /// # Errors
    /// Whatever is wrong with one of them.
    pub fn load(files: Files) -> Result<Self, TlsError> {
        let names = files.names.iter().map(|name| {
            ServerName::try_from(name.as_str())
                .map(|n| n.to_owned())
                .map_err(|_| TlsError::Name(name.clone()))
        });
        let names = names.collect::<Result<_, _>>()?;
        let loaded = Mutex::new(Loaded::read(&files)?);
        Ok(Self(Arc::new(Inner { files, names, loaded })))
    }

    /// What holds now: the files are read again if they changed.
    async fn current(&self) -> Loaded {
        let inner = Arc::clone(&self.0);
        let before = inner.loaded().clone();
        let old = before.clone();
        let read = tokio::task::spawn_blocking(move || {
            if stamps(&inner.files) == old.stamps {
                return old;
            }
            match Loaded::read(&inner.files) {
                Ok(new) => {
                    tracing::info!("the peer certificate's files changed and are in force");
                    *inner.loaded() = new.clone();
                    new
                }
                Err(error) => {
                    tracing::warn!(%error, "the peer certificate's files changed and cannot be used; the old ones go on");
                    old
                }
            }
        });
        read.await.unwrap_or(before)
    }

    /// Shakes hands as the one who was called.
    ///
    /// # Errors
    /// What the handshake failed for; the caller has been told in TLS's terms.
    pub async fn accept(&self, tcp: TcpStream) -> io::Result<Duplex> {
        let acceptor = TlsAcceptor::from(self.current().await.server);
        let stream = TlsStream::from(acceptor.accept(tcp).await?);
        self.known(stream)
    }

    /// Shakes hands as the one who calls.
    ///
    /// # Errors
    /// What the handshake failed for.
    pub async fn connect(&self, tcp: TcpStream) -> io::Result<Duplex> {
        let ip = tcp.peer_addr()?.ip().to_canonical();
        let connector = TlsConnector::from(self.current().await.client);
        let stream = TlsStream::from(connector.connect(ServerName::IpAddress(ip.into()), tcp).await?);
        self.known(stream)
    }

    /// The certificate holds; is its name one of those that are accepted?
    fn known(&self, stream: TlsStream<TcpStream>) -> io::Result<Duplex> {
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let Some(certificate) = certificates.first() else {
            return Err(io::Error::other("the peer showed no certificate"));
        };
        let parsed = webpki::EndEntityCert::try_from(certificate).map_err(io::Error::other)?;
        let found = parsed.valid_dns_names().take(4).collect::<Vec<_>>().join(", ");
        let accepted = &self.0.names;
        if !accepted.is_empty()
            && !accepted.iter().any(|n| parsed.verify_is_valid_for_subject_name(n).is_ok())
        {
            let found = if found.is_empty() { "no DNS name".to_owned() } else { found };
            return Err(io::Error::other(TlsError::Stranger { found, accepted: self.0.files.names.clone() }));
        }
        let name = crate::status::clip(&found, 256);
        Ok(Duplex::Tls(Box::new(stream), name))
    }
}

impl Inner {
    fn loaded(&self) -> std::sync::MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loaded {
    fn read(files: &Files) -> Result<Self, TlsError> {
        // Before the files: one that changes in between is read again next time.
        let stamps = stamps(files);
        let mut roots = RootCertStore::empty();
        for certificate in certificates("--peer-tls-ca", &files.ca)? {
            roots.add(certificate).map_err(|e| {
                content("--peer-tls-ca", &files.ca, e.to_string(), "the certificates of the CA")
            })?;
        }
        let roots = Arc::new(roots);
        let chain = certificates("--peer-tls-cert", &files.cert)?;
        let key = key(&files.key)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|e| content("--peer-tls-ca", &files.ca, e.to_string(), "the certificates of the CA"))?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(TlsError::Pair)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::Pair)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(TlsError::Pair)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Self { stamps, server: Arc::new(server), client: Arc::new(client) })
    }
}

fn stamps(files: &Files) -> Stamps {
    [&files.ca, &files.cert, &files.key].map(|path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.modified().ok()?, meta.len()))
    })
}

fn content(option: &'static str, path: &Path, problem: String, wanted: &'static str) -> TlsError {
    TlsError::Content { option, path: path.to_owned(), problem, wanted }
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    use std::io::Read as _;
    let failed = |source| TlsError::Read { option, path: path.to_owned(), source };
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|f| f.take(MAX_FILE).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(bytes)
}

fn certificates(option: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(option, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(content(option, path, "there is no certificate in it".to_owned(), "certificates")),
        Err(error) => Err(content(option, path, error.to_string(), "certificates")),
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use std::os::unix::fs::PermissionsExt as _;
    let option = "--peer-tls-key";
    let bytes = read(option, path)?;
    let mode = std::fs::metadata(path).map_or(0, |meta| meta.permissions().mode() & 0o7777);
    if mode & 0o007 != 0 {
        return Err(TlsError::KeyExposed(path.to_owned(), mode));
    }
    PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|e| content(option, path, e.to_string(), "a private key (PKCS#8, SEC1 or PKCS#1)"))
}

/// A handshake that takes longer is none.
pub const HANDSHAKE: Duration = Duration::from_secs(5);

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
