//! Sessions with themselves and with rustls' own, over real sockets.

use super::super::{Identity, Tls};
use super::*;
use std::io::Write as _;
use std::net::TcpListener;
use std::sync::Arc;

/// More than a record, and no multiple of one.
const LONG: usize = (300 << 10) + 17;

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let near = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    (near, listener.accept().expect("accept").0)
}

fn identities() -> (Tls, Tls) {
    let (a, b) = (Arc::new(Identity::generate().expect("a")), Arc::new(Identity::generate().expect("b")));
    let (of_a, of_b) = (a.fingerprint(), b.fingerprint());
    (Tls::new(a, of_b), Tls::new(b, of_a))
}

/// A session that is ready on either side.
fn pair() -> (TlsStream, TlsStream) {
    let ((near, far), (a, b)) = (sockets(), identities());
    let (near, far) =
        (a.client(near).expect("client"), b.server().expect("server").accept(far).expect("accept"));
    std::thread::scope(|scope| {
        let shaken = scope.spawn(|| near.shake());
        assert!(far.shake().expect("server's") && shaken.join().expect("thread").expect("client's"));
    });
    (near, far)
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i.wrapping_mul(31) >> 3) as u8).collect()
}

fn send(stream: &TlsStream, data: &[u8]) {
    // In uneven slices, one of them empty.
    let (first, rest) = data.split_at(data.len() / 3);
    stream.write_all(&[IoSlice::new(first), IoSlice::new(&[]), IoSlice::new(rest)]).expect("sent");
}

fn take(stream: &TlsStream, n: usize) -> Vec<u8> {
    let mut out = vec![0; n];
    stream.read_exact(&mut out).expect("received");
    out
}

fn exchange(near: &TlsStream, far: &TlsStream) {
    let data = bytes(LONG);
    std::thread::scope(|scope| {
        // Both ways at once: who reads does not keep the other from writing.
        scope.spawn(|| send(near, &data));
        scope.spawn(|| send(far, &data));
        let there = scope.spawn(|| take(far, LONG));
        assert!(take(near, LONG) == data && there.join().expect("thread") == data);
    });
}

impl Outgoing {
    fn say(&mut self, content: Content, message: &[u8], tcp: &TcpStream) -> io::Result<()> {
        self.put(content, message, tcp)?;
        self.flush(tcp)
    }
}

fn open(stream: &TlsStream) -> &Open {
    stream.opened().expect("open").expect("there")
}

#[test]
fn what_is_sent_arrives_both_ways_at_once() {
    let (near, far) = pair();
    exchange(&near, &far);
    assert!(!near.has_buffered() && !far.has_buffered());
    // Of a record that is read in part the rest is here.
    send(&near, b"abc");
    assert_eq!(take(&far, 1), b"a");
    assert!(far.has_buffered());
    assert_eq!(take(&far, 2), b"bc");
    assert!(!far.has_buffered());
}

#[test]
fn keys_are_renewed_when_they_are_worn_and_when_the_peer_asks() {
    let (near, far) = pair();
    for stream in [&near, &far] {
        let mut outgoing = open(stream).outgoing.lock();
        let worn = outgoing.sealer.with_limit(3);
        assert!(!worn, "the handshake's records were under other keys");
    }
    exchange(&near, &far);
    let asked = open(&near).outgoing.lock().say(Content::Handshake, &KEY_UPDATE_REQUESTED, &near.tcp);
    asked.expect("sent");
    let renewed = open(&near).renewal.lock().outgoing().expect("a key");
    open(&near).outgoing.lock().sealer.renew(renewed).expect("renewed");
    send(&near, b"x");
    assert_eq!(take(&far, 1), b"x");
    assert!(open(&far).renewal_due.load(Ordering::Acquire), "asked for");
    exchange(&near, &far);
    assert!(!open(&far).renewal_due.load(Ordering::Acquire), "answered with its next data");
}

/// rustls' own session over a socket, as another implementation of the same. It sends its data along with the end of its
/// handshake, and renews its keys in between.
fn another<C, S: rustls::SideData>(session: C, socket: TcpStream, data: &[u8]) -> Vec<u8>
where
    C: std::ops::DerefMut<Target = rustls::ConnectionCommon<S>>,
{
    let mut stream = rustls::StreamOwned::new(session, socket);
    stream.write_all(data).expect("sent");
    stream.conn.refresh_traffic_keys().expect("renewed");
    stream.write_all(data).expect("sent under another key");
    let mut back = vec![0; data.len()];
    stream.read_exact(&mut back).expect("received");
    stream.conn.send_close_notify();
    stream.flush().expect("said");
    back
}

