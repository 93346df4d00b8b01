//! Puts the probe guest into memory and says how each vCPU starts.
//!
//! The memory must be fresh (all zero): the patterns that [`super::verify_memory`] expects begin from zero.

use super::blob::{Blob, blob};
use super::config::ProbeConfig;
use super::layout::{self, PAGE};
use super::plan::{Plan, plan};
use super::tables::{self, Gate};
use crate::boot::BootError;
use crate::hypervisor::{EntryMode, InitialRegs};
use crate::memory::GuestMemory;

/// CR4: PAE, RDPMC from ring 3, SSE.
const CR4: u64 = 0x720;
/// RFLAGS: interrupts on.
const RFLAGS: u64 = 0x202;

/// Loads the probe guest and returns one start state a vCPU, in order.
pub fn load(mem: &GuestMemory, cfg: &ProbeConfig) -> Result<Vec<InitialRegs>, BootError> {
    if cfg.memory_bytes != mem.bytes() {
        return Err(BootError::Probe {
            field: "memory_bytes",
            value: cfg.memory_bytes,
            remedy: format!("the machine has {} bytes", mem.bytes()),
        });
    }
    cfg.validate()?;
    let code = blob();
    let plan = cfg.pmu.as_ref().map(|pmu| plan(pmu, cfg.overflow_period)).unwrap_or_default();
    let cr3 = tables::page_tables(cfg.vcpus);
    mem.write(layout::GDT, &tables::build_gdt(cfg.vcpus))?;
    mem.write(layout::IDT, &tables::build_idt(&gates(&code)))?;
    mem.write(layout::CODE, code.bytes)?;
    mem.write(cr3, &tables::build_page_tables(cr3, cfg.memory_bytes))?;
    let mut starts = Vec::with_capacity(cfg.vcpus as usize);
    for vcpu in 0..cfg.vcpus {
        let base = layout::block(vcpu);
        mem.write(base, &block(cfg, &plan, vcpu))?;
        starts.push(InitialRegs {
            mode: EntryMode::LongUser,
            rip: layout::CODE + u64::from(code.entry),
            rsp: base + layout::USER_STACK,
            rflags: RFLAGS,
            rdi: base,
            cr3,
            cr4: CR4,
            gdt: (layout::GDT, tables::gdt_limit(cfg.vcpus)),
            idt: (layout::IDT, 0xfff),
            tss: (tables::tss_selector(vcpu), base + layout::P_TSS, layout::TSS_LIMIT),
            ..InitialRegs::default()
        });
    }
    Ok(starts)
}

fn gates(code: &Blob) -> Vec<Gate> {
    let at = |offset: u32| layout::CODE + u64::from(offset);
    let mut gates: Vec<Gate> = (0..32u8)
        .map(|vector| Gate { vector, handler: at(code.vectors + u32::from(vector) * 8), user: false })
        .collect();
    gates.push(Gate { vector: 3, handler: at(code.gate), user: true });
    gates.push(Gate { vector: 13, handler: at(code.gp), user: false });
    gates.push(Gate { vector: layout::PMI_VECTOR, handler: at(code.pmi), user: false });
    gates.push(Gate { vector: layout::SPURIOUS_VECTOR, handler: at(code.ignore), user: false });
    gates
}

/// The three pages of a vCPU's block.
fn block(cfg: &ProbeConfig, plan: &Plan, vcpu: u32) -> Vec<u8> {
    let base = layout::block(vcpu);
    let mut bytes = vec![0u8; layout::BLOCK as usize];
    let mut put = |at: u64, data: &[u8]| bytes[at as usize..][..data.len()].copy_from_slice(data);
    let ticks = |us: u64| us * cfg.tsc_khz / 1000;
    let (fill_first, fill_pages) = cfg.fill_share(vcpu);
    let ws_ticks = match cfg.dirty_pages_per_second {
        0 => 0,
        rate => (cfg.tsc_khz * 1000 / rate).max(1),
    };
    let prints = vcpu == 0 && cfg.line_every != 0;
    let words = [
        (layout::P_LAPIC, layout::LAPIC_VA),
        (layout::P_PRESET, plan.preset),
        (layout::P_BEAT, ticks(cfg.heartbeat_us.into())),
        (layout::P_CHECK_EVERY, cfg.check_every.into()),
        (layout::P_LINE_EVERY, cfg.line_every.max(1).into()),
        (layout::P_LINES, if prints { u64::from(cfg.vcpus.min(MAX_LINES)) } else { 0 }),
        (layout::P_GAP, ticks(cfg.gap_threshold_us.into())),
        (layout::P_WS, cfg.ws_offset(vcpu)),
        (layout::P_WS_PAGES, cfg.ws_pages()),
        (layout::P_WS_TICKS, ws_ticks),
        (layout::P_WS_SALT, layout::ws_salt(vcpu)),
        (layout::P_FILL, cfg.fill_offset() + fill_first * PAGE),
        (layout::P_FILL_PAGES, fill_pages),
        (layout::P_FILL_FIRST, fill_first),
        (layout::P_VCPU, vcpu.into()),
        (layout::P_TSC_KHZ, cfg.tsc_khz),
        (layout::P_VCPUS, cfg.vcpus.into()),
        (layout::P_SETUP_COUNT, plan.setup.len() as u64),
        (layout::P_CHECK_COUNT, plan.checks.len() as u64),
        (layout::STACK + PAGE - 8, base),
        (layout::R_MAGIC, layout::MAGIC),
        (layout::R_VERSION, layout::VERSION),
        (layout::R_VCPU, vcpu.into()),
    ];
    for (at, value) in words {
        put(at, &value.to_le_bytes());
    }
    let halves = [
        (layout::P_LVTPC, u32::from(layout::PMI_VECTOR)),
        (layout::P_STATUS_BIT, plan.status_bit),
        (layout::P_STATUS_MSR, plan.status_msr),
        (layout::P_CLEAR_MSR, plan.clear_msr),
        (layout::P_OVF_MSR, plan.overflow_msr),
        (layout::P_RDPMC_STRIDE, plan.rdpmc_stride),
        (layout::P_RDPMC_GP, plan.rdpmc_gp),
        (layout::P_RDPMC_FIXED, plan.rdpmc_fixed),
    ];
    for (at, value) in halves {
        put(at, &value.to_le_bytes());
    }
    for (i, w) in plan.setup.iter().enumerate() {
        let at = layout::P_SETUP + i as u64 * layout::SETUP_BYTES;
        put(at, &w.msr.to_le_bytes());
        put(at + 8, &w.value.to_le_bytes());
    }
    for (i, c) in plan.checks.iter().enumerate() {
        let at = layout::P_CHECKS + i as u64 * layout::CHECK_BYTES;
        put(at, &c.msr.to_le_bytes());
        put(at + 4, &c.kind.to_le_bytes());
        put(at + 8, &c.operand.to_le_bytes());
        put(at + 16, &c.slot.to_le_bytes());
        put(at + 24, &c.fault.to_le_bytes());
    }
    put(layout::P_TSS, &tables::build_tss(base + layout::KERNEL_STACK));
    bytes
}

