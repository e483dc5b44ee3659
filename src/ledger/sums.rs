//! Sums over receipt lines, and how roll-ups have them: packed numbers.
//!
//! Does not know: what lines are grouped by, and where rows are.

use rusqlite::Row;

use super::receipt::Receipt;
use super::rows;
use super::store::SqlResult;
use crate::units::{BlockNanos, DeviceNanos, Picos};

/// Sums over lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sums {
    pub(super) requests: u64,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) completion_tokens: u64,
    /// Requests whose energy is known.
    pub(super) metered: u64,
    pub(super) energy_mj: u64,
    pub(super) device: DeviceNanos,
    pub(super) kv: BlockNanos,
    pub(super) time: Picos,
    pub(super) memory: Picos,
    /// Of that money, what the house pays: past budgets' caps, and for tiers that cost less.
    pub(super) overrun: Picos,
    pub(super) discount: Picos,
}

impl Sums {
    pub(super) fn of(receipt: &Receipt, line: usize) -> Self {
        let used = &receipt.usage;
        let of_line = &receipt.lines[line];
        let mut sums = Self {
            device: of_line.device_time,
            kv: of_line.kv,
            time: of_line.time,
            memory: of_line.memory,
            overrun: receipt.overrun_of(line),
            discount: of_line.discount,
            ..Self::default()
        };
        if line == 0 {
            sums.requests = 1;
            sums.prompt_tokens = used.tokens.prompt;
            sums.cached_tokens = used.tokens.cached;
            sums.completion_tokens = used.tokens.completion;
            sums.metered = u64::from(used.energy_mj.is_some());
            sums.energy_mj = used.energy_mj.unwrap_or(0);
        }
        sums
    }

    /// What is charged.
    pub(super) fn money(&self) -> Picos {
        self.time + self.memory - self.overrun - self.discount
    }

    /// What is left of these when `part` is taken away; `None` where that is more than there is.
    pub(super) fn without(&self, part: &Self) -> Option<Self> {
        let money = |all: Picos, part: Picos| Some(Picos(all.0 - part.0)).filter(|rest| *rest >= Picos::ZERO);
        Some(Self {
            requests: self.requests.checked_sub(part.requests)?,
            prompt_tokens: self.prompt_tokens.checked_sub(part.prompt_tokens)?,
            cached_tokens: self.cached_tokens.checked_sub(part.cached_tokens)?,
            completion_tokens: self.completion_tokens.checked_sub(part.completion_tokens)?,
            metered: self.metered.checked_sub(part.metered)?,
            energy_mj: self.energy_mj.checked_sub(part.energy_mj)?,
            device: DeviceNanos(self.device.0.checked_sub(part.device.0)?),
            kv: BlockNanos(self.kv.0.checked_sub(part.kv.0)?),
            time: money(self.time, part.time)?,
            memory: money(self.memory, part.memory)?,
            overrun: money(self.overrun, part.overrun)?,
            discount: money(self.discount, part.discount)?,
        })
    }

    /// As the column `sums` has them; see the schema.
    pub(super) fn packed(&self) -> Vec<u8> {
        self.packed_with(&[])
    }

    /// With more money after them.
    pub(super) fn packed_with(&self, more: &[Picos]) -> Vec<u8> {
        let money = |money: Picos| u128::try_from(money.0).expect("lines cost nothing negative");
        let mut bytes = Vec::with_capacity(48);
        let numbers = [
            self.requests.into(),
            self.prompt_tokens.into(),
            self.cached_tokens.into(),
            self.completion_tokens.into(),
            self.metered.into(),
            self.energy_mj.into(),
            self.device.0.into(),
            self.kv.0,
            money(self.time),
            money(self.memory),
            money(self.overrun),
            money(self.discount),
        ];
        for mut number in numbers.into_iter().chain(more.iter().copied().map(money)) {
            while number >= 0x80 {
                bytes.push((number & 0x7F) as u8 | 0x80);
                number >>= 7;
            }
            bytes.push(number as u8);
        }
        bytes
    }

    /// `None` for what no sums pack to.
    pub(super) fn unpacked(bytes: &[u8]) -> Option<Self> {
        let mut left = bytes;
        Self::take(&mut left).filter(|_| left.is_empty())
    }

