//! Small guests for the tests: page tables, and code that rustc assembles.
//!
//! Identity map of 0 to 1 GiB, 3 to 4 GiB (no memory there: device accesses) and 4 to 5 GiB, for ring 3 too, with
//! accessed and dirty bits set, so that the processor writes nothing of its own.
#![allow(unsafe_code)]

use crate::hypervisor::{EntryMode, InitialRegs};
use crate::memory::GuestMemory;

/// Where the code goes.
pub(super) const CODE: u64 = 0x1_0000;
/// Where guests leave results.
pub(super) const RESULT: u64 = 0x2_0000;
/// An address without memory.
pub(super) const DEVICE: u64 = 0xd000_0000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x3000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;

std::arch::global_asm!(
    r#"
    .section .rodata.vpmu_test_guests, "a"
    .balign 16
    .globl vpmu_guest_lcg, vpmu_guest_lcg_end
    /* Ring 3. rdi rounds; rax, r8, ymm0 and st(0) grow, and a word of 4096 from [rsi+0x1000] changes with each; results
       at [rsi]; then a store to [rbx]. */
    vpmu_guest_lcg:
        mov r9, 6364136223846793005
        mov r10, 1442695040888963407
        vmovdqu ymm0, [rsi + 64]
        vmovdqu ymm1, [rsi + 96]
        movdqu xmm7, [rsi + 64]
        fninit
        fild qword ptr [rsi + 128]
        fldz
    2:  imul rax, r9
        add rax, r10
        lea r8, [r8 + r8*2 + 1]
        vpaddq ymm0, ymm0, ymm1
        fadd st(0), st(1)
        mov rdx, rax
        shr rdx, 52
        xor [rsi + rdx*8 + 0x1000], rax
        dec rdi
        jnz 2b
        fistp qword ptr [rsi + 136]
        mov [rsi], rax
        mov [rsi + 8], r8
        vmovdqu [rsi + 32], ymm0
        movdqu [rsi + 16], xmm7
        mov [rbx], rax
    3:  jmp 3b
    vpmu_guest_lcg_end:

    .globl vpmu_guest_dirty, vpmu_guest_dirty_end
    /* Ring 3. For ever: [rsi] stores, each to a pseudo-random page of the [rsi+8] from [rsi+16]; then a store to
       [rbx]. The generator goes on in rax. */
    vpmu_guest_dirty:
        mov r9, 6364136223846793005
        mov r10, 1442695040888963407
    2:  mov rcx, [rsi]
        mov r11, [rsi + 8]
        mov r12, [rsi + 16]
    3:  imul rax, r9
        add rax, r10
        mov r13, rax
        shr r13, 33
        mov r14, rax
        xor edx, edx
        mov rax, r13
        div r11
        mov rax, r14
        shl rdx, 12
        mov [r12 + rdx + 8], rax
        dec rcx
        jnz 3b
        mov [rbx], rax
        jmp 2b
    vpmu_guest_dirty_end:

    .globl vpmu_guest_touch, vpmu_guest_touch_end
    /* Ring 3. [rsi] loads, each from the page of [rsi+8] whose number is next in the table at [rsi+16]: the word at 8 is
       mixed into rax and stored at 16. Then a store of rax to [rbx]. rdi counts. */
    vpmu_guest_touch:
        mov rcx, [rsi]
        mov r11, [rsi + 8]
        mov r12, [rsi + 16]
    2:  mov rdx, [r12 + rdi*8]
        shl rdx, 12
        rol rax, 7
        xor rax, [r11 + rdx + 8]
        mov [r11 + rdx + 16], rax
        inc rdi
        cmp rdi, rcx
        jne 2b
        mov [rbx], rax
    3:  jmp 3b
    vpmu_guest_touch_end:

    .globl vpmu_guest_spin, vpmu_guest_spin_end
    vpmu_guest_spin:
    2:  inc rax
        jmp 2b
    vpmu_guest_spin_end:

    .globl vpmu_guest_doorbell, vpmu_guest_doorbell_end
    /* Ring 0: OUT for ever. */
    vpmu_guest_doorbell:
        mov edx, 0x80
    2:  out dx, al
        jmp 2b
    vpmu_guest_doorbell_end:

    .globl vpmu_guest_msr, vpmu_guest_msr_end
    /* Ring 0: RDMSR of a filtered MSR for ever. */
    vpmu_guest_msr:
        mov ecx, 0x38f
    2:  rdmsr
        jmp 2b
    vpmu_guest_msr_end:

    .globl vpmu_guest_sipi, vpmu_guest_sipi_end
    /* Ring 0: INIT, then SIPI with vector 8 to APIC id 1, by the local APIC at [rbx]; then OUT. */
    vpmu_guest_sipi:
        mov eax, 0x01000000
        mov [rbx + 0x310], eax
        mov eax, 0x00004500
        mov [rbx + 0x300], eax
        mov eax, 0x01000000
        mov [rbx + 0x310], eax
        mov eax, 0x00004608
        mov [rbx + 0x300], eax
        mov edx, 0x80
        out dx, al
    2:  jmp 2b
    vpmu_guest_sipi_end:

    .globl vpmu_guest_exits, vpmu_guest_exits_end
    /* Ring 0: one of each exit; results from [rsi]. */
    vpmu_guest_exits:
        mov ecx, 0x38f
        rdmsr
        mov [rsi], eax
        mov [rsi + 4], edx
        mov ecx, 0xc1
        mov eax, 0x11223344
        mov edx, 0x55667788
        wrmsr
        mov edx, 0x60
        in al, dx
        mov [rsi + 8], al
        in ax, dx
        mov [rsi + 10], ax
        in eax, dx
        mov [rsi + 12], eax
        mov edx, 0x3f8
        mov eax, 0xdeadbeef
        out dx, eax
        out dx, al
        mov edx, 0x64
        mov ecx, 5
        lea rdi, [rsi + 16]
        cld
        rep insb
        mov rax, [rbx + 8]
        mov [rsi + 24], rax
        movzx eax, word ptr [rbx + 2]
        mov [rsi + 32], eax
        mov word ptr [rbx + 16], 0x1234
        mov rax, [rsi + 24]
        mov [rbx + 24], rax
        movdqu xmm0, [rsi + 64]
        movdqu [rbx + 32], xmm0
        mov ecx, 0x186
        rdmsr
        ud2
        /* The handler of #GP goes on here. */
    vpmu_guest_exits_gp:
        mov edx, 0x80
        mov al, 0x0d
        out dx, al
    4:  jmp 4b
    .globl vpmu_guest_exits_gp
    vpmu_guest_exits_end:
    .previous
    "#
);

