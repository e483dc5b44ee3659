//! Prices: what a nanosecond of the device and a block-nanosecond of its KV pool cost.
//!
//! Does: parse a rate card from decimals, price quantities and whole intervals in exact integers.
//! Does not know: requests, accounts, the database.
//! Invariants: no float anywhere; a price is floored exactly once, at the end; time price times
//! elapsed time plus block price times elapsed block-time is the device's hourly price times the
//! elapsed hours, before flooring.

use std::fmt;

use crate::request::Tier;
use crate::units::{BlockNanos, DeviceNanos, Picos};
use crate::usage::PoolInfo;

/// Picos in one unit of a currency, and parts in a whole `kv_share`: both decimals have 12 places.
const ONE: u128 = 1_000_000_000_000;
const PLACES: usize = 12;
const NANOS_PER_HOUR: u128 = 3_600_000_000_000;
/// Keeps a month of one device inside the `i64` of a ledger row.
const DEVICE_HOUR_MAX: u128 = 10_000 * ONE;

/// Why a rate card was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    #[error("{field}: {text:?} is not a plain decimal number such as 2.50 (digits and one point)")]
    NotADecimal { field: &'static str, text: String },
    #[error("{field}: {text:?} has more than 12 decimal places; round it")]
    TooPrecise { field: &'static str, text: String },
    #[error("{field}: {text:?} is too large; at most {limit}")]
    TooLarge { field: &'static str, text: String, limit: &'static str },
    #[error("currency: {0:?} is not a three-letter code such as USD")]
    Currency(String),
    #[error("rate version: {0:?} is empty or longer than 100 bytes")]
    Version(String),
}

/// A device's price: exact decimals, one immutable version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateCard {
    device_hour: u64,
    kv_share: u64,
    /// What of its cost a request of each tier pays, in 10^12 parts.
    tiers: TierParts,
    currency: String,
    version: String,
}

/// For each of `Tier::ALL`, in 10^12 parts.
pub(super) type TierParts = [u64; Tier::ALL.len()];

/// Every tier pays all.
pub(super) const WHOLE: TierParts = [1_000_000_000_000; Tier::ALL.len()];

impl RateCard {
    /// `device_hour`: price of one device for one hour; `kv_share`: the part of it that the KV pool
    /// recovers, 0 to 1. Both are decimals of at most 12 places. `version` names the card in receipts;
    /// without one the card's own figures are the name.
    ///
    /// # Errors
    /// Says which field is wrong and why.
    pub fn parse(
        device_hour: &str,
        kv_share: &str,
        currency: &str,
        version: Option<&str>,
    ) -> Result<Self, RateError> {
        let hour = parse_decimal("device_hour", device_hour)?;
        if hour > DEVICE_HOUR_MAX {
            return Err(too_large("device_hour", device_hour, "10000"));
        }
        let share = parse_decimal("kv_share", kv_share)?;
        if share > ONE {
            return Err(too_large("kv_share", kv_share, "1"));
        }
        if currency.len() != 3 || !currency.bytes().all(|b| b.is_ascii_uppercase()) {
            return Err(RateError::Currency(currency.to_owned()));
        }
        let mut card = Self {
            device_hour: u64::try_from(hour).expect("checked against the limit above"),
            kv_share: u64::try_from(share).expect("checked against the limit above"),
            tiers: WHOLE,
            currency: currency.to_owned(),
            version: String::new(),
        };
        card.version = version.map_or_else(|| card.own_name(), str::to_owned);
        if card.version.is_empty() || card.version.len() > 100 {
            return Err(RateError::Version(card.version));
        }
        Ok(card)
    }

