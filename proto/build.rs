//! Generates Rust from the .proto files with protox, so that a fresh machine needs no protoc.

use prost::Message as _;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=protos");
    let files = [
        "protos/vpmu/v1/virtual_machines.proto",
        "protos/vpmu/v1/pmu.proto",
        "protos/vpmu/v1/migrations.proto",
        "protos/vpmu/worker/v1/worker.proto",
        "protos/vpmu/peer/v1/peer.proto",
        "protos/vpmu/store/v1/store.proto",
        "protos/google/longrunning/operations.proto",
    ];
    let descriptors = protox::compile(files, ["protos"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("vpmu_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .boxed(".vpmu.store.v1.OwnershipRecord.forced")
        .compile_well_known_types(false)
        // Rarely there, and much larger than the pointer to it: machines travel by value.
        .boxed(".vpmu.v1.VirtualMachine.pmu_restored")
        .compile_fds(descriptors)?;
    Ok(())
}
