//! Which devices compute, in which engines, and what they cost.
//!
//! An engine has as many devices as share each layer's work; of several engines each has the whole model.

use obol_models::device::{self, ComputeDtype, DeviceId};

use crate::config::{Config, Devices};
use crate::ledger::{DeviceInfo, MeteredDevice, RateCard};
use crate::units::Picos;

use super::Failure;

/// The devices of each engine; at least one of each.
pub(super) type Engines = Vec<Vec<DeviceId>>;

/// Decides which devices compute, and keeps them in the configuration.
///
/// # Errors
/// When a device that was asked for cannot be used, or they cannot be divided among engines.
pub(super) fn choose(config: &mut Config) -> Result<Engines, Failure> {
    let devices = match &config.device {
        Devices::Auto => vec![best()],
        Devices::These(devices) => devices.clone(),
    };
    let engines = divide(&devices, config.tensor_parallel).map_err(Failure::usage)?;
    let devices: Vec<DeviceId> = engines.concat();
    if matches!(devices[0], DeviceId::Cuda(_)) {
        let count = device::cuda_count()
            .map_err(|reason| Failure::failed(format!("--device {}: {reason}", devices[0])))?;
        if let Some(missing) =
            devices.iter().find(|device| matches!(device, DeviceId::Cuda(at) if *at >= count))
        {
            let plural = if count == 1 { "device" } else { "devices" };
            return Err(Failure::failed(format!("--device {missing}: there are {count} CUDA {plural} here")));
        }
    } else if config.dtype.is_some_and(|dtype| dtype != ComputeDtype::F32) {
        return Err(Failure::usage("dtype: on the CPU activations are always f32; leave --dtype away"));
    }
    config.device = Devices::These(devices);
    Ok(engines)
}

/// As [`choose`], for a command that runs one engine.
///
/// # Errors
/// As [`choose`], and when there would be several engines.
pub(super) fn choose_one(config: &mut Config) -> Result<(), Failure> {
    match choose(config)?.len() {
        1 => Ok(()),
        several => Err(Failure::usage(format!(
            "device: this command runs one engine, not {several}; name one device"
        ))),
    }
}

/// The first of the devices that were chosen.
pub(super) fn first(config: &Config) -> DeviceId {
    match &config.device {
        Devices::These(devices) => devices[0],
        Devices::Auto => unreachable!("devices are chosen before a model is loaded"),
    }
}

fn best() -> DeviceId {
    match device::cuda_count() {
        Ok(_) => DeviceId::Cuda(0),
        Err(reason) => {
            // A build without CUDA was not meant for one.
            if cfg!(feature = "cuda") {
                tracing::info!("computing on the CPU: {reason}");
            }
            DeviceId::Cpu(0)
        }
    }
}

/// Groups of `together` devices, in their order; one device that is named alone is followed by its neighbours.
fn divide(devices: &[DeviceId], together: usize) -> Result<Engines, String> {
    let kind = |device: &DeviceId| matches!(device, DeviceId::Cuda(_));
    if devices.iter().any(|device| kind(device) != kind(&devices[0])) {
        return Err("device: CPU and CUDA devices cannot serve together; name devices of one kind".into());
    }
    let neighbour = |at: usize| match devices[0] {
        DeviceId::Cpu(first) => DeviceId::Cpu(first + at),
        DeviceId::Cuda(first) => DeviceId::Cuda(first + at),
    };
    match devices.len() {
        1 => Ok(vec![(0..together).map(neighbour).collect()]),
        several if several.is_multiple_of(together) => {
            let engines: Engines = devices.chunks(together).map(<[_]>::to_vec).collect();
            let apart = |engine: &&Vec<DeviceId>| engine.windows(2).any(|pair| !follows(pair[0], pair[1]));
            match engines.iter().find(apart) {
                Some(engine) => Err(format!(
                    "device: {} and those that compute with it do not follow each other; name devices in their order",
                    engine[0]
                )),
                None => Ok(engines),
            }
        }
        several => Err(format!(
            "device: {several} devices are not groups of {together}, as many as tensor_parallel says; name more or \
             fewer"
        )),
    }
}

fn follows(device: DeviceId, next: DeviceId) -> bool {
    match (device, next) {
        (DeviceId::Cpu(one), DeviceId::Cpu(next)) | (DeviceId::Cuda(one), DeviceId::Cuda(next)) => {
            next == one + 1
        }
        _ => false,
    }
}

