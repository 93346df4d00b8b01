// The probe guest. Intel syntax; names in braces come from layout.rs.
//
// Ring 0 is a handful of instructions in each handler (it may be emulated at half a microsecond each); the
// workload runs in ring 3. int3 is the gate into ring 0: r8d chooses the service, r9d tells of a fault.
//   r8d = 0  wrmsr: ecx, edx:eax          r8d = 1  rdmsr: ecx -> edx:eax         r8d = 2  out dx, al
// The section is data, so padding must be given as nops.
// r15 is the vCPU's block (parameters, stacks, report page) at all times in ring 3, so handlers use it too.

        .section .rodata.vpmu_probe, "a", @progbits
        .balign 64, 0x90
        .globl  vpmu_probe_start
        .hidden vpmu_probe_start
vpmu_probe_start:
        .long   .Lvp_entry - vpmu_probe_start           // offsets that the loader wants: blob.rs
        .long   .Lvp_gate - vpmu_probe_start
        .long   .Lvp_gp - vpmu_probe_start
        .long   .Lvp_pmi - vpmu_probe_start
        .long   .Lvp_ignore - vpmu_probe_start
        .long   .Lvp_vectors - vpmu_probe_start

// --- ring 0 -------------------------------------------------------------------------------------------------------

        .balign 16, 0x90
.Lvp_gate:                                              // int3 from ring 3
        cmp     r8d, 1
        je      .Lvp_gate_rdmsr
        ja      .Lvp_gate_out
.Lvp_gate_wrmsr:
        wrmsr
        iretq
.Lvp_gate_rdmsr:
        rdmsr
        iretq
.Lvp_gate_out:
        out     dx, al
.Lvp_ignore:                                            // spurious interrupt: nothing to do, no EOI
        iretq

        .balign 16, 0x90
.Lvp_gp:                                                // #GP: [rsp] error code, [rsp+8] rip
        push    rax
        mov     rax, [rsp + 16]
        cmp     word ptr [rax], 0x330f                  // rdpmc: faults wherever KVM has no vPMU
        je      .Lvp_gp_rdpmc
        cmp     word ptr [rax], 0x320f
        je      .Lvp_gp_msr
        cmp     word ptr [rax], 0x300f
        jne     .Lvp_gp_fatal
.Lvp_gp_msr:                                            // only the gate's own two may fault
        push    rcx
        lea     rcx, [rip + .Lvp_gate_wrmsr]
        cmp     rax, rcx
        je      .Lvp_gp_gate
        lea     rcx, [rip + .Lvp_gate_rdmsr]
        cmp     rax, rcx
        je      .Lvp_gp_gate
        pop     rcx
.Lvp_gp_fatal:
        pop     rax
        push    13
        jmp     .Lvp_fatal
.Lvp_gp_gate:
        mov     r9d, 1
        add     qword ptr [rsp + 24], 2
        pop     rcx
        pop     rax
        add     rsp, 8
        iretq
.Lvp_gp_rdpmc:
        add     qword ptr [rsp + 16], 2
        push    rcx
        bt      ecx, 30
        jc      21f
        imul    ecx, dword ptr [r15 + {P_RDPMC_STRIDE}]
        add     ecx, dword ptr [r15 + {P_RDPMC_GP}]
        jmp     2f
21:      add     ecx, dword ptr [r15 + {P_RDPMC_FIXED}]
2:      rdmsr                                           // exits to the VMM; a fault here is fatal
        pop     rcx
        add     rsp, 16                                 // saved rax and the error code
        iretq

        .balign 16, 0x90
.Lvp_pmi:                                               // counter overflow, from ring 3 only
        push    rax
        push    rcx
        push    rdx
        inc     qword ptr [r15 + {R_PMIS}]
        mov     ecx, [r15 + {P_STATUS_MSR}]
        test    ecx, ecx
        jz      21f
        rdmsr
        and     eax, [r15 + {P_STATUS_BIT}]
        jz      3f
        xor     edx, edx
        mov     ecx, [r15 + {P_CLEAR_MSR}]
        wrmsr                                           // before the preset: no overflow can be lost between
