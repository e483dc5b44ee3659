//! The byte alphabet of byte-level BPE: every byte has a printable character, so a vocabulary can be kept as text.
//! Printable Latin-1 stands for itself; the other 68 bytes take U+0100.. in order (GPT-2, `bytes_to_unicode`).

/// The character that stands for `byte`.
pub(super) fn char_of_byte(byte: u8) -> char {
    let stands_for_itself = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if stands_for_itself(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !stands_for_itself(b)).count();
    char::from_u32(0x100 + before as u32).expect("U+0100..U+0143 are characters; this is a bug")
}

/// The way back, as a table.
#[derive(Debug)]
pub(super) struct Alphabet {
    /// By code point; every character of the alphabet is below U+0144.
    byte_of: [Option<u8>; 0x144],
}

impl Alphabet {
    pub(super) fn new() -> Self {
        let mut byte_of = [None; 0x144];
        for byte in 0..=255 {
            byte_of[char_of_byte(byte) as usize] = Some(byte);
        }
        Self { byte_of }
    }

    /// The byte that `c` stands for.
    pub(super) fn byte(&self, c: char) -> Option<u8> {
        self.byte_of.get(c as usize).copied().flatten()
    }

    /// The bytes that `text` stands for; `None` if a character is not of the alphabet.
    pub(super) fn bytes(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| self.byte(c)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection() {
        let alphabet = Alphabet::new();
        for byte in 0..=255 {
            assert_eq!(alphabet.bytes(&char_of_byte(byte).to_string()), Some(vec![byte]));
        }
        assert_eq!((char_of_byte(b' '), char_of_byte(b'\n'), char_of_byte(0xAD)), ('Ġ', 'Ċ', 'Ń'));
        assert_eq!(alphabet.bytes(" "), None, "a space is written Ġ");
        assert_eq!(alphabet.bytes("語"), None);
    }
}
