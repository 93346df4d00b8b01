//! Judges this host against what was asked for, before anything is opened: KVM, cores, the modelled PMU.

use vcpu_worker::host::{Topology, affinity};
use vpmu_proto::peer::CpuidLeaf;

use crate::config::{ConfigError, HypervisorKind, ServeConfig};
use crate::pmu_mode::Chosen;
use crate::serve::ServeError;

/// What this host can do, judged before anything is opened.
pub(crate) struct Host {
    pub(crate) hypervisor: HypervisorKind,
    pub(crate) shape: pmu::Shape,
    /// "model", "msr" or "kvm".
    pub(crate) pmu_mode: &'static str,
    pub(crate) pmu_name: String,
    pub(crate) notes: Vec<String>,
    /// Cores that vCPUs may use.
    pub(crate) cores: Vec<u32>,
    /// Cores that this process's own threads may use.
    pub(crate) own_cores: Vec<u32>,
    pub(crate) topology: Topology,
    pub(crate) memory_bytes: u64,
    pub(crate) boot_id: String,
    pub(crate) tsc_khz: u32,
    pub(crate) cpuid: Vec<CpuidLeaf>,
}

impl Host {
    /// Looks at the host and at what was asked for.
    pub(crate) async fn judge(config: &ServeConfig) -> Result<Self, ServeError> {
        let look = || {
            let topology = Topology::of_this_host();
            let pinnable = affinity::pinnable(&topology.cpus().map(|cpu| cpu.id).collect::<Vec<_>>());
            (vcpu_worker::host::probe(), topology, pinnable)
        };
        let (facts, topology, pinnable) = tokio::task::spawn_blocking(look).await.map_err(|e| {
            ServeError::Io { what: "cannot look at the host", source: std::io::Error::other(e) }
        })?;
        let leaves = facts.kvm.as_ref().map(|k| k.cpuid.as_slice()).unwrap_or_default();
        let cpuid = leaves
            .iter()
            .map(|&(function, index, [eax, ebx, ecx, edx])| CpuidLeaf { function, index, eax, ebx, ecx, edx })
            .collect();
        let no_kvm = facts.kvm.as_ref().err().map(ToString::to_string);
        let hypervisor = match (config.hypervisor, &no_kvm) {
            (Some(HypervisorKind::Kvm), Some(why)) => return Err(ConfigError::NoKvm(why.clone()).into()),
            (Some(asked), _) => asked,
            (None, None) => HypervisorKind::Kvm,
            (None, Some(why)) => {
                tracing::warn!(%why, "no KVM here: guests are simulated, nothing real runs");
                HypervisorKind::Simulated
            }
        };
        let model: pmu::Shape =
            config.model_pmu.parse().map_err(|e: pmu::ShapeError| ConfigError::ModelPmu {
                value: crate::status::clip(&config.model_pmu, 64),
                problem: e.to_string(),
            })?;
        let cores = judge_cores(&config.cores, &facts.allowed_cores, &topology, &pinnable)?;
        let with_kvm = hypervisor == HypervisorKind::Kvm;
        let (facts, offers) = tokio::task::spawn_blocking(move || {
            let offers = crate::pmu_mode::look(&facts, model, with_kvm);
            (facts, offers)
        })
        .await
        .map_err(|e| ServeError::Io { what: "cannot look at the host", source: std::io::Error::other(e) })?;
        let Chosen { mode, shape, mut notes } = crate::pmu_mode::choose(config.pmu, &offers)?;
        for note in &notes {
            tracing::info!(pmu_mode = mode, "{note}");
        }
        if let Some(why) = no_kvm {
            notes.push(format!("no KVM: {why}"));
        }
        Ok(Self {
            hypervisor,
            pmu_mode: mode,
            pmu_name: shape.to_string(),
            shape,
            notes,
            cores,
            own_cores: facts.allowed_cores,
            topology,
            memory_bytes: facts.memory_bytes,
            boot_id: facts.boot_id,
            tsc_khz: facts.tsc_khz,
            cpuid,
        })
    }
}

/// By default every core that this process may run on, and isolated ones, which are left out of that but may be asked for.
fn judge_cores(
    asked: &[u32],
    allowed: &[u32],
    topology: &Topology,
    pinnable: &[u32],
) -> Result<Vec<u32>, ConfigError> {
    let bad =
        |problem: String| ConfigError::Cores { given: asked.to_vec(), problem, allowed: pinnable.to_vec() };
    let mut cores = asked.to_vec();
    if asked.is_empty() {
        let isolated = topology.isolated().filter(|core| pinnable.contains(core) && !allowed.contains(core));
        cores = allowed.iter().copied().chain(isolated).collect();
    }
    cores.sort_unstable();
    if let Some(twice) = cores.windows(2).find(|w| w.first() == w.last()).and_then(|w| w.first()) {
        return Err(bad(format!("core {twice} is named twice")));
    }
    if let Some(missing) = cores.iter().find(|c| !pinnable.contains(c)) {
        let problem = if topology.is_offline(*missing) {
            format!("core {missing} is offline")
        } else {
            format!("core {missing} is not there or not allowed")
        };
        return Err(bad(problem));
    }
    if cores.is_empty() {
        return Err(bad("there is no core".to_owned()));
    }
    Ok(cores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vcpu_worker::host::topology::Cpu;

    #[test]
    fn cores_must_be_there_and_named_once() {
        let two = Topology::plain(2);
        let judge = |asked: &[u32]| judge_cores(asked, &[0, 1], &two, &[0, 1]);
        assert_eq!(judge(&[]).expect("all"), [0, 1]);
        assert_eq!(judge(&[1]).expect("one"), [1]);
        for asked in [&[2][..], &[0, 0][..]] {
            assert_eq!(judge(asked).expect_err("refused").reason(), "BAD_CORES");
        }
        assert_eq!(judge_cores(&[], &[], &two, &[]).expect_err("none").reason(), "BAD_CORES");
    }

    #[test]
    fn isolated_cores_are_used_though_no_process_runs_there_by_itself() {
        let isolated =
            |id| Cpu { id, package: 0, node: 0, core: id, cache: 0, isolated: id >= 2, nohz: false };
        let host = Topology::of((0..4).map(isolated), [4]);
        assert_eq!(judge_cores(&[], &[0, 1], &host, &[0, 1, 2, 3]).expect("all"), [0, 1, 2, 3]);
        assert_eq!(judge_cores(&[], &[0, 1], &host, &[0, 1]).expect("a cpuset keeps them out"), [0, 1]);
        let offline = judge_cores(&[4], &[0, 1], &host, &[0, 1, 2, 3]).expect_err("refused");
        assert!(offline.to_string().contains("core 4 is offline"), "{offline}");
    }
}
