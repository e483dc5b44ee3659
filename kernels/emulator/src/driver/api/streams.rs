//! Streams and events.

use std::ffi::{c_int, c_uint, c_void};

use super::{exports, set, set_if};
use crate::driver::Error;
use crate::driver::perform::HostCall;

exports! {
    /// Makes a stream.
    fn cuStreamCreate(stream: *mut u64, flags: c_uint) |driver| {
        let device = driver.device_here()?;
        set(stream, driver.create_stream(device, flags, 0)?)
    }

    /// Makes a stream with a priority, of which nothing comes.
    fn cuStreamCreateWithPriority(stream: *mut u64, flags: c_uint, priority: c_int) |driver| {
        let device = driver.device_here()?;
        set(stream, driver.create_stream(device, flags, priority)?)
    }

    /// Gives a stream back. What it still has to do is done.
    fn cuStreamDestroy_v2(stream: u64) |driver| {
        if stream <= 2 {
            return Err(Error::INVALID_HANDLE);
        }
        driver.destroy_stream(driver.stream(stream)?)
    }

    /// Waits for a stream.
    fn cuStreamSynchronize(stream: u64) |driver| {
        driver.synchronize_stream(driver.stream(stream)?)
    }

    /// Whether a stream has nothing left to do.
    fn cuStreamQuery(stream: u64) |driver| {
        driver.query_stream(driver.stream(stream)?)
    }

    /// Makes a stream wait for an event.
    fn cuStreamWaitEvent(stream: u64, event: u64, flags: c_uint) |driver| {
        let stream = driver.stream(stream)?;
        if flags != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        driver.wait_for_event(stream, event)
    }

    /// The flags a stream was made with.
    fn cuStreamGetFlags(stream: u64, flags: *mut c_uint) |driver| {
        let (_, value, _) = driver.stream_properties(driver.stream(stream)?);
        set(flags, value)
    }

    /// The priority a stream was made with.
    fn cuStreamGetPriority(stream: u64, priority: *mut c_int) |driver| {
        let (_, _, value) = driver.stream_properties(driver.stream(stream)?);
        set(priority, value)
    }

    /// The device of a stream.
    fn cuStreamGetDevice(stream: u64, device: *mut c_int) |driver| {
        let (value, _, _) = driver.stream_properties(driver.stream(stream)?);
        set(device, value as c_int)
    }

    /// A number that no other stream has.
    fn cuStreamGetId(stream: u64, id: *mut u64) |driver| {
        set(id, driver.stream(stream)?.number())
    }

    /// Starts to capture what is put into a stream.
    fn cuStreamBeginCapture_v2(stream: u64, mode: u32) |driver| {
        let mode = crate::driver::capture::Mode::from_code(mode)?;
        driver.begin_capture(driver.stream(stream)?, mode)
    }

    /// Ends a capture; the graph is null where it failed.
    fn cuStreamEndCapture(stream: u64, graph: *mut u64) |driver| {
        let stream = driver.stream(stream)?;
        let captured = driver.end_capture(stream);
        set(graph, *captured.as_ref().unwrap_or(&0))?;
        captured.map(drop)
    }

    /// Whether a stream is capturing.
    fn cuStreamIsCapturing(stream: u64, status: *mut u32) |driver| {
        set(status, driver.capture_status(driver.stream(stream)?)?.0)
    }

    /// Whether a stream is capturing, and the capture's number. Nodes cannot be seen.
    fn cuStreamGetCaptureInfo_v3(stream: u64, status: *mut u32, id: *mut u64, graph: *mut u64, nodes: *mut *const u64, edges: *mut *const c_void, count: *mut usize) |driver| {
        let (value, capture) = driver.capture_status(driver.stream(stream)?)?;
        if !graph.is_null() || !nodes.is_null() || !edges.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        set(status, value)?;
        set_if(id, capture)?;
        set_if(count, 0)
    }

    /// Calls a function of the program in the order of a stream.
    fn cuLaunchHostFunc(stream: u64, function: Option<unsafe extern "C" fn(*mut c_void)>, data: *mut c_void) |driver| {
        let stream = driver.stream(stream)?;
        let function = function.ok_or(Error::INVALID_VALUE)?;
        driver.launch_host(HostCall { function, data }, stream)
    }

    /// Makes an event.
    fn cuEventCreate(event: *mut u64, flags: c_uint) |driver| {
        let device = driver.device_here()?;
        set(event, driver.create_event(device, flags)?)
    }

    /// Gives an event back.
    fn cuEventDestroy_v2(event: u64) |driver| {
        driver.is_started()?;
        driver.destroy_event(event)
    }

    /// Puts an event at the end of a stream.
    fn cuEventRecord(event: u64, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.record(event, stream)
    }

    /// Puts an event at the end of a stream.
    fn cuEventRecordWithFlags(event: u64, stream: u64, flags: c_uint) |driver| {
        let stream = driver.stream(stream)?;
        if flags != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        driver.record(event, stream)
    }

    /// Whether an event was reached.
    fn cuEventQuery(event: u64) |driver| {
        driver.is_started()?;
        driver.query_event(event)
    }

    /// Waits for an event.
    fn cuEventSynchronize(event: u64) |driver| {
        driver.is_started()?;
        driver.synchronize_event(event)
    }

    /// Milliseconds between two events.
    fn cuEventElapsedTime(milliseconds: *mut f32, start: u64, end: u64) |driver| {
        driver.is_started()?;
        set(milliseconds, driver.elapsed(start, end)?)
    }

    /// Milliseconds between two events.
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: u64, end: u64) |driver| {
        driver.is_started()?;
        set(milliseconds, driver.elapsed(start, end)?)
    }
}
