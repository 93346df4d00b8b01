//! For tests: one vCPU thread without the rest of a machine.

use std::sync::Arc;

use pmu::{Rates, Shape};

use super::{Left, Listener, Starting, VcpuHandle, VcpuSetup};
use crate::console::Console;
use crate::cores::{Backend, HostCores};
use crate::devices::Devices;
use crate::grant::{Grant, Rights, RunRight};
use crate::hypervisor::Vm;

struct Nobody;
impl Listener for Nobody {
    fn left(&self, _: u32, _: Left) {}
}

/// The first vCPU of a VM, on the first core that this process may use, without a PMU of the switcher's.
pub(crate) fn spawn(vm: Arc<dyn Vm>, backend: Backend, shape: Shape, right: &Arc<RunRight>) -> VcpuHandle {
    let core = crate::host::allowed_cores()[0];
    let cores = HostCores::with(backend, shape, &[core]);
    VcpuHandle::spawn(VcpuSetup {
        throttle: Arc::default(),
        index: 0,
        vm_name: "bare".to_owned(),
        devices: Arc::new(Devices::new(Arc::clone(&vm), Arc::new(Console::default()))),
        vm,
        slot: cores.slot(core).expect("a core"),
        fifo: None,
        pmu: None,
        rates: Rates::default(),
        right: Arc::clone(right),
        listener: Arc::new(Nobody),
    })
    .and_then(Starting::started)
    .expect("starts")
}

/// The right to run at epoch 1.
pub(crate) fn granted() -> (Rights, Arc<RunRight>) {
    let (mut rights, right) = (Rights::default(), Arc::new(RunRight::default()));
    rights.attach("s", "v", 1, 1).expect("attached");
    rights.grant(Grant { epoch: 1, term: 1, seq: 1, deadline_ns: None }, 0).expect("granted");
    right.publish(&rights);
    (rights, right)
}