/// The devices as the books have them, at their prices.
///
/// # Errors
/// When a price is wrong, or a device does not say what it is.
pub(super) fn metered(engines: &Engines, config: &Config) -> Result<Vec<Vec<MeteredDevice>>, Failure> {
    let alone = engines.concat().len() == 1;
    let metered = |&device: &DeviceId| {
        let rate = config.rates.of(device);
        let rate = RateCard::parse(&rate.device_hour, &rate.kv_share, &config.rates.currency, None)
            .and_then(|card| card.with_tiers(config.rates.tiers()))
            .map_err(|error| Failure::usage(format!("rates: {error}")))?;
        let (kind, id) = match device {
            DeviceId::Cpu(_) if alone => ("cpu", "cpu".to_owned()),
            DeviceId::Cpu(_) => ("cpu", device.to_string()),
            DeviceId::Cuda(_) => ("cuda", device.to_string()),
        };
        let info = DeviceInfo { id, kind: kind.into(), name: name(device)? };
        Ok(MeteredDevice { info, rate })
    };
    engines.iter().map(|devices| devices.iter().map(metered).collect()).collect()
}

/// What an hour of one engine costs: of all its devices together.
///
/// # Errors
/// When a price is wrong, or the devices' prices cannot be added up.
pub(super) fn rate_together(config: &Config) -> Result<RateCard, Failure> {
    let rates = &config.rates;
    let wrong = |error| Failure::usage(format!("rates: {error}"));
    let parse = |hour: &str, share: &str| RateCard::parse(hour, share, &rates.currency, None).map_err(wrong);
    // A server that is asked over HTTP may run on anything.
    let Devices::These(devices) = &config.device else { return parse(&rates.device_hour, &rates.kv_share) };
    let cards = devices.iter().map(|&device| {
        let rate = rates.of(device);
        parse(&rate.device_hour, &rate.kv_share)
    });
    let cards = cards.collect::<Result<Vec<_>, _>>()?;
    if cards.iter().any(|card| card.kv_share_parts() != cards[0].kv_share_parts()) {
        return Err(Failure::usage(
            "rates: devices of one engine have different kv_share here; give them one",
        ));
    }
    let hour: Picos = cards.iter().map(RateCard::device_hour).sum();
    parse(&hour.decimal(), &cards[0].kv_share_decimal())
}

/// What an engine's devices are called together: their ids, with commas between.
pub(super) fn label(devices: &[MeteredDevice]) -> String {
    let ids: Vec<&str> = devices.iter().map(|device| device.info.id.as_str()).collect();
    ids.join(",")
}

/// Threads of each engine: as configured, or the processor's cores divided among them.
pub(super) fn threads(config: &Config, engines: usize) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    config.threads.unwrap_or_else(|| (cores() / engines).max(1))
}

/// The device's name, for people.
///
/// # Errors
/// When a CUDA device does not say what it is.
pub(super) fn name(device: DeviceId) -> Result<String, Failure> {
    match device {
        DeviceId::Cpu(_) => Ok(processor()),
        DeviceId::Cuda(index) => Ok(device::cuda_facts(index).map_err(Failure::failed)?.name),
    }
}

/// The processor's name, for people.
pub(super) fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_else(|error| {
        tracing::warn!("the processor's name is not known: /proc/cpuinfo: {error}");
        String::new()
    });
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_divided_among_engines() {
        let check = |devices: &str, together, expected: &str| {
            let devices: Vec<DeviceId> = devices.split(',').map(|name| name.parse().unwrap()).collect();
            let said = match divide(&devices, together) {
                Ok(engines) => engines
                    .iter()
                    .map(|devices| devices.iter().map(DeviceId::to_string).collect::<Vec<_>>().join("+"))
                    .collect::<Vec<_>>()
                    .join(" "),
                Err(problem) => problem,
            };
            assert_eq!(said, expected);
        };
        check("cpu", 1, "cpu:0");
        check("cpu", 3, "cpu:0+cpu:1+cpu:2");
        check("cpu:2", 2, "cpu:2+cpu:3");
        check("cuda:0,cuda:1", 1, "cuda:0 cuda:1");
        check("cuda:0,cuda:1", 2, "cuda:0+cuda:1");
        check("cpu:0,cpu:1,cpu:2,cpu:3", 2, "cpu:0+cpu:1 cpu:2+cpu:3");
        let odd =
            "device: 3 devices are not groups of 2, as many as tensor_parallel says; name more or fewer";
        check("cpu:0,cpu:1,cpu:2", 2, odd);
        let apart = "device: cuda:2 and those that compute with it do not follow each other; name devices in their order";
        check("cuda:0,cuda:1,cuda:2,cuda:4", 2, apart);
        let mixed = "device: CPU and CUDA devices cannot serve together; name devices of one kind";
        check("cpu:0,cuda:0", 1, mixed);
    }
}
