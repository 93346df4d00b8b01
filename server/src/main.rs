//! The vpmud binary.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    vpmu_server::cli::main()
}
