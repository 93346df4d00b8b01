//! Generated protocol types of vpmud.
//!
//! One module a proto package; [`FILE_DESCRIPTOR_SET`] is what gRPC reflection serves. Nothing here is written by
//! hand but this file: the contracts are the `.proto` files under `protos/`, whose comments are the documentation.
#![forbid(unsafe_code)]
#![allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications)]

/// Encoded `google.protobuf.FileDescriptorSet` of every package below, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vpmu_descriptor.bin"));

/// Google's common packages that the API uses.
pub mod google {
    /// `google.rpc`: the status inside an operation.
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
    /// `google.longrunning`: operations.
    pub mod longrunning {
        tonic::include_proto!("google.longrunning");
    }
}

/// Packages of this project.
pub mod vpmu {
    /// The public API.
    pub mod v1 {
        tonic::include_proto!("vpmu.v1");
    }
    /// Control plane to worker.
    pub mod worker {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("vpmu.worker.v1");
        }
    }
    /// Host to host.
    pub mod peer {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("vpmu.peer.v1");
        }
    }
    /// Stored records.
    pub mod store {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("vpmu.store.v1");
        }
    }
}

pub use google::longrunning;
pub use vpmu::peer::v1 as peer;
pub use vpmu::store::v1 as store;
pub use vpmu::v1 as api;
pub use vpmu::worker::v1 as worker;
