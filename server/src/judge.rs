//! Judges this host against what was asked for, before anything is opened: KVM, cores, the modelled PMU.

use vpmu_proto::peer::CpuidLeaf;

use crate::config::{ConfigError, HypervisorKind, ServeConfig};
use crate::serve::ServeError;

/// What this host can do, judged before anything is opened.
pub(crate) struct Host {
    pub(crate) hypervisor: HypervisorKind,
    pub(crate) shape: pmu::Shape,
    pub(crate) pmu_name: String,
    pub(crate) notes: Vec<String>,
    pub(crate) cores: Vec<u32>,
    pub(crate) memory_bytes: u64,
    pub(crate) boot_id: String,
    pub(crate) cpuid: Vec<CpuidLeaf>,
}

impl Host {
    /// Looks at the host and at what was asked for.
    pub(crate) async fn judge(config: &ServeConfig) -> Result<Self, ServeError> {
        let facts = tokio::task::spawn_blocking(vcpu_worker::host::probe).await.map_err(|e| {
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
        let shape: pmu::Shape =
            config.model_pmu.parse().map_err(|e: pmu::ShapeError| ConfigError::ModelPmu {
                value: crate::status::clip(&config.model_pmu, 64),
                problem: e.to_string(),
            })?;
        let cores = judge_cores(&config.cores, &facts.allowed_cores)?;
        let mut notes = vec![
            "msr: the switcher's back end on /dev/cpu/N/msr is not there yet".to_owned(),
            "kvm: the back end on the host kernel's vPMU is not there yet".to_owned(),
        ];
        if let Some(why) = no_kvm {
            notes.push(format!("no KVM: {why}"));
        }
        Ok(Self {
            hypervisor,
            pmu_name: shape.to_string(),
            shape,
            notes,
            cores,
            memory_bytes: facts.memory_bytes,
            boot_id: facts.boot_id,
            cpuid,
        })
    }
}

fn judge_cores(asked: &[u32], allowed: &[u32]) -> Result<Vec<u32>, ConfigError> {
    let bad =
        |problem: String| ConfigError::Cores { given: asked.to_vec(), problem, allowed: allowed.to_vec() };
    let mut cores = if asked.is_empty() { allowed.to_vec() } else { asked.to_vec() };
    cores.sort_unstable();
    if let Some(twice) = cores.windows(2).find(|w| w.first() == w.last()).and_then(|w| w.first()) {
        return Err(bad(format!("core {twice} is named twice")));
    }
    if let Some(missing) = cores.iter().find(|c| !allowed.contains(c)) {
        return Err(bad(format!("core {missing} is not there or not allowed")));
    }
    if cores.is_empty() {
        return Err(bad("there is no core".to_owned()));
    }
    Ok(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_must_be_there_and_named_once() {
        assert_eq!(judge_cores(&[], &[0, 1]).expect("all"), [0, 1]);
        assert_eq!(judge_cores(&[1], &[0, 1]).expect("one"), [1]);
        for asked in [&[2][..], &[0, 0][..]] {
            assert_eq!(judge_cores(asked, &[0, 1]).expect_err("refused").reason(), "BAD_CORES");
        }
        assert_eq!(judge_cores(&[], &[]).expect_err("none").reason(), "BAD_CORES");
    }
}