    /// With these prices of tiers: what of its cost a request pays, decimals from 0 to 1. A version that is named after
    /// its figures is so after these, too.
    ///
    /// # Errors
    /// Says which price is wrong and why.
    pub fn with_tiers<'a>(
        mut self,
        prices: impl IntoIterator<Item = (Tier, &'a str)>,
    ) -> Result<Self, RateError> {
        let is_own = self.version == self.own_name();
        for (tier, text) in prices {
            let price = parse_decimal("tier", text)?;
            if price > ONE {
                return Err(too_large("tier", text, "1: no tier costs more than the device does"));
            }
            self.tiers[tier as usize] = u64::try_from(price).expect("at most 10^12");
        }
        if is_own {
            self.version = self.own_name();
        }
        Ok(self)
    }

    fn own_name(&self) -> String {
        let tiers = Tier::ALL.into_iter().zip(self.tiers).filter(|(_, parts)| u128::from(*parts) != ONE);
        let tiers: String =
            tiers.map(|(tier, parts)| format!(" {} {}", tier.as_str(), shortest_decimal(parts))).collect();
        let (hour, share) = (self.device_hour_decimal(), self.kv_share_decimal());
        format!("{} {hour}/h kv {share}{tiers}", self.currency)
    }

    /// From the ledger's own columns: picos an hour and parts in 10^12.
    pub(super) fn from_parts(
        (device_hour, kv_share): (u64, u64),
        tiers: TierParts,
        currency: String,
        version: String,
    ) -> Self {
        Self { device_hour, kv_share, tiers, currency, version }
    }

    /// For each tier, in the order of `Tier::ALL`: what of its cost a request pays, in 10^12 parts.
    pub(super) fn tier_parts(&self) -> TierParts {
        self.tiers
    }

    /// What of `cost` a request of this tier does not pay: floored, so that it pays at least its part.
    pub(super) fn discount(&self, tier: Tier, cost: Picos) -> Picos {
        let off = ONE - u128::from(self.tiers[tier as usize]);
        let cost = u128::try_from(cost.0).expect("nothing costs less than nothing");
        Picos(i128::try_from(mul_div(cost, off, ONE).0).expect("no more than the cost"))
    }

    /// Picos an hour.
    #[must_use]
    pub fn device_hour(&self) -> Picos {
        Picos(i128::from(self.device_hour))
    }

    /// Parts in 10^12.
    #[must_use]
    pub fn kv_share_parts(&self) -> u64 {
        self.kv_share
    }

    #[must_use]
    pub fn currency(&self) -> &str {
        &self.currency
    }

    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Shortest exact decimal, for people.
    #[must_use]
    pub fn device_hour_decimal(&self) -> String {
        shortest_decimal(self.device_hour)
    }

    /// Shortest exact decimal, for people.
    #[must_use]
    pub fn kv_share_decimal(&self) -> String {
        shortest_decimal(self.kv_share)
    }

    /// The prices in force with (or without) a KV pool.
    #[must_use]
    pub fn prices(&self, pool: Option<PoolInfo>) -> Prices {
        let hour = u128::from(self.device_hour);
        let whole = Ratio::new(hour, NANOS_PER_HOUR);
        let Some(pool) = pool.filter(|pool| pool.blocks > 0) else {
            return Prices { whole, time: whole, block: Ratio::ZERO };
        };
        let share = u128::from(self.kv_share);
        let memory = Ratio::new(hour * share, ONE * NANOS_PER_HOUR);
        Prices {
            whole,
            time: Ratio::new(hour * (ONE - share), ONE * NANOS_PER_HOUR),
            block: memory.over(u128::from(pool.blocks)),
        }
    }

    /// What the device costs between two instants of its epoch: `floor(P*to) - floor(P*from)`, so
    /// that the bills of adjoining intervals add up to the bill of the whole.
    #[must_use]
    pub fn bill(&self, from: DeviceNanos, to: DeviceNanos) -> Picos {
        let whole = self.prices(None).whole;
        whole.floor(u128::from(to.0)) - whole.floor(u128::from(from.0))
    }
}

/// Prices of one device in one epoch, as exact fractions of a pico.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prices {
    whole: Ratio,
    time: Ratio,
    block: Ratio,
}

