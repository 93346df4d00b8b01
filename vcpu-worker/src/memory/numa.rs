//! Where guest memory comes from on a host with several NUMA nodes.
//!
//! The policy is the memfd's own (shared memory keeps it with the file), so it holds for pages that KVM, this process or
//! another that maps the file touches first. Set before anything is touched; pages that are there stay where they are.
#![allow(unsafe_code)]

use super::{GuestMemory, MemoryError};

/// Only these nodes.
const MPOL_BIND: libc::c_ulong = 2;
/// Nodes that a mask holds; Linux's largest configuration.
const MAX_NODES: u32 = 1024;
const WORDS: usize = MAX_NODES as usize / 64;

impl GuestMemory {
    /// Takes pages from these NUMA nodes only (mbind, MPOL_BIND); an empty list changes nothing.
    ///
    /// # Errors
    /// If a node is not there or not allowed, or the kernel has no NUMA policy.
    pub fn bind(&self, nodes: &[u32]) -> Result<(), MemoryError> {
        if nodes.is_empty() {
            return Ok(());
        }
        let mut mask = [0u64; WORDS];
        for node in nodes {
            let Some(word) = mask.get_mut(*node as usize / 64) else {
                let source =
                    std::io::Error::other(format!("node {node} is beyond the {MAX_NODES} of a mask"));
                return Err(MemoryError::Os { call: "mbind", source });
            };
            *word |= 1 << (node % 64);
        }
        // SAFETY: the range is exactly the mapping of this memory, which stays; the kernel reads the mask's MAX_NODES bits
        // (it takes one off the count that it is given).
        let ret = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.inner.mapping.address(),
                self.bytes(),
                MPOL_BIND,
                mask.as_ptr(),
                libc::c_ulong::from(MAX_NODES) + 1,
                0,
            )
        };
        if ret == 0 {
            return Ok(());
        }
        Err(MemoryError::Os { call: "mbind", source: std::io::Error::last_os_error() })
    }

    /// Nodes that pages are bound to, as the kernel says; empty without a binding.
    ///
    /// # Errors
    /// If the kernel has no NUMA policy.
    pub fn bound_nodes(&self) -> Result<Vec<u32>, MemoryError> {
        const MPOL_F_ADDR: libc::c_ulong = 2;
        let mut mask = [0u64; WORDS];
        let mut mode: libc::c_int = 0;
        // SAFETY: the address is in the mapping of this memory; the kernel writes one int and MAX_NODES bits of mask.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut mode,
                mask.as_mut_ptr(),
                libc::c_ulong::from(MAX_NODES) + 1,
                self.inner.mapping.address(),
                MPOL_F_ADDR,
            )
        };
        if ret != 0 {
            return Err(MemoryError::Os { call: "get_mempolicy", source: std::io::Error::last_os_error() });
        }
        if libc::c_ulong::try_from(mode) != Ok(MPOL_BIND) {
            return Ok(Vec::new());
        }
        Ok((0..MAX_NODES).filter(|node| mask[*node as usize / 64] >> (node % 64) & 1 == 1).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binding_is_the_kernels_and_a_node_that_is_not_there_is_refused() {
        let node = *crate::host::Topology::of_this_host().nodes().first().expect("a node");
        let memory = GuestMemory::new("numa", 4 << 20).expect("memory");
        memory.bind(&[]).expect("nothing to do");
        assert_eq!(memory.bound_nodes().expect("asked"), Vec::<u32>::new());
        for absent in [1023, 5000] {
            assert_eq!(memory.bind(&[absent]).expect_err("no such node").reason(), "MEMORY_CALL_FAILED");
        }
        memory.bind(&[node]).expect("bound");
        assert_eq!(memory.bound_nodes().expect("asked"), [node]);
        memory.write(0, b"touched").expect("pages come from there");
    }
}