    /// What `packed_with` made of sums and one amount of money; `None` for anything else.
    pub(super) fn unpacked_with(bytes: &[u8]) -> Option<(Self, Picos)> {
        let mut left = bytes;
        let sums = Self::take(&mut left)?;
        let money = Picos(i128::try_from(wide(&mut left)?).ok()?);
        Some((sums, money)).filter(|_| left.is_empty())
    }

    fn take(left: &mut &[u8]) -> Option<Self> {
        Some(Self {
            requests: count(left)?,
            prompt_tokens: count(left)?,
            cached_tokens: count(left)?,
            completion_tokens: count(left)?,
            metered: count(left)?,
            energy_mj: count(left)?,
            device: DeviceNanos(count(left)?),
            kv: BlockNanos(wide(left)?),
            time: Picos(i128::try_from(wide(left)?).ok()?),
            memory: Picos(i128::try_from(wide(left)?).ok()?),
            overrun: Picos(i128::try_from(wide(left)?).ok()?),
            discount: Picos(i128::try_from(wide(left)?).ok()?),
        })
    }

    pub(super) fn read(row: &Row<'_>, column: usize) -> SqlResult<Self> {
        let bytes = row.get_ref(column)?.as_blob()?;
        Self::unpacked(bytes).ok_or_else(|| rows::invalid(column, "no sums of a roll-up"))
    }
}

fn count(bytes: &mut &[u8]) -> Option<u64> {
    u64::try_from(wide(bytes)?).ok()
}

/// Takes one packed number off the front; `None` where it does not end, or is 2^128 or more.
fn wide(bytes: &mut &[u8]) -> Option<u128> {
    // Most numbers are short: the first eight bytes need no wide arithmetic.
    let (mut low, mut at) = (0_u64, 0);
    while at < 8 {
        let byte = *bytes.get(at)?;
        low |= u64::from(byte & 0x7F) << (7 * at);
        at += 1;
        if byte & 0x80 == 0 {
            *bytes = &bytes[at..];
            return Some(low.into());
        }
    }
    let mut number = u128::from(low);
    loop {
        let byte = *bytes.get(at)?;
        let part = u128::from(byte & 0x7F);
        if at > 18 || (at == 18 && part > 3) {
            return None;
        }
        number |= part << (7 * at);
        at += 1;
        if byte & 0x80 == 0 {
            *bytes = &bytes[at..];
            return Some(number);
        }
    }
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.completion_tokens += other.completion_tokens;
        self.metered += other.metered;
        self.energy_mj += other.energy_mj;
        self.device += other.device;
        self.kv += other.kv;
        self.time += other.time;
        self.memory += other.memory;
        self.overrun += other.overrun;
        self.discount += other.discount;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_packed_and_unpacked_whole() {
        let mut sums = Sums { requests: 127, prompt_tokens: 128, cached_tokens: u64::MAX, ..Sums::default() };
        sums.completion_tokens = (1 << 56) - 1;
        sums.energy_mj = 1 << 56;
        sums.kv = BlockNanos(u128::MAX);
        sums.time = Picos(i128::MAX);
        sums.memory = Picos(1 << 70);
        sums.overrun = Picos((1 << 69) + 1);
        sums.discount = Picos(5);
        for sums in [Sums::default(), sums] {
            let bytes = sums.packed();
            assert_eq!(Sums::unpacked(&bytes), Some(sums));
            assert_eq!(Sums::unpacked(&bytes[..bytes.len() - 1]), None, "cut off");
            assert_eq!(Sums::unpacked(&[&bytes[..], &[0]].concat()), None, "too long");
        }
        let number = |bytes: &[u8]| wide(&mut &*bytes);
        let largest = [&[0xFF; 18][..], &[3]].concat();
        assert_eq!(number(&largest), Some(u128::MAX));
        assert_eq!(number(&[&[0xFF; 18][..], &[4]].concat()), None, "2^128");
        assert_eq!(number(&[0x80; 30]), None, "without end");
        assert_eq!(count(&mut &largest[..]), None, "past 2^64");
    }
}