21:      mov     ecx, [r15 + {P_OVF_MSR}]
        mov     eax, [r15 + {P_PRESET}]
        mov     edx, [r15 + {P_PRESET} + 4]
        wrmsr
2:      mov     rcx, [r15 + {P_LAPIC}]
        mov     eax, [r15 + {P_LVTPC}]
        mov     [rcx + 0x340], eax                      // Intel's local APIC masks it on delivery
        mov     dword ptr [rcx + 0xb0], 0               // EOI
        pop     rdx
        pop     rcx
        pop     rax
        iretq
3:      mov     eax, {FAULT_SPURIOUS_PMI}               // nothing had overflowed
        cmp     qword ptr [r15 + {R_FIRST}], 0
        jne     4f
        mov     [r15 + {R_FIRST}], rax
        mov     [r15 + {R_FIRST_WHERE}], rcx
4:      inc     qword ptr [r15 + {R_FAULTS}]
        jmp     2b

        .balign 16, 0x90
.Lvp_vectors:                                           // one stub an exception, eight bytes apart
        .set    .Lvp_v, 0
        .rept   32
        .balign 8, 0x90
        push    .Lvp_v
        jmp     .Lvp_fatal
        .set    .Lvp_v, .Lvp_v + 1
        .endr

        .balign 16, 0x90
.Lvp_fatal:                                             // [rsp] vector, then the frame; never returns
        mov     rdi, rsp
        or      rdi, 0xfff
        mov     rdi, [rdi - 7]                          // the block's address is the stack page's last word
        mov     rax, [rsp]
        add     rax, {FAULT_EXCEPTION}
        cmp     qword ptr [rdi + {R_FIRST}], 0
        jne     21f
        mov     [rdi + {R_FIRST}], rax
        mov     [rdi + {R_FIRST_WHERE}], rax
21:      mov     ecx, 1
2:      mov     rax, [rsp + rcx * 8]
        mov     [rdi + rcx * 8 + {R_FRAME} - 8], rax
        inc     ecx
        cmp     ecx, 6
        jbe     2b
        mov     eax, {STAGE_HALTED}
        mov     [rdi + {R_STAGE}], rax
        inc     qword ptr [rdi + {R_FAULTS}]
3:      cli
        hlt
        jmp     3b

// --- ring 3 -------------------------------------------------------------------------------------------------------

        .balign 64, 0x90
.Lvp_entry:                                             // rdi = block
        mov     r15, rdi
        mov     eax, {STAGE_SETUP}
        mov     [r15 + {R_STAGE}], rax
        cmp     qword ptr [r15 + {P_SETUP_COUNT}], 0
        je      .Lvp_ready
        mov     rax, [r15 + {P_LAPIC}]
        mov     dword ptr [rax + 0xf0], 0x100 + {SPURIOUS_VECTOR}
        mov     ecx, [r15 + {P_LVTPC}]
        mov     [rax + 0x340], ecx
        xor     ebx, ebx
        lea     rsi, [r15 + {P_SETUP}]
21:      mov     ecx, [rsi]
        mov     eax, [rsi + 8]
        mov     edx, [rsi + 12]
        xor     r8d, r8d
        xor     r9d, r9d
        int3
        test    r9d, r9d
        jz      2f
        mov     eax, {FAULT_SETUP}
        mov     rdx, [rsi + 8]
        xor     r10d, r10d
        call    .Lvp_fault
2:      add     rsi, {SETUP_BYTES}
        inc     ebx
        cmp     rbx, [r15 + {P_SETUP_COUNT}]
        jb      21b
.Lvp_ready:
        mov     rax, [r15 + {P_CHECK_COUNT}]
        mov     [r15 + {R_CHECK_POS}], rax
        mov     rax, [r15 + {P_CHECK_EVERY}]
        mov     [r15 + {R_CHECK_WAIT}], rax
        mov     rax, [r15 + {P_LINE_EVERY}]
        mov     [r15 + {R_LINE_WAIT}], rax
        mov     qword ptr [r15 + {R_WS_PASS}], 1
        cmp     qword ptr [r15 + {P_LINES}], 0
        je      3f
        lea     rdi, [r15 + {R_TX}]                     // "probe vcpu0 up"
        lea     rsi, [rip + .Lvp_s_name]
        call    .Lvp_puts
        mov     rax, [r15 + {P_VCPU}]
        call    .Lvp_putn
        lea     rsi, [rip + .Lvp_s_up]
        call    .Lvp_puts
        lea     rax, [r15 + {R_TX}]
        sub     rdi, rax
        mov     [r15 + {R_TX_LEN}], rdi
