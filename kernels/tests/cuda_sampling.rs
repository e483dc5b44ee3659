//! Sampling on a device against its definition, bit for bit, whatever shares the launch.

mod device;
mod numbers;

use device::sampling::{Lists, logprobs, sample};
use device::{gpu, upload, upload_u32};
use numbers::Random;
use obol_kernels::RowDraw;
use obol_kernels::cuda::{
    DeviceRows, DrawLayout, DrawLists, DrawRecord, Dtype, Gpu, PackedDraws, RECORD_BYTES, SamplingPasses,
    StepTokens,
};

/// What a launch draws: token, its log-probability, the most likely.
type Drawn = (Option<u32>, f32, Vec<(u32, f32)>);

/// A draw, and the row of the step's tokens that is fed to it.
type Asked = (RowDraw, Option<usize>);

fn unfed(draws: impl IntoIterator<Item = RowDraw>) -> Vec<Asked> {
    draws.into_iter().map(|draw| (draw, None)).collect()
}

const GREEDY: RowDraw = RowDraw { seed: 7, ..RowDraw::GREEDY };
const WARM: RowDraw = RowDraw { temperature: 1.0, ..GREEDY };

/// Draws from rows at a distance of `vocab` + `gap`, in places of which the last `padding` have no draw.
fn run(
    gpu: &Gpu,
    rows: &[Vec<f32>],
    draws: &[Asked],
    lists: &Lists,
    gap: usize,
    padding: usize,
) -> Vec<Drawn> {
    let (vocab, places) = (rows[0].len(), rows.len() + padding);
    let single = lists.forbidden.len() + lists.allowed.len();
    let words = DrawLayout::words_of(lists.biases.len(), single, lists.seen.len());
    let layout = DrawLayout { draws: places, words: words + 3 };
    let mut bytes = vec![0xaa; layout.bytes()];
    let packed = DrawLists {
        biases: lists.biases.iter().copied(),
        forbidden: lists.forbidden.iter().copied(),
        allowed: lists.allowed.iter().copied(),
        seen: lists.seen.iter().copied(),
    };
    let (len, passes) = layout.pack(draws.iter().map(|(draw, fed)| (draw, *fed)), packed, &mut bytes);
    assert_eq!(len, layout.bytes() - 12, "all but the room that is left");
    // One number before the rows, so that no row is aligned where the vocabulary is even.
    let mut all = vec![f32::NAN];
    for row in rows.iter().chain(std::iter::repeat_n(&rows[0], padding)) {
        all.extend(row);
        all.resize(all.len() + gap, f32::NAN);
    }
    let logits = upload(gpu, &all, Dtype::F32);
    let buffer = gpu.upload(&[&[0; 16], &bytes[..]].concat()).expect("memory");
    let tokens = upload_u32(gpu, &lists.tokens);
    let records = gpu.upload(&vec![0xaa; places * RECORD_BYTES]).expect("memory");
    let sampler = gpu.sampler(places + 1, vocab).expect("memory");
    let sample = |passes| {
        gpu.fill(&records, 0xaa).expect("filled");
        gpu.sample(
            &sampler,
            DeviceRows { start: 1, ..DeviceRows::new(&logits, Dtype::F32, vocab + gap) },
            PackedDraws { layout, buffer: &buffer, start: 16 },
            StepTokens { buffer: &tokens, rows: lists.tokens.len() },
            passes,
            &records,
        )
        .expect("launched");
        let mut bytes = vec![0; records.bytes()];
        gpu.read(&records, 0, &mut bytes).expect("the work before succeeded");
        bytes
    };
    let bytes = sample(passes);
    if passes != SamplingPasses::ALL {
        assert!(bytes == sample(SamplingPasses::ALL), "the passes that nobody needs change something");
    }
    let drawn = |at| {
        let record = DrawRecord::of(&bytes, at);
        (record.token(), record.logprob(), record.top().collect())
    };
    for place in rows.len()..places {
        assert_eq!(drawn(place), (None, 0.0, Vec::new()), "a place without a draw");
    }
    (0..rows.len()).map(drawn).collect()
}

