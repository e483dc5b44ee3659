//! Allocations, copies and fills.

use std::ffi::c_void;

use obol_emulator::driver::Config;
use obol_emulator::driver::api::graphs::cuGraphInstantiateWithFlags;
use obol_emulator::driver::api::memory::*;
use obol_emulator::driver::api::{contexts, cuGetErrorName, cuGetProcAddress_v2, cuInit};

use crate::support::*;

const MIB: usize = 1 << 20;
/// Attribute of a pool: what it keeps when somebody waits.
const RELEASE_THRESHOLD: u32 = 4;

fn small() -> Machine {
    machine_of(Config { memory_bytes: 4 * MIB as u64, ..Config::default() })
}

fn free_bytes() -> usize {
    let (mut free, mut total) = (0, 0);
    ok!(cuMemGetInfo_v2, &raw mut free, &raw mut total);
    assert_eq!(total, 4 * MIB);
    free
}

#[test]
fn a_device_has_as_much_memory_as_it_says() {
    let _machine = small();
    let first: u64 = made!(cuMemAlloc_v2, 3 * MIB);
    let mut second = 0;
    assert_eq!(code!(cuMemAlloc_v2, &raw mut second, MIB + 1), OUT_OF_MEMORY);
    let second: u64 = made!(cuMemAlloc_v2, MIB);
    assert_eq!(free_bytes(), 0);
    ok!(cuMemFree_v2, first);
    assert_eq!(free_bytes(), 3 * MIB);
    assert_ne!(made!(cuMemAlloc_v2, 2 * MIB), second);
}

#[test]
fn nothing_is_allocated_in_stream_order_only() {
    let _machine = small();
    let mut address = 7;
    assert_eq!(code!(cuMemAlloc_v2, &raw mut address, 0), INVALID_VALUE);
    ok!(cuMemAllocAsync, &raw mut address, 0, 0);
    assert_eq!(address, 0);
    ok!(cuMemFreeAsync, address, 0);
}

#[test]
fn fresh_memory_is_nan_whatever_its_size() {
    let _machine = machine();
    for count in [1, 1000, 17 * MIB / 4 + 3] {
        let address = made!(cuMemAlloc_v2, 4 * count);
        assert!(read::<f32>(address, count).iter().all(|value| value.is_nan()), "{count} floats");
        assert_eq!(address % 256, 0);
    }
}

#[test]
fn large_memory_is_written_and_read() {
    let _machine = machine();
    let values: Vec<u32> = (0..5 * MIB as u32).collect();
    let address = device_of(&values);
    assert_eq!(read::<u32>(address, values.len()), values);
}

#[test]
fn what_is_freed_twice_is_refused() {
    let _machine = machine();
    let address: u64 = made!(cuMemAlloc_v2, 64);
    assert_eq!(code!(cuMemFree_v2, address + 4), INVALID_VALUE);
    ok!(cuMemFree_v2, address);
    assert_eq!(code!(cuMemFree_v2, address), INVALID_VALUE);
    let address: u64 = made!(cuMemAllocAsync, 64, 0);
    ok!(cuMemFreeAsync, address, 0);
    assert_eq!(
        code!(cuMemFreeAsync, address, 0),
        INVALID_VALUE,
        "though the first free is still in the stream"
    );
    ok!(cuMemFree_v2, 0);
}

