//! When steps ran, on the host's clock, from what the device's own clock says of them one step late.
//!
//! The end of a step is that of the step before it and what the device counted between the two. Such a chain
//! drifts with the device's clock, so it is held between what the host knows: no step ends sooner than it can have
//! run after it was submitted and the step before it ended, nor after its end was heard of. A step that found the
//! device empty begins a new chain when it was submitted; and four times a second the chain is moved forward by the
//! least time that, since the last time, passed between a step's end by the chain and hearing of it.
//!
//! Knows no step's work, no account, and no cursor: what is booked already is clipped by the partition.

use crate::units::DeviceNanos;

/// How long a chain goes on by itself.
const ANCHOR: DeviceNanos = DeviceNanos(250_000_000);

/// What is known of a step that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ran {
    /// When the host gave it to the device.
    pub submitted: DeviceNanos,
    /// The device had another step then.
    pub behind: bool,
    /// From its start to its end, by the device's clock.
    pub run: DeviceNanos,
    /// From the end of the step before it to its end, by the device's clock, where that is known.
    pub since_last_end: Option<DeviceNanos>,
    /// When the host had heard of its end.
    pub heard: DeviceNanos,
}

#[derive(Debug, Clone, Copy)]
struct Chain {
    /// Of the last step.
    end: DeviceNanos,
    /// When it was last set by the host's clock.
    anchored: DeviceNanos,
    /// The least time since then from a step's end to hearing of it.
    lag: DeviceNanos,
}

#[derive(Debug, Default)]
pub struct Timeline {
    chain: Option<Chain>,
}

impl Timeline {
    /// Start and end of a step, on the host's clock: `submitted <= start <= end <= heard`. Steps are told of in the
    /// order in which they ran.
    pub fn place(&mut self, ran: Ran) -> (DeviceNanos, DeviceNanos) {
        // Saturating: the figures are the device's.
        let after = |at: DeviceNanos, by: DeviceNanos| DeviceNanos(at.0.saturating_add(by.0));
        let ahead = self.chain.filter(|_| ran.behind);
        let begin = ahead.map_or(ran.submitted, |chain| chain.end.max(ran.submitted));
        let soonest = after(begin, ran.run);
        let end = match ahead.zip(ran.since_last_end) {
            Some((chain, since)) => after(chain.end, since).max(soonest),
            None => soonest,
        };
        let mut end = end.min(ran.heard);
        let lag = ran.heard - end;
        self.chain = Some(match ahead {
            None => Chain { end, anchored: ran.heard, lag },
            Some(chain) if ran.heard >= after(chain.anchored, ANCHOR) => {
                end += lag.min(chain.lag);
                Chain { end, anchored: ran.heard, lag: ran.heard - end }
            }
            Some(chain) => Chain { end, lag: lag.min(chain.lag), ..chain },
        });
        let start = DeviceNanos(end.0.saturating_sub(ran.run.0)).max(ran.submitted).min(end);
        (start, end)
    }

    /// The steps in flight were lost: what comes next follows nothing.
    pub fn lose(&mut self) {
        self.chain = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) % n
        }
    }

    fn ran(submitted: u64, behind: bool, run: u64, since: Option<u64>, heard: u64) -> Ran {
        Ran {
            submitted: DeviceNanos(submitted),
            behind,
            run: DeviceNanos(run),
            since_last_end: since.map(DeviceNanos),
            heard: DeviceNanos(heard),
        }
    }

    fn check(timeline: &mut Timeline, ran: Ran, start: u64, end: u64) {
        assert_eq!(timeline.place(ran), (DeviceNanos(start), DeviceNanos(end)));
    }

    #[test]
    fn ends_are_chained_and_gaps_stay_between_steps() {
        let mut timeline = Timeline::default();
        check(&mut timeline, ran(100, false, 50, None, 170), 100, 150);
        check(&mut timeline, ran(110, true, 40, Some(45), 230), 155, 195);
        check(&mut timeline, ran(160, true, 30, Some(30), 231), 195, 225);
        // How long after the one before it ended is not known.
        check(&mut timeline, ran(161, true, 10, None, 240), 225, 235);
        // The device was empty: what its clock says of the pause is not needed.
        check(&mut timeline, ran(300, false, 20, Some(999), 340), 300, 320);
    }

    #[test]
    fn the_hosts_clock_has_the_last_word() {
        let mut timeline = Timeline::default();
        check(&mut timeline, ran(100, false, 500, None, 170), 100, 170);
        // Ends that nobody can have heard of yet, steps from before they were submitted, and figures beyond all bounds.
        check(&mut timeline, ran(110, true, 10, Some(400), 200), 190, 200);
        check(&mut timeline, ran(210, true, 10, Some(5), 300), 210, 220);
        check(&mut timeline, ran(220, true, u64::MAX, Some(u64::MAX), 330), 220, 330);
        timeline.lose();
        check(&mut timeline, ran(230, true, 10, Some(50), 400), 230, 240);
    }

    /// The device's clock loses a part in 10,000; what the host hears comes 3 to 40 us late.
    #[test]
    fn a_chain_that_drifts_is_moved_back() {
        let (mut timeline, mut random) = (Timeline::default(), Random(7));
        let (mut truth, mut worst, mut submitted) = (0, 0, 0);
        for step in 0..20_000 {
            let run = SECOND / 1000;
            let counted = run - run / 10_000;
            let next = truth;
            truth += run;
            let heard = truth + 3_000 + random.below(37_000);
            let (_, end) = timeline.place(ran(submitted, step > 0, counted, Some(counted), heard));
            worst = worst.max(truth.abs_diff(end.0));
            submitted = next;
        }
        assert!(worst < 100_000, "{worst} ns away after {} s", truth / SECOND);
    }

    #[test]
    fn whatever_the_devices_clock_says_intervals_are_where_they_can_be() {
        for seed in 1..300 {
            let (mut timeline, mut random) = (Timeline::default(), Random(seed));
            let (mut now, mut submitted) = (0, 0);
            for _ in 0..400 {
                let figure = |random: &mut Random| match random.below(20) {
                    0 => u64::MAX,
                    1 => 0,
                    _ => random.below(3_000_000),
                };
                let (run, since) = (figure(&mut random), figure(&mut random));
                let heard = now + random.below(3_000_000);
                let behind = random.below(4) > 0;
                let known = (random.below(5) > 0).then_some(since);
                let (start, end) = timeline.place(ran(submitted, behind, run, known, heard));
                assert!(submitted <= start.0 && start <= end && end.0 <= heard, "seed {seed}");
                assert!((end - start).0 <= run, "seed {seed}");
                submitted = if behind { now } else { heard };
                now = heard + random.below(50_000);
            }
        }
    }
}
