//! Keys of the prefix cache: a chain of strong hashes over (parent, tokens), rooted in the tenant's salt.
//!
//! 256-bit blake3: equal keys mean equal prefixes of the same tenant, so a hit is trusted without
//! comparing tokens, and nobody can make two prefixes collide. The model is not part of the key
//! because a pool serves exactly one.

use crate::request::CacheSalt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefixKey([u8; 32]);

/// The parent of the first block: differs by tenant.
#[must_use]
pub fn root(salt: CacheSalt) -> PrefixKey {
    PrefixKey(*blake3::Hasher::new_keyed(&salt.0).update(b"obol prefix root").finalize().as_bytes())
}

/// Appends the keys of the full blocks of `tokens` that `keys` does not have yet.
pub fn extend(keys: &mut Vec<PrefixKey>, root: PrefixKey, tokens: &[u32], block_size: usize) {
    for block in tokens.chunks_exact(block_size).skip(keys.len()) {
        let parent = keys.last().unwrap_or(&root);
        let mut hasher = blake3::Hasher::new_keyed(&parent.0);
        for token in block {
            hasher.update(&token.to_le_bytes());
        }
        keys.push(PrefixKey(*hasher.finalize().as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(salt: u8, tokens: &[u32]) -> Vec<PrefixKey> {
        let mut keys = Vec::new();
        extend(&mut keys, root(CacheSalt([salt; 32])), tokens, 2);
        keys
    }

    #[test]
    fn equal_prefixes_of_one_tenant_share_keys_and_nothing_else_does() {
        let a = keys(0, &[1, 2, 3, 4, 5]);
        assert_eq!(a.len(), 2);
        assert_eq!(a, keys(0, &[1, 2, 3, 4, 9]));
        assert_eq!(a[0], keys(0, &[1, 2, 9, 9])[0]);
        assert_ne!(a[1], keys(0, &[9, 2, 3, 4])[1], "the parent is part of the key");
        assert_ne!(a[0], keys(1, &[1, 2])[0], "tenants do not share");
        let mut grown = keys(0, &[1, 2]);
        extend(&mut grown, root(CacheSalt([0; 32])), &[1, 2, 3, 4], 2);
        assert_eq!(grown, a, "a chain grows as it would have been made");
    }
}
