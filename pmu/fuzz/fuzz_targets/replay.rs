//! libFuzzer target: lines to the replay tool. Every one is answered, whatever it is.
#![no_main]

#[path = "../../examples/replay/engine.rs"]
mod engine;
#[path = "../../examples/replay/input.rs"]
mod input;
#[path = "../../examples/replay/recorder.rs"]
mod recorder;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut engine = engine::Engine::default();
    for line in String::from_utf8_lossy(data).lines() {
        let answer = engine.line(line).to_json();
        assert!(answer["ok"].is_boolean());
    }
});