#[track_caller]
fn token(gpu: &Gpu, row: &[f32], draw: RowDraw, lists: &Lists) -> Option<u32> {
    run(gpu, &[row.to_vec()], &unfed([draw]), lists, 0, 0)[0].0
}

#[test]
fn greedy_takes_the_highest_and_the_lower_token_on_a_tie() {
    let gpu = gpu();
    let none = Lists::default();
    let forbidden = Lists { forbidden: vec![1], ..Lists::default() };
    assert_eq!(token(&gpu, &[0.0, 3.0, 3.0, 1.0], GREEDY, &none), Some(1));
    assert_eq!(
        token(&gpu, &[0.0, 3.0, 3.0, 1.0], RowDraw { forbidden: 0..1, ..GREEDY }, &forbidden),
        Some(2)
    );
    assert_eq!(token(&gpu, &[f32::NAN, 3.0, f32::INFINITY], GREEDY, &none), Some(1));
    assert_eq!(token(&gpu, &[-1.0, -0.0, 0.0], GREEDY, &none), Some(1));
    assert_eq!(token(&gpu, &[f32::MIN, f32::NEG_INFINITY], GREEDY, &none), Some(0));
    for temperature in [1e-40, 1e-6, f32::MIN_POSITIVE] {
        assert_eq!(token(&gpu, &[0.0, 3.0, 2.9], RowDraw { temperature, ..GREEDY }, &none), Some(1));
    }
    assert_eq!(token(&gpu, &[0.0, 2.9, 3.0], RowDraw { top_k: 1, ..WARM }, &none), Some(2));
    let cold = RowDraw { temperature: 1e-5, ..WARM };
    assert_eq!(token(&gpu, &[-1e30, 3.0, 2.9], cold, &none), Some(1));
}

#[test]
fn rows_without_a_finite_logit_draw_nothing() {
    let gpu = gpu();
    let row = vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let draws = unfed([GREEDY, WARM, RowDraw { top_p: 0.5, top_k: 2, logprobs: Some(2), ..WARM }]);
    for (at, drawn) in run(&gpu, &vec![row; 3], &draws, &Lists::default(), 0, 0).into_iter().enumerate() {
        assert_eq!(drawn, (None, 0.0, Vec::new()), "draw {at}");
    }
}

#[test]
fn penalties_and_bias_move_the_choice() {
    let gpu = gpu();
    let lists = Lists {
        biases: vec![(0, 5.0), (99, 1.0), (0, 1.0), (2, 6.0)],
        forbidden: Vec::new(),
        allowed: Vec::new(),
        seen: vec![(1, 2), (2, 0), (77, 3)],
        tokens: vec![3, 1],
    };
    let check_fed = |row: &[f32], draw: RowDraw, fed: Option<usize>, expected: u32| {
        let asked = (draw, fed);
        let drawn = &run(&gpu, &[row.to_vec()], std::slice::from_ref(&asked), &lists, 0, 0)[0];
        assert_eq!(drawn.0, Some(expected), "{asked:?}");
    };
    let check = |row: &[f32], draw: RowDraw, expected: u32| check_fed(row, draw, None, expected);
    let row = [1.0, 2.0, 2.5, 1.9];
    let seen = RowDraw { seen: 0..3, ..GREEDY };
    check(&row, GREEDY, 2);
    check(&row, RowDraw { repetition_penalty: 2.0, ..seen.clone() }, 3);
    check_fed(&row, RowDraw { repetition_penalty: 2.0, ..seen.clone() }, Some(0), 2);
    check(&row, RowDraw { biases: 0..2, ..GREEDY }, 0);
    check(&row, RowDraw { biases: 1..4, ..GREEDY }, 2);
    let row = [1.0, 2.0, 0.0, 1.9];
    check(&row, RowDraw { presence_penalty: 0.05, ..seen.clone() }, 1);
    check(&row, RowDraw { frequency_penalty: 0.06, ..seen.clone() }, 3);
    check(&row, RowDraw { frequency_penalty: 0.04, ..seen.clone() }, 1);
    check_fed(&row, RowDraw { frequency_penalty: 0.04, ..seen }, Some(1), 3);
    // A fed token that no penalty asks for changes nothing; a row that is not there neither.
    check_fed(&row, GREEDY, Some(1), 1);
    check_fed(&row, RowDraw { frequency_penalty: 5.0, ..GREEDY }, Some(9), 1);
    check_fed(&row, RowDraw { frequency_penalty: 5.0, ..GREEDY }, Some(1), 3);
}

