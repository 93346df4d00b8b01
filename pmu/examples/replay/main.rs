//! The replay tool: JSON lines in, one JSON line out for each, in order, flushed (switch.md section 9).
//!
//! ```text
//! $ cargo run -p pmu --example replay <<'EOT'
//! {"op":"host","vendor":"intel","version":5,"gp":8,"fixed":4,"gp_width":48,"fixed_width":48}
//! {"op":"guest","id":"a","gp":8,"fixed":3,"policy":"strict"}
//! {"op":"guest_wrmsr","id":"a","msr":390,"value":4391104}
//! {"op":"guest_wrmsr","id":"a","msr":911,"value":1}
//! {"op":"load","id":"a"}
//! {"op":"count","events":{"instructions":1000}}
//! {"op":"put","id":"a"}
//! {"op":"guest_rdmsr","id":"a","msr":193}
//! EOT
//! ```
//!
//! Outside checkers drive the switcher through it and compare what the guest sees, which accesses were made and in
//! which order. Every line is answered, an invalid one with `"ok":false` and an `error`; the stream goes on.
#![forbid(unsafe_code)]

mod engine;
mod input;
mod recorder;
#[cfg(test)]
mod tests;

use std::io::{self, BufRead, Read, Write};

/// Longest line that is looked at; the rest of a longer one is skipped and answered with an error.
const MAX_LINE: usize = 64 * 1024;

fn main() -> io::Result<()> {
    let mut input = io::stdin().lock();
    let mut output = io::stdout().lock();
    let mut engine = engine::Engine::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.len() > MAX_LINE && line.last() != Some(&b'\n') {
            skip_line(&mut input)?;
            line.clear();
        }
        let text = String::from_utf8_lossy(&line);
        let answer = if line.is_empty() {
            engine::Answer::error(format!("a line longer than {MAX_LINE} bytes"))
        } else {
            engine.line(&text)
        };
        writeln!(output, "{}", answer.to_json())?;
        output.flush()?;
    }
}

fn skip_line(input: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        let end = buffer.iter().position(|b| *b == b'\n');
        let used = end.map_or(buffer.len(), |i| i + 1);
        input.consume(used);
        if end.is_some() {
            return Ok(());
        }
    }
}
