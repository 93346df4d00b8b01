//! Which host cores a machine's vCPUs get: the options of `vm create` and `vm placement`.

use clap::{Args, ValueEnum};
use vpmu_client::api::{CpuPlacement, cpu_placement};

/// Most cores in one list.
const MAX_CORES: usize = 256;

#[derive(Debug, Args)]
pub(crate) struct PlacementArgs {
    /// Who else may run on its cores.
    #[arg(long, value_enum, default_value = "shared", help_heading = "Cores")]
    placement: Policy,
    /// Which free cores are taken; unset means packed.
    #[arg(long, value_enum, conflicts_with = "cores", help_heading = "Cores")]
    arrangement: Option<Arrangement>,
    /// All vCPUs on one NUMA node, memory bound to it.
    #[arg(long, help_heading = "Cores")]
    numa_local: bool,
    /// These host cores, e.g. 2-4,8: dedicated, one a vCPU; shared, at most one a vCPU, taken in turn.
    #[arg(long, value_parser = parse_cores, value_name = "LIST", help_heading = "Cores")]
    cores: Option<Cores>,
    /// Run the vCPUs under SCHED_FIFO at this priority, 1 to 99; dedicated cores only.
    #[arg(long, value_name = "N", help_heading = "Cores")]
    fifo: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Policy {
    /// vCPUs of several machines take turns.
    Shared,
    /// A whole physical core for each vCPU, its other threads idle, vpmud's own threads elsewhere.
    Dedicated,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Arrangement {
    /// Close together: one last-level cache, else one NUMA node, if it has enough.
    Packed,
    /// Far apart: over NUMA nodes and caches in turn.
    Spread,
}

/// A list of cores as given.
#[derive(Clone, Debug)]
struct Cores(Vec<u32>);

impl PlacementArgs {
    /// As the API has it.
    pub(crate) fn spec(&self) -> CpuPlacement {
        let policy = match self.placement {
            // Unset means shared: a machine that asked for nothing shows nothing.
            Policy::Shared => cpu_placement::Policy::Unspecified,
            Policy::Dedicated => cpu_placement::Policy::Dedicated,
        };
        let arrangement = match self.arrangement {
            None => cpu_placement::Arrangement::Unspecified,
            Some(Arrangement::Packed) => cpu_placement::Arrangement::Packed,
            Some(Arrangement::Spread) => cpu_placement::Arrangement::Spread,
        };
        CpuPlacement {
            policy: policy.into(),
            arrangement: arrangement.into(),
            numa_local: self.numa_local,
            cores: self.cores.clone().map(|cores| cores.0).unwrap_or_default(),
            fifo_priority: self.fifo.unwrap_or_default(),
        }
    }
}

/// `2-4,8`, in the order given.
fn parse_cores(text: &str) -> Result<Cores, String> {
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |n: &str| {
            n.trim().parse::<u32>().map_err(|_| format!("{n:?} is no core number; write e.g. 2-4,8"))
        };
        let (first, last) = (number(first)?, number(last)?);
        if last < first {
            return Err(format!("{part} runs backwards; write {last}-{first}"));
        }
        if (last - first) as usize >= MAX_CORES - cores.len().min(MAX_CORES) {
            return Err(format!("more than {MAX_CORES} cores"));
        }
        cores.extend(first..=last);
    }
    Ok(Cores(cores))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_ranges_and_numbers() {
        assert_eq!(parse_cores("2-4,8,0").expect("a list").0, [2, 3, 4, 8, 0]);
        for bad in ["", "a", "4-2", "1,", "0-4294967295", "-1", "0-200,0-200"] {
            assert!(parse_cores(bad).is_err(), "{bad}");
        }
    }
}
