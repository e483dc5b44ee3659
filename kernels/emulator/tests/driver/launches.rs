//! Kernels that run, and kernels that fail.

use std::ffi::c_void;

use obol_emulator::driver::Config;
use obol_emulator::driver::api::contexts::{cuCtxSynchronize, cuDevicePrimaryCtxReset_v2};
use obol_emulator::driver::api::graphs;
use obol_emulator::driver::api::memory::{cuMemAlloc_v2, cuMemFree_v2};
use obol_emulator::driver::api::modules::*;
use obol_emulator::driver::api::streams::{
    self, cuStreamBeginCapture_v2, cuStreamCreate, cuStreamEndCapture,
};

use crate::kernels::*;
use crate::support::*;

/// What host objects keep of their fat binary.
#[repr(C)]
struct Wrapper {
    magic: u32,
    version: u32,
    image: *const u8,
}

fn store(stream: u64, address: u64, value: u32) -> u32 {
    launch(kernel("store"), [1, 1], 0, stream, &[address_of(&address), address_of(&value)])
}

fn check_add(function: u64) {
    let count = 1000_u32;
    let left: Vec<f32> = (0..count).map(|i| i as f32).collect();
    let right: Vec<f32> = (0..count).map(|i| 2.0 * i as f32).collect();
    let (out, a, b) = (device_of(&vec![0_f32; count as usize]), device_of(&left), device_of(&right));
    let params = [address_of(&out), address_of(&a), address_of(&b), address_of(&count)];
    assert_eq!(launch(function, [8, 128], 0, 0, &params), SUCCESS);
    let sums = read::<f32>(out, count as usize);
    assert!(sums.iter().enumerate().all(|(i, &sum)| sum == 3.0 * i as f32));
    for address in [out, a, b] {
        ok!(cuMemFree_v2, address);
    }
}

#[test]
fn a_kernel_runs_from_text_and_from_a_fat_binary() {
    let _machine = machine();
    check_add(kernel("add"));
    let old = text(&PTX.replace("entry add", "entry old"));
    let machine_code = b"\x7fELF machine code";
    let image = fat_binary(&[
        (2, 80, 0x11, machine_code),
        (1, 75, 0x11, &old),
        (1, 80, 0x11, &text(PTX)),
        (1, 130, 0x11, &old),
    ]);
    check_add(function(module_of(&image), "add"));
    let wrapper = Wrapper { magic: 0x4662_43b1, version: 1, image: image.as_ptr() };
    let mut module = 0;
    ok!(cuModuleLoadFatBinary, &raw mut module, address_of(&wrapper));
    check_add(function(module, "add"));
}

#[test]
fn arguments_can_be_packed() {
    let _machine = machine();
    let out = device_of(&[0_u32]);
    let mut packed = out.to_le_bytes().to_vec();
    packed.extend(77_u32.to_le_bytes());
    let size = packed.len();
    let pointer = |number: usize| number as *const c_void;
    let extra = [pointer(1), packed.as_ptr().cast(), pointer(2), address_of(&size), pointer(0)];
    let function = kernel("store");
    ok!(cuLaunchKernel, function, 1, 1, 1, 1, 1, 1, 0, 0, std::ptr::null(), extra.as_ptr());
    assert_eq!(read::<u32>(out, 1), [77]);
}

#[test]
fn launches_with_attributes_run() {
    let _machine = machine();
    let out = device_of(&[0_u32]);
    let value = 9_u32;
    let params = [address_of(&out), address_of(&value)];
    let mut attribute = LaunchAttribute { id: 4, padding: 0, value: [0; 16] };
    attribute.value[..3].copy_from_slice(&[1, 1, 1]);
    let function = kernel("store");
    let launch = |attribute: &LaunchAttribute| {
        let config = LaunchConfig {
            grid: [1, 1, 1],
            block: [1, 1, 1],
            shared_bytes: 0,
            stream: 0,
            attributes: attribute,
            attribute_count: 1,
        };
        code!(cuLaunchKernelEx, &raw const config, function, params.as_ptr(), std::ptr::null())
    };
    assert_eq!(launch(&attribute), SUCCESS);
    assert_eq!(read::<u32>(out, 1), [9]);
    attribute.value[0] = 2;
    assert_eq!(launch(&attribute), 801, "a cluster of two");
}

#[test]
fn a_fault_stays_until_the_device_is_reset() {
    let _machine = machine();
    let address = device_of(&[0_u32]);
    assert_eq!(store(0, address + 4, 1), SUCCESS, "the launch itself is fine");
    assert_eq!(code!(cuCtxSynchronize), 700);
    let mut other = 0;
    assert_eq!(code!(cuMemAlloc_v2, &raw mut other, 4), 700);
    assert_eq!(code!(cuMemFree_v2, address), 700);
    assert_eq!(code!(cuStreamCreate, &raw mut other, 0), 700);
    ok!(cuDevicePrimaryCtxReset_v2, 0);
    check_add(kernel("add"));
}

