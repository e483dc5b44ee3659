#[cfg(feature = "cuda")]
mod device;

use super::*;

fn run(row: &[f32], sampling: &Sampling, history: &History, forbidden: &[u32], position: u64) -> u32 {
    let draw = Draw { seed: sampling.seed, choice: 0, position };
    sample(row, sampling, history, Bars::forbid(forbidden), draw, &mut Scratch::default()).expect("finite").0
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

#[test]
fn greedy_takes_the_highest_and_the_lower_id_on_a_tie() {
    let none = History::default();
    assert_eq!(run(&[0.0, 3.0, 3.0, 1.0], &greedy(), &none, &[], 0), 1);
    assert_eq!(run(&[0.0, 3.0, 3.0, 1.0], &greedy(), &none, &[1], 0), 2);
    assert_eq!(run(&[f32::NAN, 3.0, f32::INFINITY], &greedy(), &none, &[], 0), 1);
    for temperature in [1e-40, 1e-6, f32::MIN_POSITIVE] {
        let cold = Sampling { temperature, ..Sampling::default() };
        assert_eq!(run(&[0.0, 3.0, 2.9], &cold, &none, &[], 0), 1, "{temperature}");
    }
    let cold = Sampling { temperature: 1e-5, ..Sampling::default() };
    assert_eq!(run(&[-1e30, 3.0, 2.9], &cold, &none, &[], 0), 1);
    let broken = [f32::NAN; 3];
    let draw = Draw { seed: 0, choice: 0, position: 0 };
    assert_eq!(
        sample(&broken, &greedy(), &none, Bars::default(), draw, &mut Scratch::default()),
        Err(NotFinite)
    );
}

#[test]
fn penalties_and_bias_move_the_choice() {
    let mut history = History::new(&[2], &Sampling { repetition_penalty: 2.0, ..greedy() });
    history.push(1);
    history.push(1);
    let row = [1.0, 2.0, 2.5, 1.9];
    assert_eq!(run(&row, &greedy(), &history, &[], 0), 2);
    assert_eq!(run(&row, &Sampling { repetition_penalty: 2.0, ..greedy() }, &history, &[], 0), 3);
    assert_eq!(
        run(&row, &Sampling { logit_bias: vec![(0, 5.0), (99, 1.0)], ..greedy() }, &history, &[], 0),
        0
    );
    let row = [1.0, 2.0, 0.0, 1.9];
    assert_eq!(run(&row, &Sampling { presence_penalty: 0.05, ..greedy() }, &history, &[], 0), 1);
    assert_eq!(run(&row, &Sampling { frequency_penalty: 0.06, ..greedy() }, &history, &[], 0), 3);
}

/// The tokens that the filters leave, and the weights.
fn kept(row: &[f32], sampling: &Sampling) -> Vec<(u32, f32)> {
    let mut scratch = Scratch::default();
    let row = Row { plain: row, patch: &scratch.patch };
    row.highest(&mut scratch.highest);
    let (_, best) = row.best(&scratch.highest).expect("finite");
    let drawer = Drawer { row, highest: &scratch.highest, scale: scale(best, sampling) };
    drawer.filter(sampling, &mut scratch.masses, &mut scratch.ranked, &mut scratch.kept);
    scratch.kept
}

#[test]
fn filters_keep_what_they_promise() {
    let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
    let check = |sampling: Sampling, expected: &[u32]| {
        let tokens: Vec<u32> = kept(&row, &sampling).iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, expected, "{sampling:?}");
    };
    check(Sampling::default(), &[0, 1, 2, 3]);
    check(Sampling { top_k: 2, ..Sampling::default() }, &[0, 1]);
    check(Sampling { top_p: 0.79, ..Sampling::default() }, &[0, 1]);
    check(Sampling { top_p: 0.81, ..Sampling::default() }, &[0, 1, 2]);
    check(Sampling { min_p: 0.2, ..Sampling::default() }, &[0, 1, 2]);
    check(Sampling { min_p: 1.0, ..Sampling::default() }, &[0]);
    check(Sampling { top_p: 0.0, ..Sampling::default() }, &[0]);
    check(Sampling { top_p: 0.9, min_p: 1.0, ..Sampling::default() }, &[0]);
}

