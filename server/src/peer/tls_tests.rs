use std::os::unix::fs::PermissionsExt as _;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("CA"))
    }

    fn files(&self, dir: &Path, host: &str, names: &[&str]) -> Files {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let key = KeyPair::generate().expect("key");
        let cert = CertificateParams::new(names).expect("names").signed_by(&key, &self.0).expect("signed");
        let at = |what: &str| dir.join(format!("{host}.{what}"));
        std::fs::write(at("ca"), self.0.pem()).expect("written");
        std::fs::write(at("pem"), cert.pem()).expect("written");
        std::fs::write(at("key"), key.serialize_pem()).expect("written");
        std::fs::set_permissions(at("key"), std::fs::Permissions::from_mode(0o600)).expect("mode");
        Files { ca: at("ca"), cert: at("pem"), key: at("key"), names: Vec::new() }
    }
}

/// What the called one sees of the caller, and how it went for each.
async fn meet(called: &PeerTls, caller: &PeerTls) -> (io::Result<String>, io::Result<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let address = listener.local_addr().expect("address");
    let answer = async {
        let (tcp, _) = listener.accept().await?;
        let mut stream = called.accept(tcp).await?;
        stream.write_all(b"hi").await?;
        stream.flush().await?;
        let Duplex::Tls(_, name) = stream else { panic!("not under TLS") };
        Ok(name)
    };
    let call = async {
        let mut stream = caller.connect(TcpStream::connect(address).await?).await?;
        // In TLS 1.3 a caller hears that it was refused only when it reads.
        let mut hi = [0; 2];
        stream.read_exact(&mut hi).await.map(|_| ())
    };
    tokio::join!(answer, call)
}

#[tokio::test]
async fn hosts_of_one_ca_meet_and_all_others_are_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (ours, theirs) = (Ca::new(), Ca::new());
    let load = |files: Files| PeerTls::load(files).expect("loads");
    let a = load(ours.files(dir.path(), "a", &["host-a.example", "127.0.0.1"]));
    let b = load(ours.files(dir.path(), "b", &["host-b.example", "127.0.0.1"]));
    let (seen, went) = meet(&a, &b).await;
    assert_eq!(seen.expect("accepts"), "host-b.example");
    went.expect("connects");

    let stranger = load(theirs.files(dir.path(), "x", &["host-b.example", "127.0.0.1"]));
    let (seen, went) = meet(&a, &stranger).await;
    assert!(seen.is_err() && went.is_err(), "another CA");
    // It trusts our CA, and ours does not trust it.
    let mut mixed = theirs.files(dir.path(), "m", &["host-b.example", "127.0.0.1"]);
    mixed.ca = dir.path().join("a.ca");
    let (seen, went) = meet(&a, &load(mixed)).await;
    assert!(seen.is_err() && went.is_err(), "a certificate of another CA");

    let elsewhere = load(ours.files(dir.path(), "e", &["host-e.example", "10.0.0.9"]));
    let (_, went) = meet(&elsewhere, &a).await;
    assert!(went.expect_err("another address").to_string().contains("not valid for name"));

    let mut narrow = ours.files(dir.path(), "n", &["host-n.example", "127.0.0.1"]);
    narrow.names = vec!["host-a.example".to_owned()];
    let narrow = load(narrow);
    let (seen, _) = meet(&narrow, &a).await;
    assert_eq!(seen.expect("is on the list"), "host-a.example");
    let (seen, _) = meet(&narrow, &b).await;
    assert!(seen.expect_err("is not on the list").to_string().contains("host-b.example"));
    let (_, went) = meet(&b, &narrow).await;
    assert!(went.expect_err("the caller has a list too").to_string().contains("--peer-tls-name"));
}

#[tokio::test]
async fn changed_files_count_from_the_next_connection_and_bad_ones_do_not() {
    let dir = tempfile::tempdir().expect("tempdir");
    let ca = Ca::new();
    let a = PeerTls::load(ca.files(dir.path(), "a", &["old.example", "127.0.0.1"])).expect("loads");
    let b = PeerTls::load(ca.files(dir.path(), "b", &["b.example", "127.0.0.1"])).expect("loads");
    assert_eq!(meet(&b, &a).await.0.expect("accepts"), "old.example");
    ca.files(dir.path(), "a", &["renewed-name.example", "127.0.0.1"]);
    assert_eq!(meet(&b, &a).await.0.expect("accepts"), "renewed-name.example");
    std::fs::write(dir.path().join("a.pem"), "broken").expect("written");
    assert_eq!(meet(&b, &a).await.0.expect("accepts"), "renewed-name.example", "the old one goes on");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().expect("tempdir");
    let ca = Ca::new();
    let good = ca.files(dir.path(), "a", &["a.example"]);
    let other = ca.files(dir.path(), "b", &["b.example"]);
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").expect("written");
    std::fs::set_permissions(&empty, std::fs::Permissions::from_mode(0o600)).expect("mode");
    let open = dir.path().join("open.key");
    std::fs::copy(&good.key, &open).expect("copied");
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644)).expect("mode");
    let cases = [
        (Files { ca: dir.path().join("none"), ..good.clone() }, "TLS_FILE_UNREADABLE", "--peer-tls-ca"),
        (Files { ca: empty.clone(), ..good.clone() }, "TLS_FILE_CONTENT", "no certificate"),
        (Files { cert: empty.clone(), ..good.clone() }, "TLS_FILE_CONTENT", "--peer-tls-cert"),
        (Files { key: empty, ..good.clone() }, "TLS_FILE_CONTENT", "private key"),
        (Files { key: open, ..good.clone() }, "TLS_KEY_EXPOSED", "644"),
        (Files { key: other.key, ..good.clone() }, "TLS_KEY_MISMATCH", "the key that it was made for"),
        (Files { names: vec!["a b".to_owned()], ..good.clone() }, "BAD_TLS_NAME", "a b"),
    ];
    for (files, reason, said) in cases {
        let error = PeerTls::load(files).expect_err(reason);
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
    PeerTls::load(good).expect("loads");
}
