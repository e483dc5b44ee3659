//! Splits the energy that a device used between two readings of its meter over those who had the device's time
//! meanwhile, in proportion to it; the rest is the house's. Meters are read rarely, as they change rarely.
//!
//! Who leaves between two readings cannot wait for the next one. The house gives them what their time since the
//! last reading would have cost between the two readings before, as far as the house has as much; when the meter is
//! read, what falls on their time is the house's.
//!
//! Knows no request and no price. Invariant: what was given to all and what the house has sum to what the meter
//! has counted, to the millijoule, after each call.

use crate::units::DeviceNanos;

/// Counts the energy that a device uses.
pub trait EnergyMeter: Send {
    /// Millijoules since some fixed instant; none while that is not known.
    fn millijoules(&self) -> Option<u64>;

    /// How long it is left alone after a reading. NVML's changes every 20 to 100 ms.
    fn pause(&self) -> DeviceNanos {
        DeviceNanos(100_000_000)
    }
}

/// One account's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// Given to it so far, in millijoules.
    pub given: u64,
    /// Device time that it had since the last reading.
    pub time: DeviceNanos,
}

#[derive(Debug)]
pub struct Energy {
    /// The last reading, and where the books stood then.
    reading: u64,
    at: DeviceNanos,
    /// Since the first reading, in millijoules.
    total: u64,
    house: u64,
    /// The last interval: millijoules in so much time.
    rate: (u64, DeviceNanos),
}

impl Energy {
    /// The meter's first reading, when the books stand at `at`.
    #[must_use]
    pub fn new(reading: u64, at: DeviceNanos) -> Self {
        Self { reading, at, total: 0, house: 0, rate: (0, DeviceNanos(1)) }
    }

    /// Where the books stood when the meter was last seen to have changed.
    #[must_use]
    pub fn at(&self) -> DeviceNanos {
        self.at
    }

    /// Splits what was used since the last reading over those who are there now, when the books stand at `at`. A
    /// meter that shows the same has not been updated yet, and one that fell begins anew.
    ///
    /// # Panics
    /// When they had more time than has passed.
    pub fn read<'a>(
        &mut self,
        reading: u64,
        at: DeviceNanos,
        shares: impl IntoIterator<Item = &'a mut Share>,
    ) {
        let used = reading.saturating_sub(self.reading);
        self.reading = reading;
        if used == 0 {
            return;
        }
        self.total += used;
        if at <= self.at {
            self.house += used;
            return;
        }
        let elapsed = at - self.at;
        let (mut time, mut given) = (DeviceNanos::ZERO, 0);
        for share in shares {
            time += share.time;
            assert!(time <= elapsed, "no more time was charged than has passed");
            let upto = part(used, time, elapsed);
            share.given += upto - given;
            share.time = DeviceNanos::ZERO;
            given = upto;
        }
        self.house += used - given;
        self.rate = (used, elapsed);
        self.at = at;
    }

    /// What one who leaves has used, in millijoules.
    pub fn settle(&mut self, share: Share) -> u64 {
        let (used, elapsed) = self.rate;
        let lent = part(used, share.time, elapsed).min(self.house);
        self.house -= lent;
        share.given + lent
    }

    /// The house's, in millijoules.
    #[must_use]
    pub fn house(&self) -> u64 {
        self.house
    }

    /// All since the first reading, in millijoules.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }
}

/// `used * time / elapsed`, rounded down.
fn part(used: u64, time: DeviceNanos, elapsed: DeviceNanos) -> u64 {
    let part = u128::from(used) * u128::from(time.0) / u128::from(elapsed.0);
    u64::try_from(part).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn had(nanos: u64) -> Share {
        Share { given: 0, time: DeviceNanos(nanos) }
    }

    #[test]
    fn an_interval_is_split_by_device_time_and_the_rest_is_the_houses() {
        let mut energy = Energy::new(5_000, DeviceNanos(100));
        let mut shares = [had(30), had(30), had(1)];
        energy.read(6_000, DeviceNanos(200), &mut shares);
        assert_eq!(shares.map(|share| share.given), [300, 300, 10]);
        assert_eq!((energy.house(), energy.total()), (390, 1_000));
        shares[0].time = DeviceNanos(50);
        energy.read(6_000, DeviceNanos(250), &mut shares);
        assert_eq!(shares[0], Share { given: 300, time: DeviceNanos(50) }, "the meter shows the same");
        energy.read(6_100, DeviceNanos(300), &mut shares);
        assert_eq!((shares[0].given, energy.house()), (350, 440));
    }

    #[test]
    fn who_leaves_is_lent_what_the_time_cost_before() {
        let mut energy = Energy::new(0, DeviceNanos(0));
        assert_eq!(energy.settle(had(40)), 0, "nothing is known yet");
        energy.read(100, DeviceNanos(100), []);
        assert_eq!(energy.settle(had(40)), 40);
        assert_eq!(energy.settle(had(90)), 60, "more than that nobody has");
        energy.read(300, DeviceNanos(200), []);
        assert_eq!((energy.house(), energy.total()), (200, 300));
    }

    #[test]
    fn any_history_adds_up() {
        for seed in 1..200u64 {
            let mut state = seed;
            let mut random = |n: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 11) % n
            };
            let (mut at, mut reading, mut settled) = (DeviceNanos(9), random(1_000), 0);
            let mut energy = Energy::new(reading, at);
            let mut open: Vec<Share> = Vec::new();
            for _ in 0..300 {
                let time = DeviceNanos(random(50_000_000));
                at += time;
                match random(4) {
                    0 => open.push(Share::default()),
                    1 if !open.is_empty() => {
                        settled += energy.settle(open.swap_remove(random(open.len() as u64) as usize));
                    }
                    2 => {
                        reading = if random(50) == 0 { 0 } else { reading + random(40_000) };
                        energy.read(reading, at, &mut open);
                    }
                    _ => {
                        if let Some(share) = open.last_mut() {
                            share.time += time;
                        }
                    }
                }
                let given: u64 = open.iter().map(|share| share.given).sum();
                assert_eq!(settled + given + energy.house(), energy.total(), "seed {seed}");
            }
        }
    }
}
