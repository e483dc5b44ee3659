//! Loading modules, their names, and launches that are refused.

use std::ffi::{c_char, c_void};

use obol_emulator::driver::Config;
use obol_emulator::driver::api::modules::*;

use crate::kernels::*;
use crate::support::*;

fn load_code(image: &[u8]) -> u32 {
    let mut module = 0;
    code!(cuModuleLoadData, &raw mut module, image.as_ptr().cast())
}

#[test]
fn launches_a_device_cannot_take_are_refused() {
    let _machine = machine();
    let add = kernel("store");
    let (out, value) = (device_of(&[0_u32]), 1_u32);
    let params = [address_of(&out), address_of(&value)];
    for (blocks, threads) in [(0, 1), (1, 0), (1, 1025)] {
        assert_eq!(launch(add, [blocks, threads], 0, 0, &params), INVALID_VALUE, "{blocks} x {threads}");
    }
    let by_hand = |grid_y, block_z| {
        code!(cuLaunchKernel, add, 1, grid_y, 1, 1, 1, block_z, 0, 0, params.as_ptr(), std::ptr::null())
    };
    assert_eq!((by_hand(65_536, 1), by_hand(1, 65)), (INVALID_VALUE, INVALID_VALUE));
    assert_eq!(launch(add, [1, 1], 0, 0, &[address_of(&out), std::ptr::null()]), INVALID_VALUE);
    assert_eq!(
        code!(cuLaunchKernel, add, 1, 1, 1, 1, 1, 1, 0, 0, std::ptr::null(), std::ptr::null()),
        INVALID_VALUE
    );
    assert_eq!(launch(kernel("limited"), [1, 65], 0, 0, &[]), INVALID_VALUE, ".maxntid");
    assert_eq!(launch(add + 1, [1, 1], 0, 0, &params), 400);
    assert_eq!(read::<u32>(out, 1), [0]);
}

#[test]
fn images_a_driver_cannot_load_have_their_errors() {
    let machine = machine();
    let entry = fat_binary(&[(1, 80, 0x8011, &text(PTX))]);
    assert_eq!(load_code(&entry), 200, "compressed");
    assert_eq!(load_code(&fat_binary(&[(2, 80, 0x11, b"\x7fELF")])), 209, "machine code only");
    assert_eq!(load_code(b"\x7fELF\x02"), 209);
    assert_eq!(load_code(b"nonsense\0"), 200);
    assert_eq!(load_code(&text(&PTX.replace(".version 7.0", ".version 9.1"))), 222);
    assert_eq!(load_code(&text(&PTX.replace("sm_80", "sm_130"))), 218);
    assert_eq!(load_code(&text(&PTX.replace("sm_80", "sm_90a"))), 209);
    drop(machine);
    let _machine = machine_of(Config { driver_version: 12_080, ..Config::default() });
    assert_eq!(load_code(&text(&PTX.replace(".version 7.0", ".version 9.0"))), 222);
    assert_eq!(load_code(&text(PTX)), SUCCESS);
}

#[test]
fn a_text_that_is_not_understood_fills_the_log() {
    let _machine = machine();
    let broken = text(".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry broken( {");
    let mut log = [1 as c_char; 200];
    let (keys, values) = ([5_u32, 6], [log.as_mut_ptr().cast_const().cast(), log.len() as *const c_void]);
    let mut module = 0;
    let code =
        code!(cuModuleLoadDataEx, &raw mut module, broken.as_ptr().cast(), 2, keys.as_ptr(), values.as_ptr());
    assert_eq!(code, 218);
    // SAFETY: the driver ends what it writes with a null.
    let log = unsafe { std::ffi::CStr::from_ptr(log.as_ptr()) };
    assert!(log.to_string_lossy().contains("broken"), "{log:?}");
}

#[test]
fn names_of_a_module_are_found_while_it_is_loaded() {
    let _machine = machine();
    let module = module_of(&text(PTX));
    let (mut address, mut bytes) = (0, 0);
    ok!(cuModuleGetGlobal_v2, &raw mut address, &raw mut bytes, module, c"answer".as_ptr());
    assert_eq!((bytes, read::<u32>(address, 1)), (4, vec![42]));
    let mut found = 0;
    assert_eq!(code!(cuModuleGetFunction, &raw mut found, module, c"none".as_ptr()), 500);
    let store = function(module, "store");
    assert_eq!(function(module, "store"), store);
    ok!(cuModuleUnload, module);
    assert_eq!(code!(cuModuleUnload, module), 400);
    assert_eq!(launch(store, [1, 1], 0, 0, &[]), 400);
}

#[test]
fn occupancy_follows_threads_and_shared_memory() {
    let _machine = machine();
    let store = kernel("store");
    let blocks = |threads, shared| -> i32 {
        made!(cuOccupancyMaxActiveBlocksPerMultiprocessor, store, threads, shared)
    };
    assert_eq!([blocks(1024, 0), blocks(128, 0), blocks(32, 0)], [2, 16, 24]);
    assert_eq!([blocks(128, 48 << 10), blocks(128, 49 << 10)], [4, 0]);
    let (mut grid, mut block) = (0, 0);
    ok!(cuOccupancyMaxPotentialBlockSize, &raw mut grid, &raw mut block, store, None, 0, 0);
    assert_eq!((grid, block), (16, 1024));
}
