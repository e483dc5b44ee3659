//! The sampler of CUDA devices against the host's, bit for bit.

use obol_kernels::RowDraw;
use obol_kernels::cuda::{
    DeviceRows, DrawLayout, DrawLists, DrawRecord, Dtype, Gpu, PackedDraws, RECORD_BYTES, StepTokens,
};
use obol_models::queue::Seen;

use super::*;

/// Draws of one case: all from the same row, at positions from 0 on.
const DRAWS: usize = 4;

/// What one request asks, and what its sequence has seen.
struct Case {
    row: Vec<f32>,
    sampling: Sampling,
    history: History,
    /// Generated last: the device learns of it from its own tokens.
    fed: Option<u32>,
    forbidden: Vec<u32>,
    /// Bits of the tokens that may be drawn; empty: all.
    allowed: Vec<u32>,
}

impl Case {
    fn new(random: &mut Random, seed: u64) -> Self {
        let (row, mut sampling) = (random.row(), random.sampling());
        let token = |random: &mut Random| random.below(row.len()) as u32;
        let some = random.one(&[0, 0, 1, 7]);
        sampling.seed = seed;
        sampling.logit_bias = (0..some).map(|_| (token(random) + random.one(&[0, 9999]), 3.0)).collect();
        sampling.logprobs = random.one(&[None, Some(0), Some(5), Some(20)]);
        let prompt: Vec<u32> = (0..some).map(|_| token(random)).collect();
        let forbidden = (0..some / 2).map(|_| token(random)).collect();
        let words = random.one(&[0, row.len().div_ceil(32)]);
        let allowed = (0..words).map(|_| random.below(1 << 32) as u32).collect();
        let mut history = History::new(&prompt, &sampling);
        (0..3 * some).for_each(|_| history.push(token(random)));
        let fed = random.one(&[false, true]).then(|| token(random));
        Self { row, sampling, history, fed, forbidden, allowed }
    }

    fn on_host(&mut self) -> Vec<Result<(u32, Option<TokenLogprobs>), NotFinite>> {
        let mut scratch = Scratch::default();
        self.fed.into_iter().for_each(|token| self.history.push(token));
        let mut draw = |position| {
            let draw = Draw { seed: self.sampling.seed, choice: 1, position };
            sample(
                &self.row,
                &self.sampling,
                &self.history,
                Bars {
                    forbidden: &self.forbidden,
                    allowed: Some(&self.allowed[..]).filter(|a| !a.is_empty()),
                },
                draw,
                &mut scratch,
            )
        };
        (0..DRAWS as u64).map(&mut draw).collect()
    }

    fn on_device(&self, gpu: &Gpu) -> Vec<Result<(u32, Option<TokenLogprobs>), NotFinite>> {
        let Sampling { logit_bias: biases, logprobs, .. } = &self.sampling;
        let mut seen: Vec<Seen> = Vec::new();
        self.history.list(&mut seen);
        let draw = |position| RowDraw {
            temperature: self.sampling.temperature,
            top_k: self.sampling.top_k,
            top_p: self.sampling.top_p,
            min_p: self.sampling.min_p,
            repetition_penalty: self.sampling.repetition_penalty,
            presence_penalty: self.sampling.presence_penalty,
            frequency_penalty: self.sampling.frequency_penalty,
            seed: self.sampling.seed,
            choice: 1,
            position,
            logprobs: *logprobs,
            biases: 0..biases.len(),
            forbidden: 0..self.forbidden.len(),
            allowed: 0..self.allowed.len(),
            seen: 0..seen.len(),
        };
        let single = self.forbidden.len() + self.allowed.len();
        let words = DrawLayout::words_of(biases.len(), single, seen.len());
        let layout = DrawLayout { draws: DRAWS, words };
        let mut bytes = vec![0; layout.bytes()];
        let lists = DrawLists {
            biases: biases.iter().copied(),
            forbidden: self.forbidden.iter().copied(),
            allowed: self.allowed.iter().copied(),
            seen: seen.iter().map(|seen| (seen.token, seen.times)),
        };
        let draws: Vec<RowDraw> = (0..DRAWS as u64).map(draw).collect();
        let draws = draws.iter().map(|draw| (draw, self.fed.map(|_| 0)));
        let (_, passes) = layout.pack(draws, lists, &mut bytes);
        let vocab = self.row.len();
        let logits: Vec<u8> = self.row.repeat(DRAWS).iter().flat_map(|logit| logit.to_le_bytes()).collect();
        let upload = |bytes: &[u8]| gpu.upload(bytes).expect("the device has memory");
        let (logits, packed) = (upload(&logits), upload(&bytes));
        let tokens = upload(&self.fed.unwrap_or(0).to_le_bytes());
        let records = gpu.allocate(DRAWS * RECORD_BYTES).expect("the device has memory");
        let sampler = gpu.sampler(DRAWS, vocab).expect("the device has memory");
        gpu.sample(
            &sampler,
            DeviceRows::new(&logits, Dtype::F32, vocab),
            PackedDraws { layout, buffer: &packed, start: 0 },
            StepTokens { buffer: &tokens, rows: 1 },
            passes,
            &records,
        )
        .expect("the device draws");
        let mut bytes = vec![0; records.bytes()];
        gpu.read(&records, 0, &mut bytes).expect("the device draws");
        let drawn = |index| {
            let record = DrawRecord::of(&bytes, index);
            let token = record.token().ok_or(NotFinite)?;
            let logprobs =
                logprobs.map(|_| TokenLogprobs { chosen: record.logprob(), top: record.top().collect() });
            Ok((token, logprobs))
        };
        (0..DRAWS).map(drawn).collect()
    }
}

/// A logarithm may differ in its last bit, and is added to numbers as large as the logits.
fn assert_close(got: f32, expected: f32, what: &str) {
    assert!(
        got == expected || (got - expected).abs() < 1e-5 * (1.0 + expected.abs()),
        "{what}: {got}, {expected}"
    );
}

#[test]
fn a_device_draws_what_the_host_draws() {
    let gpu = Gpu::open(0).expect("a CUDA device, or the emulator's libcuda.so.1 in LD_LIBRARY_PATH");
    let mut random = Random(31);
    for seed in 0..100 {
        let mut case = Case::new(&mut random, seed);
        let got = case.on_device(&gpu);
        for (got, expected) in got.into_iter().zip(case.on_host()) {
            let what = format!("case {seed}: {:?}", case.sampling);
            let (Ok((token, got)), Ok((expected_token, expected))) = (&got, &expected) else {
                assert_eq!(got, expected, "{what}");
                continue;
            };
            assert_eq!(token, expected_token, "{what}");
            let (Some(got), Some(expected)) = (got, expected) else {
                assert_eq!(got, expected, "{what}");
                continue;
            };
            assert_close(got.chosen, expected.chosen, &what);
            let tokens = |of: &TokenLogprobs| of.top.iter().map(|(token, _)| *token).collect::<Vec<_>>();
            assert_eq!(tokens(got), tokens(expected), "{what}");
            for (got, expected) in got.top.iter().zip(&expected.top) {
                assert_close(got.1, expected.1, &what);
            }
        }
    }
}
