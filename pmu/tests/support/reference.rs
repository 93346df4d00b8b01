//! A private PMU as the vendor's manual tells it, for one guest that nobody ever takes off the processor.
//!
//! Written apart from the crate's model and from its guest code: registers live in a map by meaning, and every rule is
//! spelled out from reference sections 1.2, 1.3, 1.7 and 1.8 and switch.md sections 3, 6 and 7.

use std::collections::BTreeMap;

use pmu::{Events, Shape, Vendor};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Counter(u32),
    Select(u32),
    Fixed(u32),
    FixedControl,
    Control,
    Status,
}

/// The reference.
#[derive(Debug, Clone)]
pub(crate) struct Reference {
    shape: Shape,
    registers: BTreeMap<Name, u64>,
    /// An armed status bit went from 0 to 1 since this was last taken.
    pub(crate) interrupt: bool,
    /// A PMI was delivered, and the guest has not cleared its last enabled status bit since.
    pub(crate) in_service: bool,
    /// PMIs that were judged.
    pub(crate) judged: u64,
    /// Wraps of each counter, by status bit.
    pub(crate) wraps: BTreeMap<u32, u64>,
    denied: Vec<u64>,
}

impl Reference {
    pub(crate) fn new(shape: Shape, denied: &[u64]) -> Self {
        let mut registers = BTreeMap::new();
        if shape.version >= 2 {
            registers.insert(Name::Control, shape.gp);
        }
        Self {
            shape,
            registers,
            interrupt: false,
            in_service: false,
            judged: 0,
            wraps: BTreeMap::new(),
            denied: denied.to_vec(),
        }
    }

    fn get(&self, name: Name) -> u64 {
        self.registers.get(&name).copied().unwrap_or(0)
    }

    fn intel(&self) -> bool {
        self.shape.vendor == Vendor::Intel
    }

    fn gp_exists(&self, i: u32) -> bool {
        i < 64 && self.shape.gp & (1u64 << i) != 0
    }

    fn fixed_exists(&self, i: u32) -> bool {
        i < 64 && self.shape.fixed & (1u64 << i) != 0
    }

    fn all_counters(&self) -> u64 {
        self.shape.gp | (self.shape.fixed << 32)
    }

    fn port_bits(&self) -> u64 {
        if !self.intel() {
            return self.all_counters();
        }
        let frz = if self.shape.version >= 4 { 0b11 << 58 } else { 0 };
        self.all_counters() | frz | 0b11 << 62
    }

    /// Status bits whose PMI enable is set.
    fn enabled_status(&self) -> u64 {
        let mut enabled = 0;
        for i in 0..16 {
            enabled |= (self.get(Name::Select(i)) >> 20 & 1) << i;
            if i < 8 {
                enabled |= (self.get(Name::FixedControl) >> (4 * i + 3) & 1) << (32 + i);
            }
        }
        self.get(Name::Status) & enabled
    }

    /// Whether a pause that saw an armed bit rise delivers a PMI.
    pub(crate) fn judge(&mut self, raised: bool, masked: bool) -> bool {
        self.judged += u64::from(raised);
        if !raised || masked || self.in_service {
            return false;
        }
        self.in_service = self.enabled_status() != 0;
        true
    }

    fn cleared(&mut self) {
        self.in_service &= self.enabled_status() != 0;
    }

