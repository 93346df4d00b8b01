//! Load, resume, pause, put, sync and a trapped access allocate nothing, whatever the policy and also on eviction.

use pmu::{Core, CpuMode, EventFilter, Events, GuestId, GuestPmu, ModelPmu, Policy, Shape};

#[test]
fn the_switch_allocates_nothing() {
    let host: Shape = "intel:v5:8+4:48".parse().expect("shape");
    let events = Events { cycles: 900, instructions: 1000, ref_cycles: 300, slots: 4000, branches: 0 };
    for policy in [Policy::Strict, Policy::Lazy] {
        let mut core = Core::new(ModelPmu::new(host), host);
        let mut guests: Vec<GuestPmu> = (0..2)
            .map(|id| {
                GuestPmu::new(
                    GuestId(id),
                    host.guest(8, 4).expect("subset"),
                    policy,
                    EventFilter::allow_all(),
                )
            })
            .collect();
        let info = allocation_counter::measure(|| {
            for round in 0..4u64 {
                for g in &mut guests {
                    core.guest_wrmsr(g, 0x4C1, (1 << 48) - 500 + round).expect("write");
                    core.guest_wrmsr(g, 0x186, 0x53_00C0).expect("write");
                    core.guest_wrmsr(g, 0x38F, 1).expect("write");
                    core.load(g).expect("load");
                    core.resume(g).expect("resume");
                    core.hardware_mut().feed(&events, CpuMode::Guest);
                    core.pause(g).expect("pause");
                    core.guest_rdmsr(g, 0x38E).expect("read");
                    core.put(g).expect("put");
                }
            }
            for g in &mut guests {
                core.sync(g).expect("sync");
            }
        });
        assert_eq!(info.count_total, 0, "{policy:?}");
    }
}
