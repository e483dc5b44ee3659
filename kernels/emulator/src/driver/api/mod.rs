//! The functions of the driver API, by their C names and signatures.
//!
//! Handles are numbers and cannot be followed; each call looks them up. Where NVIDIA's headers rename a
//! function to a version of it (`cuMemAlloc` to `cuMemAlloc_v2`), the versioned name is exported.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use super::codes;
use super::{Driver, Error, Result};

pub mod contexts;
pub mod graphs;
pub mod memory;
pub mod modules;
pub mod streams;

/// Defines exported functions, each with the code of its outcome as result, and `find` to look one up.
macro_rules! exports {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$driver:pat_param| $body:block)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// As the driver API says: pointers are null or valid for what the call reads and writes.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> u32 {
                $crate::driver::api::status(|$driver: &::std::sync::Arc<$crate::driver::Driver>| $body)
            }
        )*

        /// Address of the function of that name.
        pub(super) fn find(name: &str) -> Option<*const ::std::ffi::c_void> {
            match name {
                $(stringify!($name) => Some($name as *const ::std::ffi::c_void),)*
                _ => None,
            }
        }
    };
}
pub(crate) use exports;

/// Runs a call on the thread's machine and gives its code.
fn status(call: impl FnOnce(&Arc<Driver>) -> Result<()>) -> u32 {
    call(&Driver::current()).map_or_else(Error::code, |()| 0)
}

/// Writes a result where the caller wants it. Only for pointers that a caller of this API gave.
fn set<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() {
        return Err(Error::INVALID_VALUE);
    }
    // SAFETY: the caller promised that the pointer is null or valid.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes a result where the caller wants it, if it does.
fn set_if<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() { Ok(()) } else { set(to, value) }
}

/// Reads a value the caller gave.
fn get<T: Copy>(from: *const T) -> Result<T> {
    // SAFETY: the caller promised that the pointer is null or valid.
    unsafe { from.as_ref() }.copied().ok_or(Error::INVALID_VALUE)
}

/// A string the caller gave.
fn text<'a>(start: *const c_char) -> Result<&'a str> {
    if start.is_null() {
        return Err(Error::INVALID_VALUE);
    }
    // SAFETY: the caller promised a string that ends in a null.
    unsafe { CStr::from_ptr(start) }.to_str().map_err(|_| Error::INVALID_VALUE)
}

/// Writes text, cut off where it does not fit, and a null.
fn set_text(to: *mut c_char, capacity: usize, value: &str) -> Result<()> {
    if to.is_null() || capacity == 0 {
        return Err(Error::INVALID_VALUE);
    }
    let length = value.len().min(capacity - 1);
    // SAFETY: the caller promised `capacity` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(value.as_ptr().cast(), to, length);
        to.add(length).write(0);
    }
    Ok(())
}

fn find_any(name: &str) -> Option<*const c_void> {
    let homes = [find, contexts::find, graphs::find, memory::find, modules::find, streams::find];
    homes.iter().find_map(|find| find(name))
}

exports! {
    /// Prepares the driver.
    fn cuInit(flags: u32) |driver| {
        if flags == 0 { driver.start() } else { Err(Error::INVALID_VALUE) }
    }

    /// Version of the driver, as 1000 x major + 10 x minor.
    fn cuDriverGetVersion(version: *mut c_int) |driver| {
        set(version, driver.config.driver_version as c_int)
    }

    /// Name of an error.
    fn cuGetErrorName(error: u32, name: *mut *const c_char) |_| {
        set_static(name, codes::name(error))
    }

    /// What an error means.
    fn cuGetErrorString(error: u32, meaning: *mut *const c_char) |_| {
        set_static(meaning, codes::meaning(error))
    }

    /// Address of the newest version of a function.
    fn cuGetProcAddress_v2(name: *const c_char, address: *mut *const c_void, _version: c_int, _flags: u64, found: *mut u32) |_| {
        // The header renames this one to another name, and not to a version of it.
        let name = match text(name)? {
            "cuGraphInstantiate" => "cuGraphInstantiateWithFlags",
            name => name,
        };
        let versions = ["_v4", "_v3", "_v2", ""];
        let function = versions.iter().find_map(|version| find_any(&format!("{name}{version}")));
        set(address, function.unwrap_or(std::ptr::null()))?;
        // Found, or not known.
        set_if(found, u32::from(function.is_none()))?;
        function.map(drop).ok_or(Error::NOT_FOUND)
    }

    /// Starts profiling: there is no profiler.
    fn cuProfilerStart() |driver| { driver.device_here().map(drop) }

    /// Stops profiling: there is no profiler.
    fn cuProfilerStop() |driver| { driver.device_here().map(drop) }
}

fn set_static(to: *mut *const c_char, value: Option<&'static CStr>) -> Result<()> {
    set(to, value.map_or(std::ptr::null(), CStr::as_ptr))?;
    value.map(drop).ok_or(Error::INVALID_VALUE)
}
