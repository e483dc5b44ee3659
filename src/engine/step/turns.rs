//! Whose prompt is computed next, and who keeps its place: by tier, and within it the tenant that was given least by
//! its weight goes first, and of its requests which arrived first.
//!
//! While a tenant that had nothing here computes the prompt of its request, tenants with several requests that were
//! given as much or more are held back: none of their sequences takes part in the step, and all keep their blocks. So
//! beside a flood that was given as much it waits for its first token at most as long as alone and, over that, for the
//! step that runs when it comes, as no step can be cut short (for both, where the device is given steps ahead). That is
//! more than twice as long as alone where its prompt takes less than such a step. Who asks for more than its part waits
//! until the others were given as much. While tenants share the device a flood's prompts make no step longer than
//! `crowd_tokens`; who comes after [`COMPANY`] in which one tenant had the device for itself may find one of
//! `step_tokens`. Prompts of more than four steps, and second requests of a tenant, go in turn beside the others'
//! decodes.
//!
//! Nobody is held back for long. Who is let ahead pays for its steps alone, so its counter rises past the others'. And
//! tenants are held back for one prompt at a time, of at most four steps: before they are for the next, everybody has a
//! step, in which that prompt may take part beside them.
//!
//! A flood's sequence that loses its place is computed again for the house (`HouseTime::Preemption`), and its tenant's
//! counter does not grow by it: the house pays what it costs to let others in, as with any preemption. It happens
//! only where a tenant with fewer sequences by its weight needs a place or blocks, so a tenant that comes again and
//! again costs the house at most one such sequence for each place that it takes, or those whose blocks it needs.
//!
//! What is of the tier `batch` runs where others leave room: its sequences sit out every step that computes another's
//! prompt, have few tokens of any step ([`BATCH_PARTS`]) and fewer beside others ([`BATCH_PARTS_BESIDE`]), and give their
//! places and blocks to whoever waits for them. So whoever comes beside a batch waits for one such step, and its answer
//! is a little slower. As long as prompts of others come without a pause, a batch does not get on.
//!
//! Knows no device or client. Invariant: one tenant alone is served in order of arrival, a tier at a time.

use crate::engine::EngineConfig;
use crate::engine::blocks::{Blocks, PrefixMatch};
use crate::engine::fair::{Fair, Service};
use crate::engine::flight::Flights;
use crate::engine::lines::{self, Line, Lines, account, tier};
use crate::engine::scheduler::{Favoured, Running, StepPlan, Turn, Waiting};
use crate::engine::sequence::{RequestKey, Sequence};
use crate::meter::share::{Coefficients, Work};
use crate::request::Tier;
use crate::units::DeviceNanos;

/// Who shared the device within this time is thought to come again.
const COMPANY: DeviceNanos = DeviceNanos(60_000_000_000);

/// A flood's prompts make a step as many times as long as its fixed part, so that shorter steps cost a flood no more
/// than that part of its throughput.
const FIXED_PARTS: (u64, u64) = (16, 1);

/// What is of the tier `batch` makes a step as many times as long as its fixed part: whoever comes meanwhile waits for
/// it.
pub(super) const BATCH_PARTS: (u64, u64) = (8, 1);

/// And this beside others, who decode: there each of their tokens takes so much longer.
pub(super) const BATCH_PARTS_BESIDE: (u64, u64) = (1, 2);

/// One line while a step is planned.
#[derive(Clone, Default)]
struct Contender {
    /// What its tenant was given, with estimates of what was not metered yet.
    given: Service,
    /// With what it had turns for in this plan, too.
    service: Service,
    /// Sequences that run, and that had a turn in this plan.
    running: usize,
    /// Its views from the next one that computes a prompt.
    next: usize,
    end: usize,
    /// Sequences of its line that had their turn.
    turns: usize,
    /// Whether it is held back for a prompt of another tenant.
    held: bool,
}