/// vCPUs that a progress report names: the text must fit [`layout::TX_MAX`] (each line is at most 130 bytes).
const MAX_LINES: u32 = 8;
const _: () = assert!(MAX_LINES as usize * 130 <= layout::TX_MAX);

#[cfg(test)]
mod tests {
    use super::super::config::ProbePmu;
    use super::super::{is_probe, report};
    use super::*;

    fn pmu() -> ProbePmu {
        ProbePmu {
            amd: false,
            version: 5,
            gp: 0xff,
            fixed: 0xf,
            gp_width: 48,
            fixed_width: 48,
            full_width_writes: true,
        }
    }

    #[test]
    fn loads_into_the_smallest_machine_and_reports() {
        let mem = GuestMemory::new("probe-test", 2 << 20).unwrap();
        let cfg = ProbeConfig::new(1, 2 << 20, 2_600_000, Some(pmu()));
        let starts = load(&mem, &cfg).unwrap();
        assert_eq!(starts.len(), 1);
        assert!(is_probe(&mem, 0) && !is_probe(&mem, 1));
        assert_eq!(report(&mem, 0).unwrap().heartbeats, 0);
        assert_eq!(report(&mem, 1).unwrap_err().reason(), "NOT_A_PROBE");
    }

    #[test]
    fn refuses_what_is_out_of_range_by_name() {
        let mem = GuestMemory::new("probe-test", 2 << 20).unwrap();
        let good = ProbeConfig::new(1, 2 << 20, 2_600_000, Some(pmu()));
        let field = |cfg: &ProbeConfig| match load(&mem, cfg) {
            Err(BootError::Probe { field, .. }) => field,
            Err(BootError::TooLarge { .. }) => "size",
            other => panic!("{other:?}"),
        };
        assert_eq!(field(&ProbeConfig { vcpus: 0, ..good.clone() }), "vcpus");
        assert_eq!(field(&ProbeConfig { vcpus: 10_000, ..good.clone() }), "vcpus");
        assert_eq!(field(&ProbeConfig { vcpus: 200, ..good.clone() }), "size");
        assert_eq!(field(&ProbeConfig { working_set_bytes: u64::MAX, ..good.clone() }), "size");
        assert_eq!(field(&ProbeConfig { fill_bytes: 2 << 20, ..good.clone() }), "size");
        assert_eq!(field(&ProbeConfig { overflow_period: 9_999, ..good.clone() }), "overflow_period");
        assert_eq!(field(&ProbeConfig { overflow_period: 1 << 47, ..good.clone() }), "overflow_period");
        assert_eq!(field(&ProbeConfig { tsc_khz: 0, ..good.clone() }), "tsc_khz");
        assert_eq!(field(&ProbeConfig { memory_bytes: 4 << 20, ..good.clone() }), "memory_bytes");
        assert_eq!(field(&ProbeConfig { gap_threshold_us: 0, ..good.clone() }), "gap_threshold_us");
        assert!(!is_probe(&mem, 0), "nothing was written");
    }

    #[test]
    fn shares_of_the_fill_area_are_whole() {
        let mut cfg = ProbeConfig::new(3, 64 << 20, 2_600_000, None);
        cfg.fill_bytes = 1000 * PAGE;
        let shares: Vec<_> = (0..3).map(|v| cfg.fill_share(v)).collect();
        assert_eq!(shares, [(0, 334), (334, 333), (667, 333)]);
    }
}
