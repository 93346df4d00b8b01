//! Saving and restoring what KVM knows of a VM and its vCPUs.
//!
//! A piece is (kind, version, bytes); the bytes are KVM's own structures of x86-64, except `cpuid` (40-byte entries),
//! `msrs` (16-byte entries: number, zero, value) and `tsc` (see [`Tsc`]). Everything is checked before anything is
//! set; KVM checks the contents again. Pieces are set in the order of [`VCPU_ORDER`], however they arrive.
//!
//! Order matters: CPUID decides what the rest may hold; the APIC's base (sregs) decides its mode; the TSC deadline
//! (msrs) needs the APIC's timer mode. On saving, mp_state comes first because reading it makes KVM digest INIT and
//! SIPI into the other pieces.

use std::sync::OnceLock;

use kvm_bindings::*;
use vpmu_proto::worker::StatePiece;

use super::vcpu::KvmVcpu;
use super::{Shared, cpuid};
use crate::host::clock;
use crate::hypervisor::HvError;
use crate::sys::{self, State, failed};

const VERSION: u32 = 1;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_ENTRY: usize = 16;

/// Kinds of a vCPU in the order in which they are set; `sregs` stands for `sregs2` too.
const VCPU_ORDER: [&str; 11] = [
    "cpuid",
    "tsc",
    "sregs",
    "regs",
    "xcrs",
    "xsave",
    "debugregs",
    "lapic",
    "msrs",
    "vcpu_events",
    "mp_state",
];
/// Kinds of a VM.
const VM_ORDER: [&str; 5] = ["irqchip0", "irqchip1", "irqchip2", "pit2", "clock"];

fn bad(kind: &str, problem: impl Into<String>) -> HvError {
    HvError::State { kind: kind.to_owned(), problem: problem.into() }
}

fn piece(kind: &str, data: Vec<u8>) -> StatePiece {
    StatePiece { kind: kind.to_owned(), version: VERSION, data }
}

fn canonical(kind: &str) -> &str {
    if kind == "sregs2" { "sregs" } else { kind }
}

/// Puts pieces into the order in which they are set; refuses unknown, doubled, missing and newer ones.
fn ordered<'a>(
    pieces: &'a [StatePiece],
    order: &[&str],
    optional: &[&str],
) -> Result<Vec<&'a StatePiece>, HvError> {
    let mut found: Vec<Option<&StatePiece>> = vec![None; order.len()];
    for piece in pieces {
        let shown: String = piece.kind.chars().take(32).collect();
        let Some(at) = order.iter().position(|kind| *kind == canonical(&piece.kind)) else {
            return Err(bad(&shown, "unknown kind; the source runs a newer version?"));
        };
        if piece.version != VERSION {
            return Err(bad(&shown, format!("version {} is not {VERSION}", piece.version)));
        }
        if found[at].replace(piece).is_some() {
            return Err(bad(&shown, "is there twice"));
        }
    }
    for (kind, found) in order.iter().zip(&found) {
        if found.is_none() && !optional.contains(kind) {
            return Err(bad(kind, "is missing"));
        }
    }
    Ok(found.into_iter().flatten().collect())
}

fn fixed(kind: &str) -> Option<State> {
    [
        sys::REGS,
        sys::SREGS,
        sys::SREGS2,
        sys::XCRS,
        sys::DEBUGREGS,
        sys::LAPIC,
        sys::VCPU_EVENTS,
        sys::MP_STATE,
        sys::PIT2,
        sys::CLOCK,
    ]
    .into_iter()
    .find(|state| state.kind == kind)
}

fn check_len(kind: &str, data: &[u8], want: usize) -> Result<(), HvError> {
    if data.len() == want {
        Ok(())
    } else {
        Err(bad(kind, format!("{} bytes instead of {want}", data.len())))
    }
}

pub(super) fn save_vcpu(vcpu: &mut KvmVcpu) -> Result<Vec<StatePiece>, HvError> {
    let fd = &vcpu.fd;
    let read = |state: State| state.read(fd, &[]).map(|data| piece(state.kind, data));
    let mp_state = read(sys::MP_STATE)?;
    let mut pieces = vec![piece("cpuid", vcpu.cpuid.clone())];
    if let Some(tsc) = Tsc::read(vcpu)? {
        pieces.push(piece("tsc", tsc.to_bytes()));
    }
    pieces.push(read(if vcpu.shared.sregs2 { sys::SREGS2 } else { sys::SREGS })?);
    pieces.push(read(sys::REGS)?);
    pieces.push(read(sys::XCRS)?);
    pieces.push(piece("xsave", sys::get_xsave(fd, vcpu.shared.xsave_size)?));
    pieces.push(read(sys::DEBUGREGS)?);
    let lapic = read(sys::LAPIC)?;
    let deadline_mode = deadline_armed(&lapic.data);
    pieces.push(lapic);
    pieces.push(piece("msrs", read_msrs(vcpu, deadline_mode)?));
    pieces.push(read(sys::VCPU_EVENTS)?);
    pieces.push(mp_state);
    Ok(pieces)
}