#[test]
fn copies_and_fills_stay_inside_one_allocation() {
    let _machine = machine();
    let values = [1_u32; 32];
    let address = device_of(&values);
    let host = values.as_ptr().cast::<c_void>();
    assert_eq!(code!(cuMemcpyHtoD_v2, address, host, 129), INVALID_VALUE);
    assert_eq!(code!(cuMemcpyHtoD_v2, address + 128, host, 1), INVALID_VALUE);
    assert_eq!(code!(cuMemcpyHtoD_v2, address - 1, host, 4), INVALID_VALUE);
    let mut out = [0_u32; 32];
    assert_eq!(code!(cuMemcpyDtoH_v2, out.as_mut_ptr().cast(), address + 4, 128), INVALID_VALUE);
    assert_eq!(code!(cuMemcpyDtoDAsync_v2, address, address + 64, 65, 0), INVALID_VALUE);
    assert_eq!(code!(cuMemsetD8Async, address + 100, 0, 29, 0), INVALID_VALUE);
    assert_eq!(code!(cuMemsetD32_v2, address + 2, 0, 1), INVALID_VALUE, "not aligned");
    ok!(cuMemFree_v2, address);
    assert_eq!(code!(cuMemcpyHtoD_v2, address, host, 4), INVALID_VALUE);
    ok!(cuMemcpyHtoD_v2, address, host, 0);
}

#[test]
fn a_copy_of_freed_memory_fails_when_its_stream_gets_there() {
    let _machine = machine();
    let stream = stream();
    let address: u64 = made!(cuMemAllocAsync, 64, stream);
    ok!(cuMemFreeAsync, address, stream);
    ok!(cuMemsetD8Async, address, 0, 64, stream);
    assert_eq!(code!(obol_emulator::driver::api::streams::cuStreamSynchronize, stream), 700);
}

#[test]
fn fills_repeat_their_value() {
    let _machine = machine();
    let address = device_of(&[0_u32; 4]);
    ok!(cuMemsetD32_v2, address, 0x0102_0304, 4);
    ok!(cuMemsetD16_v2, address + 4, 0xabcd, 3);
    ok!(cuMemsetD8_v2, address + 12, 0x55, 1);
    assert_eq!(read::<u32>(address, 4), [0x0102_0304, 0xabcd_abcd, 0x0102_abcd, 0x0102_0355]);
}

#[test]
fn copies_of_pinned_memory_are_done_when_somebody_waits() {
    let _machine = machine();
    let stream = stream();
    let device = device_of(&[0_u32; 2]);
    let mut up = Pinned::of(&[1, 2]);
    let down = Pinned::of(&[7, 7]);
    ok!(cuMemcpyHtoDAsync_v2, device, up.address(), up.bytes(), stream);
    ok!(cuMemcpyDtoHAsync_v2, down.address(), device, down.bytes(), stream);
    up.values_mut()[0] = 10;
    assert_eq!(down.values(), [7, 7], "nobody has waited");
    synchronize(stream);
    assert_eq!(down.values(), [10, 2], "the copy read what was there when it ran");
}

#[test]
fn copies_of_pageable_memory_are_done_with_the_callers_bytes() {
    let _machine = machine();
    let stream = stream();
    for count in [2, 100_000] {
        let mut values = vec![3_u32; count];
        let bytes = 4 * count;
        let device = made!(cuMemAlloc_v2, bytes);
        ok!(cuMemcpyHtoDAsync_v2, device, values.as_ptr().cast(), bytes, stream);
        values.fill(4);
        ok!(cuMemcpyDtoHAsync_v2, values.as_mut_ptr().cast(), device, bytes, stream);
        assert_eq!(values, vec![3; count]);
    }
}

#[test]
fn registered_memory_is_pinned() {
    let _machine = machine();
    let stream = stream();
    let device = device_of(&[5_u32; 4]);
    let mut values = vec![0_u32; 4];
    let start = values.as_mut_ptr().cast::<c_void>();
    ok!(cuMemHostRegister_v2, start, 16, 0);
    assert_eq!(code!(cuMemHostRegister_v2, start, 16, 0), 712);
    ok!(cuMemcpyDtoHAsync_v2, start, device, 16, stream);
    assert_eq!(values, [0; 4]);
    synchronize(stream);
    assert_eq!(values, [5; 4]);
    ok!(cuMemHostUnregister, start);
    assert_eq!(code!(cuMemHostUnregister, start), 713);
}

