//! Which of several results are not worse in everything than another one.

/// What is weighed: more of the first is better, less of the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Merits {
    pub(super) throughput: f64,
    pub(super) latency: f64,
    /// `None` where nobody tells it; then it is not weighed.
    pub(super) cost: Option<f64>,
}

/// Where a result stands among the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// No other is as good in everything and better in something.
    Best,
    /// The first that is.
    Dominated { by: usize },
    /// It has no figures.
    Unknown,
}

impl Merits {
    fn dominates(&self, other: &Self) -> bool {
        let costs = self.cost.zip(other.cost);
        let as_good = self.throughput >= other.throughput
            && self.latency <= other.latency
            && costs.is_none_or(|(own, other)| own <= other);
        let better = self.throughput > other.throughput
            || self.latency < other.latency
            || costs.is_some_and(|(own, other)| own < other);
        as_good && better
    }
}

/// Where each stands; `None` has no figures.
pub(super) fn standings(all: &[Option<Merits>]) -> Vec<Standing> {
    let standing = |own: &Option<Merits>| match own {
        None => Standing::Unknown,
        Some(own) => {
            let dominates = |other: &Option<Merits>| other.is_some_and(|other| other.dominates(own));
            all.iter().position(dominates).map_or(Standing::Best, |by| Standing::Dominated { by })
        }
    };
    all.iter().map(standing).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_good_in_everything_dominates() {
        let of = |throughput, latency, cost| Some(Merits { throughput, latency, cost });
        let all = [
            of(100.0, 10.0, Some(1.0)),
            // Slower, but for less money.
            of(90.0, 11.0, Some(0.5)),
            // As good as the first but for the money.
            of(100.0, 10.0, Some(1.1)),
            // Equal to the first: neither dominates.
            of(100.0, 10.0, Some(1.0)),
            None,
            // Its cost is not known.
            of(80.0, 12.0, None),
            of(200.0, 50.0, None),
        ];
        let best = Standing::Best;
        let expected = [
            best,
            best,
            Standing::Dominated { by: 0 },
            best,
            Standing::Unknown,
            Standing::Dominated { by: 0 },
            best,
        ];
        assert_eq!(standings(&all), expected);
        assert!(standings(&[]).is_empty());
    }
}
