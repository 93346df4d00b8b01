//! Guests and host taking turns on one core, each guest beside its reference.
//!
//! [`World::step`] does one thing and checks everything that must hold after it; what it finds is an `Err`, so that the
//! mutation check can ask whether a wrong switcher is caught.

use pmu::{
    Core, CpuMode, EventFilter, Events, FilterSpec, GuestAccess, GuestId, GuestPmu, Policy, Shape, Vendor,
};

use super::reference::Reference;
use super::rig::{Mutant, Rig, all_registers};

/// One thing that happens. Guests are numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Load(usize),
    Resume(usize),
    Pause(usize),
    Put(usize),
    Sync(usize),
    Release(usize),
    Write(usize, u32, u64),
    Read(usize, u32),
    Rdpmc(usize, u32),
    Count(Events),
    /// The host writes a register while nobody is loaded.
    HostSet(u32, u64),
}

struct Member {
    pmu: GuestPmu,
    reference: Reference,
    /// What the guest read, in order.
    trace: Vec<Option<u64>>,
}

/// The world.
pub(crate) struct World {
    core: Core<Rig>,
    members: Vec<Member>,
    loaded: Option<usize>,
    running: bool,
}

impl World {
    pub(crate) fn new(
        host: Shape,
        guests: &[(u32, u32, Policy)],
        denied: &[u64],
        mutant: Option<Mutant>,
    ) -> Self {
        let mut core = Core::new(Rig::new(host), host);
        core.hardware_mut().mutant = mutant;
        let members = guests
            .iter()
            .enumerate()
            .map(|(i, &(gp, fixed, policy))| {
                let mut shape = host.guest(gp, fixed).expect("subset");
                if i == 2 {
                    // Every third guest is narrower than its host.
                    (shape.gp_width, shape.fixed_width) = (32, 32);
                }
                let filter = if denied.is_empty() {
                    EventFilter::allow_all()
                } else {
                    let spec = FilterSpec { action: 1, events: denied.to_vec(), ..FilterSpec::default() };
                    EventFilter::new(host.vendor, spec).expect("filter")
                };
                Member {
                    pmu: GuestPmu::new(GuestId(i as u64), shape, policy, filter),
                    reference: Reference::new(shape, denied),
                    trace: Vec::new(),
                }
            })
            .collect();
        Self { core, members, loaded: None, running: false }
    }

    pub(crate) fn trace(&self, guest: usize) -> &[Option<u64>] {
        &self.members[guest].trace
    }

    pub(crate) fn core_mut(&mut self) -> &mut Core<Rig> {
        &mut self.core
    }

    /// Does one thing; what cannot be done in this state is skipped.
    pub(crate) fn step(&mut self, op: Op) -> Result<(), String> {
        let fail = |what: &str, detail: String| Err(format!("{what}: {detail} after {op:?}"));
        match op {
            Op::Load(g) if self.loaded.is_none() => {
                self.core.load(&mut self.members[g].pmu).map_err(|e| e.to_string())?;
                self.loaded = Some(g);
                self.check_loaded(g)?;
            }
            Op::Resume(g) if self.loaded == Some(g) => {
                self.core.resume(&mut self.members[g].pmu).map_err(|e| e.to_string())?;
                self.running = true;
                let host = *self.core.host();
                let control =
                    if host.has_global() { self.core.hardware().model.raw(host.control_msr()) } else { None };
                let foreign = control.unwrap_or(0) & !self.members[g].pmu.shape().counter_bits();
                if foreign != 0 {
                    return fail(
                        "I-5",
                        format!("control opens counters {foreign:#x} that the guest does not have"),
                    );
                }
            }
            Op::Pause(g) if self.loaded == Some(g) => {
                self.core.pause(&mut self.members[g].pmu).map_err(|e| e.to_string())?;
                self.running = false;
                self.judge(g)?;
            }
            Op::Put(g) if self.loaded == Some(g) => {
                self.core.put(&mut self.members[g].pmu).map_err(|e| e.to_string())?;
                self.loaded = None;
                self.running = false;
                self.judge(g)?;
                let strict = self.members[g].pmu.policy() == Policy::Strict;
                if strict {
                    self.check_scrubbed()?;
                }
                self.check_quiet(strict)?;
            }
            Op::Sync(g) => {
                self.core.sync(&mut self.members[g].pmu).map_err(|e| e.to_string())?;
                if self.loaded == Some(g) {
                    self.running = false;
                }
                self.judge(g)?;
                let image = self.members[g].pmu.image();
                for &(msr, value) in &image.registers {
                    if self.members[g].reference.rdmsr(msr) != Some(value) {
                        return fail("I-11 image", format!("{msr:#x} is {value:#x}"));
                    }
                }
            }
            Op::Release(g) if self.loaded.is_none() || self.loaded == Some(g) => {
                self.core.release(&mut self.members[g].pmu).map_err(|e| e.to_string())?;
                if self.loaded == Some(g) {
                    self.loaded = None;
                    self.running = false;
                }
                self.judge(g)?;
            }
            Op::Write(g, msr, value) => {
                let m = &mut self.members[g];
                let got = self.core.guest_wrmsr(&mut m.pmu, msr, value).map_err(|e| e.to_string())?;
                let want = if m.reference.wrmsr(msr, value).is_some() {
                    GuestAccess::Done
                } else {
                    GuestAccess::Fault
                };
                if got != want {
                    return fail("I-13 fault matrix", format!("{got:?}, reference {want:?}"));
                }
            }
            Op::Read(g, msr) => {
                let m = &mut self.members[g];
                let got = self.core.guest_rdmsr(&mut m.pmu, msr).map_err(|e| e.to_string())?;
                return self.compare(g, got, self.members[g].reference.rdmsr(msr), op);
            }
            Op::Rdpmc(g, index) => {
                let m = &mut self.members[g];
                let got = self.core.guest_rdpmc(&mut m.pmu, index).map_err(|e| e.to_string())?;
                return self.compare(g, got, self.members[g].reference.rdpmc(index), op);
            }
            Op::Count(events) => {
                let mode = if self.running { CpuMode::Guest } else { CpuMode::Host };
                self.core.hardware_mut().model.feed(&events, mode);
                if let (true, Some(g)) = (self.running, self.loaded) {
                    self.members[g].reference.count(&events);
                }
            }
            Op::HostSet(msr, value) if self.loaded.is_none() => {
                self.core.evict_resident().map_err(|e| e.to_string())?;
                let _refused = self.core.hardware_mut().model.host_set(msr, value);
                self.core.forget();
            }
            _ => {}
        }
        if let Some(&(msr, value)) = self.core.hardware().unquiesced.first() {
            return fail("I-6 quiesce", format!("{msr:#x} <- {value:#x} while enabled"));
        }
        Ok(())
    }