pub(super) fn restore_vcpu(vcpu: &mut KvmVcpu, pieces: &[StatePiece]) -> Result<(), HvError> {
    let pieces = ordered(pieces, &VCPU_ORDER, &["tsc"])?;
    let mut entries = Vec::new();
    let mut msrs = Vec::new();
    let mut tsc = None;
    for p in &pieces {
        match p.kind.as_str() {
            "cpuid" => entries = cpuid::from_bytes(&p.data).map_err(|e| bad("cpuid", e))?,
            "msrs" => msrs = parse_msrs(&p.data)?,
            "tsc" => tsc = Some(Tsc::from_bytes(&p.data)?),
            "xsave" => check_len("xsave", &p.data, vcpu.shared.xsave_size.max(sys::XSAVE.size))?,
            "sregs2" if !vcpu.shared.sregs2 => {
                return Err(bad("sregs2", "this host's KVM lacks KVM_SET_SREGS2; use Linux 5.14 or later"));
            }
            kind => check_len(kind, &p.data, fixed(kind).map_or(0, |s| s.size))?,
        }
    }
    for p in pieces {
        match p.kind.as_str() {
            // Slow (tens of microseconds), and mostly set already when the vCPU was made.
            "cpuid" if p.data == vcpu.cpuid => {}
            "cpuid" => {
                vcpu.set_cpuid(&entries)?;
                if vcpu.cpuid != p.data {
                    let differences = vcpu.cpuid_differences();
                    return Err(bad("cpuid", format!("this host's KVM changes it: {differences:x?}")));
                }
            }
            "tsc" => {
                if let Some(tsc) = &tsc {
                    tsc.write(vcpu)?;
                }
            }
            "xsave" => sys::set_xsave(&vcpu.fd, vcpu.shared.xsave_size, &p.data)?,
            "msrs" => write_msrs(vcpu, &msrs)?,
            kind => {
                if let Some(state) = fixed(kind) {
                    state.write(&vcpu.fd, kind, &p.data)?;
                }
            }
        }
    }
    Ok(())
}

pub(super) fn save_vm(shared: &Shared) -> Result<Vec<StatePiece>, HvError> {
    let mut pieces = Vec::with_capacity(VM_ORDER.len());
    for (chip, kind) in (0u32..3).zip(VM_ORDER) {
        pieces.push(piece(kind, sys::IRQCHIP.read(&shared.fd, &chip.to_le_bytes())?));
    }
    pieces.push(piece("pit2", sys::PIT2.read(&shared.fd, &[])?));
    let mut clock = sys::CLOCK.read(&shared.fd, &[])?;
    mask_clock_flags(&mut clock);
    pieces.push(piece("clock", clock));
    Ok(pieces)
}

pub(super) fn restore_vm(shared: &Shared, pieces: &[StatePiece]) -> Result<(), HvError> {
    let pieces = ordered(pieces, &VM_ORDER, &[])?;
    for p in &pieces {
        match p.kind.as_str() {
            "pit2" => check_len("pit2", &p.data, sys::PIT2.size)?,
            "clock" => check_len("clock", &p.data, sys::CLOCK.size)?,
            kind => {
                check_len(kind, &p.data, sys::IRQCHIP.size)?;
                let chip = p.data.first_chunk::<4>().map_or(u32::MAX, |id| u32::from_le_bytes(*id));
                if kind.strip_prefix("irqchip") != Some(chip.to_string().as_str()) {
                    return Err(bad(kind, format!("holds chip {chip}")));
                }
            }
        }
    }
    for p in pieces {
        match p.kind.as_str() {
            "pit2" => sys::PIT2.write(&shared.fd, "pit2", &p.data)?,
            "clock" => {
                let mut clock = p.data.clone();
                mask_clock_flags(&mut clock);
                sys::CLOCK.write(&shared.fd, "clock", &clock)?;
            }
            kind => sys::IRQCHIP.write(&shared.fd, kind, &p.data)?,
        }
    }
    Ok(())
}

/// With no flag KVM sets the clock to just the value; with KVM_CLOCK_REALTIME it would add the time since, and older
/// kernels refuse any flag.
fn mask_clock_flags(clock: &mut [u8]) {
    const FLAGS: usize = std::mem::offset_of!(kvm_clock_data, flags);
    if let Some(flags) = clock.get_mut(FLAGS..FLAGS + 4) {
        flags.fill(0);
    }
}