3:      mov     eax, {STAGE_RUNNING}
        mov     [r15 + {R_STAGE}], rax
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        mov     r14, rax                                // last turn
        mov     r12, rax                                // next page due
        mov     r13, rax                                // next heartbeat due

        .balign 64, 0x90
.Lvp_main:
        pause
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        mov     rbp, rax                                // now
        sub     rax, r14                                // gap
        jb      .Lvp_back
.Lvp_gap:
        mov     r14, rbp
        mov     rcx, [r15 + {R_MARK}]
        cmp     rcx, [r15 + {R_MARK_SEEN}]
        jne     .Lvp_marked
21:      cmp     rax, [r15 + {R_LAST_GAP}]
        jbe     2f
        mov     [r15 + {R_LAST_GAP}], rax
2:      cmp     rax, [r15 + {R_MAX_GAP}]
        jbe     3f
        mov     [r15 + {R_MAX_GAP}], rax
3:      cmp     rax, [r15 + {P_GAP}]
        jbe     4f
        inc     qword ptr [r15 + {R_GAPS}]
4:      inc     qword ptr [r15 + {R_LOOPS}]
        cmp     rbp, r13
        jae     .Lvp_beat
.Lvp_steps:
        mov     rbx, [r15 + {R_CHECK_POS}]
        cmp     rbx, [r15 + {P_CHECK_COUNT}]
        jae     5f
        call    .Lvp_check
5:      mov     rbx, [r15 + {R_TX_POS}]
        cmp     rbx, [r15 + {R_TX_LEN}]
        jae     6f
        mov     al, [r15 + rbx + {R_TX}]                // one byte a turn: output makes no gap
        mov     edx, {COM1}
        mov     r8d, 2
        int3
        inc     rbx
        mov     [r15 + {R_TX_POS}], rbx
6:      mov     rbx, [r15 + {R_FILLED}]
        cmp     rbx, [r15 + {P_FILL_PAGES}]
        jb      .Lvp_fill
        jmp     .Lvp_dirty

.Lvp_back:                                              // another host's TSC may lie behind
        inc     qword ptr [r15 + {R_TSC_BACK}]
        mov     r12, rbp
        mov     r13, rbp
        xor     eax, eax
        jmp     .Lvp_gap

.Lvp_marked:                                            // the host resumed us: a new window
        mov     [r15 + {R_MARK_SEEN}], rcx
        mov     qword ptr [r15 + {R_LAST_GAP}], 0
        jmp     21b

.Lvp_beat:
        inc     qword ptr [r15 + {R_BEATS}]
        mov     [r15 + {R_BEAT_TSC}], rbp
        add     r13, [r15 + {P_BEAT}]
        cmp     r13, rbp
        ja      21f
        mov     r13, rbp                                // a hole: no catching up
        add     r13, [r15 + {P_BEAT}]
21:      dec     qword ptr [r15 + {R_CHECK_WAIT}]
        jnz     2f
        mov     rax, [r15 + {P_CHECK_EVERY}]
        mov     [r15 + {R_CHECK_WAIT}], rax
        mov     rbx, [r15 + {R_CHECK_POS}]
        cmp     rbx, [r15 + {P_CHECK_COUNT}]
        jb      2f                                      // the last round still goes on
        mov     qword ptr [r15 + {R_CHECK_POS}], 0
2:      dec     qword ptr [r15 + {R_LINE_WAIT}]
        jnz     .Lvp_steps
        mov     rax, [r15 + {P_LINE_EVERY}]
        mov     [r15 + {R_LINE_WAIT}], rax
        cmp     qword ptr [r15 + {P_LINES}], 0
        je      .Lvp_steps
        mov     rbx, [r15 + {R_TX_POS}]
        cmp     rbx, [r15 + {R_TX_LEN}]
        jb      .Lvp_steps                              // the last line is still on its way
        call    .Lvp_lines
        jmp     .Lvp_steps