/// What each plan fills anew.
#[derive(Default)]
pub(super) struct Order {
    /// Running sequences, by their indices; first who keeps its blocks longest.
    pub(super) running: Vec<usize>,
    /// By line.
    contenders: Vec<Contender>,
    /// Lines with sequences, ascending: of many tenants few have any. The others' contenders are as new.
    present: Vec<Line>,
    /// Lines of waiting sequences that had a turn, in order.
    pub(super) lines: Vec<Line>,
    /// When several tenants had requests here last.
    company: Option<DeviceNanos>,
    /// For whom tenants may be held back in this plan.
    favoured: Option<RequestKey>,
    /// For whom they were in the last step. Before they are for another there is a step in which they were not.
    held_for: Option<RequestKey>,
}

impl Order {
    /// Sets the counters, and the order of who runs.
    pub(super) fn begin(&mut self, fair: &Fair, flights: &Flights, running: &[Sequence], waiting: &Lines) {
        self.lines.clear();
        for line in self.present.drain(..) {
            self.contenders[line] = Contender::default();
        }
        self.contenders.resize(lines::of(fair.len()).start, Contender::default());
        self.present.extend(waiting.waiting());
        self.present.extend(running.iter().map(|sequence| sequence.line));
        self.present.sort_unstable();
        self.present.dedup();
        for line in &self.present {
            self.contenders[*line].given = fair.service(account(*line));
        }
        for flight in flights.iter() {
            let sequences = flight.members.len();
            for member in &flight.members {
                let expected = fair.worth(account(member.line), member.part.expected(sequences));
                for line in siblings(member.line).filter(|line| self.present.binary_search(line).is_ok()) {
                    self.contenders[line].given += expected;
                }
            }
        }
        for line in &self.present {
            let contender = &mut self.contenders[*line];
            contender.service = contender.given;
        }
        self.running.clear();
        self.running.extend(0..running.len());
        let contenders = &self.contenders;
        self.running.sort_unstable_by_key(|index| {
            let line = running[*index].line;
            (tier(line), contenders[line].service, line, *index)
        });
    }

    /// Finds the tenant for whose prompt others are held back: of those that had nothing here when it came, and of
    /// which nothing was answered, who was given least. Held back are crowds that were given as much or more.
    pub(super) fn favour(
        &mut self,
        fair: &Fair,
        running: &[Sequence],
        waiting: &Lines,
        places: usize,
    ) -> Option<Favoured> {
        let newcomer = self.favour_newcomer(fair, running, waiting, places);
        newcomer.map(Favoured::Line).or(self.hold_batches(running, waiting).then_some(Favoured::Prompts))
    }

    /// Holds what is of the tier `batch` back where others have prompts to compute. Gives whether it holds any.
    fn hold_batches(&mut self, running: &[Sequence], waiting: &Lines) -> bool {
        let others = |line: Line| tier(line) != Tier::Batch;
        let computes = |s: &Sequence| others(s.line) && s.wanted() > s.start() + 1;
        let prompts = self.present.iter().any(|line| others(*line) && waiting.get(*line, 0).is_some())
            || running.iter().any(computes);
        let mut holds = false;
        for line in self.present.iter().filter(|line| prompts && !others(**line)) {
            self.contenders[*line].held = true;
            holds = true;
        }
        holds
    }

    /// As `favour`, for newcomers among tenants.
    fn favour_newcomer(
        &mut self,
        fair: &Fair,
        running: &[Sequence],
        waiting: &Lines,
        places: usize,
    ) -> Option<Line> {
        self.favoured = None;
        if fair.present() < 2 {
            return None;
        }
        let computed = running.iter().filter(|s| s.start() < s.prompt && s.ended.is_none());
        // Where there is no place for it, nothing is won.
        let lines = self.present.iter().filter(|_| running.len() < places);
        let candidates = computed.chain(lines.filter_map(|line| waiting.get(*line, 0)));
        let first = |s: &&Sequence| {
            let its_turn = self.held_for.is_none_or(|request| s.request == request);
            its_turn && s.generated() == 0 && tier(s.line) <= Tier::Default
        };
        let begun = candidates.filter(first).filter_map(|s| {
            let given = self.contenders[s.line].given;
            Some((tier(s.line), s.begins?.min(given), s.request, s.line))
        });
        let (first, service, request, favoured) = begun.min()?;
        let mine = account(favoured);
        if running.iter().any(|s| account(s.line) == mine && s.start() >= s.prompt) {
            return None;
        }
        let mut holds = false;
        for line in
            self.present.iter().filter(|line| account(**line) != mine && !fair.has_one(account(**line)))
        {
            let contender = &mut self.contenders[*line];
            contender.held = contender.given >= service || tier(*line) > first;
            holds |= contender.held;
        }
        self.favoured = Some(request);
        holds.then_some(favoured)
    }

