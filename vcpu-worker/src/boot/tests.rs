//! Kernels made up in memory, good and bad.

use std::io::Write as _;

use proptest::prelude::*;

use super::*;
use crate::hypervisor::EntryMode;

const MEM: u64 = 4 << 20;

fn put(image: &mut Vec<u8>, at: usize, data: &[u8]) {
    if image.len() < at + data.len() {
        image.resize(at + data.len(), 0);
    }
    image[at..at + data.len()].copy_from_slice(data);
}

/// A PVH ELF with one segment of `code` at 1 MiB with 4 KiB of uninitialised data, and the note.
fn pvh_elf(code: &[u8]) -> Vec<u8> {
    let mut e = vec![];
    put(&mut e, 0, b"\x7fELF\x02\x01\x01");
    put(&mut e, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut e, 24, &0x10_0000u64.to_le_bytes());
    put(&mut e, 32, &64u64.to_le_bytes());
    put(&mut e, 52, &[64, 0, 56, 0, 2, 0]);
    put(&mut e, 62, &[0, 0]);
    let code_at = 0x200u64;
    let header = |kind: u32, offset: u64, paddr: u64, filesz: u64, memsz: u64| {
        let mut h = vec![];
        h.extend_from_slice(&kind.to_le_bytes());
        h.extend_from_slice(&7u32.to_le_bytes());
        for w in [offset, paddr, paddr, filesz, memsz, 4096] {
            h.extend_from_slice(&w.to_le_bytes());
        }
        h
    };
    put(&mut e, 64, &header(1, code_at, 0x10_0000, code.len() as u64, code.len() as u64 + 4096));
    put(&mut e, 120, &header(4, 0x180, 0, 20, 20));
    put(&mut e, 0x180, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut e, 0x18c, b"Xen\0");
    put(&mut e, 0x190, &0x10_0000u32.to_le_bytes());
    put(&mut e, code_at as usize, code);
    e
}

/// A bzImage with one set-up sector and `code` as its protected-mode part.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut k = vec![0; 1024];
    k[0x1f1] = 1;
    put(&mut k, 0x1f4, &(code.len() as u32).div_ceil(16).to_le_bytes());
    put(&mut k, 0x202, b"HdrS");
    put(&mut k, 0x206, &0x20fu16.to_le_bytes());
    k[0x211] = 1;
    put(&mut k, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut k, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut k, 0x238, &255u32.to_le_bytes());
    put(&mut k, 0x260, &0x1_0000u32.to_le_bytes());
    k.extend_from_slice(code);
    k
}

struct Case {
    dir: tempfile::TempDir,
    mem: GuestMemory,
}

impl Case {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), mem: GuestMemory::new("boot-test", MEM).unwrap() }
    }

    fn file(&self, name: &str, data: &[u8]) -> String {
        let path = self.dir.path().join(name);
        std::fs::File::create(&path).unwrap().write_all(data).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn boot(&self, path: &str, initrd: &str, cmdline: &str) -> Result<InitialRegs, BootError> {
        let spec =
            KernelBoot { path: path.to_owned(), initrd_path: initrd.to_owned(), cmdline: cmdline.to_owned() };
        load(&self.mem, &spec)
    }

    fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.mem.read(gpa, &mut b).unwrap();
        b
    }

    fn reason(&self, path: &str) -> &'static str {
        self.boot(path, "", "").unwrap_err().reason()
    }
}

/// linux-loader borrows the mapping: it is there afterwards, also after a failure, in all of its regions.
#[test]
fn the_mapping_outlives_its_loading() {
    let c = Case { mem: GuestMemory::new("boot-test", 5 << 30).unwrap(), ..Case::new() };
    let [_, high] = c.mem.regions() else { panic!("two regions") };
    let high = high.gpa;
    c.mem.write(high, b"above").unwrap();
    let mut code = pvh_elf(b"\xf4code");
    let good = c.file("vmlinux", &code);
    // Its note says no entry.
    put(&mut code, 0x188, &[17]);
    assert_eq!(c.reason(&c.file("noteless", &code)), "NOT_A_KERNEL");
    c.mem.track_writes(true);
    c.boot(&good, "", "").unwrap();
    let mut written = crate::bitmap::PageBitmap::new(c.mem.pages());
    c.mem.take_writes(&mut written);
    assert!(written.get(0x10_0000 / 4096), "what linux-loader wrote is noted");
    assert_eq!((c.bytes(0x10_0000, 5), c.bytes(high, 5)), (b"\xf4code".to_vec(), b"above".to_vec()));
}