// Fills up to TURN_PAGES pages: every word of page p is (p + 1) * FILL_FACTOR.
.Lvp_fill:
        mov     edx, {TURN_PAGES}
        mov     r11, {FILL_FACTOR}
21:      mov     rax, rbx
        add     rax, [r15 + {P_FILL_FIRST}]
        inc     rax
        imul    rax, r11
        mov     rdi, rbx
        shl     rdi, 12
        add     rdi, [r15 + {P_FILL}]
        mov     ecx, 512
        rep stosq
        inc     rbx
        mov     [r15 + {R_FILLED}], rbx
        cmp     rbx, [r15 + {P_FILL_PAGES}]
        jae     .Lvp_main
        dec     edx
        jnz     21b
        jmp     .Lvp_main

// Dirties the pages that are due, up to TURN_PAGES: first word ((pass << 32) | page) ^ salt, last word its complement.
.Lvp_dirty:
        cmp     qword ptr [r15 + {P_WS_PAGES}], 0
        je      .Lvp_main
        mov     esi, {TURN_PAGES}
21:      mov     r11, [r15 + {P_WS_TICKS}]
        test    r11, r11
        jz      2f
        cmp     rbp, r12
        jb      .Lvp_main
        add     r12, r11
2:      mov     rbx, [r15 + {R_WS_NEXT}]
        mov     rax, [r15 + {R_WS_PASS}]
        shl     rax, 32
        or      rax, rbx
        xor     rax, [r15 + {P_WS_SALT}]
        mov     rdi, rbx
        shl     rdi, 12
        add     rdi, [r15 + {P_WS}]
        mov     [rdi], rax
        not     rax
        mov     [rdi + 4088], rax
        inc     rbx
        cmp     rbx, [r15 + {P_WS_PAGES}]
        jb      3f
        xor     ebx, ebx
        mov     [r15 + {R_WS_NEXT}], rbx                // next first: between the two stores page 0 may be either
        inc     qword ptr [r15 + {R_WS_PASS}]
        jmp     4f
3:      mov     [r15 + {R_WS_NEXT}], rbx
4:      inc     qword ptr [r15 + {R_DIRTIED}]
        dec     esi
        jnz     21b
        mov     rax, r12                                // more than a heartbeat behind: drop the backlog
        add     rax, [r15 + {P_BEAT}]
        cmp     rax, rbp
        jae     .Lvp_main
        mov     r12, rbp
        jmp     .Lvp_main

// One check; rbx is its number.
.Lvp_check:
        mov     rsi, rbx
        shl     rsi, 5
        lea     rsi, [r15 + rsi + {P_CHECKS}]
        inc     rbx
        mov     [r15 + {R_CHECK_POS}], rbx
        cmp     rbx, [r15 + {P_CHECK_COUNT}]
        jb      21f
        inc     qword ptr [r15 + {R_CHECKS}]
21:      mov     ecx, [rsi]
        mov     edi, [rsi + 4]
        xor     r9d, r9d
        cmp     edi, {CHECK_RDPMC}
        je      2f
        mov     r8d, 1
        int3
        jmp     3f
2:      rdpmc
3:      shl     rdx, 32
        or      rax, rdx
        mov     r10, rax                                // what is there
        mov     rdx, [rsi + 8]
        test    r9d, r9d
        mov     eax, {FAULT_READ}
        jnz     .Lvp_fault
        cmp     edi, {CHECK_OVERFLOW}
        je      .Lvp_check_overflow
        cmp     edi, {CHECK_EQUAL}
        jne     4f
        cmp     r10, rdx
        mov     rax, [rsi + 24]
        jne     .Lvp_fault
        ret
4:      mov     ecx, edx                                // sign of the difference in the counter's width
        mov     rdi, [rsi + 16]
        mov     rdx, [r15 + rdi * 8 + {R_SLOTS}]
        mov     [r15 + rdi * 8 + {R_SLOTS}], r10
        mov     rax, r10
        sub     rax, rdx
        shl     rax, cl
        mov     ecx, [rsi]
        test    rax, rax
        mov     rax, [rsi + 24]
        js      .Lvp_fault
        ret
