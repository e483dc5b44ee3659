//! Images that modules are loaded from: PTX text, fat binaries, and what is neither.
//!
//! A fat binary is a container with one entry for each architecture. The emulator runs PTX, so it takes
//! the entry with the PTX of the newest architecture that it is as new as. The layout was read off files
//! that nvcc 13.0 wrote.

use std::ffi::CStr;

use crate::driver::config::COMPUTE_CAPABILITY;
use crate::driver::{Config, Error};

/// First word of a container.
const CONTAINER: u32 = 0xba55_ed50;
/// First word of what host objects keep: magic, version, address of the container.
const WRAPPER: u32 = 0x4662_43b1;
/// First word of machine code in an ELF file.
const ELF: u32 = u32::from_le_bytes(*b"\x7fELF");
/// Kind of an entry with PTX.
const PTX: u16 = 1;
/// Bits of an entry's flags which say that its text is compressed, by LZ4 and by zstd.
const COMPRESSED: u64 = 0x2000 | 0x8000;
/// Bytes of a container's header and of the part of an entry's header that is read.
const CONTAINER_HEADER: usize = 16;
const ENTRY_HEADER: usize = 64;

/// A module's text and the architecture it was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Image<'a> {
    pub(crate) text: &'a str,
    /// 10 x major + minor.
    pub(crate) target: u32,
}

/// Why an image cannot be loaded: the driver's error and a reason for humans.
type Refusal = (Error, String);

/// The bytes of the image that begins at an address; how many they are, it says itself.
///
/// # Safety
/// `start` is not null and begins a PTX text that ends in a null, a fat binary, or at least a word.
pub(crate) unsafe fn image<'a>(start: *const u8) -> &'a [u8] {
    // SAFETY: any image has a first word.
    let word = u32::from_le_bytes(unsafe { start.cast::<[u8; 4]>().read_unaligned() });
    match word {
        WRAPPER => {
            // SAFETY: a wrapper has the container's address at byte 8, and the caller vouches for both.
            unsafe { image(start.add(8).cast::<*const u8>().read_unaligned()) }
        }
        CONTAINER => {
            // SAFETY: a container has a header.
            let header = unsafe { std::slice::from_raw_parts(start, CONTAINER_HEADER) };
            let bytes = u64::from(half_word(header, 6)) + double_word(header, 8);
            // SAFETY: its header says how many bytes it has.
            unsafe { std::slice::from_raw_parts(start, bytes as usize) }
        }
        // SAFETY: any image has a first word.
        ELF => unsafe { std::slice::from_raw_parts(start, 4) },
        // SAFETY: anything else is a text that ends in a null.
        _ => unsafe { CStr::from_ptr(start.cast()) }.to_bytes(),
    }
}

/// The text that this device would run.
///
/// # Errors
/// As a driver refuses an image.
pub(crate) fn choose<'a>(image: &'a [u8], config: &Config) -> Result<Image<'a>, Refusal> {
    let word = image.get(..4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    match word {
        Some(ELF) => Err(machine_code()),
        Some(CONTAINER) => from_container(image, config),
        _ => {
            let text = text_of(image)?;
            let target = check(text, config)?;
            if target > own_target() {
                return Err((
                    Error::INVALID_PTX,
                    format!("PTX for sm_{target}; this device is {}", own_target()),
                ));
            }
            Ok(Image { text, target })
        }
    }
}

fn from_container<'a>(image: &'a [u8], config: &Config) -> Result<Image<'a>, Refusal> {
    let entries = entries(image).ok_or_else(|| invalid("a fat binary that ends within an entry"))?;
    let suitable = entries.iter().filter(|entry| entry.kind == PTX && entry.target <= own_target());
    let Some(best) = suitable.max_by_key(|entry| entry.target) else {
        return Err(if entries.is_empty() { invalid("an empty fat binary") } else { machine_code() });
    };
    if best.flags & COMPRESSED != 0 {
        return Err(invalid("compressed PTX in a fat binary; compile with --no-compress"));
    }
    let text = text_of(best.payload)?;
    check(text, config)?;
    Ok(Image { text, target: best.target })
}

struct Entry<'a> {
    kind: u16,
    target: u32,
    flags: u64,
    payload: &'a [u8],
}

/// The entries of a container; `None` where one is cut off.
fn entries(image: &[u8]) -> Option<Vec<Entry<'_>>> {
    let mut rest = image.get(usize::from(half_word(image.get(..CONTAINER_HEADER)?, 6))..)?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let header = rest.get(..ENTRY_HEADER)?;
        let (header_bytes, payload_bytes) =
            (word(header, 4) as usize, usize::try_from(double_word(header, 8)).ok()?);
        let end = header_bytes.checked_add(payload_bytes)?;
        let payload = rest.get(header_bytes.max(ENTRY_HEADER)..end)?;
        let (kind, target, flags) = (half_word(header, 0), word(header, 28), double_word(header, 40));
        entries.push(Entry { kind, target, flags, payload });
        rest = rest.get(end..)?;
    }
    Some(entries)
}

fn text_of(bytes: &[u8]) -> Result<&str, Refusal> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let text = str::from_utf8(&bytes[..end])
        .map_err(|_| invalid("an image that is neither text nor a fat binary"))?;
    if text.contains(".version") { Ok(text) } else { Err(invalid("a text without .version")) }
}

/// Checks version and target of a text, and gives its target as 10 x major + minor.
fn check(text: &str, config: &Config) -> Result<u32, Refusal> {
    let (major, minor) =
        directive(text, ".version").and_then(version).ok_or_else(|| bad("no PTX version"))?;
    let newest = config.ptx_version_max();
    if (major, minor) > newest {
        let why = format!(
            "PTX {major}.{minor}; driver {} takes up to {}.{}",
            config.driver_version, newest.0, newest.1
        );
        return Err((Error::UNSUPPORTED_PTX_VERSION, why));
    }
    let named = directive(text, ".target").and_then(|target| target.strip_prefix("sm_"));
    let named = named.ok_or_else(|| bad("no target architecture"))?;
    let digits = named.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let target: u32 = digits.parse().map_err(|_| bad("no target architecture"))?;
    if digits != named && target != own_target() {
        return Err((Error::NO_BINARY_FOR_GPU, format!("PTX for sm_{named} runs on that architecture only")));
    }
    Ok(target)
}

/// The word behind a directive at the start of a line.
fn directive<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let rest = text.lines().find_map(|line| line.trim_start().strip_prefix(name))?;
    rest.trim_start().split(|letter: char| letter == ',' || letter.is_whitespace()).next()
}

fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn own_target() -> u32 {
    10 * COMPUTE_CAPABILITY.0 + COMPUTE_CAPABILITY.1
}

fn machine_code() -> Refusal {
    (Error::NO_BINARY_FOR_GPU, format!("no PTX for sm_{} or older in the image", own_target()))
}

fn invalid(why: &str) -> Refusal {
    (Error::INVALID_IMAGE, why.to_owned())
}

fn bad(why: &str) -> Refusal {
    (Error::INVALID_PTX, why.to_owned())
}

fn half_word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn double_word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
