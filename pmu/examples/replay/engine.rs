//! One core, its guests, and what each line does to them.

use std::collections::HashMap;

use pmu::registers::CAP_FW_WRITE;
use pmu::{
    Core, CpuMode, EventFilter, Events, GuestAccess, GuestId, GuestPmu, ModelPmu, Policy, Shape, SwitchError,
    Vendor,
};
use serde_json::{Map, Value, json};

use crate::input::{Guest, Host, Input};
use crate::recorder::{Access, Recorder};

/// Guests of one stream at most.
const MAX_GUESTS: usize = 4096;

/// The answer to one line.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    error: Option<String>,
    fault: bool,
    value: Option<u64>,
    accesses: Vec<Access>,
    pmi: u64,
}

impl Answer {
    pub(crate) fn error(text: impl Into<String>) -> Self {
        Self { error: Some(text.into()), ..Self::default() }
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut out = Map::new();
        out.insert("ok".into(), json!(self.error.is_none() && !self.fault));
        if let Some(value) = self.value {
            out.insert("value".into(), json!(value));
        }
        if self.fault {
            out.insert("fault".into(), json!("#GP"));
        }
        if let Some(error) = &self.error {
            out.insert("error".into(), json!(error));
        }
        out.insert("accesses".into(), json!(self.accesses));
        out.insert("pmi".into(), json!(self.pmi));
        Value::Object(out)
    }
}

/// What went wrong with a line.
enum Failure {
    /// The tool's user.
    Input(String),
    /// The switcher.
    Switch(SwitchError),
}

impl From<SwitchError> for Failure {
    fn from(error: SwitchError) -> Self {
        Self::Switch(error)
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Input(text)
    }
}

/// State of a stream.
#[derive(Default)]
pub(crate) struct Engine {
    core: Option<Core<Recorder>>,
    guests: HashMap<String, GuestPmu>,
}

impl Engine {
    /// Answers one line.
    pub(crate) fn line(&mut self, text: &str) -> Answer {
        match serde_json::from_str(text) {
            Ok(input) => self.step(input),
            Err(error) => Answer::error(format!("not a valid line: {error}")),
        }
    }

    fn step(&mut self, input: Input) -> Answer {
        if let Some(core) = &mut self.core {
            core.hardware_mut().failed = false;
        }
        let mut answer = Answer::default();
        match self.run(input) {
            Ok(None | Some(GuestAccess::Done)) => {}
            Ok(Some(GuestAccess::Value(value))) => answer.value = Some(value),
            Ok(Some(GuestAccess::Fault)) => answer.fault = true,
            Err(Failure::Switch(SwitchError::Busy(_))) => answer.error = Some("busy".into()),
            Err(Failure::Switch(SwitchError::Access { .. })) => answer.error = Some("hw".into()),
            Err(Failure::Switch(error)) => answer.error = Some(error.to_string()),
            Err(Failure::Input(text)) => answer.error = Some(text),
        }
        if let Some(core) = &mut self.core {
            answer.accesses = std::mem::take(&mut core.hardware_mut().accesses);
        }
        // The tool has no local APIC: the performance interrupt is unmasked.
        answer.pmi = self.guests.values_mut().map(|g| u64::from(g.judge_pmi(false))).sum();
        answer
    }

    fn core(&mut self) -> Result<&mut Core<Recorder>, Failure> {
        self.core
            .as_mut()
            .ok_or_else(|| Failure::Input("no host yet: begin with an \"op\":\"host\" line".into()))
    }

    fn pair(&mut self, id: &str) -> Result<(&mut Core<Recorder>, &mut GuestPmu), Failure> {
        let core = self
            .core
            .as_mut()
            .ok_or_else(|| "no host yet: begin with an \"op\":\"host\" line".to_string())?;
        let guest = self.guests.get_mut(id).ok_or_else(|| format!("no guest {id:?}"))?;
        Ok((core, guest))
    }

