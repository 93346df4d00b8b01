//! Special registers at the start of a vCPU, and the registers that are told of when a guest ends.

use kvm_bindings::*;

use super::KvmVcpu;
use crate::hypervisor::{EntryMode, InitialRegs};

/// For people: registers, and the bytes at the instruction pointer where they can be read.
pub(super) fn describe(vcpu: &mut KvmVcpu) -> String {
    let (regs, sregs) = match (vcpu.fd.get_regs(), vcpu.fd.get_sregs()) {
        (Ok(regs), Ok(sregs)) => (regs, sregs),
        (Err(e), _) | (_, Err(e)) => return format!("registers cannot be read: {e}"),
    };
    let mut code = [0u8; 16];
    let read = match vcpu.fd.translate_gva(regs.rip) {
        Ok(at) => at.valid != 0 && vcpu.shared.memory.read(at.physical_address, &mut code).is_ok(),
        Err(_) => false,
    };
    text(vcpu.index, &regs, &sregs, read.then_some(code))
}

/// What matters most comes first: whoever keeps it may cut it.
fn text(vcpu: u32, regs: &kvm_regs, sregs: &kvm_sregs, code: Option<[u8; 16]>) -> String {
    let code = code.map_or_else(|| "not readable".to_owned(), |code| format!("{code:02x?}"));
    format!(
        "vcpu {vcpu} rip {:#x} code at rip: {code} cpl {} rflags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} \
         idt {:#x}+{:#x} cs {:#x} ss {:#x} rsp {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} rbp {:#x} \
         r8 {:#x} r9 {:#x} r10 {:#x} r11 {:#x} r12 {:#x} r13 {:#x} r14 {:#x} r15 {:#x}",
        regs.rip,
        sregs.cs.dpl,
        regs.rflags,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer,
        sregs.idt.base,
        sregs.idt.limit,
        sregs.cs.selector,
        sregs.ss.selector,
        regs.rsp,
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
    )
}

/// A flat segment. `kind` is the descriptor type (11 code, 3 data), `long` the L bit.
fn segment(selector: u16, kind: u8, dpl: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl,
        db: u8::from(!(long && kind == 11)),
        s: 1,
        l: u8::from(long && kind == 11),
        g: 1,
        ..Default::default()
    }
}

/// Fills in the special registers that a vCPU starts with.
pub(crate) fn initial_sregs(sregs: &mut kvm_sregs, regs: &InitialRegs) {
    const PE: u64 = 1;
    const ET: u64 = 1 << 4;
    // PG, AM, WP, NE, ET, MP, PE.
    const LONG_CR0: u64 = 0x8005_0033;
    // NXE is left to the guest; LMA, LME, SCE.
    const LONG_EFER: u64 = 0x501;
    let (code, data) = match regs.mode {
        EntryMode::Long => (segment(0x08, 11, 0, true), segment(0x10, 3, 0, true)),
        EntryMode::LongUser => (segment(0x23, 11, 3, true), segment(0x1b, 3, 3, true)),
        EntryMode::Protected32 => (segment(0x10, 11, 0, false), segment(0x18, 3, 0, false)),
    };
    sregs.cs = code;
    sregs.ss = data;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.cr3 = regs.cr3;
    sregs.cr4 = regs.cr4;
    (sregs.cr0, sregs.efer) =
        if regs.mode == EntryMode::Protected32 { (PE | ET, 0) } else { (LONG_CR0, LONG_EFER) };
    (sregs.gdt.base, sregs.gdt.limit) = regs.gdt;
    (sregs.idt.base, sregs.idt.limit) = regs.idt;
    let (selector, base, limit) = regs.tss;
    if selector != 0 || regs.mode == EntryMode::Protected32 {
        // Type 11: busy TSS of the mode. PVH wants base 0 and limit 0x67 when nothing is given.
        let limit = if selector == 0 { 0x67 } else { limit };
        sregs.tr =
            kvm_segment { base, limit, selector, type_: 11, present: 1, s: 0, g: 0, ..Default::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_text_is_bounded_and_begins_with_the_instruction() {
        let m = u64::MAX;
        let regs = kvm_regs {
            rax: m,
            rbx: m,
            rcx: m,
            rdx: m,
            rsi: m,
            rdi: m,
            rsp: m,
            rbp: m,
            r8: m,
            r9: m,
            r10: m,
            r11: m,
            r12: m,
            r13: m,
            r14: m,
            r15: m,
            rip: m,
            rflags: m,
        };
        let mut sregs = kvm_sregs { cr0: m, cr2: m, cr3: m, cr4: m, efer: m, ..Default::default() };
        (sregs.idt.base, sregs.idt.limit) = (m, u16::MAX);
        (sregs.cs.selector, sregs.ss.selector) = (u16::MAX, u16::MAX);
        let text = text(u32::MAX, &regs, &sregs, Some([0xff; 16]));
        // Beside it a reason and KVM's own words go into the 1024 bytes that a machine's message has for an end.
        assert!(text.len() < 900, "{} bytes", text.len());
        assert!(text.find("code at rip: [ff").is_some_and(|at| at < 64), "{text}");
    }
}
