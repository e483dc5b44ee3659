//! The device's energy meter, where it has one, and what requests were given of it.

use std::collections::BTreeMap;

use crate::engine::sequence::{Request, RequestKey};
use crate::meter::energy::{Energy, EnergyMeter, Share};
use crate::units::DeviceNanos;
use crate::usage::EnergyTotals;

pub(super) struct Metered {
    meter: Option<Box<dyn EnergyMeter>>,
    /// From the first reading on.
    energy: Option<Energy>,
    /// Given to requests that are settled, in millijoules.
    settled: u64,
}

impl Metered {
    pub(super) fn new(meter: Option<Box<dyn EnergyMeter>>) -> Self {
        Self { meter, energy: None, settled: 0 }
    }

    /// Reads the meter if that was long ago; the books stand at `at`.
    pub(super) fn read_if_due(&mut self, at: DeviceNanos, requests: &mut BTreeMap<RequestKey, Request>) {
        let Some(meter) = &self.meter else { return };
        if self.energy.as_ref().is_none_or(|energy| at >= energy.at() + meter.pause()) {
            self.read(at, requests);
        }
    }

    /// Reads the meter, and splits what was used over the requests that are there.
    pub(super) fn read(&mut self, at: DeviceNanos, requests: &mut BTreeMap<RequestKey, Request>) {
        let Some(reading) = self.meter.as_ref().and_then(|meter| meter.millijoules()) else { return };
        let shares = requests.values_mut().map(|request| &mut request.energy);
        match &mut self.energy {
            Some(energy) => energy.read(reading, at, shares),
            None => {
                // What was used before is not known.
                shares.for_each(|share| *share = Share::default());
                self.energy = Some(Energy::new(reading, at));
            }
        }
    }

    /// What a request has used that is settled now, in millijoules.
    pub(super) fn settle(&mut self, share: Share) -> Option<u64> {
        let given = self.energy.as_mut()?.settle(share);
        self.settled += given;
        Some(given)
    }

    pub(super) fn totals(&self, requests: &BTreeMap<RequestKey, Request>) -> Option<EnergyTotals> {
        let energy = self.energy.as_ref()?;
        Some(EnergyTotals {
            total_mj: energy.total(),
            house_mj: energy.house(),
            settled_mj: self.settled,
            open_mj: requests.values().map(|request| request.energy.given).sum(),
        })
    }
}
