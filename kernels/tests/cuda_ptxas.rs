//! No kernel keeps registers in memory, on any architecture that machine code is made for.

use std::collections::{BTreeMap, BTreeSet};

use obol_kernels::cuda::PTXAS;

/// Kernels by architecture, each with what ptxas said of its stack and spills.
fn said() -> BTreeMap<&'static str, BTreeMap<&'static str, &'static str>> {
    let mut said: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    let mut compiling = None;
    for line in PTXAS.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut parts = rest.split('\'');
            let (kernel, architecture) = (parts.next(), parts.nth(1));
            compiling = kernel.zip(architecture);
        } else if line.contains("bytes spill stores")
            && let Some((kernel, architecture)) = compiling.take()
        {
            let known = said.entry(architecture).or_default().insert(kernel, line.trim());
            assert_eq!(known, None, "two kernels {kernel} for {architecture}");
        }
    }
    said
}

#[test]
fn no_kernel_spills_registers() {
    let said = said();
    for (architecture, kernels) in &said {
        for (kernel, line) in kernels {
            assert!(
                line.contains(" 0 bytes spill stores, 0 bytes spill loads"),
                "{kernel} for {architecture}: {line}"
            );
        }
    }
    assert!(!said.is_empty(), "ptxas said nothing");
}

#[test]
fn every_kernel_is_there_for_every_architecture() {
    let said = said();
    let names: BTreeSet<&str> = said.values().flat_map(|kernels| kernels.keys().copied()).collect();
    for (architecture, kernels) in &said {
        let missing: Vec<_> = names.iter().filter(|name| !kernels.contains_key(**name)).collect();
        assert!(missing.is_empty(), "{architecture} lacks {missing:?}");
    }
    // One kernel of each file, so that no file is left out.
    for kernel in ["rms_norm_bf16", "silu_mul_f16", "gather_2", "route_f32", "sample_pick"] {
        assert!(names.contains(kernel), "{kernel} is not among {names:?}");
    }
    // A build for trying things out may be made for fewer.
    if option_env!("OBOL_CUDA_ARCHITECTURES").is_none() {
        assert_eq!(said.keys().copied().collect::<Vec<_>>(), ["sm_80", "sm_86", "sm_89", "sm_90"]);
    }
}
