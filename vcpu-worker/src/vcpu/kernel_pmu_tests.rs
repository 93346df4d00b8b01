//! PMU mode `kvm` on a vCPU thread, against the fake that records every call: what requests read is what KVM holds, a
//! restore is the whole order, and one that KVM refuses part way leaves a PMU that does not count.

use std::sync::{Arc, Mutex};

use pmu::{Image, Shape};
use vpmu_proto::worker::StatePiece;

use super::request::{LoadFrom, Request};
use super::{VcpuHandle, bare};
use crate::bitmap::PageBitmap;
use crate::cores::Backend;
use crate::error::WorkerError;
use crate::grant::RunRight;
use crate::hypervisor::simulated::{SimOptions, SimVm};
use crate::hypervisor::{Completion, Exit, HvError, InitialRegs, Kick, Vcpu, Vm};
use crate::kvm_pmu::KvmPmu;
use crate::kvm_pmu::fake::{Call, FakeKvm};
use crate::memory::GuestMemory;

type Shared = Arc<Mutex<FakeKvm>>;

/// The simulated machine with a PMU of its own for each vCPU.
struct WithPmu {
    inner: Arc<SimVm>,
    fake: Shared,
}

struct VcpuWithPmu {
    inner: Box<dyn Vcpu>,
    pmu: KvmPmu,
    fake: Shared,
}

impl Vm for WithPmu {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HvError> {
        let fake = Arc::clone(&self.fake);
        let pmu = {
            let mut fake = fake.lock().expect("fake");
            KvmPmu::new(fake.shape, &mut *fake)?
        };
        Ok(Box::new(VcpuWithPmu { inner: self.inner.create_vcpu(index)?, pmu, fake }))
    }
    fn memory(&self) -> &GuestMemory {
        self.inner.memory()
    }
    fn start_dirty_tracking(&self) -> Result<(), HvError> {
        self.inner.start_dirty_tracking()
    }
    fn collect_dirty(&self, into: &mut PageBitmap) -> Result<(), HvError> {
        self.inner.collect_dirty(into)
    }
    fn stop_dirty_tracking(&self) -> Result<(), HvError> {
        self.inner.stop_dirty_tracking()
    }
    fn save(&self) -> Result<Vec<StatePiece>, HvError> {
        self.inner.save()
    }
    fn restore(&self, pieces: &[StatePiece]) -> Result<(), HvError> {
        self.inner.restore(pieces)
    }
    fn signal_msi(&self, address: u64, data: u32) -> Result<(), HvError> {
        self.inner.signal_msi(address, data)
    }
    fn set_irq_line(&self, gsi: u32, level: bool) -> Result<(), HvError> {
        self.inner.set_irq_line(gsi, level)
    }
}

impl Vcpu for VcpuWithPmu {
    fn run(&mut self) -> Result<Exit, HvError> {
        self.inner.run()
    }
    fn complete(&mut self, answer: Completion) -> Result<(), HvError> {
        self.inner.complete(answer)
    }
    fn finish_pending(&mut self) -> Result<Option<Exit>, HvError> {
        self.inner.finish_pending()
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        self.inner.kicker()
    }
    fn clear_kick(&mut self) {
        self.inner.clear_kick();
    }
    fn set_initial(&mut self, regs: &InitialRegs) -> Result<(), HvError> {
        self.inner.set_initial(regs)
    }
    fn set_runnable(&mut self) -> Result<(), HvError> {
        self.inner.set_runnable()
    }
    fn save(&mut self) -> Result<Vec<StatePiece>, HvError> {
        self.inner.save()
    }
    fn restore(&mut self, pieces: &[StatePiece]) -> Result<(), HvError> {
        self.inner.restore(pieces)
    }
    fn has_pmu(&self) -> bool {
        true
    }
    fn save_pmu(&mut self) -> Result<Option<Image>, HvError> {
        Ok(Some(self.pmu.save(&mut *self.fake.lock().expect("fake"))?))
    }
    fn restore_pmu(&mut self, image: &Image) -> Result<bool, HvError> {
        let restored = self.pmu.restore(&mut *self.fake.lock().expect("fake"), image)?;
        Ok(restored.armed_overflows != 0)
    }
    fn lvtpc(&mut self) -> Result<u32, HvError> {
        self.inner.lvtpc()
    }
    fn inject_nmi(&mut self) -> Result<(), HvError> {
        self.inner.inject_nmi()
    }
    fn describe(&mut self) -> String {
        self.inner.describe()
    }
}

fn shape() -> Shape {
    "intel:v5:4+3:48".parse().expect("a shape")
}

/// What a guest may have left: two counters on, one of them overflowed and waiting for its interrupt.
fn image() -> Image {
    let shape = shape();
    let set = [
        (shape.counter_msr(0), 0x1234),
        (shape.counter_msr(1), 7),
        (shape.selector_msr(0), 0x53_00c0),
        (shape.selector_msr(1), 0x43_003c),
        (shape.status_msr(), 1),
        (shape.control_msr(), 3),
    ];
    let mut fake = FakeKvm::new(shape);
    fake.values.extend(set);
    let registers = fake.values.into_iter().collect();
    Image { shape, registers, in_service: false, pmi_pending: false, pmis: 0 }
}