    fn run(&mut self, input: Input) -> Result<Option<GuestAccess>, Failure> {
        match input {
            Input::Host(host) => {
                let shape = host_shape(&host)?;
                self.guests.clear();
                self.core = Some(Core::new(Recorder::new(ModelPmu::new(shape)), shape));
                Ok(None)
            }
            Input::Guest(guest) => {
                let host = *self.core()?.host();
                if self.guests.contains_key(&guest.id) {
                    return Err(format!("guest {:?} exists already", guest.id).into());
                }
                if self.guests.len() >= MAX_GUESTS {
                    return Err(format!("at most {MAX_GUESTS} guests").into());
                }
                let (shape, policy) = guest_shape(&guest, &host)?;
                let id = GuestId(self.guests.len() as u64 + 1);
                self.guests.insert(guest.id, GuestPmu::new(id, shape, policy, EventFilter::allow_all()));
                Ok(None)
            }
            Input::HostSet { msr, value } => {
                let core = self.core()?;
                if core.is_busy() {
                    return Err("refused while a guest is loaded".to_string().into());
                }
                if core.hardware().model.raw(msr).is_none() {
                    return Err(format!("this core has no register {msr}").into());
                }
                // Whoever gives the core to the host reads the resident guest first; host_set is no access.
                core.hardware_mut().aside = true;
                let evicted = core.evict_resident();
                core.hardware_mut().aside = false;
                evicted?;
                core.hardware_mut()
                    .model
                    .host_set(msr, value)
                    .map_err(|_| format!("the host cannot put {value} into register {msr}"))?;
                core.forget();
                Ok(None)
            }
            Input::Load { id } => {
                let (core, guest) = self.pair(&id)?;
                if core.is_loaded(guest) {
                    return Ok(None);
                }
                core.load(guest)?;
                if let Err(error) = core.resume(guest) {
                    // The line's operation is load and resume: a failed one leaves the guest not loaded.
                    core.abandon_load(guest);
                    return Err(error.into());
                }
                Ok(None)
            }
            Input::Put { id } => {
                let (core, guest) = self.pair(&id)?;
                core.put(guest)?;
                Ok(None)
            }
            Input::GuestWrmsr { id, msr, value } => {
                let (core, guest) = self.pair(&id)?;
                Ok(Some(core.guest_wrmsr(guest, msr, value)?))
            }
            Input::GuestRdmsr { id, msr } => {
                let (core, guest) = self.pair(&id)?;
                Ok(Some(core.guest_rdmsr(guest, msr)?))
            }
            Input::GuestRdpmc { id, index } => {
                let (core, guest) = self.pair(&id)?;
                Ok(Some(core.guest_rdpmc(guest, index)?))
            }
            Input::Count { events } => {
                let core = self.core()?;
                let mode = if core.is_busy() { CpuMode::Guest } else { CpuMode::Host };
                let events = Events {
                    cycles: events.cycles,
                    instructions: events.instructions,
                    ref_cycles: events.ref_cycles,
                    slots: events.slots,
                    branches: 0,
                };
                core.hardware_mut().model.feed(&events, mode);
                Ok(None)
            }
            Input::HwRead { msr } => {
                let value = self.core()?.hardware().model.raw(msr);
                let value = value.ok_or_else(|| format!("this core has no register {msr}"))?;
                Ok(Some(GuestAccess::Value(value)))
            }
            Input::FailAccess { n } => {
                if n == 0 {
                    return Err("n is 1 for the next access".to_string().into());
                }
                self.core()?.hardware_mut().fail_in = Some(n);
                Ok(None)
            }
        }
    }
}

fn bitmap(count: Option<u32>, bitmap: Option<u64>, field: &str) -> Result<u64, String> {
    match (count, bitmap) {
        (_, Some(bitmap)) => Ok(bitmap),
        (Some(count), None) if count < 64 => Ok((1 << count) - 1),
        (Some(count), None) => Err(format!("{field} is {count}, at most 63")),
        (None, None) => Ok(0),
    }
}

fn host_shape(host: &Host) -> Result<Shape, String> {
    let vendor: Vendor =
        host.vendor.parse().map_err(|_| format!("vendor is {:?}, must be intel or amd", host.vendor))?;
    let gp_width = host.gp_width.unwrap_or(48);
    let shape = Shape {
        vendor,
        version: host.version,
        gp: bitmap(host.gp, host.gp_bitmap, "gp")?,
        fixed: bitmap(host.fixed, host.fixed_bitmap, "fixed")?,
        gp_width,
        fixed_width: host.fixed_width.unwrap_or(gp_width),
        perf_capabilities: if vendor == Vendor::Intel { CAP_FW_WRITE } else { 0 },
    };
    shape.validate().map_err(|e| e.to_string())?;
    Ok(shape)
}

fn guest_shape(guest: &Guest, host: &Shape) -> Result<(Shape, Policy), String> {
    let policy = match guest.policy.as_deref() {
        None | Some("strict") => Policy::Strict,
        Some("lazy") => Policy::Lazy,
        Some(other) => return Err(format!("policy is {other:?}, must be strict or lazy")),
    };
    // What is not given is the host's, as far as the guest's version has it.
    let version = guest.version.unwrap_or(host.version);
    let (max_gp, max_fixed) = match (host.vendor, version) {
        (Vendor::Amd, 0) => (4, 0),
        (Vendor::Amd, _) | (Vendor::Intel, 1) => (64, 0),
        (Vendor::Intel, 0) => (0, 0),
        (Vendor::Intel, _) => (64, 64),
    };
    let gp = guest.gp.unwrap_or_else(|| host.gp_count().min(max_gp));
    let fixed = guest.fixed.unwrap_or_else(|| host.fixed_count().min(max_fixed));
    let subset = host
        .guest(
            if guest.gp_bitmap.is_some() { 0 } else { gp },
            if guest.fixed_bitmap.is_some() { 0 } else { fixed },
        )
        .map_err(|e| e.to_string())?;
    let mut shape = Shape {
        gp: guest.gp_bitmap.unwrap_or(subset.gp),
        fixed: guest.fixed_bitmap.unwrap_or(subset.fixed),
        version,
        gp_width: guest.gp_width.unwrap_or(host.gp_width),
        fixed_width: guest.fixed_width.unwrap_or(host.fixed_width),
        ..subset
    };
    if guest.fw_write == Some(false) {
        shape.perf_capabilities &= !CAP_FW_WRITE;
    }
    shape.validate().map_err(|e| e.to_string())?;
    let within = shape.counter_bits() & !host.counter_bits() == 0
        && shape.version <= host.version
        && shape.gp_width <= host.gp_width
        && shape.fixed_width <= host.fixed_width;
    if within {
        Ok((shape, policy))
    } else {
        Err(format!("a guest of shape {shape} does not fit a host of shape {host}"))
    }
}