.Lvp_check_overflow:
        mov     ecx, edx
        mov     rax, r10
        shl     rax, cl
        mov     ecx, [rsi]
        test    rax, rax
        mov     rax, [r15 + {R_PMIS}]
        js      6f                                      // still on its way up from the preset
        cmp     qword ptr [r15 + {R_OVF_SEEN}], 0
        mov     qword ptr [r15 + {R_OVF_SEEN}], 1
        mov     rdx, [r15 + {R_OVF_PMIS}]
        mov     [r15 + {R_OVF_PMIS}], rax
        je      5f
        cmp     rax, rdx
        mov     rax, [rsi + 24]
        je      .Lvp_fault
5:      ret
6:      mov     qword ptr [r15 + {R_OVF_SEEN}], 0
        ret

// Records a fault: rax code, ecx where, rdx expected, r10 got.
.Lvp_fault:
        cmp     qword ptr [r15 + {R_FIRST}], 0
        jne     21f
        mov     ecx, ecx
        mov     [r15 + {R_FIRST_WHERE}], rcx
        mov     [r15 + {R_FIRST_EXPECTED}], rdx
        mov     [r15 + {R_FIRST_GOT}], r10
        mov     [r15 + {R_FIRST}], rax
21:      inc     qword ptr [r15 + {R_FAULTS}]
        ret

// Writes a progress line for each of the first P_LINES vCPUs into R_TX.
.Lvp_lines:
        lea     rdi, [r15 + {R_TX}]
        xor     ebx, ebx
21:      mov     r11, rbx
        imul    r11, r11, {BLOCK}
        add     r11, {BLOCKS}                           // that vCPU's block
        lea     rsi, [rip + .Lvp_s_name]
        call    .Lvp_puts
        mov     rax, rbx
        call    .Lvp_putn
        lea     rsi, [rip + .Lvp_s_beats]
        call    .Lvp_puts
        mov     rax, [r11 + {R_BEATS}]
        call    .Lvp_putn
        lea     rsi, [rip + .Lvp_s_pmis]
        call    .Lvp_puts
        mov     rax, [r11 + {R_PMIS}]
        call    .Lvp_putn
        lea     rsi, [rip + .Lvp_s_checks]
        call    .Lvp_puts
        mov     rax, [r11 + {R_CHECKS}]
        call    .Lvp_putn
        lea     rsi, [rip + .Lvp_s_faults]
        call    .Lvp_puts
        mov     rax, [r11 + {R_FAULTS}]
        call    .Lvp_putn
        mov     byte ptr [rdi], 10
        inc     rdi
        inc     rbx
        cmp     rbx, [r15 + {P_LINES}]
        jb      21b
        lea     rax, [r15 + {R_TX}]
        sub     rdi, rax
        mov     [r15 + {R_TX_LEN}], rdi
        mov     qword ptr [r15 + {R_TX_POS}], 0
        ret

// Appends the zero-terminated text at rsi at rdi.
.Lvp_puts:
        mov     al, [rsi]
        test    al, al
        jz      21f
        mov     [rdi], al
        inc     rsi
        inc     rdi
        jmp     .Lvp_puts
21:      ret

// Appends rax in decimal at rdi.
.Lvp_putn:
        mov     r10d, 10
        xor     ecx, ecx
21:      xor     edx, edx
        div     r10
        add     edx, 48
        push    rdx
        inc     ecx
        test    rax, rax
        jnz     21b
2:      pop     rdx
        mov     [rdi], dl
        inc     rdi
        dec     ecx
        jnz     2b
        ret

.Lvp_s_name:    .asciz  "probe vcpu"
.Lvp_s_up:      .asciz  " up\n"
.Lvp_s_beats:   .asciz  " beats "
.Lvp_s_pmis:    .asciz  " pmis "
.Lvp_s_checks:  .asciz  " checks "
.Lvp_s_faults:  .asciz  " faults "

        .balign 8, 0x90
        .globl  vpmu_probe_end
        .hidden vpmu_probe_end
vpmu_probe_end:
        .text