impl Prices {
    /// Device time while the pool exists (all of the price where there is no pool).
    #[must_use]
    pub fn time(&self, quantity: DeviceNanos) -> Picos {
        self.time.floor(u128::from(quantity.0))
    }

    /// Device time before the pool existed: the whole price.
    #[must_use]
    pub fn whole(&self, quantity: DeviceNanos) -> Picos {
        self.whole.floor(u128::from(quantity.0))
    }

    #[must_use]
    pub fn memory(&self, quantity: BlockNanos) -> Picos {
        self.block.floor(quantity.0)
    }

    /// Time and memory money of work that is still open, each rounded up: never less than it will cost.
    pub(super) fn at_most(&self, time: DeviceNanos, memory: BlockNanos) -> Picos {
        self.time.ceil(u128::from(time.0)) + self.block.ceil(memory.0)
    }
}

/// A non-negative fraction of picos per unit, in lowest terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ratio {
    numerator: u128,
    denominator: u128,
}

impl Ratio {
    const ZERO: Self = Self { numerator: 0, denominator: 1 };

    fn new(numerator: u128, denominator: u128) -> Self {
        let divisor = gcd(numerator, denominator);
        Self { numerator: numerator / divisor, denominator: denominator / divisor }
    }

    fn over(self, parts: u128) -> Self {
        let divisor = gcd(self.numerator, parts);
        Self {
            numerator: self.numerator / divisor,
            denominator: self.denominator.checked_mul(parts / divisor).expect("fewer than 2^46 KV blocks"),
        }
    }

    fn floor(self, quantity: u128) -> Picos {
        let (quotient, _) = mul_div(self.numerator, quantity, self.denominator);
        Picos(i128::try_from(quotient).expect("money overflows: this is a bug"))
    }

    fn ceil(self, quantity: u128) -> Picos {
        let (quotient, remainder) = mul_div(self.numerator, quantity, self.denominator);
        let up = quotient + u128::from(remainder > 0);
        Picos(i128::try_from(up).expect("money overflows: this is a bug"))
    }
}

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.max(1)
}

/// Quotient and remainder of `a*b / d`, the product taken in 256 bits. Panics when the quotient
/// does not fit.
pub(super) fn mul_div(a: u128, b: u128, d: u128) -> (u128, u128) {
    if let Some(product) = a.checked_mul(b) {
        return (product / d, product % d);
    }
    let (high, low) = wide_mul(a, b);
    assert!(high < d, "{a} * {b} / {d} overflows: this is a bug");
    wide_div(high, low, d)
}

/// 128 x 128 -> 256 bits, by halves.
fn wide_mul(a: u128, b: u128) -> (u128, u128) {
    const HALF: u128 = u64::MAX as u128;
    let (a1, a0) = (a >> 64, a & HALF);
    let (b1, b0) = (b >> 64, b & HALF);
    let low = a0 * b0;
    let middle = a1 * b0 + (low >> 64);
    let carry = a0 * b1 + (middle & HALF);
    (a1 * b1 + (middle >> 64) + (carry >> 64), (carry << 64) | (low & HALF))
}

/// Long division, a bit at a time, of `high:low` by `d`; needs `high < d`.
fn wide_div(high: u128, low: u128, d: u128) -> (u128, u128) {
    let mut remainder = high;
    let mut quotient = 0_u128;
    for bit in (0..128).rev() {
        let carried = remainder >> 127 == 1;
        remainder = (remainder << 1) | ((low >> bit) & 1);
        quotient <<= 1;
        if carried || remainder >= d {
            remainder = remainder.wrapping_sub(d);
            quotient |= 1;
        }
    }
    (quotient, remainder)
}

fn too_large(field: &'static str, text: &str, limit: &'static str) -> RateError {
    RateError::TooLarge { field, text: text.to_owned(), limit }
}

