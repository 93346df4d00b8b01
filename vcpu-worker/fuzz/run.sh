#!/usr/bin/env bash
# Builds one fuzz target and runs it for a while; needs a nightly toolchain and a C++ compiler, but not cargo-fuzz.
#
#   CRATE/fuzz/run.sh TARGET SECONDS [LIBFUZZER OPTIONS...]
#   CRATE/fuzz/run.sh --build TARGET      prints where the program is
#
# CRATE is vcpu-worker (frames, handshake, receiver) or pmu (image_import, cpuid, replay), where this is a link.
# What was found goes on being used: the corpus is kept below target/corpus,
# and an input that fails is left in target/artifacts; run.sh TARGET 0 FILE runs that one input again.
# Under AddressSanitizer, with at most 2 GiB of memory. Environment: VPMU_FUZZ_JOBS, compiler processes (default: all).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${CARGO_TARGET_DIR:-$here/target}
toolchain=${VPMU_FUZZ_TOOLCHAIN:-nightly}

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

die() {
    printf '%s\n' "run.sh: $*" >&2
    exit 1
}

only_build=
if [ "${1:-}" = --build ]; then
    only_build=1
    shift
fi
target=${1:-}
[ -n "$target" ] || usage
[ -f "$here/fuzz_targets/$target.rs" ] ||
    die "there is no target '$target'; there are:$(cd "$here/fuzz_targets" && printf ' %s' *.rs | sed 's/\.rs//g')"
if [ -z "$only_build" ]; then
    seconds=${2:-}
    [[ $seconds =~ ^[0-9]{1,7}$ ]] || die "'$seconds' is no number of seconds; e.g. run.sh $target 600"
    shift 2
fi

cargo "+$toolchain" --version >/dev/null 2>&1 ||
    die "no '$toolchain' toolchain (sanitizers need one): rustup toolchain install nightly --profile minimal"
command -v c++ >/dev/null || die "no C++ compiler (libFuzzer is built from source): apt-get install g++"
triple=$(rustc "+$toolchain" -vV | sed -n 's/^host: //p')

# What cargo-fuzz sets. With --target, so that build scripts and procedural macros stay as they are.
flags=(
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    --cfg fuzzing
    -Zsanitizer=address
    -Cdebug-assertions
    -Ccodegen-units=1
    -Cdebuginfo=1
)
CARGO_TARGET_DIR=$out CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f' && printf '%s' "${flags[*]}") \
    cargo "+$toolchain" build --manifest-path "$here/Cargo.toml" --locked --release --target "$triple" \
    ${VPMU_FUZZ_JOBS:+-j "$VPMU_FUZZ_JOBS"} --bin "$target" >&2
program=$out/$triple/release/$target
if [ -n "$only_build" ]; then
    printf '%s\n' "$program"
    exit 0
fi

mkdir -p "$out/corpus/$target" "$out/artifacts/$target"
options=(-artifact_prefix="$out/artifacts/$target/" -rss_limit_mb=2048 -print_final_stats=1)
if [ "$seconds" = 0 ]; then
    exec "$program" "${options[@]}" "$@"
fi
exec "$program" "${options[@]}" -max_total_time="$seconds" "$@" "$out/corpus/$target"
