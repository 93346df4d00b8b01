//! Checks guest memory against the patterns that the probe writes, to the byte in the fill area and to the pass in the
//! working sets. Call it while the vCPUs are stopped.

use super::config::ProbeConfig;
use super::layout::{self, PAGE};
use crate::memory::{GuestMemory, MemoryError};

/// What is wrong with the memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// A word does not have the value that the guest's report implies.
    #[error("{area} of vCPU {vcpu}, page {page}, byte {byte}: expected {expected:#x}, found {found:#x}")]
    Mismatch {
        /// "fill area" or "working set".
        area: &'static str,
        /// Whose.
        vcpu: u32,
        /// Page number in it.
        page: u64,
        /// Byte in the page.
        byte: u64,
        /// Expected.
        expected: u64,
        /// Found.
        found: u64,
    },
    /// Guest memory refused an access.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

/// Checks all fill and working set pages; returns how many were checked. One page of each, the one that the guest is
/// writing, may be half written.
pub fn verify_memory(mem: &GuestMemory, cfg: &ProbeConfig) -> Result<u64, VerifyError> {
    let mut pages = 0;
    for vcpu in 0..cfg.vcpus {
        pages += verify_fill(mem, cfg, vcpu)? + verify_working_set(mem, cfg, vcpu)?;
    }
    Ok(pages)
}

fn verify_fill(mem: &GuestMemory, cfg: &ProbeConfig, vcpu: u32) -> Result<u64, VerifyError> {
    let filled = mem.load_u64(layout::block(vcpu) + layout::R_FILLED)?;
    let (first, count) = cfg.fill_share(vcpu);
    let mut page = [0u8; PAGE as usize];
    for i in (0..count).filter(|i| *i != filled) {
        mem.read_at(cfg.fill_offset() + (first + i) * PAGE, &mut page)?;
        let expected = if i < filled { layout::fill_word(first + i) } else { 0 };
        for (at, word) in page.chunks_exact(8).enumerate() {
            let found = u64::from_le_bytes(word.try_into().unwrap_or_default());
            if found != expected {
                let byte = at as u64 * 8;
                return Err(VerifyError::Mismatch {
                    area: "fill area",
                    vcpu,
                    page: first + i,
                    byte,
                    expected,
                    found,
                });
            }
        }
    }
    Ok(count)
}

fn verify_working_set(mem: &GuestMemory, cfg: &ProbeConfig, vcpu: u32) -> Result<u64, VerifyError> {
    let base = layout::block(vcpu);
    let pass = mem.load_u64(base + layout::R_WS_PASS)?;
    let next = mem.load_u64(base + layout::R_WS_NEXT)?;
    // Between "next := 0" and "pass += 1" the guest has written every page in this pass; page 0 need not be exempt,
    // but all others are one pass ahead of what the report says.
    let last = cfg.ws_pages().saturating_sub(1);
    let rolling = next == 0 && pass != 0 && last > 0 && {
        let expected = layout::ws_word(layout::ws_salt(vcpu), pass, last);
        word(mem, cfg.ws_offset(vcpu) + last * PAGE)? == expected
    };
    for i in 0..cfg.ws_pages() {
        if i == next {
            continue;
        }
        let of = if i < next || rolling { pass } else { pass.saturating_sub(1) };
        let value = layout::ws_word(layout::ws_salt(vcpu), of, i);
        let expected = if of == 0 { [0, 0] } else { [value, !value] };
        for (byte, expected) in [(0, expected[0]), (PAGE - 8, expected[1])] {
            let found = word(mem, cfg.ws_offset(vcpu) + i * PAGE + byte)?;
            if found != expected {
                return Err(VerifyError::Mismatch {
                    area: "working set",
                    vcpu,
                    page: i,
                    byte,
                    expected,
                    found,
                });
            }
        }
    }
    Ok(cfg.ws_pages())
}

fn word(mem: &GuestMemory, offset: u64) -> Result<u64, MemoryError> {
    let mut bytes = [0u8; 8];
    mem.read_at(offset, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