    pub(super) fn holds(&self, line: Line) -> bool {
        self.contenders[line].held
    }

    /// Notes for whom tenants are held back in the step.
    pub(super) fn planned(&mut self, plan: &StepPlan) {
        if plan.held {
            self.held_for = self.favoured;
        } else if !plan.run.is_empty() || !plan.admit.is_empty() {
            self.held_for = None;
        }
    }

    /// Prompt tokens with which a step is long enough where whoever comes during it should not wait for long.
    pub(super) fn crowd_tokens(
        &mut self,
        fair: &Fair,
        now: DeviceNanos,
        step_tokens: usize,
        decode: &Coefficients,
    ) -> usize {
        if fair.present() > 1 {
            self.company = Some(now);
        }
        let batch = self.present.iter().any(|line| tier(*line) == Tier::Batch);
        if !batch && self.company.is_none_or(|at| now > at + COMPANY) {
            return step_tokens;
        }
        parts(decode, FIXED_PARTS, step_tokens)
    }

    /// Whether it matters who loses blocks so that another may begin.
    pub(super) fn contended(&self, running: &[Sequence], waiting: &Lines) -> bool {
        let first = waiting.waiting().next();
        first.is_some_and(|first| {
            running.iter().any(|s| s.line != first) || waiting.waiting().nth(1).is_some()
        })
    }
}

/// Tokens that make a step so many times, as a fraction, as long as its fixed part; at least one.
pub(super) fn parts(decode: &Coefficients, (times, of): (u64, u64), step_tokens: usize) -> usize {
    let tokens = decode.step.saturating_mul(times) / of;
    let tokens = tokens.checked_div(decode.token).unwrap_or(u64::MAX);
    usize::try_from(tokens).unwrap_or(usize::MAX).clamp(1, step_tokens)
}

/// The lines of the line's tenant.
fn siblings(line: Line) -> std::ops::Range<Line> {
    lines::of(account(line))
}

/// The turns of one plan, as the scheduler takes them.
pub(super) struct Turns<'a> {
    pub(super) order: &'a mut Order,
    pub(super) fair: &'a Fair,
    pub(super) running: &'a [Sequence],
    pub(super) waiting: &'a Lines,
    pub(super) views: &'a [Running],
    pub(super) blocks: &'a Blocks,
    pub(super) config: &'a EngineConfig,
    pub(super) coefficients: &'a Coefficients,
}

impl Turns<'_> {
    /// Finds each line's sequences in the views.
    pub(super) fn begin(&mut self) {
        for (index, view) in self.views.iter().enumerate() {
            let contender = &mut self.order.contenders[view.line];
            if contender.running == 0 {
                contender.next = index;
            }
            contender.running += 1;
            contender.end = index + 1;
        }
        for line in &self.order.present {
            skip_decodes(&mut self.order.contenders[*line], self.views);
        }
    }

    /// Who is next of the line, and what its tenant was given.
    fn head(&self, line: Line) -> Option<(Service, RequestKey)> {
        let contender = &self.order.contenders[line];
        if contender.next == contender.end {
            let sequence = self.waiting.get(line, contender.turns)?;
            return Some((contender.service, sequence.request));
        }
        let sequence = &self.running[self.order.running[contender.next]];
        let service = sequence.begins.map_or(contender.service, |begins| begins.min(contender.service));
        Some((service, sequence.request))
    }

    fn best(&self) -> Option<Line> {
        let lines = self.order.present.iter().filter(|line| !self.order.holds(**line));
        let heads = lines.filter_map(|line| Some((*line, self.head(*line)?)));
        let best = heads.min_by_key(|(line, (service, request))| {
            let running = self.fair.weighed(account(*line), self.order.contenders[*line].running);
            (tier(*line), *service, running, *request)
        });
        best.map(|(line, _)| line)
    }

    /// What the scheduler has to know of a sequence that waits.
    fn view(&self, line: Line, sequence: &Sequence) -> Waiting {
        // Where nobody can be admitted nothing is looked for.
        let looks = self.config.prefix_caching && self.running.len() < self.config.max_sequences;
        let found = match looks {
            true => self.blocks.match_prefix(sequence.reusable_keys(self.config.block_size)),
            false => PrefixMatch::default(),
        };
        let length = sequence.tokens.len();
        let crowd = in_crowd(self.fair, line);
        Waiting { line, length, cached_blocks: found.blocks, cached_unheld: found.unheld, crowd }
    }
}