/// Memory that another machine still has.
#[test]
fn memory_that_was_handed_over_is_not_loaded_into() {
    let c = Case::new();
    let kernel = c.file("vmlinux", &pvh_elf(b"\xf4code"));
    let other = GuestMemory::new("other", MEM).unwrap();
    c.mem.take_over(other.fd().try_clone_to_owned().unwrap()).unwrap();
    let error = c.boot(&kernel, "", "").unwrap_err();
    assert!(matches!(error, BootError::Memory(crate::memory::MemoryError::Locked)), "{error}");
    assert_eq!(c.bytes(0x10_0000, 5), [0; 5]);
}

#[test]
fn pvh_elf_with_initrd_and_command_line() {
    let c = Case::new();
    let kernel = c.file("vmlinux", &pvh_elf(b"\xf4code"));
    let initrd = c.file("initrd", &[0xaa; 5000]);
    let regs = c.boot(&kernel, &initrd, "console=ttyS0").unwrap();
    assert_eq!((regs.mode, regs.rip, regs.rbx), (EntryMode::Protected32, 0x10_0000, map::START_INFO));
    assert_eq!(c.bytes(0x10_0000, 5), b"\xf4code");
    let word = |at| c.mem.load_u64(at).unwrap();
    assert_eq!(word(map::START_INFO) as u32, 0x336e_c578);
    assert_eq!(word(map::START_INFO + 8) >> 32, 1, "one module");
    let module = word(map::START_INFO + 16);
    assert_eq!((word(module), word(module + 8)), (MEM - 8192, 5000));
    assert_eq!(c.bytes(MEM - 8192, 5000), vec![0xaa; 5000]);
    assert_eq!(c.bytes(word(map::START_INFO + 24), 14), b"console=ttyS0\0");
    let memmap = word(map::START_INFO + 40);
    assert_eq!(word(map::START_INFO + 48) as u32, 2, "two pieces of RAM");
    assert_eq!((word(memmap), word(memmap + 8)), (0, 0x9fc00));
    assert_eq!((word(memmap + 24), word(memmap + 32)), (1 << 20, MEM - (1 << 20)));
}

#[test]
fn bzimage_with_zero_page() {
    let c = Case::new();
    let kernel = c.file("bzImage", &bzimage(&[0x90; 100]));
    let initrd = c.file("initrd", b"cpio");
    let regs = c.boot(&kernel, &initrd, "quiet").unwrap();
    assert_eq!((regs.mode, regs.rip, regs.rsi), (EntryMode::Protected32, 0x10_0000, map::ZERO_PAGE));
    assert_eq!(c.bytes(0x10_0000, 100), vec![0x90; 100]);
    assert_eq!(c.bytes(map::ZERO_PAGE + 0x202, 4), b"HdrS");
    assert_eq!(c.bytes(map::ZERO_PAGE + 0x1e8, 1), [2], "e820 entries");
    assert_eq!(c.bytes(map::ZERO_PAGE + 0x228, 4), (map::CMDLINE as u32).to_le_bytes());
    assert_eq!(c.bytes(map::ZERO_PAGE + 0x218, 4), (MEM as u32 - 4096).to_le_bytes());
    let long = "x".repeat(256);
    assert_eq!(c.boot(&kernel, "", &long).unwrap_err().reason(), "CMDLINE_TOO_LONG", "this kernel takes 255");
}

/// Pieces of RAM as a kernel is told of them, `count` entries of `stride` bytes: address, bytes, kind.
fn told(c: &Case, table: u64, count: u64, stride: u64) -> Vec<(u64, u64)> {
    let word = |at: u64| u64::from_le_bytes(c.bytes(at, 8).try_into().unwrap());
    let entries = (0..count).map(|n| table + n * stride);
    entries
        .map(|at| {
            assert_eq!(c.bytes(at + 16, 4), [1, 0, 0, 0], "RAM");
            (word(at), word(at + 8))
        })
        .collect()
}