/// Rows of every kind: flat, steep, full of ties, with what is no number.
fn row(random: &mut Random, vocab: usize) -> Vec<f32> {
    let (spread, steps, broken) =
        (random.one(&[0.0, 0.5, 4.0, 30.0]), random.one(&[0.0, 0.0, 2.0]), random.one(&[0, 0, 30]));
    let mut row: Vec<f32> = (0..vocab)
        .map(|_| {
            let logit = -spread * random.unit().abs().max(1e-6).ln() + 2.0;
            if steps > 0.0 { (logit * steps).round() / steps } else { logit }
        })
        .collect();
    for _ in 0..broken {
        let at = random.below(vocab);
        row[at] = random.one(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]);
    }
    row
}

/// A part of a list that this draw appends to.
fn extend<T>(list: &mut Vec<T>, more: impl IntoIterator<Item = T>) -> std::ops::Range<usize> {
    let start = list.len();
    list.extend(more);
    start..list.len()
}

fn draw(random: &mut Random, vocab: usize, lists: &mut Lists) -> Asked {
    let some = random.one(&[0, 0, 1, 7, 300]);
    let token = |random: &mut Random| (random.below(vocab) + random.one(&[0, 0, 0, 9999])) as u32;
    let biases = (0..some).map(|_| (token(random), random.unit() * 3.0)).collect::<Vec<_>>();
    let forbidden = (0..some / 2).map(|_| token(random)).collect::<Vec<_>>();
    // Sometimes fewer words than the vocabulary has, and sometimes only a few tokens.
    let words = random.one(&[0, 0, vocab.div_ceil(32), vocab.div_ceil(64)]);
    let sparse = random.one(&[false, true]);
    let bits =
        |random: &mut Random| random.next() as u32 & if sparse { 1 << random.below(32) } else { u32::MAX };
    let allowed = (0..words).map(|_| bits(random)).collect::<Vec<_>>();
    let mut seen: Vec<u32> = (0..3 * some).map(|_| token(random)).collect();
    seen.sort_unstable();
    seen.dedup();
    let seen = seen.into_iter().map(|token| (token, random.below(3) as u32)).collect::<Vec<_>>();
    lists.tokens.push(random.below(vocab) as u32);
    let draw = RowDraw {
        temperature: random.one(&[0.0, 0.3, 1.0, 1.0, 2.0]),
        top_k: random.one(&[0, 0, 0, 1, 2, 5, 40, 1000]),
        top_p: random.one(&[1.0, 1.0, 0.0, 0.05, 0.5, 0.9, 0.999]),
        min_p: random.one(&[0.0, 0.0, 0.05, 1e-20, 1.0]),
        presence_penalty: random.one(&[0.0, 0.0, 1.5]),
        frequency_penalty: random.one(&[0.0, 0.0, -0.5]),
        repetition_penalty: random.one(&[1.0, 1.0, 1.3]),
        seed: random.next(),
        choice: random.below(3) as u32,
        position: random.next() >> random.below(64),
        logprobs: random.one(&[None, None, None, Some(0), Some(5), Some(20)]),
        biases: extend(&mut lists.biases, biases),
        forbidden: extend(&mut lists.forbidden, forbidden),
        allowed: extend(&mut lists.allowed, allowed),
        seen: extend(&mut lists.seen, seen),
    };
    (draw, random.one(&[None, Some(lists.tokens.len() - 1)]))
}