#[test]
fn draws_follow_the_distribution_and_repeat_with_the_seed() {
    let row: Vec<f32> = [0.5f32, 0.3, 0.2].iter().map(|p| p.ln()).collect();
    let sampling = Sampling { seed: 7, ..Sampling::default() };
    let mut counts = [0u32; 3];
    for position in 0..20_000 {
        let token = run(&row, &sampling, &History::default(), &[], position);
        assert_eq!(token, run(&row, &sampling, &History::default(), &[], position));
        counts[token as usize] += 1;
    }
    for (count, p) in counts.iter().zip([0.5, 0.3, 0.2]) {
        assert!((f64::from(*count) / 20_000.0 - p).abs() < 0.015, "{counts:?}");
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    fn unit(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 24) as f32
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Rows of every kind: flat, steep, full of ties, with what is no number.
    fn row(&mut self) -> Vec<f32> {
        let vocab = self.one(&[1, 2, 63, 64, 65, 200, 1000, 5000]);
        let (spread, steps, broken) =
            (self.one(&[0.5, 4.0, 30.0]), self.one(&[0.0, 0.0, 2.0]), self.one(&[0, 0, 30]));
        let mut row: Vec<f32> = (0..vocab)
            .map(|_| {
                let logit = -spread * self.unit().max(1e-6).ln() + 2.0;
                if steps > 0.0 { (logit * steps).round() / steps } else { logit }
            })
            .collect();
        for _ in 0..broken {
            let at = self.below(vocab);
            row[at] = self.one(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]);
        }
        row
    }

    fn sampling(&mut self) -> Sampling {
        Sampling {
            temperature: self.one(&[0.0, 0.3, 1.0, 1.0, 2.0]),
            top_k: self.one(&[0, 0, 0, 1, 2, 5, 40, 1000]),
            top_p: self.one(&[1.0, 1.0, 0.0, 0.05, 0.5, 0.9, 0.999]),
            min_p: self.one(&[0.0, 0.0, 0.05, 1e-20, 1.0]),
            presence_penalty: self.one(&[0.0, 0.0, 1.5]),
            frequency_penalty: self.one(&[0.0, 0.0, -0.5]),
            repetition_penalty: self.one(&[1.0, 1.0, 1.3]),
            ..Sampling::default()
        }
    }
}

#[test]
fn draws_are_those_of_the_definition() {
    let mut random = Random(7);
    let mut scratch = Scratch::default();
    for case in 0..3000 {
        let (row, mut sampling) = (random.row(), random.sampling());
        let token = |random: &mut Random| random.below(row.len()) as u32;
        let some = random.one(&[0, 0, 1, 7]);
        sampling.logit_bias = (0..some).map(|_| (token(&mut random) + random.one(&[0, 9999]), 3.0)).collect();
        let prompt: Vec<u32> = (0..some).map(|_| token(&mut random)).collect();
        let forbidden: Vec<u32> = (0..some / 2).map(|_| token(&mut random)).collect();
        let mut history = History::new(&prompt, &sampling);
        (0..3 * some).for_each(|_| history.push(token(&mut random)));
        for position in 0..4 {
            let draw = Draw { seed: case, choice: 0, position };
            let bits = philox::bits(draw);
            let expected = oracle::sample(&row, &sampling, &history, &forbidden, bits, f32::exp);
            let got = sample(&row, &sampling, &history, Bars::forbid(&forbidden), draw, &mut scratch);
            assert_eq!(got.ok().map(|(token, _)| token), expected, "case {case}: {sampling:?}");
        }
    }
}

#[test]
fn filters_keep_exactly_what_the_definition_keeps() {
    let mut random = Random(8);
    for case in 0..3000 {
        let (row, sampling) = (random.row(), random.sampling());
        let finite = row.iter().copied().filter(|logit| logit.is_finite());
        let best = finite.fold(f32::NEG_INFINITY, f32::max);
        if sampling.temperature == 0.0 || best == f32::NEG_INFINITY {
            continue;
        }
        let expected = oracle::filter(&row, best, &sampling, weigh::exp);
        assert_eq!(kept(&row, &sampling), expected, "case {case}: {} logits, {sampling:?}", row.len());
    }
}

#[test]
fn logprobs_are_of_the_plain_distribution_most_likely_first() {
    let row: Vec<f32> = [0.1f32, 0.6, 0.3].iter().map(|p| p.ln() + 4.0).collect();
    let check = |row: &[f32], sampling: &Sampling| {
        let draw = Draw { seed: 0, choice: 0, position: 0 };
        let none = History::default();
        let (token, got) =
            sample(row, sampling, &none, Bars::default(), draw, &mut Scratch::default()).expect("finite");
        let got = got.expect("logprobs were asked for");
        let top = sampling.logprobs.expect("logprobs are asked for") as usize;
        let (chosen, order) = oracle::logprobs(row, token, top);
        assert!((f64::from(got.chosen) - chosen).abs() < 2e-5, "{} is not {chosen}", got.chosen);
        assert_eq!(got.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), order);
        for (token, logprob) in got.top {
            let expected = oracle::logprobs(row, token, 0).0;
            assert!((f64::from(logprob) - expected).abs() < 2e-5, "{logprob} is not {expected}");
        }
    };
    check(&row, &Sampling { logprobs: Some(2), ..greedy() });
    check(&row, &Sampling { logprobs: Some(0), ..greedy() });
    // The bias moves the choice and not the distribution that is reported.
    check(&row, &Sampling { logprobs: Some(3), logit_bias: vec![(0, 50.0)], ..greedy() });
    let mut random = Random(9);
    for vocab in [1, 64, 65, 3000] {
        let row: Vec<f32> = (0..vocab).map(|_| (random.unit() * 40.0).round() / 4.0).collect();
        for top in [0, 1, 5, 20] {
            check(&row, &Sampling { logprobs: Some(top), ..greedy() });
        }
    }
}