/// By both protocols: every byte but the BIOS's below 1 MiB, once, in ascending order, and nothing in the hole.
#[test]
fn memory_beyond_the_hole_is_told_whole() {
    const GIB: u64 = 1 << 30;
    let (low, legacy) = (0x9fc00u64, (1u64 << 20) - 0x9fc00);
    for (bytes, high) in [
        (3 * GIB - (2 << 20), 0),
        (3 * GIB, 0),
        (3 * GIB + (2 << 20), 2 << 20),
        (5 * GIB, 2 * GIB),
        (64 * GIB, 61 * GIB),
    ] {
        let c = Case { mem: GuestMemory::new("boot-test", bytes).unwrap(), ..Case::new() };
        let initrd = c.file("initrd", b"cpio");
        let mut expected = vec![(0, low), (1 << 20, bytes.min(3 * GIB) - (1 << 20))];
        expected.extend((high > 0).then_some((4 * GIB, high)));
        c.boot(&c.file("vmlinux", &pvh_elf(b"\xf4")), &initrd, "").unwrap();
        let word = |at| c.mem.load_u64(at).unwrap();
        let count = word(map::START_INFO + 48) & 0xffff_ffff;
        let pvh = told(&c, word(map::START_INFO + 40), count, 24);
        assert_eq!(
            word(word(map::START_INFO + 16)),
            bytes.min(3 * GIB) - 4096,
            "the initrd lies below the hole"
        );
        c.boot(&c.file("bzImage", &bzimage(&[0x90; 100])), &initrd, "").unwrap();
        let count = c.bytes(map::ZERO_PAGE + 0x1e8, 1)[0];
        let e820 = told(&c, map::ZERO_PAGE + 0x2d0, count.into(), 20);
        for ram in [&pvh, &e820] {
            assert_eq!(*ram, expected, "{bytes}");
            assert!(ram.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "{ram:x?}");
            assert_eq!(ram.iter().map(|(_, len)| len).sum::<u64>(), bytes - legacy);
            for (at, len) in ram {
                assert!(c.mem.offset_of(*at, *len).is_some(), "{at:x}+{len:x} is no memory of this machine");
            }
        }
    }
}

#[test]
fn flat_image() {
    let c = Case::new();
    let regs = c.boot(&c.file("tiny.flat", b"\xf4\xeb\xfd"), "", "").unwrap();
    assert_eq!((regs.rip, regs.rbx), (map::HIGH, map::START_INFO));
    assert_eq!(c.bytes(map::HIGH, 3), b"\xf4\xeb\xfd");
}

#[test]
fn each_fault_has_its_reason() {
    let c = Case::new();
    assert_eq!(c.reason("/nowhere/vmlinux"), "KERNEL_FILE_MISSING");
    assert_eq!(c.reason(""), "KERNEL_FILE_MISSING");
    assert_eq!(c.reason(c.dir.path().to_str().unwrap()), "KERNEL_FILE_UNREADABLE");
    assert_eq!(c.reason("/dev/null"), "KERNEL_FILE_UNREADABLE");
    assert_eq!(c.reason(&c.file("text", b"hello, world")), "NOT_A_KERNEL");
    assert_eq!(c.reason(&c.file("empty", b"")), "NOT_A_KERNEL");
    assert_eq!(c.reason(&c.file("empty.flat", b"")), "NOT_A_KERNEL");
    let good = pvh_elf(&[0x90; 100]);
    assert_eq!(c.reason(&c.file("short", &good[..40])), "KERNEL_TRUNCATED");
    assert_eq!(c.reason(&c.file("short2", &good[..100])), "KERNEL_TRUNCATED");
    assert_eq!(c.reason(&c.file("short3", &good[..good.len() - 1])), "KERNEL_TRUNCATED");
    let mut far = good.clone();
    put(&mut far, 64 + 24, &MEM.to_le_bytes());
    assert_eq!(c.reason(&c.file("far", &far)), "LARGER_THAN_MEMORY");
    let mut low = good.clone();
    put(&mut low, 64 + 24, &0x6000u64.to_le_bytes());
    assert_eq!(c.reason(&c.file("low", &low)), "NOT_A_KERNEL");
    let mut no_note = good.clone();
    put(&mut no_note, 0x188, &[1]);
    assert_eq!(c.reason(&c.file("no-note", &no_note)), "NOT_A_KERNEL");
    let mut arm = good.clone();
    arm[18] = 183;
    assert_eq!(c.reason(&c.file("arm", &arm)), "NOT_A_KERNEL");
    let bz = bzimage(&[0x90; 1000]);
    assert_eq!(c.reason(&c.file("bz-short", &bz[..1800])), "KERNEL_TRUNCATED");
    assert_eq!(c.reason(&c.file("bz-header", &bz[..0x230])), "KERNEL_TRUNCATED");
    let mut greedy = bz.clone();
    put(&mut greedy, 0x260, &(16u32 << 20).to_le_bytes());
    assert_eq!(c.reason(&c.file("bz-greedy", &greedy)), "LARGER_THAN_MEMORY");
    let mut big = vec![0; 16];
    big.resize(MEM as usize, 0);
    assert_eq!(c.reason(&c.file("big.flat", &big)), "LARGER_THAN_MEMORY");
    let ok = c.file("ok", &good);
    let huge = c.file("initrd", &big);
    assert_eq!(c.boot(&ok, &huge, "").unwrap_err().reason(), "LARGER_THAN_MEMORY");
    assert_eq!(c.boot(&ok, "/nowhere/initrd", "").unwrap_err().reason(), "KERNEL_FILE_MISSING");
    assert_eq!(c.boot(&ok, "", &"x".repeat(2048)).unwrap_err().reason(), "CMDLINE_TOO_LONG");
    assert_eq!(c.boot(&ok, "", "a\0b").unwrap_err().reason(), "CMDLINE_INVALID");
    c.boot(&ok, "", &"x".repeat(2047)).unwrap();
}