/// Whether the APIC's timer is in TSC-deadline mode and not masked.
fn deadline_armed(lapic: &[u8]) -> bool {
    const LVTT: usize = 0x320;
    let lvtt = lapic.get(LVTT..).and_then(|l| l.first_chunk::<4>()).map_or(0, |r| u32::from_le_bytes(*r));
    lvtt >> 17 & 3 == 2 && lvtt >> 16 & 1 == 0
}

/// KVM's list of MSRs without the time stamp counter (piece `tsc`) and without the PMU: that is the switcher's or, in PMU
/// mode `kvm`, travels as an image of its own, which is set in an order that counts nothing early.
fn read_msrs(vcpu: &KvmVcpu, deadline_armed: bool) -> Result<Vec<u8>, HvError> {
    let mut wanted: Vec<u32> = vcpu.shared.system.msrs.clone();
    wanted.retain(|msr| *msr != MSR_TSC && !pmu::is_pmu_msr(*msr));
    let mut bytes = Vec::with_capacity(wanted.len() * MSR_ENTRY);
    let mut from = 0;
    while let Some(rest) = wanted.get(from..).filter(|r| !r.is_empty()) {
        let rest = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<kvm_msr_entry> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut list =
            Msrs::from_entries(&entries).map_err(|e| bad("msrs", format!("too many MSRs: {e:?}")))?;
        let got = vcpu.fd.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
        for entry in list.as_slice().iter().take(got) {
            let mut value = entry.data;
            if entry.index == MSR_TSC_DEADLINE && value == 0 && deadline_armed {
                // The deadline passed and the interrupt is on its way inside KVM, where it cannot be read: a
                // deadline in the past makes it come again. A guest that had disarmed gets one spurious tick.
                value = 1;
            }
            bytes.extend_from_slice(&entry.index.to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        // KVM stops at one that this vCPU does not have: that one is not state; go on behind it.
        from += if got < rest.len() { got + 1 } else { got };
    }
    Ok(bytes)
}

fn parse_msrs(bytes: &[u8]) -> Result<Vec<kvm_msr_entry>, HvError> {
    let (chunks, rest) = bytes.as_chunks::<MSR_ENTRY>();
    if !rest.is_empty() {
        return Err(bad("msrs", format!("{} bytes are no list of {MSR_ENTRY}-byte entries", bytes.len())));
    }
    if chunks.len() > 4 * KVM_MAX_MSR_ENTRIES {
        return Err(bad("msrs", format!("{} entries are too many", chunks.len())));
    }
    let mut entries = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let word = |at: usize| {
            chunk.get(at..).and_then(|c| c.first_chunk::<4>()).map_or(0, |w| u32::from_le_bytes(*w))
        };
        let data = u64::from(word(8)) | u64::from(word(12)) << 32;
        let index = word(0);
        if index == MSR_TSC {
            return Err(bad("msrs", "holds IA32_TSC, which travels in piece tsc"));
        }
        entries.push(kvm_msr_entry { index, reserved: 0, data });
    }
    Ok(entries)
}

fn write_msrs(vcpu: &KvmVcpu, entries: &[kvm_msr_entry]) -> Result<(), HvError> {
    for part in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let list = Msrs::from_entries(part).map_err(|e| bad("msrs", format!("too many MSRs: {e:?}")))?;
        let set = vcpu.fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?;
        if let Some(refused) = part.get(set) {
            return Err(bad("msrs", format!("KVM refuses MSR {:#x} = {:#x}", refused.index, refused.data)));
        }
    }
    Ok(())
}

/// Where the guest's time stamp counter stands against the host's.
///
/// On the same boot of the same host the offset goes on unchanged. On another host it is moved once for the whole VM,
/// by what both hosts' clocks say has passed, so that the vCPUs stay in step to the tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tsc {
    khz: u64,
    offset: u64,
    host: u64,
    realtime_ns: u64,
    boot_id: [u8; 16],
}

/// Added to every offset of a VM that came from another host.
pub(super) type TscShift = OnceLock<u64>;

