//! TLS 1.3 for the data connections of one migration.
//!
//! Each side makes a key and a self-signed certificate for this migration alone and tells the other its SHA-256 over
//! the authenticated control channel. Both then accept exactly that certificate and nothing else: no names, no chains,
//! no clocks, no resumption, no older TLS. Keys never leave the process that made them and die with the migration.
//!
//! Invariants: without the pinned certificate and its key no byte of a session passes in either direction; a peer that
//! speaks something else is refused before anything of it is interpreted.

mod handshake;
mod record;
mod stream;
mod verify;

use std::net::TcpStream;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, ServerConfig};
use sha2::{Digest, Sha256};

use super::error::{DataplaneError, Result};
use handshake::Side;
pub(crate) use stream::TlsStream;
use verify::Pin;

/// SHA-256 over a certificate as it travels (DER).
pub type Fingerprint = [u8; 32];

/// Application protocol: a listener for something else never takes us for its own.
const ALPN: &[u8] = b"vpmud-data";
/// Rustls wants a name; nobody looks at it.
const NAME: &str = "vpmud.invalid";

fn failed(error: impl std::fmt::Display) -> DataplaneError {
    DataplaneError::Tls { problem: error.to_string() }
}

/// A key and its certificate, made for one migration.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("key", &"(secret)").finish_non_exhaustive()
    }
}

impl Identity {
    /// A new one; takes a fraction of a millisecond.
    ///
    /// # Errors
    /// `Tls` if the system gives no randomness.
    pub fn generate() -> Result<Self> {
        let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).map_err(failed)?;
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        Ok(Self { certificate: made.cert.der().clone(), key })
    }

    /// What the other side is told.
    pub fn fingerprint(&self) -> Fingerprint {
        Sha256::digest(&self.certificate).into()
    }
}

/// Who we are and whom we expect.
#[derive(Debug, Clone)]
pub struct Tls {
    identity: Arc<Identity>,
    peer: Fingerprint,
}

impl Tls {
    /// `peer` is what the other side said over the control channel.
    pub fn new(identity: Arc<Identity>, peer: Fingerprint) -> Self {
        Self { identity, peer }
    }

    /// For the listener.
    pub(crate) fn server(&self) -> Result<TlsServer> {
        let pin = Arc::new(Pin::new(self.peer));
        let provider = Arc::clone(pin.provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(pin)
            .with_single_cert(vec![self.identity.certificate.clone()], self.identity.key.clone_key().into())
            .map_err(failed)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        // The record layer is ours.
        config.enable_secret_extraction = true;
        Ok(TlsServer(Arc::new(config)))
    }

    /// A connection that is about to introduce itself.
    pub(crate) fn client(&self, tcp: TcpStream) -> Result<TlsStream> {
        let session = UnbufferedClientConnection::new(self.client_config()?, name()?).map_err(failed)?;
        Ok(TlsStream::new(tcp, Side::Client(Box::new(session))))
    }

    fn client_config(&self) -> Result<Arc<ClientConfig>> {
        let pin = Arc::new(Pin::new(self.peer));
        let provider = Arc::clone(pin.provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .dangerous()
            .with_custom_certificate_verifier(pin)
            .with_client_auth_cert(
                vec![self.identity.certificate.clone()],
                self.identity.key.clone_key().into(),
            )
            .map_err(failed)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_secret_extraction = true;
        Ok(Arc::new(config))
    }
}

fn name() -> Result<ServerName<'static>> {
    ServerName::try_from(NAME).map_err(failed)
}

/// Takes connections of one migration.
#[derive(Clone, Debug)]
pub(crate) struct TlsServer(Arc<ServerConfig>);

impl TlsServer {
    pub(crate) fn accept(&self, tcp: TcpStream) -> Result<TlsStream> {
        let session = UnbufferedServerConnection::new(Arc::clone(&self.0)).map_err(failed)?;
        Ok(TlsStream::new(tcp, Side::Server(Box::new(session))))
    }
}