    /// `None` is #GP.
    pub(crate) fn wrmsr(&mut self, msr: u32, value: u64) -> Option<()> {
        let mask = |width: u8| if width == 64 { u64::MAX } else { (1u64 << width) - 1 };
        let (gpw, fxw) = (mask(self.shape.gp_width), mask(self.shape.fixed_width));
        if self.intel() {
            match msr {
                0xC1..=0xCA if self.gp_exists(msr - 0xC1) => {
                    let low = value & 0xFFFF_FFFF;
                    let extended = if low & 0x8000_0000 != 0 { low | 0xFFFF_FFFF_0000_0000 } else { low };
                    self.registers.insert(Name::Counter(msr - 0xC1), extended & gpw);
                }
                0x4C1..=0x4CA
                    if self.gp_exists(msr - 0x4C1) && self.shape.perf_capabilities & 0x2000 != 0 =>
                {
                    if value > gpw {
                        return None;
                    }
                    self.registers.insert(Name::Counter(msr - 0x4C1), value);
                }
                0x186..=0x18F if self.gp_exists(msr - 0x186) => {
                    if value >> 32 != 0 || value & (1 << 21) != 0 {
                        return None;
                    }
                    self.registers.insert(Name::Select(msr - 0x186), value);
                }
                0x309..=0x310 if self.fixed_exists(msr - 0x309) => {
                    if value > fxw {
                        return None;
                    }
                    self.registers.insert(Name::Fixed(msr - 0x309), value);
                }
                0x38D if self.shape.version >= 2 => {
                    for nibble in 0..16 {
                        let field = value >> (4 * nibble) & 0xF;
                        if field != 0 && (!self.fixed_exists(nibble) || field & 4 != 0) {
                            return None;
                        }
                    }
                    self.registers.insert(Name::FixedControl, value);
                }
                0x38F if self.shape.version >= 2 => {
                    if value & !self.all_counters() != 0 {
                        return None;
                    }
                    self.registers.insert(Name::Control, value);
                }
                0x390 if self.shape.version >= 2 => {
                    if value & !self.port_bits() != 0 {
                        return None;
                    }
                    let status = self.get(Name::Status) & !value;
                    self.registers.insert(Name::Status, status);
                    self.cleared();
                }
                0x391 if self.shape.version >= 4 => {
                    if value & !self.port_bits() != 0 {
                        return None;
                    }
                    let status = self.get(Name::Status) | value;
                    self.registers.insert(Name::Status, status);
                }
                0xC1 | 0xC2 | 0x186 | 0x187 => {}
                _ => return None,
            }
            return Some(());
        }
        let ext = self.shape.version >= 1;
        let v2 = self.shape.version >= 2;
        let select = value & !0xFFFF_FFF0_0028_0000;
        match msr {
            0xC001_0000..=0xC001_0003 if self.gp_exists(msr & 3) => {
                self.registers.insert(Name::Select(msr & 3), select);
            }
            0xC001_0004..=0xC001_0007 if self.gp_exists(msr & 3) => {
                self.registers.insert(Name::Counter(msr & 3), value & gpw);
            }
            0xC001_0200..=0xC001_021F if ext && self.gp_exists((msr - 0xC001_0200) / 2) => {
                let i = (msr - 0xC001_0200) / 2;
                if msr % 2 == 0 {
                    self.registers.insert(Name::Select(i), select);
                } else {
                    self.registers.insert(Name::Counter(i), value & gpw);
                }
            }
            0xC000_0300 if v2 => {}
            0xC000_0301 if v2 => {
                self.registers.insert(Name::Control, value & self.all_counters());
            }
            0xC000_0302 if v2 => {
                let status = self.get(Name::Status) & !(value & self.all_counters());
                self.registers.insert(Name::Status, status);
                self.cleared();
            }
            0xC000_0303 if v2 => {
                let status = self.get(Name::Status) | value & self.all_counters();
                self.registers.insert(Name::Status, status);
            }
            0xC1 | 0xC2 | 0x186 | 0x187 => {}
            // KVM drops the K7 registers for a guest without counters.
            0xC001_0000..=0xC001_0007 if self.shape.gp == 0 => {}
            _ => return None,
        }
        Some(())
    }

    /// `None` is #GP.
    pub(crate) fn rdmsr(&self, msr: u32) -> Option<u64> {
        let v = self.shape.version;
        Some(if self.intel() {
            match msr {
                0xC1..=0xCA if self.gp_exists(msr - 0xC1) => self.get(Name::Counter(msr - 0xC1)),
                0x4C1..=0x4CA
                    if self.gp_exists(msr - 0x4C1) && self.shape.perf_capabilities & 0x2000 != 0 =>
                {
                    self.get(Name::Counter(msr - 0x4C1))
                }
                0x186..=0x18F if self.gp_exists(msr - 0x186) => self.get(Name::Select(msr - 0x186)),
                0x309..=0x310 if self.fixed_exists(msr - 0x309) => self.get(Name::Fixed(msr - 0x309)),
                0x345 if v > 0 => self.shape.perf_capabilities,
                0x38D if v >= 2 => self.get(Name::FixedControl),
                0x38E if v >= 2 => self.get(Name::Status),
                0x38F if v >= 2 => self.get(Name::Control),
                0x390 if v >= 2 => 0,
                0x391 if v >= 4 => 0,
                0x392 if v >= 4 => self.in_use(),
                0xC1 | 0xC2 | 0x186 | 0x187 => 0,
                _ => return None,
            }
        } else {
            match msr {
                0xC001_0000..=0xC001_0003 if self.gp_exists(msr & 3) => self.get(Name::Select(msr & 3)),
                0xC001_0004..=0xC001_0007 if self.gp_exists(msr & 3) => self.get(Name::Counter(msr & 3)),
                0xC001_0200..=0xC001_021F if v >= 1 && self.gp_exists((msr - 0xC001_0200) / 2) => {
                    let i = (msr - 0xC001_0200) / 2;
                    if msr % 2 == 0 { self.get(Name::Select(i)) } else { self.get(Name::Counter(i)) }
                }
                0xC000_0300 if v >= 2 => self.get(Name::Status),
                0xC000_0301 if v >= 2 => self.get(Name::Control),
                0xC000_0302 | 0xC000_0303 if v >= 2 => 0,
                0xC1 | 0xC2 | 0x186 | 0x187 => 0,
                0xC001_0000..=0xC001_0007 if self.shape.gp == 0 => 0,
                _ => return None,
            }
        })
    }