/// Whether prompts of the line make no step longer than `crowd_tokens`.
pub(super) fn in_crowd(fair: &Fair, line: Line) -> bool {
    !fair.has_one(account(line)) || tier(line) == Tier::Batch
}

fn skip_decodes(contender: &mut Contender, views: &[Running]) {
    while contender.next < contender.end && views[contender.next].remaining() <= 1 {
        contender.next += 1;
    }
}

impl Iterator for Turns<'_> {
    type Item = Turn;

    fn next(&mut self) -> Option<Turn> {
        let line = self.best()?;
        let Contender { next, end, turns, .. } = self.order.contenders[line];
        let (turn, tokens, context) = if next < end {
            let Running { computed, .. } = self.views[next];
            (Turn::Running(next), self.views[next].remaining(), computed)
        } else {
            let view = self.view(line, self.waiting.get(line, turns)?);
            let cached = view.cached_blocks * self.config.block_size;
            self.order.lines.push(line);
            (Turn::Waiting(view), view.length - cached, cached)
        };
        // What it will be charged is known when the step is over: until then, the estimate of its own part.
        let work = Work { tokens: tokens as u64, context: context as u64, logits: 1 };
        let picos =
            self.coefficients.own(work) + u128::from(self.coefficients.step) / (self.views.len() as u128 + 1);
        let time = DeviceNanos(u64::try_from(picos / 1000).unwrap_or(u64::MAX));
        let worth = self.fair.worth(account(line), time);
        for line in siblings(line).filter(|line| self.order.present.binary_search(line).is_ok()) {
            self.order.contenders[line].service += worth;
        }
        let contender = &mut self.order.contenders[line];
        if next < end {
            contender.next += 1;
            skip_decodes(contender, self.views);
        } else {
            contender.turns += 1;
            contender.running += 1;
        }
        Some(turn)
    }
}

/// Makes room for a waiting sequence whose tenant was given less and has fewer sequences by its weight: the last ones
/// of who was given most lose their blocks, and nothing else happens in this plan. Those of the tier `batch` go first,
/// and give to whoever waits; all other tiers give to `priority`.
///
/// A tenant's last sequence by its weight stays, and who gained a place so can not lose it so to the same tenant.
pub(super) fn make_room(turns: &mut Turns<'_>, plan: &mut StepPlan) {
    let Some(view) = plan.blocked.filter(|view| tier(view.line) != Tier::Batch && plan.admit.is_empty())
    else {
        return;
    };
    let first = tier(view.line) == Tier::Priority;
    let Turns { order, fair, views, config, .. } = turns;
    // The sequence is counted as running already.
    let Contender { running, given, .. } = order.contenders[view.line];
    let mine = fair.weighed(account(view.line), running);
    let full = views.len() >= config.max_sequences;
    let needed = view.length.div_ceil(config.block_size) + views.len();
    let mut free = plan.spare_blocks;
    let mut victims = 0;
    for (index, victim) in views.iter().enumerate().rev() {
        if free >= needed && (victims > 0 || !full) {
            break;
        }
        let contender = &mut order.contenders[victim.line];
        let theirs = fair.weighed(account(victim.line), contender.running.saturating_sub(1));
        let later = tier(victim.line) == Tier::Batch || first && tier(victim.line) > Tier::Priority;
        let alike = tier(victim.line) >= tier(view.line);
        let gives = later || alike && contender.given >= given && theirs >= mine;
        if victim.line != view.line && gives {
            contender.running -= 1;
            free += victim.exclusive;
            victims += 1;
            plan.preempt.push(index);
        }
    }
    if victims > 0 && free >= needed {
        plan.run.clear();
        plan.admit.clear();
    } else {
        plan.preempt.clear();
    }
}
