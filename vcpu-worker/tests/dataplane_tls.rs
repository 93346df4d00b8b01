//! TLS on data connections: what arrives is what was there, and nobody but the announced peer gets a byte in or out.

mod dataplane_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::Duration;

use dataplane_support::*;
use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::{
    CancelFlag, ConnectOptions, DataAddress, DataplaneError, Fingerprint, Identity, Incoming, Outgoing,
    Received, Tls,
};
use vcpu_worker::memory::{GuestMemory, PAGE_SIZE};

struct Pair {
    source: Arc<Identity>,
    destination: Arc<Identity>,
}

impl Pair {
    fn new() -> Self {
        let make = || Arc::new(Identity::generate().expect("an identity"));
        Self { source: make(), destination: make() }
    }

    /// What the source uses, expecting `peer`.
    fn of_source(&self, peer: Fingerprint) -> ConnectOptions {
        ConnectOptions { tls: Some(Tls::new(Arc::clone(&self.source), peer)), ..options(1) }
    }
}

struct Listening {
    address: DataAddress,
    memory: GuestMemory,
    cancel: CancelFlag,
    thread: JoinHandle<Result<Received, DataplaneError>>,
}

impl Listening {
    fn new(pair: &Pair, connections: u16, bytes: u64) -> Self {
        let memory = GuestMemory::new("destination", bytes).expect("memory");
        let tls = Tls::new(Arc::clone(&pair.destination), pair.source.fingerprint());
        let incoming = Incoming::bind(&tcp(), session(), connections, memory.clone())
            .expect("bind")
            .with_timeouts(PATIENT)
            .with_tls(tls);
        let (address, cancel) = (incoming.local_address().expect("address"), CancelFlag::new());
        let flag = cancel.clone();
        let thread = std::thread::spawn(move || incoming.run(flag, &AtomicU64::new(0)));
        Self { address, memory, cancel, thread }
    }

    fn open(&self, memory: &GuestMemory, options: ConnectOptions) -> Result<Outgoing, DataplaneError> {
        Outgoing::open(&self.address, &session(), memory.clone(), CancelFlag::new(), options)
    }

    /// Nobody came in: the rightful source still can, and nothing was written before it.
    fn still_takes(self, pair: &Pair) {
        assert!(self.memory.resident_pages().expect("tmpfs").is_empty());
        let memory = GuestMemory::new("source", self.memory.bytes()).expect("memory");
        memory.write_at(5 * PAGE_SIZE, b"content").expect("inside memory");
        let mut out = self.open(&memory, pair.of_source(pair.destination.fingerprint())).expect("rightful");
        out.send_round(1, &PageBitmap::full(memory.pages()), false).expect("round");
        out.finish(b"state").expect("finish");
        self.thread.join().expect("no panic").expect("received");
        assert_same(&memory, &self.memory);
    }
}

fn whole(connections: u16, live: bool) {
    let pair = Pair::new();
    let listening = Listening::new(&pair, connections, 32 * MIB);
    let source = GuestMemory::new("source", 32 * MIB).expect("memory");
    fill(&source, 11, 2);
    let options = ConnectOptions { connections, ..pair.of_source(pair.destination.fingerprint()) };
    let mut out = listening.open(&source, options).expect("connect");
    assert_eq!(out.transport(), "tcp+tls");
    out.send_round(1, &PageBitmap::full(source.pages()), live).expect("round 1");
    // A second round goes another way into memory than the first.
    let mut again = PageBitmap::new(source.pages());
    for page in (0..source.pages()).step_by(5) {
        source.write_at(page * PAGE_SIZE + 8, &page.to_le_bytes()).expect("inside memory");
        again.set(page);
    }
    source.write_at(0, &[0; PAGE_SIZE as usize]).expect("inside memory");
    out.send_round(2, &again, false).expect("round 2");
    let state = vec![7; 3 * MIB as usize + 5];
    let finish = out.finish(&state).expect("finish");
    let mut received = listening.thread.join().expect("no panic").expect("received");
    assert_same(&source, &listening.memory);
    assert!(received.state == state && received.digest == finish.digest);
    received.acknowledge().expect("acknowledged");
    out.await_applied(Duration::from_secs(30)).expect("applied");
}

#[test]
fn one_connection() {
    whole(1, true);
    whole(1, false);
}

#[test]
fn four_connections() {
    whole(4, true);
}

#[test]
fn a_destination_with_another_certificate_is_refused_by_the_source() {
    let (pair, stranger) = (Pair::new(), Pair::new());
    let listening = Listening::new(&pair, 1, 2 * MIB);
    let memory = GuestMemory::new("source", 2 * MIB).expect("memory");
    let error = listening.open(&memory, pair.of_source(stranger.source.fingerprint())).expect_err("refused");
    assert_eq!(error.reason(), "DATA_TLS", "{error}");
    assert!(error.to_string().contains("not the one that was announced"), "{error}");
    listening.still_takes(&pair);
}