    fn compare(&mut self, g: usize, got: GuestAccess, want: Option<u64>, op: Op) -> Result<(), String> {
        let got = match got {
            GuestAccess::Value(v) => Some(v),
            GuestAccess::Fault => None,
            GuestAccess::Done => return Err(format!("a read without a value after {op:?}")),
        };
        self.members[g].trace.push(got);
        if got == want {
            Ok(())
        } else {
            Err(format!("I-12 value: {got:x?}, reference {want:x?} after {op:?}"))
        }
    }

    /// I-9: a pause raises a PMI exactly if an armed status bit went from 0 to 1.
    fn judge(&mut self, g: usize) -> Result<(), String> {
        let m = &mut self.members[g];
        let (raised, want) = (m.pmu.pmi_raised(), std::mem::take(&mut m.reference.interrupt));
        // Every third one finds the performance interrupt masked: none then, and none later for it.
        let masked = m.reference.judged % 3 == 2;
        let service = m.reference.in_service;
        let expected = m.reference.judge(want, masked);
        let injected = m.pmu.judge_pmi(masked);
        if raised != want {
            return Err(format!("I-9: PMI raised {raised}, reference {want}"));
        }
        if injected != expected || m.pmu.pmi_raised() || m.pmu.in_service() != m.reference.in_service {
            return Err(format!("I-9: injected {injected} (masked {masked}, in service {service})"));
        }
        Ok(())
    }

    /// I-3, I-5: after a load the hardware holds the live registers, nothing of anybody else counts, K is 0.
    fn check_loaded(&self, g: usize) -> Result<(), String> {
        let host = *self.core.host();
        let raw = |msr| self.core.hardware().model.raw(msr).unwrap_or(0);
        if host.has_global() && raw(host.control_msr()) != 0 {
            return Err("I-3: K is not 0 after load".into());
        }
        let m = &self.members[g];
        for i in 0..16 {
            if host.has_gp(i)
                && !m.pmu.shape().has_gp(i)
                && m.pmu.any_live()
                && raw(host.selector_msr(i)) != 0
            {
                return Err(format!("I-5: unexposed selector {i} is not 0"));
            }
            if m.pmu.policy() == Policy::Strict
                && host.has_gp(i)
                && !m.pmu.shape().has_gp(i)
                && raw(host.counter_msr(i)) != 0
            {
                return Err(format!("I-5: unexposed counter {i} is not 0"));
            }
        }
        let status = if host.has_global() { raw(host.status_msr()) } else { 0 };
        if host.vendor == Vendor::Intel && status >> 58 & 3 != 0 {
            return Err("I-7: a stale freeze bit survived into the guest".into());
        }
        Ok(())
    }

    /// I-1: after a strict put no register holds anything.
    fn check_scrubbed(&self) -> Result<(), String> {
        for msr in all_registers(self.core.host()) {
            let value = self.core.hardware().model.raw(msr).unwrap_or(0);
            if value != 0 {
                return Err(format!("I-1: register {msr:#x} holds {value:#x} after a strict put"));
            }
        }
        Ok(())
    }

    /// I-1, second half: a host that enables everything counts nothing of the guest's, and a lazy guest stays quiet (I-2).
    fn check_quiet(&self, scrubbed: bool) -> Result<(), String> {
        let host = *self.core.host();
        let mut probe = self.core.hardware().model.clone();
        if scrubbed && host.has_global() {
            probe.host_set(host.control_msr(), host.counter_bits()).map_err(|e| e.to_string())?;
        }
        let before: Vec<_> = all_registers(&host).iter().map(|&m| probe.raw(m)).collect();
        probe.feed(
            &Events { cycles: 7, instructions: 7, ref_cycles: 7, slots: 7, branches: 7 },
            CpuMode::Host,
        );
        probe.feed(
            &Events { cycles: 7, instructions: 7, ref_cycles: 7, slots: 7, branches: 7 },
            CpuMode::Guest,
        );
        let after: Vec<_> = all_registers(&host).iter().map(|&m| probe.raw(m)).collect();
        if before == after { Ok(()) } else { Err("I-2: a guest that was put goes on counting".into()) }
    }
}
