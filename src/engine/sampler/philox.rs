//! Random numbers by place instead of by turn: Philox4x32-10 (Salmon et al., SC'11).

use super::Draw;

/// 53 random bits.
pub(super) fn bits(draw: Draw) -> u64 {
    let counter = [draw.position as u32, (draw.position >> 32) as u32, draw.choice, 0];
    let [a, b, ..] = philox(counter, [draw.seed as u32, (draw.seed >> 32) as u32]);
    (u64::from(a) << 32 | u64::from(b)) >> 11
}

/// Uniform in 0..total.
pub(super) fn below(total: u64, bits: u64) -> u64 {
    ((u128::from(total) * u128::from(bits)) >> 53) as u64
}

/// Philox4x32-10.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(counter[0]) * 0xD251_1F53;
        let high = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_equals_the_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn random_bits_become_a_number_below_the_total() {
        assert_eq!(below(10, 0), 0);
        assert_eq!(below(10, 1 << 52), 5);
        assert_eq!(below(1 << 62, (1 << 53) - 1), (1 << 62) - (1 << 9));
        assert_eq!(below(3, (1 << 53) - 1), 2);
    }
}