#[test]
fn a_source_with_another_certificate_is_refused_by_the_destination() {
    let (pair, stranger) = (Pair::new(), Pair::new());
    let listening = Listening::new(&pair, 1, 2 * MIB);
    let memory = GuestMemory::new("source", 2 * MIB).expect("memory");
    // It knows the token and whom to expect, but has not the key.
    let options = stranger.of_source(pair.destination.fingerprint());
    let error = listening.open(&memory, options).expect_err("refused");
    assert_eq!(error.reason(), "DATA_TLS", "{error}");
    listening.still_takes(&pair);
}

fn raw(address: &DataAddress) -> TcpStream {
    let DataAddress::Tcp(address) = address else { panic!("TCP") };
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("time-out");
    stream
}

#[test]
fn a_source_without_a_certificate_is_refused() {
    let pair = Pair::new();
    let listening = Listening::new(&pair, 1, 2 * MIB);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"vpmud-data".to_vec()];
    let name = "vpmud.invalid".try_into().expect("a name");
    let mut session = rustls::ClientConnection::new(Arc::new(config), name).expect("a session");
    let mut tcp = raw(&listening.address);
    let mut stream = rustls::Stream::new(&mut session, &mut tcp);
    // The handshake ends for the client before the server has judged it: the answer comes with the first read.
    let _ = stream.write_all(&[0; 120]);
    let error = stream.read(&mut [0; 100]).expect_err("refused");
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    listening.still_takes(&pair);
}

#[derive(Debug)]
struct Anybody(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        panic!("TLS 1.2")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[test]
fn plaintext_to_a_tls_listener_is_refused() {
    let pair = Pair::new();
    let listening = Listening::new(&pair, 1, 2 * MIB);
    let memory = GuestMemory::new("source", 2 * MIB).expect("memory");
    let error = listening.open(&memory, options(1)).expect_err("refused");
    assert!(matches!(error.reason(), "FRAME_MAGIC" | "DATA_PEER_CLOSED"), "{} {error}", error.reason());
    listening.still_takes(&pair);
}

#[test]
fn tls_to_a_plain_listener_is_refused() {
    let pair = Pair::new();
    let plain = destination(&tcp(), 1, 2 * MIB);
    let memory = GuestMemory::new("source", 2 * MIB).expect("memory");
    let options = pair.of_source(pair.destination.fingerprint());
    let error =
        Outgoing::open(&plain.address, &session(), memory, CancelFlag::new(), options).expect_err("refused");
    assert_eq!(error.reason(), "DATA_TLS", "{error}");
    plain.cancel.cancel();
    assert_eq!(plain.join().expect_err("nobody came").reason(), "DATA_CANCELLED");
}

/// A ClientHello that offers TLS 1.2 only, as an attacker in the middle would leave it.
#[test]
fn a_downgrade_is_refused() {
    let pair = Pair::new();
    let listening = Listening::new(&pair, 1, 2 * MIB);
    let mut body = vec![3, 3];
    body.extend_from_slice(&[0x5a; 32]);
    // No session, ECDHE-RSA-AES128-GCM, no compression, no extensions.
    body.extend_from_slice(&[0, 0, 2, 0xc0, 0x2f, 1, 0]);
    let mut hello = vec![22, 3, 1];
    hello.extend_from_slice(&(body.len() as u16 + 4).to_be_bytes());
    hello.extend_from_slice(&[1, 0]);
    hello.extend_from_slice(&(body.len() as u16).to_be_bytes());
    hello.extend_from_slice(&body);
    let mut stream = raw(&listening.address);
    stream.write_all(&hello).expect("written");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    // A fatal alert; which one is rustls' choice: protocol_version or what it misses first.
    assert_eq!((answer.first(), answer.len()), (Some(&21), 7), "{answer:?}");
    assert_eq!(answer.get(5), Some(&2), "fatal");
    listening.still_takes(&pair);
}

#[test]
fn cancel_ends_a_handshake_and_a_listener() {
    let pair = Pair::new();
    let listening = Listening::new(&pair, 1, 2 * MIB);
    let _silent = raw(&listening.address);
    listening.cancel.cancel();
    assert_eq!(listening.thread.join().expect("no panic").expect_err("nobody").reason(), "DATA_CANCELLED");
    // A listener that never answers.
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = DataAddress::Tcp(deaf.local_addr().expect("address"));
    let cancel = CancelFlag::new();
    let options = pair.of_source(pair.destination.fingerprint());
    let memory = GuestMemory::new("source", 2 * MIB).expect("memory");
    let flag = cancel.clone();
    let waiting = std::thread::spawn(move || Outgoing::open(&address, &session(), memory, flag, options));
    cancel.cancel();
    assert_eq!(waiting.join().expect("no panic").expect_err("cancelled").reason(), "DATA_CANCELLED");
}
