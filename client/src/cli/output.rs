//! Prints answers. Everything goes through here, so that a closed pipe is an error value and never a panic.

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use std::io::{self, Write as _};

/// Prints one line.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Prints one JSON object on one line.
pub(crate) fn json(value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string(value).map_err(io::Error::other)?;
    line(&text)
}

/// Prints bytes as they are.
pub(crate) fn raw(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// A plain table: no lines, columns that line up, so that `awk` and eyes can both read it.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(|title| title.to_uppercase()));
    table
}

/// Prints a table without the blanks at the ends of its lines.
pub(crate) fn print(table: &Table) -> io::Result<()> {
    let text = table.trim_fmt();
    line(&text)
}

/// Prints `key  value` lines; empty values are left out.
pub(crate) fn facts(pairs: &[(&str, String)]) -> io::Result<()> {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or_default();
    for (key, value) in pairs.iter().filter(|(_, value)| !value.is_empty()) {
        line(&format!("{key:width$}  {value}"))?;
    }
    Ok(())
}