#[test]
fn another_implementation_understands_it_and_is_understood() {
    let data = &bytes(LONG);
    for client in [true, false] {
        let ((ours, theirs), (a, b)) = (sockets(), identities());
        std::thread::scope(|scope| {
            let (ours, there) = if client {
                let session = a.server().expect("config").accept(ours).expect("accept");
                let config = b.client_config().expect("config");
                let name = super::super::name().expect("name");
                let other = rustls::ClientConnection::new(config, name).expect("client");
                (session, scope.spawn(|| another(other, theirs, data)))
            } else {
                let other = rustls::ServerConnection::new(b.server().expect("config").0).expect("server");
                (a.client(ours).expect("client"), scope.spawn(|| another(other, theirs, data)))
            };
            assert!(ours.shake().expect("shaken"), "client: {client}");
            assert!(take(&ours, LONG) == *data && take(&ours, LONG) == *data, "client: {client}");
            send(&ours, data);
            assert!(there.join().expect("thread") == *data, "client: {client}");
            assert_eq!(ours.read(&mut [0; 8]).expect("the end"), 0, "client: {client}");
        });
    }
}

fn refused(far: &TlsStream) -> String {
    let error = far.read(&mut [0; 8]).expect_err("refused");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    error.to_string()
}

#[test]
fn what_is_neither_data_nor_a_key_ends_the_session() {
    for (content, message, why) in [
        (Content::Handshake, &[4, 0, 0, 0][..], "handshake message after the handshake"),
        (Content::Handshake, &[24, 0, 0, 1, 2], "handshake message after the handshake"),
        (Content::Alert, &[2, 40], "HandshakeFailure"),
        (Content::Alert, &[2], "MessageTooShort"),
    ] {
        let (near, far) = pair();
        open(&near).outgoing.lock().say(content, message, &near.tcp).expect("sent");
        let told = refused(&far);
        assert!(told.contains(why), "{told}");
        assert_eq!(refused(&far), told, "for good");
        if content == Content::Handshake {
            assert!(refused(&near).contains("UnexpectedMessage"), "the peer is told");
        }
    }
    let (near, far) = pair();
    (&near.tcp)
        .write_all(&[23, 3, 3, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        .expect("sent");
    assert!(refused(&far).contains("decrypt"));
    assert!(refused(&near).contains("BadRecordMac"));
    let (near, far) = pair();
    (&near.tcp).write_all(&[23, 3, 3, 0xff, 0xff]).expect("sent");
    assert!(refused(&far).contains("excess record size"));
    assert!(refused(&near).contains("RecordOverflow"));
}

/// A peer cannot keep us busy with records that say nothing.
#[test]
fn records_without_data_have_a_bound() {
    let (near, far) = pair();
    for _ in 0..IDLE_RECORDS {
        open(&near).outgoing.lock().say(Content::Data, &[], &near.tcp).expect("sent");
    }
    send(&near, b"x");
    assert_eq!(take(&far, 1), b"x");
    for _ in 0..=IDLE_RECORDS {
        open(&near).outgoing.lock().say(Content::Data, &[], &near.tcp).expect("sent");
    }
    assert!(refused(&far).contains("TooManyEmptyFragments"));
}

#[test]
fn half_a_record_is_the_end_and_no_data() {
    let (near, far) = pair();
    {
        let mut outgoing = open(&near).outgoing.lock();
        outgoing.put(Content::Data, b"never whole", &near.tcp).expect("sealed");
        outgoing.end -= 1;
        outgoing.flush(&near.tcp).expect("sent");
    }
    near.tcp.shutdown(std::net::Shutdown::Write).expect("shut");
    assert!(!far.has_buffered());
    assert_eq!(far.read(&mut [0; 64]).expect("the end"), 0);
}

#[test]
fn nothing_follows_the_peers_own_end() {
    let (near, far) = pair();
    open(&near).outgoing.lock().say(Content::Alert, &[1, 0], &near.tcp).expect("sent");
    send(&near, b"too late");
    for _ in 0..2 {
        assert_eq!(far.read(&mut [0; 8]).expect("the end"), 0);
    }
}

/// The peer does not read for a while: what is written afterwards comes after all that was sealed before.
#[test]
fn a_write_that_timed_out_can_be_followed_by_another() {
    let (near, far) = pair();
    near.tcp.set_write_timeout(Some(std::time::Duration::from_millis(50))).expect("timeout");
    let data = bytes(LONG);
    let mut whole = 0;
    let error = loop {
        match near.write_all(&[IoSlice::new(&data)]) {
            Ok(()) => whole += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            for _ in 0..whole {
                assert!(take(&far, LONG) == data);
            }
            // Of what was cut short some records came, in order.
            let mut rest = Vec::new();
            let mut piece = [0; 4096];
            loop {
                match far.read(&mut piece).expect("no record is damaged") {
                    0 => break rest,
                    n => rest.extend_from_slice(&piece[..n]),
                }
            }
        });
        near.tcp.set_write_timeout(None).expect("none");
        near.write_all(&[IoSlice::new(b"why")]).expect("sent");
        near.tcp.shutdown(std::net::Shutdown::Write).expect("shut");
        let rest = there.join().expect("thread");
        let cut = rest.strip_suffix(b"why").expect("the last word");
        // All of it, if the last record had been sealed when the time was over.
        assert!(data.starts_with(cut), "{}", cut.len());
    });
}