#[test]
fn each_kind_of_fault_has_its_error() {
    for (offset, expected) in [(0, SUCCESS), (4, 700), (2, 716)] {
        let _machine = machine();
        let address = device_of(&[0_u32]);
        assert_eq!(store(0, address + offset, 1), SUCCESS);
        assert_eq!(code!(cuCtxSynchronize), expected, "offset {offset}");
    }
    let _machine = machine();
    assert_eq!(launch(kernel("stopped"), [1, 1], 0, 0, &[]), SUCCESS);
    assert_eq!(code!(cuCtxSynchronize), 719);
}

#[test]
fn what_stands_behind_a_fault_is_not_done() {
    let _machine = machine();
    let (stream, log) = (stream(), std::sync::Arc::default());
    let address = device_of(&[0_u32]);
    assert_eq!(store(stream, address + 4, 1), SUCCESS);
    note(stream, &log, "after the fault");
    assert_eq!(code!(streams::cuStreamSynchronize, stream), 700);
    assert!(notes(&log).is_empty());
}

#[test]
fn memory_of_another_device_is_out_of_bounds() {
    let _machine = machine_of(Config { devices: 2, threads: 1, ..Config::default() });
    let elsewhere = device_of(&[0_u32]);
    use_device(1);
    assert_eq!(store(0, elsewhere, 1), SUCCESS);
    assert_eq!(code!(cuCtxSynchronize), 700);
    use_device(0);
    ok!(cuCtxSynchronize);
}

#[test]
fn more_than_48_kib_of_shared_memory_must_be_asked_for() {
    const MAX_DYNAMIC: u32 = 8;
    let _machine = machine();
    let limited = kernel("limited");
    assert_eq!(launch(limited, [1, 1], 8 << 10, 0, &[]), SUCCESS);
    assert_eq!(launch(limited, [1, 1], (8 << 10) + 1, 0, &[]), INVALID_VALUE);
    let left = (227 << 10) - 40_960;
    assert_eq!(code!(cuFuncSetAttribute, limited, MAX_DYNAMIC, left + 1), INVALID_VALUE);
    ok!(cuFuncSetAttribute, limited, MAX_DYNAMIC, left);
    assert_eq!(launch(limited, [1, 1], left as u32, 0, &[]), SUCCESS);
    ok!(cuCtxSynchronize);
    let attribute = |attribute| -> i32 { made!(cuFuncGetAttribute, attribute, limited) };
    assert_eq!([attribute(0), attribute(1), attribute(MAX_DYNAMIC)], [64, 40_960, left]);
    assert_eq!((attribute(5), attribute(6)), (80, 120), "PTX for 8.0 on a device of 12.0");
}

#[test]
fn a_captured_kernel_is_replayed_with_its_arguments() {
    let _machine = machine();
    let stream = stream();
    let values = device_of(&[1_f32, 2.0]);
    let add = kernel("add");
    ok!(cuStreamBeginCapture_v2, stream, 0);
    let arguments = Box::new((values, 2_u32));
    let (address, count) = (address_of(&arguments.0), address_of(&arguments.1));
    assert_eq!(launch(add, [1, 32], 0, stream, &[address, address, address, count]), SUCCESS);
    drop(arguments);
    let mut graph = 0;
    ok!(cuStreamEndCapture, stream, &raw mut graph);
    let exec: u64 = made!(graphs::cuGraphInstantiateWithFlags, graph, 0);
    for _ in 0..3 {
        ok!(graphs::cuGraphLaunch, exec, stream);
    }
    synchronize(stream);
    assert_eq!(read::<f32>(values, 2), [8.0, 16.0]);
}

#[test]
fn warps_run_in_the_order_that_was_asked_for() {
    for (reverse_warps, expected) in [(false, [0, 1, 2]), (true, [2, 1, 0])] {
        let _machine = machine_of(Config { reverse_warps, ..Config::default() });
        let (counter, out) = (device_of(&[0_u32]), device_of(&[9_u32; 3]));
        let params = [address_of(&counter), address_of(&out)];
        assert_eq!(launch(kernel("tickets"), [1, 96], 0, 0, &params), SUCCESS);
        assert_eq!(read::<u32>(out, 3), expected);
    }
}

#[test]
fn races_are_looked_for_when_asked() {
    for (racecheck, expected) in [(false, SUCCESS), (true, 719)] {
        let _machine = machine_of(Config { racecheck, ..Config::default() });
        assert_eq!(launch(kernel("races"), [1, 64], 0, 0, &[]), SUCCESS);
        assert_eq!(code!(cuCtxSynchronize), expected);
    }
}
