//! What a monitor sees of the same devices.

use std::ffi::{CStr, c_char, c_void};
use std::thread;
use std::time::{Duration, Instant};

use obol_emulator::driver::Config;
use obol_emulator::driver::api::memory::{cuMemAlloc_v2, cuMemGetInfo_v2};
use obol_emulator::nvml::*;

use crate::kernels::*;
use crate::support::*;

/// Calls a function that must succeed and whose last argument takes its result.
macro_rules! asked {
    ($function:path, $($argument:expr),*) => {{
        let mut result = Default::default();
        ok!($function, $($argument,)* &raw mut result);
        result
    }};
}

fn first() -> u64 {
    asked!(nvmlDeviceGetHandleByIndex_v2, 0)
}

fn string(fill: impl Fn(*mut c_char, u32) -> u32) -> String {
    let mut buffer = [1 as c_char; 96];
    assert_eq!(fill(buffer.as_mut_ptr(), 96), SUCCESS);
    // SAFETY: the call ends what it writes with a null.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned()
}

fn monitored() -> Machine {
    let machine = machine_of(Config { devices: 2, ..Config::default() });
    ok!(nvmlInit_v2);
    machine
}

#[test]
fn devices_are_found_by_index_name_and_address() {
    let _machine = monitored();
    assert_eq!(made!(nvmlDeviceGetCount_v2), 2_u32);
    let second: u64 = asked!(nvmlDeviceGetHandleByIndex_v2, 1);
    let uuid = string(|to, capacity| code!(nvmlDeviceGetUUID, second, to, capacity));
    assert_eq!(uuid, "GPU-6f626f6c-2d65-6d75-6c61-746564000001");
    let uuid = std::ffi::CString::new(uuid).expect("no null inside");
    assert_eq!(asked!(nvmlDeviceGetHandleByUUID, uuid.as_ptr()), second);
    for address in [c"00000000:02:00.0", c"0000:02:00.0"] {
        assert_eq!(asked!(nvmlDeviceGetHandleByPciBusId_v2, address.as_ptr()), second);
    }
    let mut none = 0_u64;
    assert_eq!(code!(nvmlDeviceGetHandleByUUID, c"GPU-0".as_ptr(), &raw mut none), 6);
    assert_eq!(code!(nvmlDeviceGetHandleByIndex_v2, 2, &raw mut none), 2);
    assert_eq!(string(|to, capacity| code!(nvmlDeviceGetName, second, to, capacity)), "Obol emulated GPU");
    let mut short = [0; 4];
    assert_eq!(code!(nvmlDeviceGetName, second, short.as_mut_ptr(), 4), 7);
}

#[test]
fn memory_is_the_drivers() {
    let _machine = monitored();
    let _held: u64 = made!(cuMemAlloc_v2, 1 << 20);
    let (mut free, mut total) = (0, 0);
    ok!(cuMemGetInfo_v2, &raw mut free, &raw mut total);
    let (free, total) = (free as u64, total as u64);
    let mut info = MemoryInfo::default();
    ok!(nvmlDeviceGetMemoryInfo, first(), &raw mut info);
    assert_eq!(info, MemoryInfo { total, free, used: 1 << 20 });
    let mut info = MemoryInfoV2 { version: 7, ..MemoryInfoV2::default() };
    ok!(nvmlDeviceGetMemoryInfo_v2, first(), &raw mut info);
    assert_eq!(info, MemoryInfoV2 { version: 7, total, reserved: 0, free, used: 1 << 20 });
}

#[test]
fn energy_grows_with_time_and_with_work() {
    extern "C" fn nap(_: *mut c_void) {
        thread::sleep(Duration::from_millis(20));
    }
    let machine = monitored();
    let energy = || -> u64 { asked!(nvmlDeviceGetTotalEnergyConsumption, first()) };
    let power = || -> u32 { asked!(nvmlDeviceGetPowerUsage, first()) };
    assert_eq!(power(), 50_000);
    let before = energy();
    let start = Instant::now();
    let stream = stream();
    ok!(obol_emulator::driver::api::streams::cuLaunchHostFunc, stream, Some(nap), std::ptr::null_mut());
    synchronize(stream);
    let idle = energy() - before;
    let elapsed = start.elapsed();
    assert!(idle >= 1000, "{idle} mJ in 20 ms at 50 W");
    assert!(idle <= 50 * elapsed.as_millis() as u64 + 51, "{idle} mJ in {elapsed:?}: a nap is no kernel");
    let mut rates = Utilization { gpu: 7, memory: 7 };
    ok!(nvmlDeviceGetUtilizationRates, first(), &raw mut rates);
    assert_eq!(rates, Utilization::default());
    drop(machine);
}

#[test]
fn kernels_take_energy_and_keep_a_device_busy() {
    let _machine = monitored();
    let energy = || -> u64 { asked!(nvmlDeviceGetTotalEnergyConsumption, first()) };
    let (start, before) = (Instant::now(), energy());
    let turns = 200_000_u32;
    assert_eq!(launch(kernel("counts"), [1, 1], 0, 0, &[address_of(&turns)]), SUCCESS);
    synchronize(0);
    let (after, elapsed) = (energy(), start.elapsed());
    let idle = 50 * elapsed.as_micros() as u64 / 1000;
    assert!(after - before > idle, "{} mJ, of which {idle} for the time alone", after - before);
    let mut rates = Utilization::default();
    ok!(nvmlDeviceGetUtilizationRates, first(), &raw mut rates);
    assert!((1..=100).contains(&rates.gpu), "{rates:?}");
    let second: u64 = asked!(nvmlDeviceGetHandleByIndex_v2, 1);
    ok!(nvmlDeviceGetUtilizationRates, second, &raw mut rates);
    assert_eq!(rates.gpu, 0);
}

#[test]
fn monitoring_must_be_started() {
    let _machine = machine();
    let mut count = 0;
    assert_eq!(code!(nvmlDeviceGetCount_v2, &raw mut count), 1);
    ok!(nvmlInit_v2);
    ok!(nvmlInitWithFlags, 0);
    ok!(nvmlShutdown);
    ok!(nvmlDeviceGetCount_v2, &raw mut count);
    ok!(nvmlShutdown);
    assert_eq!(code!(nvmlDeviceGetCount_v2, &raw mut count), 1);
    assert_eq!(code!(nvmlShutdown), 1);
    let none = obol_emulator::driver::Driver::new(Config { devices: 0, ..Config::default() });
    let _entered = none.enter();
    assert_eq!(code!(nvmlInit_v2), 9);
}

#[test]
fn versions_are_given() {
    let _machine = monitored();
    assert_eq!(made!(nvmlSystemGetCudaDriverVersion_v2), 13_000);
    assert_eq!(string(|to, capacity| code!(nvmlSystemGetDriverVersion, to, capacity)), "580.13.0");
    assert_eq!(string(|to, capacity| code!(nvmlSystemGetNVMLVersion, to, capacity)), "13.580.0");
    assert!((1..100).contains(&asked!(nvmlDeviceGetTemperature, first(), 0)));
}