/// Every byte of the handshake comes alone, to sockets that do not block.
#[test]
fn a_handshake_goes_on_where_it_was() {
    let ((near, near_proxy), (far_proxy, far), (a, b)) = (sockets(), sockets(), identities());
    for (mut from, mut to) in [
        (near_proxy.try_clone().expect("socket"), far_proxy.try_clone().expect("socket")),
        (far_proxy, near_proxy),
    ] {
        to.set_nodelay(true).expect("nodelay");
        std::thread::spawn(move || {
            let mut byte = [0];
            while from.read(&mut byte).is_ok_and(|n| n > 0) && to.write_all(&byte).is_ok() {}
        });
    }
    let near = a.client(near).expect("client");
    let far = b.server().expect("server").accept(far).expect("accept");
    for stream in [&near, &far] {
        stream.tcp.set_nonblocking(true).expect("nonblocking");
    }
    let (mut done, mut waits) = ([false, false], 0);
    while done != [true, true] {
        for (stream, done) in [&near, &far].into_iter().zip(&mut done) {
            match stream.shake() {
                Ok(shaken) => *done = shaken,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}"),
            }
        }
        waits += 1;
        assert!(waits < 100_000, "{done:?}");
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
    for stream in [&near, &far] {
        stream.tcp.set_nonblocking(false).expect("blocking");
    }
    send(&near, b"hello");
    assert_eq!(take(&far, 5), b"hello");
}

/// The server finds out after its hello: what it says of it follows that.
#[test]
fn why_a_handshake_fails_is_said_after_what_was_said_before() {
    let ((ours, mut theirs), (a, b)) = (sockets(), identities());
    let mut config = rustls::ClientConfig::clone(&b.client_config().expect("config"));
    config.alpn_protocols = vec![b"something else".to_vec()];
    let name = super::super::name().expect("name");
    let mut other = rustls::ClientConnection::new(Arc::new(config), name).expect("client");
    let ours = a.server().expect("config").accept(ours).expect("accept");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let error = ours.shake().expect_err("no protocol in common");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
            assert!(ours.shake().is_err(), "for good");
            ours.tcp.shutdown(std::net::Shutdown::Write).expect("shut");
        });
        let told = loop {
            if let Err(error) = other.complete_io(&mut theirs) {
                break error;
            }
        };
        assert!(told.to_string().contains("NoApplicationProtocol"), "{told}");
    });
}

#[test]
fn what_is_no_tls_is_refused_at_its_first_bytes() {
    for first in [&b"GET / HTTP/1.1"[..], b"SSH-2.0-x", b"V"] {
        let ((mut stranger, far), (_, b)) = (sockets(), identities());
        let far = b.server().expect("server").accept(far).expect("accept");
        stranger.write_all(first).expect("sent");
        let error = far.shake().expect_err("refused");
        assert!(error.to_string().contains("InvalidContentType"), "{error}");
    }
}