#[track_caller]
fn check_logprobs(row: &[f32], draw: &RowDraw, (token, logprob, top): &Drawn, what: &str) {
    let (Some(token), Some(wanted)) = (*token, draw.logprobs) else {
        assert_eq!((*logprob, top.len()), (0.0, 0), "{what}: nobody asked");
        return;
    };
    let (all, mut order) = logprobs(row);
    let close = |got: f32, token: u32| {
        let (got, expected) = (f64::from(got), all[token as usize]);
        // The logarithm of the sum is rounded where the logits are.
        let bound = 1e-5 + 1e-6 * f64::from(row[token as usize].abs());
        let is_close = got == expected || (got - expected).abs() < bound;
        assert!(is_close, "{what}: token {token}: {got} is not {expected}");
    };
    close(*logprob, token);
    order.truncate(wanted as usize);
    assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), order, "{what}: the most likely");
    top.iter().for_each(|(token, logprob)| close(*logprob, *token));
}

fn check_random(seed: u64, vocab: usize, rows: usize, cases: usize) {
    let gpu = gpu();
    let mut random = Random(seed);
    for case in 0..cases {
        let mut lists = Lists::default();
        let logits: Vec<Vec<f32>> = (0..rows).map(|_| row(&mut random, vocab)).collect();
        let draws: Vec<Asked> = (0..rows).map(|_| draw(&mut random, vocab, &mut lists)).collect();
        let drawn = run(&gpu, &logits, &draws, &lists, random.below(3), random.below(3));
        for ((logits, draw), drawn) in logits.iter().zip(&draws).zip(&drawn) {
            let what = format!("vocabulary {vocab}, case {case}: {draw:?}");
            assert_eq!(drawn.0, sample(logits, draw, &lists), "{what}");
            check_logprobs(logits, &draw.0, drawn, &what);
        }
    }
}

#[test]
fn draws_are_those_of_the_definition_for_small_vocabularies() {
    for (seed, vocab) in [1, 2, 63, 64, 65, 1000].into_iter().enumerate() {
        check_random(seed as u64, vocab, 33, 4);
    }
}

#[test]
fn draws_are_those_of_the_definition_around_a_chunk() {
    for vocab in [2047, 2048, 2049, 5000] {
        check_random(vocab as u64, vocab, 9, 4);
    }
}

#[test]
fn draws_are_those_of_the_definition_for_large_vocabularies() {
    check_random(100, 49_152, 3, 2);
    check_random(101, 128_256, 2, 2);
}

#[test]
fn more_chunks_than_threads_are_searched() {
    // 2^20 tokens are 512 chunks.
    let gpu = gpu();
    let mut random = Random(5);
    let row: Vec<f32> = (0..1 << 20).map(|_| random.unit()).collect();
    let flat = unfed([RowDraw { logprobs: Some(3), ..WARM }]);
    let drawn = &run(&gpu, std::slice::from_ref(&row), &flat, &Lists::default(), 0, 0)[0];
    assert_eq!(drawn.0, sample(&row, &flat[0], &Lists::default()));
    check_logprobs(&row, &flat[0].0, drawn, "2^20 tokens");
}

