//! The shared library under the names that programs look for.

use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use obol_emulator::nvml::MemoryInfo;

/// The shared library that was built with this test, beside its program.
fn library() -> PathBuf {
    let program = std::env::current_exe().expect("a test knows its program");
    program.with_file_name("libobol_emulator.so")
}

fn open(path: &Path) -> *mut c_void {
    let name = CString::new(path.as_os_str().as_bytes()).expect("no null inside");
    // SAFETY: the library's start has no effect beyond itself.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{} opens", path.display());
    handle
}

/// A function of an open library.
///
/// # Safety
/// `F` is the function's type.
unsafe fn symbol<F: Copy>(library: *mut c_void, name: &CStr) -> F {
    // SAFETY: the library is open and the name a string.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    assert!(!address.is_null(), "{name:?} is exported");
    // SAFETY: the caller vouches for the type, and function pointers are as wide as addresses.
    unsafe { std::mem::transmute_copy(&address) }
}

type Init = unsafe extern "C" fn(u32) -> u32;
type Start = unsafe extern "C" fn() -> u32;
type Retain = unsafe extern "C" fn(*mut u64, i32) -> u32;
type Allocate = unsafe extern "C" fn(*mut u64, usize) -> u32;
type Take = unsafe extern "C" fn(u64) -> u32;
type Handle = unsafe extern "C" fn(u32, *mut u64) -> u32;
type Memory = unsafe extern "C" fn(u64, *mut MemoryInfo) -> u32;

#[test]
fn links_to_one_file_share_their_devices() {
    let folder = std::env::temp_dir().join(format!("obol-emulator-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let links = ["libcuda.so.1", "libnvidia-ml.so.1"].map(|name| folder.join(name));
    for link in &links {
        std::os::unix::fs::symlink(library(), link).expect("a link can be made");
    }
    let [cuda, nvml] = links.each_ref().map(|link| open(link));
    std::fs::remove_dir_all(&folder).expect("what was made can be removed");
    let (mut context, mut address, mut device, mut info) = (0, 0, 0, MemoryInfo::default());
    // SAFETY: the types are those of the exported functions; pointers are to living values.
    unsafe {
        assert_eq!(symbol::<Init>(cuda, c"cuInit")(0), 0);
        assert_eq!(symbol::<Retain>(cuda, c"cuDevicePrimaryCtxRetain")(&raw mut context, 0), 0);
        assert_eq!(symbol::<Take>(cuda, c"cuCtxSetCurrent")(context), 0);
        assert_eq!(symbol::<Allocate>(cuda, c"cuMemAlloc_v2")(&raw mut address, 12_345), 0);
        assert_eq!(symbol::<Start>(nvml, c"nvmlInit_v2")(), 0);
        assert_eq!(symbol::<Handle>(nvml, c"nvmlDeviceGetHandleByIndex_v2")(0, &raw mut device), 0);
        assert_eq!(symbol::<Memory>(nvml, c"nvmlDeviceGetMemoryInfo")(device, &raw mut info), 0);
    }
    assert_eq!(info.used, 12_345);
}