    fn in_use(&self) -> u64 {
        let mut out = 0;
        for i in 0..16 {
            let select = self.get(Name::Select(i));
            if select & 0xFF != 0 {
                out |= 1 << i;
            }
            if select & (1 << 20) != 0 {
                out |= 1 << 63;
            }
            if i < 8 {
                let field = self.get(Name::FixedControl) >> (4 * i) & 0xF;
                if field & 3 != 0 {
                    out |= 1 << (32 + i);
                }
                if field & 8 != 0 {
                    out |= 1 << 63;
                }
            }
        }
        out
    }

    /// `None` is #GP.
    pub(crate) fn rdpmc(&self, index: u32) -> Option<u64> {
        if index < 64 && self.gp_exists(index) {
            return Some(self.get(Name::Counter(index)));
        }
        let fixed = index.checked_sub(1 << 30)?;
        (self.intel() && self.fixed_exists(fixed)).then(|| self.get(Name::Fixed(fixed)))
    }

    fn count_one(&mut self, name: Name, bit: u32, width: u8, n: u64, interrupts: bool) {
        let sum = u128::from(self.get(name)) + u128::from(n);
        let modulus = 1u128 << width;
        self.registers.insert(name, (sum % modulus) as u64);
        if sum >= modulus {
            *self.wraps.entry(bit).or_default() += 1;
            let status = self.get(Name::Status);
            let already = self.shape.version >= 2 && status >> bit & 1 == 1;
            if self.shape.version >= 2 {
                self.registers.insert(Name::Status, status | 1 << bit);
            }
            self.interrupt |= interrupts && !already;
        }
    }

    /// The guest executes while these events happen.
    pub(crate) fn count(&mut self, events: &Events) {
        let frozen = self.intel() && self.shape.version >= 4 && self.get(Name::Status) >> 59 & 1 == 1;
        if frozen {
            return;
        }
        let control = if self.shape.version >= 2 { self.get(Name::Control) } else { u64::MAX };
        for i in 0..16 {
            let select = self.get(Name::Select(i));
            let counts = self.gp_exists(i)
                && control >> i & 1 == 1
                && select >> 22 & 1 == 1
                && select & 0x3_0000 != 0
                && select & 0xFF84_0000 == 0
                && (self.intel() || select >> 32 == 0)
                && !self.denied.contains(&(select & 0xFFFF));
            let n = match (self.shape.vendor, select & 0xFFFF) {
                (Vendor::Intel, 0x003C) | (Vendor::Amd, 0x0076) => events.cycles,
                (_, 0x00C0) => events.instructions,
                (Vendor::Intel, 0x013C) => events.ref_cycles,
                _ => 0,
            };
            if counts {
                self.count_one(Name::Counter(i), i, self.shape.gp_width, n, select >> 20 & 1 == 1);
            }
        }
        for (i, n) in
            [events.instructions, events.cycles, events.ref_cycles, events.slots].into_iter().enumerate()
        {
            let i = i as u32;
            let field = self.get(Name::FixedControl) >> (4 * i) & 0xF;
            if self.fixed_exists(i) && control >> (32 + i) & 1 == 1 && field & 3 != 0 {
                self.count_one(Name::Fixed(i), 32 + i, self.shape.fixed_width, n, field & 8 != 0);
            }
        }
    }
}