#[test]
fn every_token_of_a_flat_row_can_be_drawn() {
    let gpu = gpu();
    let rows = vec![vec![1.5; 8]; 64];
    let draws = unfed((0..64).map(|position| RowDraw { position, ..WARM }));
    let drawn = run(&gpu, &rows, &draws, &Lists::default(), 0, 0);
    for token in 0..8 {
        assert!(drawn.iter().any(|drawn| drawn.0 == Some(token)), "token {token}");
    }
    // With ties the filters keep the lower tokens.
    for (filtered, kept) in [(RowDraw { top_k: 3, ..WARM }, 3), (RowDraw { top_p: 0.5, ..WARM }, 4)] {
        let draws = unfed((0..64).map(|position| RowDraw { position, ..filtered.clone() }));
        let drawn = run(&gpu, &rows, &draws, &Lists::default(), 0, 0);
        let mut tokens: Vec<u32> = drawn.iter().filter_map(|drawn| drawn.0).collect();
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens, (0..kept).collect::<Vec<u32>>(), "{filtered:?}");
    }
}

#[test]
fn a_draw_does_not_depend_on_what_shares_the_launch() {
    let gpu = gpu();
    let mut random = Random(11);
    let mut lists = Lists::default();
    let logits: Vec<Vec<f32>> = (0..20).map(|_| row(&mut random, 3000)).collect();
    let draws: Vec<Asked> = (0..20).map(|_| draw(&mut random, 3000, &mut lists)).collect();
    let together = run(&gpu, &logits, &draws, &lists, 0, 5);
    for (at, together) in together.iter().enumerate() {
        let alone = run(&gpu, &logits[at..=at], &draws[at..=at], &lists, 1, 0);
        let bits = |drawn: &Drawn| {
            let top: Vec<(u32, u32)> =
                drawn.2.iter().map(|(token, logprob)| (*token, logprob.to_bits())).collect();
            (drawn.0, drawn.1.to_bits(), top)
        };
        assert_eq!(bits(&alone[0]), bits(together), "draw {at}");
    }
}

#[test]
fn sampling_can_be_recorded_and_run_again_with_other_draws() {
    let gpu = gpu();
    let layout = DrawLayout { draws: 2, words: 8 };
    let (logits, tokens) =
        (upload(&gpu, &[0.0, 1.0, 2.0, 5.0, 4.0, 3.0], Dtype::F32), upload_u32(&gpu, &[2]));
    let (sampler, buffer) =
        (gpu.sampler(2, 3).expect("memory"), gpu.allocate(layout.bytes()).expect("memory"));
    let records = gpu.allocate(2 * RECORD_BYTES).expect("memory");
    let graph = gpu
        .capture(|| {
            let packed = PackedDraws { layout, buffer: &buffer, start: 0 };
            let rows = DeviceRows::new(&logits, Dtype::F32, 3);
            gpu.sample(
                &sampler,
                rows,
                packed,
                StepTokens { buffer: &tokens, rows: 1 },
                SamplingPasses::ALL,
                &records,
            )
        })
        .expect("recorded");
    let draw_with = |draws: &[RowDraw], biases: &[(u32, f32)]| {
        let mut bytes = vec![0; layout.bytes()];
        let lists = DrawLists {
            biases: biases.iter().copied(),
            forbidden: std::iter::empty(),
            allowed: std::iter::empty(),
            seen: std::iter::empty(),
        };
        let (len, _) = layout.pack(draws.iter().map(|draw| (draw, None)), lists, &mut bytes);
        gpu.write(&buffer, 0, &bytes[..len]).expect("written");
        graph.launch().expect("launched");
        let mut bytes = vec![0; records.bytes()];
        gpu.read(&records, 0, &mut bytes).expect("the work before succeeded");
        [0, 1].map(|at| DrawRecord::of(&bytes, at).token())
    };
    assert_eq!(draw_with(&[GREEDY, GREEDY], &[]), [Some(2), Some(0)]);
    assert_eq!(draw_with(&[GREEDY], &[]), [Some(2), None]);
    let biased = RowDraw { biases: 0..1, ..GREEDY };
    let filtered = RowDraw { top_k: 2, top_p: 0.1, ..WARM };
    assert_eq!(draw_with(&[biased, filtered], &[(1, 9.0)]), [Some(1), Some(0)]);
}
