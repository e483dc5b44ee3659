//! The driver's result codes.

use std::ffi::CStr;

/// A result of the driver API other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error(u32);

/// What most of the driver's parts give back.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! codes {
    ($($name:ident $code:literal $text:literal;)*) => {
        impl Error {
            $(#[doc = $text] pub const $name: Self = Self($code);)*
        }

        /// Name and meaning of each code that is given back, success included.
        const KNOWN: &[(u32, &CStr, &CStr)] = &[
            (0, c"CUDA_SUCCESS", c"no error"),
            $(($code, match CStr::from_bytes_with_nul(concat!("CUDA_ERROR_", stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => unreachable!(),
            }, match CStr::from_bytes_with_nul(concat!($text, "\0").as_bytes()) {
                Ok(text) => text,
                Err(_) => unreachable!(),
            }),)*
        ];
    };
}

codes! {
    INVALID_VALUE 1 "invalid argument";
    OUT_OF_MEMORY 2 "out of memory";
    NOT_INITIALIZED 3 "initialization error";
    NO_DEVICE 100 "no CUDA-capable device is detected";
    INVALID_DEVICE 101 "invalid device ordinal";
    INVALID_IMAGE 200 "device kernel image is invalid";
    INVALID_CONTEXT 201 "invalid device context";
    NO_BINARY_FOR_GPU 209 "no kernel image is available for execution on the device";
    UNSUPPORTED_LIMIT 215 "limit is not supported on this architecture";
    PEER_ACCESS_UNSUPPORTED 217 "peer access is not supported between these two devices";
    INVALID_PTX 218 "a PTX JIT compilation failed";
    UNSUPPORTED_PTX_VERSION 222 "the provided PTX was compiled with an unsupported toolchain";
    FILE_NOT_FOUND 301 "file not found";
    ILLEGAL_STATE 401 "the operation cannot be performed in the present state";
    INVALID_HANDLE 400 "invalid resource handle";
    NOT_FOUND 500 "named symbol not found";
    NOT_READY 600 "device not ready";
    ILLEGAL_ADDRESS 700 "an illegal memory access was encountered";
    LAUNCH_OUT_OF_RESOURCES 701 "too many resources requested for launch";
    PRIMARY_CONTEXT_ACTIVE 708 "the primary context of the device is in use";
    CONTEXT_IS_DESTROYED 709 "context is destroyed";
    ASSERT 710 "device-side assert triggered";
    HOST_MEMORY_ALREADY_REGISTERED 712 "part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED 713 "pointer does not correspond to a registered memory region";
    ILLEGAL_INSTRUCTION 715 "an illegal instruction was encountered";
    MISALIGNED_ADDRESS 716 "misaligned address";
    LAUNCH_FAILED 719 "unspecified launch failure";
    NOT_SUPPORTED 801 "operation not supported";
    STREAM_CAPTURE_UNSUPPORTED 900 "operation not permitted when stream is capturing";
    STREAM_CAPTURE_INVALIDATED 901 "operation failed due to a previous error during capture";
    STREAM_CAPTURE_MERGE 902 "operation would result in a merge of separate capture sequences";
    STREAM_CAPTURE_UNMATCHED 903 "capture was not ended in the same stream as it began";
    STREAM_CAPTURE_UNJOINED 904 "capturing stream has unjoined work";
    STREAM_CAPTURE_ISOLATION 905 "dependency created on uncaptured work in another stream";
    STREAM_CAPTURE_IMPLICIT 906 "operation would make the legacy stream depend on a capturing blocking stream";
    CAPTURED_EVENT 907 "operation not permitted on an event last recorded in a capturing stream";
    STREAM_CAPTURE_WRONG_THREAD 908 "attempt to terminate a thread-local capture sequence from another thread";
    GRAPH_EXEC_UPDATE_FAILURE 910 "the graph update was not performed because it included changes which violated constraints";
    UNKNOWN 999 "unknown error";
}

impl Error {
    /// As the driver API gives it back.
    pub fn code(self) -> u32 {
        self.0
    }

    /// Name of the error, as `CUDA_ERROR_INVALID_VALUE`.
    pub fn name(self) -> &'static CStr {
        name(self.0).unwrap_or(c"CUDA_ERROR_UNKNOWN")
    }
}

/// Name of a code; `None` where the driver never gives it.
pub(super) fn name(code: u32) -> Option<&'static CStr> {
    KNOWN.iter().find(|known| known.0 == code).map(|known| known.1)
}

/// What a code means; `None` where the driver never gives it.
pub(super) fn meaning(code: u32) -> Option<&'static CStr> {
    KNOWN.iter().find(|known| known.0 == code).map(|known| known.2)
}