macro_rules! guests {
    ($($function:ident: $start:ident, $end:ident;)*) => {
        // SAFETY: all are labels of the assembly above, around its bytes.
        unsafe extern "C" {
            $(static $start: u8; static $end: u8;)*
            static vpmu_guest_exits_gp: u8;
        }
        $(
            pub(super) fn $function() -> &'static [u8] {
                let (start, end) = (&raw const $start, &raw const $end);
                // SAFETY: both symbols are in the read-only section above, the second behind the first.
                unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
            }
        )*
    };
}

guests! {
    lcg: vpmu_guest_lcg, vpmu_guest_lcg_end;
    dirty: vpmu_guest_dirty, vpmu_guest_dirty_end;
    touch: vpmu_guest_touch, vpmu_guest_touch_end;
    spin: vpmu_guest_spin, vpmu_guest_spin_end;
    doorbell: vpmu_guest_doorbell, vpmu_guest_doorbell_end;
    msr: vpmu_guest_msr, vpmu_guest_msr_end;
    sipi: vpmu_guest_sipi, vpmu_guest_sipi_end;
    exits: vpmu_guest_exits, vpmu_guest_exits_end;
}

/// Offset of the #GP handler in `exits`.
pub(super) fn exits_gp() -> u64 {
    ((&raw const vpmu_guest_exits_gp).addr() - (&raw const vpmu_guest_exits).addr()) as u64
}

/// Writes tables and code; how to start there.
pub(super) fn load(memory: &GuestMemory, code: &[u8], mode: EntryMode, handler: Option<u64>) -> InitialRegs {
    let put = |at: u64, value: u64| memory.store_u64(at, value).expect("inside");
    let gdt = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for (at, entry) in (0u64..).zip(gdt) {
        put(GDT + at * 8, entry);
    }
    if let Some(handler) = handler {
        // Vector 13, present 64-bit interrupt gate to 0x08.
        put(IDT + 13 * 16, (handler & 0xffff) | 0x08 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48);
    }
    put(PML4, PDPT | 0x27);
    for (gib, table) in [(0u64, 0xb000u64), (3, 0xc000), (4, 0xd000)] {
        put(PDPT + gib * 8, table | 0x27);
        for entry in 0..512u64 {
            put(table + entry * 8, (gib << 30) | (entry << 21) | 0xe7);
        }
    }
    memory.write(CODE, code).expect("inside");
    InitialRegs {
        mode,
        rip: CODE,
        rsp: 0x8000,
        rsi: RESULT,
        rbx: DEVICE,
        cr3: PML4,
        // PAE, MCE, PGE, OSFXSR, OSXMMEXCPT, OSXSAVE.
        cr4: 0x4_06e0,
        gdt: (GDT, 39),
        idt: (IDT, 0xfff),
        ..InitialRegs::default()
    }
}
