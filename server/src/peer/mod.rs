//! The way to another vpmud, and what other hosts are told of the way back.

pub mod tls;

use std::net::IpAddr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};
use vpmu_proto::peer::migration_peer_service_client::MigrationPeerServiceClient;
use vpmu_proto::peer::*;

use crate::config::Address;
use crate::duplex::Duplex;
use crate::migration::limits::Limits;
use crate::status::ApiError;
use tls::PeerTls;

/// Version of the peer protocol that this daemon speaks.
pub const VERSION: u32 = 1;

/// How this host talks to others.
#[derive(Debug, Clone)]
pub struct Peering {
    /// What is waited for, and how long.
    pub limits: Limits,
    /// Every TCP connection to and from other hosts is made with it.
    pub tls: Option<PeerTls>,
    /// Without TLS, other machines are talked to all the same: the operator said so.
    pub plaintext: bool,
    /// Where this host's peer service is, the peer listeners first.
    pub listeners: Vec<Address>,
}

impl Peering {
    /// Whether a connection to `address` may be made in the way that this host makes them.
    fn admit(&self, address: &Address) -> Result<(), ApiError> {
        match address {
            Address::Tcp(addr) if self.tls.is_none() && !self.plaintext && !addr.ip().is_loopback() => {
                Err(ApiError::precondition(
                    "TLS_REQUIRED",
                    &address.to_string(),
                    format!(
                        "{address} is another machine, and this host has no certificate; start vpmud on both with \
                         --peer-tls-ca, --peer-tls-cert and --peer-tls-key, or with --peer-plaintext on a network \
                         that nobody else is on"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// Where `peer` reaches this host, for its questions about the migration. None: it could not.
    pub fn way_back(&self, peer: &Peer) -> Option<String> {
        way_back(&self.listeners, peer.local).map(|address| address.to_string())
    }
}

/// `local` is our end of the connection to the one who is to come back; none: it is on a Unix socket.
fn way_back(listeners: &[Address], local: Option<IpAddr>) -> Option<Address> {
    let tcp = || {
        listeners.iter().filter_map(|a| match a {
            Address::Tcp(addr) => Some(*addr),
            Address::Unix(_) => None,
        })
    };
    let Some(local) = local else {
        let unix = listeners.iter().find(|a| matches!(a, Address::Unix(_)));
        return unix.or_else(|| listeners.first()).cloned();
    };
    let same = tcp().find(|a| a.ip().to_canonical() == local);
    // A listener on every address is reached where the connection began; the families' wildcards overlap on Linux.
    let any = || {
        let fits = |ip: IpAddr| ip.is_unspecified() && (ip.is_ipv6() || local.is_ipv4());
        tcp().find(|a| fits(a.ip())).map(|a| std::net::SocketAddr::new(local, a.port()))
    };
    if let Some(found) = same.or_else(any) {
        return Some(Address::Tcp(found));
    }
    if local.is_loopback() {
        return listeners.first().cloned();
    }
    // Another address of this host; the network between the two is the operator's.
    tcp().find(|a| !a.ip().is_loopback() && !a.ip().is_unspecified()).map(Address::Tcp)
}

/// Another vpmud.
#[derive(Clone)]
pub struct Peer {
    /// Its address.
    pub address: Address,
    /// Our end of the connection; none for a Unix socket.
    pub local: Option<IpAddr>,
    client: MigrationPeerServiceClient<Channel>,
    /// Bound on one call.
    bound: Duration,
}

impl Peer {
    /// Connects.
    pub async fn connect(address: &Address, peering: &Peering) -> Result<Self, ApiError> {
        peering.admit(address)?;
        let limits = &peering.limits;
        let unreachable = |why: String| {
            ApiError::unavailable(
                "DESTINATION_UNREACHABLE",
                format!(
                    "no vpmud answers at {address}: {why}; check the address and that its --peer-listen is up"
                ),
            )
            .with("destination", address)
        };
        let opened = async {
            let first = dial(address, peering.tls.as_ref()).await.map_err(|e| unreachable(root_cause(&e)))?;
            let local = first.local_ip();
            let endpoint = Endpoint::from_static("http://peer.invalid")
                .connect_timeout(limits.connect)
                .http2_keep_alive_interval(limits.keep_alive)
                .keep_alive_timeout(limits.keep_alive)
                .keep_alive_while_idle(true);
            let (mut first, target, tls) = (Some(first), address.clone(), peering.tls.clone());
            let connector = tower::service_fn(move |_: Uri| {
                let (first, target, tls) = (first.take(), target.clone(), tls.clone());
                async move {
                    match first {
                        Some(open) => Ok(TokioIo::new(open)),
                        None => dial(&target, tls.as_ref()).await.map(TokioIo::new),
                    }
                }
            });
            let channel = endpoint.connect_with_connector(connector).await;
            channel.map(|channel| (channel, local)).map_err(|e| unreachable(root_cause(&e)))
        };
        let (channel, local) = tokio::time::timeout(limits.connect, opened)
            .await
            .unwrap_or_else(|_| Err(unreachable(format!("no connection within {:?}", limits.connect))))?;
        let client = MigrationPeerServiceClient::new(channel).max_decoding_message_size(16 << 20);
        Ok(Self { address: address.clone(), local, client, bound: limits.call })
    }

    /// Finds out who the other is.
    pub async fn negotiate(&self, host_id: &str) -> Result<NegotiateResponse, ApiError> {
        let request = NegotiateRequest { versions: vec![VERSION], host_id: host_id.to_owned() };
        let mut client = self.client.clone();
        let answer = call(self.bound, client.negotiate(request)).await?;
        if answer.version == VERSION {
            return Ok(answer);
        }
        Err(ApiError::precondition(
            "VERSION",
            &self.address.to_string(),
            format!(
                "{} speaks peer protocol {}, this host {VERSION}; upgrade one of them",
                self.address, answer.version
            ),
        ))
    }

    /// Names what does not fit.
    pub async fn check(&self, requirements: Requirements) -> Result<CheckResponse, ApiError> {
        let request = CheckRequest { version: VERSION, requirements: Some(requirements) };
        let mut client = self.client.clone();
        call(self.bound, client.check(request)).await
    }

    /// Reserves.
    pub async fn prepare(&self, request: PrepareRequest) -> Result<PrepareResponse, ApiError> {
        let mut client = self.client.clone();
        call(self.bound, client.prepare(request)).await
    }

    /// Opens the stream of one migration.
    pub async fn handover(
        &self,
        messages: tokio::sync::mpsc::Receiver<SourceMessage>,
    ) -> Result<tonic::Streaming<DestinationMessage>, ApiError> {
        let mut client = self.client.clone();
        call(self.bound, client.handover(tokio_stream::wrappers::ReceiverStream::new(messages))).await
    }

    /// Asks for a decision.
    pub async fn resolve(&self, request: ResolveRequest) -> Result<ResolveResponse, ApiError> {
        let mut client = self.client.clone();
        call(self.bound, client.resolve(request)).await
    }
}

/// Opens the connection, under TLS where this host has it.
async fn dial(address: &Address, tls: Option<&PeerTls>) -> std::io::Result<Duplex> {
    Ok(match address {
        Address::Unix(path) => Duplex::Unix(tokio::net::UnixStream::connect(path).await?),
        Address::Tcp(addr) => {
            let stream = tokio::net::TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            match tls {
                Some(tls) => tls.connect(stream).await?,
                None => Duplex::Tcp(stream),
            }
        }
    })
}

async fn call<T>(
    bound: Duration,
    future: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(bound, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(ApiError::from_status("destination", &status)),
        Err(_) => Err(ApiError::unavailable(
            "DESTINATION_TIMEOUT",
            format!("the destination did not answer within {bound:?}; look at its log and try again"),
        )),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_told_an_address_that_it_can_reach() {
        let listeners = |all: &[&str]| -> Vec<Address> { all.iter().map(|a| a.parse().expect(a)).collect() };
        let told = |all: &[&str], local: Option<&str>| {
            let local = local.map(|ip| ip.parse().expect("an IP address"));
            way_back(&listeners(all), local).map(|a| a.to_string())
        };
        let mixed = ["unix:/p", "tcp:127.0.0.1:1", "tcp:10.0.0.1:2", "tcp:0.0.0.0:3"];
        for (local, expected) in [
            (None, Some("unix:/p")),
            (Some("127.0.0.1"), Some("tcp:127.0.0.1:1")),
            (Some("10.0.0.1"), Some("tcp:10.0.0.1:2")),
            (Some("10.0.0.9"), Some("tcp:10.0.0.9:3")),
            (Some("fd00::9"), Some("tcp:10.0.0.1:2")),
        ] {
            assert_eq!(told(&mixed, local).as_deref(), expected, "{local:?}");
        }
        assert_eq!(told(&["tcp:[::]:7"], Some("10.0.0.9")).as_deref(), Some("tcp:10.0.0.9:7"));
        assert_eq!(told(&["unix:/p"], Some("127.0.0.1")).as_deref(), Some("unix:/p"));
        assert_eq!(told(&["unix:/p", "tcp:127.0.0.1:1"], Some("10.0.0.9")), None, "nobody else gets there");
    }
}
