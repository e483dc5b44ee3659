//! Requests that may use only so much: they end in the step in which that is found out, and say what they said
//! until then.

use std::sync::{Arc, Mutex};

use obol::request::{Allowance, CacheSalt, Finish, NewRequest, Prompts, Tier, Use};
use obol::units::{RequestId, Ticket};
use obol_models::fake::FakeModel;

use crate::engine_sim::{EVERYWHERE, On, Rng, World, block_on, oracle, random_request, read, tight};
use crate::fake_grammar::grammar_of;

/// So much device time or block time, whichever is used first.
#[derive(Debug)]
struct Limits {
    most: Use,
    /// As in a budget, what was asked for stays set aside.
    has: Mutex<Use>,
    refused: Mutex<Option<Use>>,
}

impl Limits {
    fn new(most: Use) -> Arc<Self> {
        Arc::new(Self { most, has: Mutex::default(), refused: Mutex::default() })
    }

    fn refused(&self) -> Option<Use> {
        *self.refused.lock().unwrap()
    }
}

fn within(used: Use, most: Use) -> bool {
    used.device <= most.device && used.kv <= most.kv
}

impl Allowance for Limits {
    fn has(&self, used: Use) -> bool {
        within(used, *self.has.lock().unwrap())
    }

    fn covers(&self, need: Use, want: Use) -> bool {
        assert!(within(need, want), "it wants at least what it needs");
        let covered = within(need, self.most);
        if covered {
            *self.has.lock().unwrap() = if within(want, self.most) { want } else { need };
        } else {
            self.refused.lock().unwrap().get_or_insert(need);
        }
        covered
    }
}

#[test]
fn random_worlds_end_whoever_has_used_enough_and_nobody_else() {
    EVERYWHERE.into_iter().for_each(random_worlds);
}

fn random_worlds(on: On) {
    let (mut cut, mut refused, mut whole) = (0, 0, 0);
    for seed in 0..150u64 {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let (vocab, config) = tight(&mut rng);
        let capacity = config.max_model_len as u64;
        let model = || FakeModel::new(vocab, capacity as usize, seed);
        let oracle_model = model();
        let world = World::new(model(), config, on);
        let mut limited: Vec<(u64, Arc<Limits>)> = Vec::new();
        block_on(async {
            let mut streams = Vec::new();
            for ticket in 0..12 {
                let (prompt, sampling, stops) = random_request(&mut rng, capacity, vocab as u64);
                let mut prompts = vec![prompt];
                if rng.below(4) == 0 {
                    // The settings fit the first one: others are no longer.
                    let shorter = 1 + rng.below(prompts[0].len() as u64) as usize;
                    prompts.extend([prompts[0][..shorter].to_vec(), prompts[0].clone()]);
                }
                let each = [1, 1, 1, 3][rng.below(4) as usize];
                let choices = each * prompts.len() as u32;
                let mut limits = None;
                if rng.below(2) == 0 {
                    let mut most = Use::default();
                    // Of some nothing is ever run.
                    let device = if rng.below(3) == 0 { 2_000 } else { 200_000 };
                    most.device.0 = rng.below(device);
                    most.kv.0 = u128::from(rng.below(2_000_000));
                    limits = Some(Limits::new(most));
                    limited.extend(limits.clone().map(|limits| (ticket, limits)));
                }
                let stream = world.submit_new(NewRequest {
                    allowance: limits.clone().map(|limits| limits as Arc<dyn Allowance>),
                    grammar: grammar_of(&sampling, &stops),
                    score_prompts: false,
                    vectors: None,
                    tenant: "anonymous".into(),
                    tier: Tier::Default,
                    id: RequestId(format!("r{ticket}")),
                    ticket: Ticket(ticket),
                    prompt: Prompts::new(prompts.clone()),
                    choices,
                    sampling: sampling.clone(),
                    stops: stops.clone(),
                    salt: CacheSalt([0; 32]),
                });
                streams.push((stream, prompts, sampling, stops, choices, limits));
            }
            for (mut stream, prompts, sampling, stops, choices, limits) in streams {
                let got = read(&mut stream, choices).await;
                let was_refused = limits.is_some_and(|limits| limits.refused().is_some());
                for (choice, (tokens, finish)) in got.into_iter().enumerate() {
                    let prompt = &prompts[choice * prompts.len() / choices as usize];
                    let (expected, by_itself) =
                        oracle(&oracle_model, prompt, &sampling, &stops, choice as u32);
                    if finish == Some(Finish::Budget) {
                        assert!(was_refused && expected.starts_with(&tokens), "{on:?}, seed {seed}");
                    } else {
                        assert_eq!((tokens, finish), (expected, Some(by_itself)), "{on:?}, seed {seed}");
                    }
                }
            }
        });
        let usages = world.finish();
        assert_eq!(usages.len(), 12, "seed {seed}: one settlement a request");
        for usage in usages {
            let limits =
                limited.iter().find(|(ticket, _)| *ticket == usage.ticket.0).map(|(_, limits)| limits);
            let Some(need) = limits.and_then(|limits| limits.refused()) else {
                assert_ne!(usage.status, Finish::Budget, "{on:?}, seed {seed}");
                whole += 1;
                continue;
            };
            // It ended in the step that was read then, but for a step that was in flight already.
            if matches!(on, On::Host) {
                assert!(usage.device() <= need.device, "seed {seed}: {usage:?}, {need:?}");
            }
            match usage.steps {
                0 => refused += 1,
                _ => cut += usize::from(usage.status == Finish::Budget),
            }
        }
    }
    assert!(cut > 100 && refused > 20 && whole > 500, "{on:?}: {cut} cut, {refused} refused, {whole} whole");
}