fn start(fake: FakeKvm) -> (VcpuHandle, Shared) {
    let fake = Arc::new(Mutex::new(fake));
    let memory = GuestMemory::new("kernel-pmu", 4 << 20).expect("memory");
    let inner = SimVm::new(memory, SimOptions::default()).expect("simulated");
    let vm: Arc<dyn Vm> = Arc::new(WithPmu { inner, fake: Arc::clone(&fake) });
    let handle = bare::spawn(vm, Backend::Kvm, shape(), &Arc::new(RunRight::default()));
    (handle, fake)
}

fn load(
    vcpu: &VcpuHandle,
    pieces: &[StatePiece],
    image: Option<Image>,
) -> Result<Option<Image>, WorkerError> {
    let from = LoadFrom::Saved { pieces: pieces.to_vec(), pmu: image.map(Box::new) };
    vcpu.load(from).expect("sent").blocking_recv().expect("answered")
}

fn saved(vcpu: &VcpuHandle) -> Vec<StatePiece> {
    let saved = vcpu.ask(Request::Save).expect("sent").blocking_recv().expect("answered");
    saved.expect("saved").0
}

#[test]
fn requests_read_what_kvm_holds_and_a_restore_is_the_whole_order() {
    let (vcpu, fake) = start(FakeKvm::holding(&image()));
    let look = vcpu.ask(Request::Look).expect("sent").blocking_recv().expect("answered").expect("image");
    assert_eq!(look, Some(image()));
    let (pieces, pmu) =
        vcpu.ask(Request::Save).expect("sent").blocking_recv().expect("answered").expect("saved");
    assert_eq!(pmu, Some(image()));
    drop(vcpu);

    let (other, there) = start(FakeKvm::new(shape()));
    assert_eq!(load(&other, &pieces, pmu).expect("restored"), Some(image()), "as read back");
    let there = there.lock().expect("fake");
    assert_eq!(there.violations, Vec::<String>::new(), "nothing counted before everything was in place");
    let sets: Vec<_> =
        there.calls.iter().filter_map(|c| if let Call::Set(s) = c { Some(s) } else { None }).collect();
    let [writes] = sets[..] else { panic!("one batch: {sets:?}") };
    assert_eq!(writes.first(), Some(&(shape().control_msr(), 0)), "stopped first");
    assert_eq!(writes.last(), Some(&(shape().control_msr(), 3)), "started last");
    drop(fake);
}

#[test]
fn a_restore_that_kvm_refuses_part_way_stops_the_pmu() {
    let refusing = |edit: fn(&mut FakeKvm)| {
        let mut fake = FakeKvm::new(shape());
        edit(&mut fake);
        let (vcpu, fake) = start(fake);
        let pieces = saved(&vcpu);
        let error = load(&vcpu, &pieces, Some(image())).expect_err("refused");
        let fake = fake.lock().expect("fake");
        let enabled = fake.values[&shape().control_msr()];
        (error.reason(), enabled, fake.violations.clone())
    };
    let selector: fn(&mut FakeKvm) = |fake| {
        fake.zero_only.insert(fake.shape.selector_msr(1));
    };
    assert_eq!(refusing(selector), ("PMU_KVM_WRITE_REFUSED", 0, vec![]));
    for applied in 1..8 {
        let (reason, enabled, violations) = {
            let mut fake = FakeKvm::new(shape());
            fake.stop_next_set = Some(applied);
            let (vcpu, fake) = start(fake);
            let pieces = saved(&vcpu);
            let error = load(&vcpu, &pieces, Some(image())).expect_err("partial");
            let fake = fake.lock().expect("fake");
            (error.reason(), fake.values[&shape().control_msr()], fake.violations.clone())
        };
        assert_eq!((reason, enabled, violations), ("PMU_KVM_WRITE_REFUSED", 0, vec![]), "{applied} applied");
    }
    let forgetful: fn(&mut FakeKvm) = |fake| fake.forgets = Some(fake.shape.counter_msr(0));
    assert_eq!(refusing(forgetful), ("PMU_KVM_NOT_VERIFIED", 0, vec![]));
}

#[test]
fn an_image_is_wanted_and_must_be_this_guests() {
    let (vcpu, fake) = start(FakeKvm::new(shape()));
    let pieces = saved(&vcpu);
    assert_eq!(load(&vcpu, &pieces, None).expect_err("missing").reason(), "PMU_IMAGE_REJECTED");
    let other = Image { shape: "intel:v5:8+4:48".parse().expect("a shape"), ..image() };
    assert_eq!(load(&vcpu, &pieces, Some(other)).expect_err("another's").reason(), "PMU_KVM_SHAPE");
    let fake = fake.lock().expect("fake");
    assert!(!fake.calls.iter().any(|call| matches!(call, Call::Set(_))), "nothing was written");
}