#[test]
fn a_fifo_does_not_hang() {
    let c = Case::new();
    let path = c.dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    assert_eq!(c.reason(path.to_str().unwrap()), "KERNEL_FILE_UNREADABLE");
}

/// Runs until the guest has written three bytes to the serial port.
fn says(regs: &InitialRegs, mem: &GuestMemory) -> Vec<u8> {
    use crate::hypervisor::kvm::{KvmOptions, KvmVm};
    use crate::hypervisor::{Exit, Vm as _};
    let vm = KvmVm::new(mem.clone(), KvmOptions { vcpus: 1, ..KvmOptions::default() }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_initial(regs).unwrap();
    let mut said = vec![];
    while said.len() < 3 {
        match vcpu.run().unwrap() {
            Exit::PioOut { port: 0x3f8, data, .. } => said.push(data as u8),
            other => panic!("{other:?} after {said:x?}: {}", vcpu.describe()),
        }
    }
    said
}

#[test]
fn kvm_enters_each_kind_of_kernel() {
    if !crate::testing::require_kvm() {
        return;
    }
    // mov dx, 0x3f8; two bytes of the start info's magic, then the first of the command line; hlt
    let pvh = b"\x66\xba\xf8\x03\x8b\x03\xee\xc1\xe8\x08\xee\x8b\x43\x18\x8a\x00\xee\xf4";
    // The same with the header's magic in the zero page.
    let bz = b"\x66\xba\xf8\x03\x8b\x86\x02\x02\x00\x00\xee\xc1\xe8\x08\xee\x8b\x86\x28\x02\x00\x00\x8a\x00\xee\xf4";
    let kinds: [(&str, Vec<u8>, &[u8]); 3] = [
        ("vmlinux", pvh_elf(pvh), b"\x78\xc5q"),
        ("image.flat", pvh.to_vec(), b"\x78\xc5q"),
        ("bzImage", bzimage(bz), b"Hdq"),
    ];
    for (name, image, expected) in kinds {
        let c = Case::new();
        let regs = c.boot(&c.file(name, &image), "", "quiet").unwrap();
        assert_eq!(says(&regs, &c.mem), expected, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn damaged_kernels_never_panic(
        elf: bool, at in 0usize..0x400, value: u64, width in 1usize..9, cut in 0usize..0x600,
    ) {
        let c = Case::new();
        let mut image = if elf { pvh_elf(&[0x90; 64]) } else { bzimage(&[0x90; 64]) };
        put(&mut image, at, &value.to_le_bytes()[..width]);
        image.truncate(cut.max(4));
        if let Ok(regs) = c.boot(&c.file("k.flat", &image), "", "x") {
            prop_assert!(regs.rip >= map::HIGH && regs.rip < MEM);
        }
    }
}
