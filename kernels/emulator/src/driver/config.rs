//! What the emulated machine is like, read once from the environment.

use std::env;
use std::str::FromStr;

/// Name of each device.
pub const DEVICE_NAME: &str = "Obol emulated GPU";
/// The compute capability each device has, major and minor.
pub const COMPUTE_CAPABILITY: (u32, u32) = (12, 0);

/// Properties of the emulated machine. [`Config::from_env`] says how the environment sets them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Memory of each device in bytes.
    pub memory_bytes: u64,
    /// Number of devices; with none, initialisation fails as on a machine without a GPU.
    pub devices: usize,
    /// Work is done when it is enqueued, not when somebody waits.
    pub eager: bool,
    /// Each launch is told on stderr, with its grid and time.
    pub trace: bool,
    /// Host threads that run the blocks of one launch; 0 is one for each core.
    pub threads: usize,
    /// Warps of a block run last to first.
    pub reverse_warps: bool,
    /// Accesses to shared memory are checked for races.
    pub racecheck: bool,
    /// The version the driver gives, as 1000 x major + 10 x minor.
    pub driver_version: u32,
    /// Shared memory a block may have when its kernel asks for more than 48 KiB, in bytes.
    pub shared_bytes_max: u32,
    /// What was launched, allocated and copied is told on stderr when a context ends.
    pub stats: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory_bytes: 4 << 30,
            devices: 1,
            eager: false,
            trace: false,
            threads: 0,
            reverse_warps: false,
            racecheck: false,
            driver_version: 13_000,
            shared_bytes_max: 227 << 10,
            stats: false,
        }
    }
}

impl Config {
    /// The configuration that the variables `OBOL_EMULATOR_*` describe; the crate's documentation lists them.
    ///
    /// # Panics
    /// On a value that cannot be read: a test that meant to set something must not run without it.
    pub fn from_env() -> Self {
        let default = Self::default();
        Self {
            memory_bytes: number("MEMORY_MB").map_or(default.memory_bytes, |mib: u64| mib << 20),
            devices: number("DEVICES").unwrap_or(default.devices),
            eager: flag("EAGER"),
            trace: flag("TRACE"),
            threads: number("THREADS").unwrap_or(default.threads),
            reverse_warps: reverse_warps(),
            racecheck: flag("RACECHECK"),
            driver_version: number("DRIVER_VERSION").unwrap_or(default.driver_version),
            shared_bytes_max: number("SHARED_KB").map_or(default.shared_bytes_max, |kib: u32| kib << 10),
            stats: flag("STATS"),
        }
    }

    /// The newest PTX version that a driver of this version takes, major and minor.
    pub fn ptx_version_max(&self) -> (u32, u32) {
        // Each toolkit brought its PTX version, listed in the release history of NVIDIA's PTX manual.
        const BY_DRIVER: [(u32, (u32, u32)); 13] = [
            (13_000, (9, 0)),
            (12_090, (8, 8)),
            (12_080, (8, 7)),
            (12_070, (8, 6)),
            (12_050, (8, 5)),
            (12_040, (8, 4)),
            (12_030, (8, 3)),
            (12_020, (8, 2)),
            (12_010, (8, 1)),
            (12_000, (8, 0)),
            (11_080, (7, 8)),
            (11_040, (7, 4)),
            (11_000, (7, 0)),
        ];
        BY_DRIVER.iter().find(|known| self.driver_version >= known.0).map_or((6, 5), |known| known.1)
    }
}

fn value(name: &str) -> Option<String> {
    env::var(format!("OBOL_EMULATOR_{name}")).ok().filter(|value| !value.is_empty())
}

fn number<T: FromStr>(name: &str) -> Option<T> {
    let text = value(name)?;
    match text.parse() {
        Ok(number) => Some(number),
        Err(_) => panic!("OBOL_EMULATOR_{name}={text} is not a number"),
    }
}

fn flag(name: &str) -> bool {
    value(name).is_some_and(|value| value != "0")
}

fn reverse_warps() -> bool {
    match value("WARP_ORDER").as_deref() {
        None | Some("forward") => false,
        Some("reverse") => true,
        Some(other) => panic!("OBOL_EMULATOR_WARP_ORDER={other} is neither forward nor reverse"),
    }
}