#[test]
fn a_pool_keeps_what_its_threshold_allows() {
    let _machine = small();
    let address: u64 = made!(cuMemAllocAsync, MIB, 0);
    ok!(cuMemFreeAsync, address, 0);
    assert_eq!(free_bytes(), 3 * MIB, "the free is still in the stream");
    synchronize(0);
    assert_eq!(free_bytes(), 4 * MIB);
    let pool: u64 = made!(cuDeviceGetDefaultMemPool, 0);
    let threshold = u64::MAX;
    ok!(cuMemPoolSetAttribute, pool, RELEASE_THRESHOLD, (&raw const threshold).cast());
    let address: u64 = made!(cuMemAllocAsync, MIB, 0);
    ok!(cuMemFreeAsync, address, 0);
    synchronize(0);
    assert_eq!(free_bytes(), 3 * MIB, "kept for later");
    ok!(cuMemPoolTrimTo, pool, 0);
    assert_eq!(free_bytes(), 4 * MIB);
}

#[test]
fn memory_freed_in_a_stream_can_be_allocated_in_it_again() {
    let _machine = small();
    let stream = stream();
    for _ in 0..3 {
        let address: u64 = made!(cuMemAllocAsync, 3 * MIB, stream);
        ok!(cuMemFreeAsync, address, stream);
    }
}

#[test]
fn the_last_release_frees_everything() {
    let _machine = small();
    let _leaked: u64 = made!(cuMemAlloc_v2, MIB);
    ok!(contexts::cuDevicePrimaryCtxRelease_v2, 0);
    assert_eq!(code!(contexts::cuCtxSynchronize), 709);
    use_device(0);
    assert_eq!(free_bytes(), 4 * MIB);
}

#[test]
fn calls_need_a_driver_and_a_context() {
    let driver = obol_emulator::driver::Driver::new(Config::default());
    let _entered = driver.enter();
    let mut count = 0;
    assert_eq!(code!(contexts::cuDeviceGetCount, &raw mut count), 3);
    ok!(cuInit, 0);
    ok!(contexts::cuDeviceGetCount, &raw mut count);
    assert_eq!(count, 1);
    let mut address = 0;
    assert_eq!(code!(cuMemAlloc_v2, &raw mut address, 1), 201);
    let empty = obol_emulator::driver::Driver::new(Config { devices: 0, ..Config::default() });
    let _entered = empty.enter();
    assert_eq!(code!(cuInit, 0), 100);
}

#[test]
fn devices_have_memory_of_their_own() {
    let _machine = machine_of(Config { devices: 2, memory_bytes: 4 * MIB as u64, ..Config::default() });
    let first = device_of(&[1_u32, 2, 3]);
    use_device(1);
    assert_eq!(free_bytes(), 4 * MIB);
    let second = device_of(&[0_u32; 3]);
    let stream = stream();
    ok!(cuMemcpyPeerAsync, second, 0, first, 0, 12, stream);
    synchronize(stream);
    assert_eq!(read::<u32>(second, 3), [1, 2, 3]);
}

#[test]
fn functions_are_found_by_their_unversioned_names() {
    let _machine = machine();
    let (mut address, mut found) = (std::ptr::null(), 9);
    ok!(cuGetProcAddress_v2, c"cuMemAlloc".as_ptr(), &raw mut address, 13_000, 0, &raw mut found);
    assert_eq!((address, found), (cuMemAlloc_v2 as *const c_void, 0));
    ok!(cuGetProcAddress_v2, c"cuGraphInstantiate".as_ptr(), &raw mut address, 13_000, 0, &raw mut found);
    assert_eq!(address, cuGraphInstantiateWithFlags as *const c_void);
    assert_eq!(
        code!(cuGetProcAddress_v2, c"cuNoSuch".as_ptr(), &raw mut address, 13_000, 0, &raw mut found),
        500
    );
    let mut name = std::ptr::null();
    ok!(cuGetErrorName, 700, &raw mut name);
    // SAFETY: the driver gave a string that lives as long as the process.
    assert_eq!(unsafe { std::ffi::CStr::from_ptr(name) }, c"CUDA_ERROR_ILLEGAL_ADDRESS");
}