impl Tsc {
    fn read(vcpu: &KvmVcpu) -> Result<Option<Self>, HvError> {
        let Some(offset) = sys::get_tsc_offset(&vcpu.fd)? else { return Ok(None) };
        let khz = vcpu.fd.get_tsc_khz().map_or(0, u64::from);
        Ok(Some(Self {
            khz,
            offset,
            host: clock::tsc(),
            realtime_ns: clock::realtime_ns(),
            boot_id: clock::boot_id_bytes(),
        }))
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(48);
        for word in [self.khz, self.offset, self.host, self.realtime_ns] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.boot_id);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, HvError> {
        check_len("tsc", bytes, 48)?;
        let word = |at: usize| {
            bytes.get(at..).and_then(|b| b.first_chunk::<8>()).map_or(0, |w| u64::from_le_bytes(*w))
        };
        let boot_id = bytes.last_chunk::<16>().copied().unwrap_or_default();
        let tsc = Self { khz: word(0), offset: word(8), host: word(16), realtime_ns: word(24), boot_id };
        // 100 GHz: far above any, and small enough that no product below overflows 128 bits.
        if tsc.khz > 100_000_000 {
            return Err(bad("tsc", format!("{} kHz", tsc.khz)));
        }
        Ok(tsc)
    }

    /// What must be added to the offset on a host whose TSC reads `host_tsc` at `realtime_ns`.
    fn shift(&self, host_tsc: u64, realtime_ns: u64) -> u64 {
        // A clock that runs behind the source's must not turn the guest's time back.
        let passed_ns = realtime_ns.saturating_sub(self.realtime_ns);
        let ticks = u128::from(passed_ns) * u128::from(self.khz) / 1_000_000;
        self.host.wrapping_add(ticks as u64).wrapping_sub(host_tsc)
    }

    fn write(&self, vcpu: &KvmVcpu) -> Result<(), HvError> {
        let here = vcpu.fd.get_tsc_khz().map_or(0, u64::from);
        // Within 250 ppm (KVM's own tolerance) a guest lives with it; beyond that KVM must scale.
        if self.khz != 0 && here.abs_diff(self.khz) * 4000 > here {
            let khz = u32::try_from(self.khz).unwrap_or(u32::MAX);
            vcpu.fd.set_tsc_khz(khz).map_err(|e| {
                bad("tsc", format!("the guest's {khz} kHz cannot be had on this host with {here} kHz: {e}"))
            })?;
        }
        let shift = if self.boot_id == clock::boot_id_bytes() {
            0
        } else {
            *vcpu.shared.tsc_shift.get_or_init(|| self.shift(clock::tsc(), clock::realtime_ns()))
        };
        sys::set_tsc_offset(&vcpu.fd, self.offset.wrapping_add(shift))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_ordered_and_checked() {
        let all: Vec<StatePiece> = VM_ORDER.iter().rev().map(|k| piece(k, vec![])).collect();
        let kinds: Vec<String> =
            ordered(&all, &VM_ORDER, &[]).expect("good").iter().map(|p| p.kind.clone()).collect();
        assert_eq!(kinds, VM_ORDER);
        let problem =
            |pieces: &[StatePiece]| ordered(pieces, &VM_ORDER, &["clock"]).expect_err("bad").to_string();
        assert!(problem(&all[1..4]).contains("irqchip0: is missing"));
        assert!(problem(&[all.clone(), all.clone()].concat()).contains("twice"));
        assert!(problem(&[piece("zebra", vec![])]).contains("unknown"));
        assert!(problem(&[StatePiece { version: 2, ..all[0].clone() }]).contains("version 2"));
        assert!(ordered(&all[1..], &VM_ORDER, &["clock"]).is_ok());
    }

    #[test]
    fn msr_lists_are_bounded() {
        assert!(parse_msrs(&[0; 17]).is_err());
        assert!(parse_msrs(&vec![0; MSR_ENTRY * 4 * 257]).is_err());
        let mut tsc = vec![0; MSR_ENTRY];
        tsc[0] = 0x10;
        assert!(parse_msrs(&tsc).is_err());
        assert_eq!(
            parse_msrs(&[1, 2, 0, 0, 9, 9, 9, 9, 1, 0, 0, 0, 0, 0, 0, 0x80]).expect("good"),
            [kvm_msr_entry { index: 0x201, reserved: 0, data: 1 << 63 | 1 }]
        );
    }

    #[test]
    fn tsc_moves_on_by_the_time_that_passed() {
        let tsc = Tsc { khz: 2_000_000, offset: 5, host: 1_000, realtime_ns: 50, boot_id: [7; 16] };
        assert_eq!(Tsc::from_bytes(&tsc.to_bytes()).expect("good"), tsc);
        // 10 ns at 2 GHz are 20 ticks; the new host's counter stands at 400.
        assert_eq!(tsc.shift(400, 60), 620);
        assert_eq!(tsc.shift(400, 40), 600, "a clock behind the source's counts as no time");
        assert_eq!(tsc.shift(5_000, 50), 4_000u64.wrapping_neg());
        assert!(Tsc::from_bytes(&[0; 47]).is_err());
        assert!(Tsc::from_bytes(&Tsc { khz: u64::MAX, ..tsc }.to_bytes()).is_err());
    }
}
