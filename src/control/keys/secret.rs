//! Secrets: drawn, hashed, compared. None is ever kept, printed or logged by what is here.

use std::fmt;

/// What every secret of ours begins with.
pub const SECRET_PREFIX: &str = "sk-obol-";
/// 62^43 is over 2^256.
const DRAWN_CHARS: usize = 43;
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const ADMIN_CHARS_MIN: usize = 16;

/// What a secret is known by. Made so that it says nothing of the secret, which has 256 random bits; found in
/// constant time as far as the secret goes, for where two hashes begin to differ tells nothing of it either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SecretHash(pub [u8; 32]);

impl SecretHash {
    #[must_use]
    pub fn of(secret: &str) -> Self {
        Self(blake3::derive_key("obol api key, to find it by", secret.as_bytes()))
    }

    /// Reads 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
    }
}

/// Lower-case hexadecimal.
impl fmt::Display for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

/// A key's secret, just drawn: whoever has it spends.
pub struct Secret(String);

impl Secret {
    /// # Errors
    /// When the system gives no random bytes.
    pub fn draw() -> Result<Self, getrandom::Error> {
        let mut text = String::from(SECRET_PREFIX);
        let whole = SECRET_PREFIX.len() + DRAWN_CHARS;
        while text.len() < whole {
            let mut bytes = [0; 64];
            getrandom::fill(&mut bytes)?;
            // 248 is four times 62: what is left below it is even.
            let drawn = bytes.iter().filter(|byte| **byte < 248);
            let drawn = drawn.map(|byte| char::from(ALPHABET[usize::from(byte % 62)]));
            text.extend(drawn.take(whole - text.len()));
        }
        Ok(Self(text))
    }

    /// To be shown once.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn hash(&self) -> SecretHash {
        SecretHash::of(&self.0)
    }

    /// Enough of it to tell one key from another: `sk-...7sFA`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("sk-...{}", &self.0[self.0.len() - 4..])
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// A key that the configuration names: the administrator's, or that of who reads metrics.
#[derive(Clone)]
pub struct ConfiguredKey(blake3::Hash);

impl ConfiguredKey {
    /// Spaces and line ends around the text are not part of it.
    ///
    /// # Errors
    /// When it is too short to be a secret, or no header can carry it.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.len() < ADMIN_CHARS_MIN || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!(
                "a key here is at least {ADMIN_CHARS_MIN} printable ASCII characters without spaces; \
                 `openssl rand -hex 32` makes one"
            ));
        }
        Ok(Self(Self::hash(text)))
    }

    fn hash(text: &str) -> blake3::Hash {
        blake3::Hash::from_bytes(blake3::derive_key("obol configured key, to compare it", text.as_bytes()))
    }

    /// Compares in constant time, as `blake3::Hash` does.
    #[must_use]
    pub fn matches(&self, given: &str) -> bool {
        Self::hash(given) == self.0
    }

    /// Which one it is, for the audit trail: the same for the same key, and of no use to who wants it.
    #[must_use]
    pub fn id(&self) -> String {
        let digest = blake3::derive_key("obol configured key, its id", self.0.as_bytes());
        format!("admin_{}", &blake3::Hash::from_bytes(digest).to_hex()[..12])
    }
}

impl fmt::Debug for ConfiguredKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn secrets_are_long_plain_and_never_the_same() {
        let secrets: BTreeSet<String> =
            (0..500).map(|_| Secret::draw().unwrap().reveal().to_owned()).collect();
        assert_eq!(secrets.len(), 500);
        let mut seen = BTreeSet::new();
        for secret in &secrets {
            let drawn = secret.strip_prefix(SECRET_PREFIX).unwrap();
            assert_eq!(drawn.len(), 43, "{secret}");
            seen.extend(drawn.bytes());
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ALPHABET, "every letter and digit is drawn");
    }

    #[test]
    fn neither_debug_nor_a_name_tells_a_secret() {
        let secret = Secret::draw().unwrap();
        let end = &secret.reveal()[secret.reveal().len() - 4..];
        assert_eq!(secret.name(), format!("sk-...{end}"));
        assert_eq!(format!("{secret:?}"), secret.name());
        let admin = ConfiguredKey::new(" 0123456789abcdef\n").unwrap();
        assert!(!format!("{admin:?}").contains("0123"));
    }

    #[test]
    fn a_configured_key_matches_itself_alone() {
        let admin = ConfiguredKey::new("0123456789abcdef\n").unwrap();
        assert!(admin.matches("0123456789abcdef"));
        for other in ["", "0123456789abcde", "0123456789abcdeF", "0123456789abcdef "] {
            assert!(!admin.matches(other), "{other:?}");
        }
        assert_eq!(admin.id(), ConfiguredKey::new("0123456789abcdef").unwrap().id());
        assert_ne!(admin.id(), ConfiguredKey::new("0123456789abcdeF").unwrap().id());
        for short in ["", "sk-1234", "with a space in it", "äöüäöüäöüäöüäöü"] {
            assert!(ConfiguredKey::new(short).is_err(), "{short:?}");
        }
    }

    #[test]
    fn a_hash_is_read_as_it_is_printed() {
        let hash = Secret::draw().unwrap().hash();
        assert_eq!(SecretHash::parse(&hash.to_string()), Some(hash));
        assert_eq!(hash.to_string().len(), 64);
        assert_eq!(SecretHash::parse("key_x"), None);
    }
}