/// A decimal with at most 12 places, times 10^12.
fn parse_decimal(field: &'static str, text: &str) -> Result<u128, RateError> {
    let not_a_decimal = || RateError::NotADecimal { field, text: text.to_owned() };
    let (whole, places) = text.split_once('.').unwrap_or((text, ""));
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(places) || (places.is_empty() && text.contains('.')) {
        return Err(not_a_decimal());
    }
    if places.len() > PLACES {
        return Err(RateError::TooPrecise { field, text: text.to_owned() });
    }
    if whole.len() > 20 {
        return Err(too_large(field, text, "20 digits before the point"));
    }
    let whole: u128 = whole.parse().map_err(|_| not_a_decimal())?;
    let places: u128 = format!("{places:0<PLACES$}").parse().map_err(|_| not_a_decimal())?;
    Ok(whole * ONE + places)
}

fn shortest_decimal(parts: u64) -> String {
    let one = u64::try_from(ONE).expect("10^12 fits");
    let text = format!("{}.{:012}", parts / one, parts % one);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl fmt::Display for RateCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} an hour, {} of it through the KV pool",
            self.device_hour_decimal(),
            self.currency,
            self.kv_share_decimal()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Big integers the slow way: 16-bit digits, lowest first.
    fn digits(mut value: u128) -> Vec<u64> {
        let mut digits = Vec::new();
        while value > 0 {
            digits.push((value & 0xFFFF) as u64);
            value >>= 16;
        }
        digits
    }

    fn carried(mut digits: Vec<u64>) -> Vec<u64> {
        let mut index = 0;
        while index < digits.len() {
            let carry = digits[index] >> 16;
            digits[index] &= 0xFFFF;
            if carry > 0 {
                if index + 1 == digits.len() {
                    digits.push(0);
                }
                digits[index + 1] += carry;
            }
            index += 1;
        }
        while digits.last() == Some(&0) {
            digits.pop();
        }
        digits
    }

    fn product_plus(a: u128, b: u128, c: u128) -> Vec<u64> {
        let (a, b, c) = (digits(a), digits(b), digits(c));
        let mut sum = vec![0; a.len() + b.len() + c.len() + 1];
        for (i, x) in a.iter().enumerate() {
            for (j, y) in b.iter().enumerate() {
                sum[i + j] += x * y;
            }
        }
        for (i, x) in c.iter().enumerate() {
            sum[i] += x;
        }
        carried(sum)
    }

    /// SplitMix64, widened; of every size.
    fn random(state: &mut u64) -> u128 {
        let mut next = || {
            *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = *state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        let value = u128::from(next()) << 64 | u128::from(next());
        value >> (next() % 128)
    }

    #[test]
    fn a_tier_pays_its_part_and_never_less() {
        let card = RateCard::parse("2.5", "0.2", "USD", None).unwrap();
        let same = card.clone().with_tiers([(Tier::Default, "1")]).unwrap();
        assert_eq!(same, card, "no discount is no other card");
        let card = card.with_tiers([(Tier::Batch, "0.5"), (Tier::Flex, "0.333333333333")]).unwrap();
        assert_eq!(card.version(), "USD 2.5/h kv 0.2 flex 0.333333333333 batch 0.5");
        for (tier, cost, off) in [
            (Tier::Batch, 10, 5),
            (Tier::Batch, 11, 5),
            (Tier::Batch, 1, 0),
            (Tier::Flex, 1_000_000_000_000, 666_666_666_667),
            (Tier::Default, i128::from(i64::MAX), 0),
            (Tier::Priority, 7, 0),
        ] {
            assert_eq!(card.discount(tier, Picos(cost)), Picos(off), "{tier:?} {cost}");
        }
        let free = card.with_tiers([(Tier::Batch, "0")]).unwrap();
        assert_eq!(free.discount(Tier::Batch, Picos(i128::from(i64::MAX))), Picos(i128::from(i64::MAX)));
        assert!(free.clone().with_tiers([(Tier::Priority, "1.5")]).is_err(), "dearer than the device");
        assert!(free.with_tiers([(Tier::Priority, "-1")]).is_err());
    }

    #[test]
    fn products_and_quotients_are_exact_beyond_128_bits() {
        let mut state = 1;
        let mut beyond = 0;
        for _ in 0..20_000 {
            let (a, b, d) = (random(&mut state), random(&mut state), random(&mut state).max(1));
            if wide_mul(a, b).0 >= d {
                continue;
            }
            beyond += u32::from(a.checked_mul(b).is_none());
            let (quotient, remainder) = mul_div(a, b, d);
            assert!(remainder < d);
            assert_eq!(product_plus(a, b, 0), product_plus(quotient, d, remainder), "{a} * {b} / {d}");
        }
        assert!(beyond > 2_000, "only {beyond} products passed 128 bits");
        assert_eq!(mul_div(u128::MAX, u128::MAX, u128::MAX), (u128::MAX, 0));
    }

    #[test]
    fn decimals_are_exact_or_refused() {
        let card = |hour, share| RateCard::parse(hour, share, "USD", None);
        let ok = card("2.500000000001", "0.20").unwrap();
        assert_eq!(ok.device_hour(), Picos(2_500_000_000_001));
        assert_eq!(ok.kv_share_parts(), 200_000_000_000);
        assert_eq!(ok.version(), "USD 2.500000000001/h kv 0.2");
        assert_eq!(card("10", "1").unwrap().device_hour_decimal(), "10");
        let refused = |hour, share, says: &str| {
            let error = card(hour, share).unwrap_err().to_string();
            assert!(error.contains(says), "{hour} {share}: {error}");
        };
        for text in ["", ".5", "5.", "-1", "+1", "1e3", "1,5", "NaN", " 1", "1.2.3", "\u{663}"] {
            refused(text, "0.2", "device_hour");
            refused("1", text, "kv_share");
        }
        refused("0.0000000000001", "0", "12 decimal places");
        refused("10000.1", "0", "at most 10000");
        refused("9999999999999999999999", "0", "20 digits");
        refused("1", "1.000000000001", "at most 1");
        assert!(RateCard::parse("1", "0", "usd", None).is_err());
        assert!(RateCard::parse("1", "0", "USD", Some("")).is_err());
    }

    #[test]
    fn an_hour_costs_its_price_through_either_share() {
        for (hour, share, blocks) in
            [("2.5", "0.2", 1_000), ("0.07", "1", 7), ("9999.999999999999", "0", 100_003)]
        {
            let card = RateCard::parse(hour, share, "USD", None).unwrap();
            let pool = PoolInfo { blocks, bytes_per_block: 1, since: DeviceNanos(0) };
            let (prices, span) = (card.prices(Some(pool)), 3_600_000_000_000);
            let time = prices.time(DeviceNanos(span));
            let memory = prices.memory(BlockNanos(u128::from(blocks) * u128::from(span)));
            let lost = card.device_hour() - time - memory;
            assert!((0..2).contains(&lost.0), "{hour} {share}: {lost:?}");
            assert_eq!(card.bill(DeviceNanos(0), DeviceNanos(span)), card.device_hour());
            assert_eq!(card.prices(None).time(DeviceNanos(span)), card.device_hour());
        }
        // $2.50 an hour is 694.44 picos a microsecond.
        let card = RateCard::parse("2.5", "0", "USD", None).unwrap();
        assert_eq!(card.prices(None).time(DeviceNanos(1_000_000)), Picos(694_444));
    }

    #[test]
    fn bills_of_adjoining_intervals_add_up() {
        let card = RateCard::parse("0.071234567891", "0.2", "EUR", None).unwrap();
        let mut state = 5;
        let mut at = DeviceNanos(0);
        let mut sum = Picos(0);
        for _ in 0..1_000 {
            let next = at + DeviceNanos((random(&mut state) % 10_000_000_000) as u64);
            sum += card.bill(at, next);
            at = next;
        }
        assert_eq!(sum, card.bill(DeviceNanos(0), at));
    }
}
