//! Attribution: which tags a request ends up with, and which it must have.
//!
//! A key's tags win over headers, headers over the body's `metadata`: what a client says of itself never
//! overrules what its administrator said of it. Knows no header and no JSON.

use std::collections::BTreeMap;

use super::keys::Key;
use crate::request::Tag;

pub const TAG_CHARS_MAX: usize = 128;

/// Tags as one source gives them.
pub type Tags = BTreeMap<Tag, String>;

/// # Errors
/// When a tag's value is empty, too long or has control characters: half a name would be worse than none.
pub fn check_value(value: &str) -> Result<(), String> {
    if (1..=TAG_CHARS_MAX).contains(&value.chars().count()) && !value.chars().any(char::is_control) {
        return Ok(());
    }
    Err(format!("a tag is 1 to {TAG_CHARS_MAX} characters, none of them control"))
}

/// A request's tags, from what its key, its headers and its body say.
#[must_use]
pub fn attribute(key: Option<&Key>, headers: Tags, body: Tags) -> Tags {
    let mut tags = body;
    tags.extend(headers);
    if let Some(key) = key {
        tags.extend(key.settings.tags.iter().map(|(tag, value)| (*tag, value.clone())));
    }
    tags
}

/// The tags that are required and not there, in the order in which they are required.
#[must_use]
pub fn missing(required: &[Tag], key: Option<&Key>, tags: &Tags) -> Vec<Tag> {
    let of_key = key.map_or(&[][..], |key| &key.settings.require_tags);
    let mut missing: Vec<Tag> = Vec::new();
    for tag in required.iter().chain(of_key) {
        if !tags.contains_key(tag) && !missing.contains(tag) {
            missing.push(*tag);
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::keys::{KeyId, KeySettings};
    use crate::units::UnixNanos;

    fn tags(of: &[(Tag, &str)]) -> Tags {
        of.iter().map(|(tag, value)| (*tag, (*value).to_owned())).collect()
    }

    fn key(of: &[(Tag, &str)], require_tags: &[Tag]) -> Key {
        let settings =
            KeySettings { tags: tags(of), require_tags: require_tags.to_vec(), ..KeySettings::default() };
        let at = UnixNanos(1);
        Key {
            id: KeyId::new(),
            name: "sk-...".into(),
            settings,
            created: at,
            created_by: "cli".into(),
            updated: at,
            updated_by: "cli".into(),
            deleted: None,
        }
    }

    #[test]
    fn the_key_wins_over_headers_and_headers_over_the_body() {
        let key = key(&[(Tag::Team, "key")], &[]);
        let headers = || tags(&[(Tag::Team, "header"), (Tag::Feature, "header")]);
        let body = || tags(&[(Tag::Team, "body"), (Tag::Feature, "body"), (Tag::Task, "body")]);
        let with_key = tags(&[(Tag::Team, "key"), (Tag::Feature, "header"), (Tag::Task, "body")]);
        assert_eq!(attribute(Some(&key), headers(), body()), with_key);
        let without = tags(&[(Tag::Team, "header"), (Tag::Feature, "header"), (Tag::Task, "body")]);
        assert_eq!(attribute(None, headers(), body()), without);
    }

    #[test]
    fn what_is_required_and_missing_is_named_once() {
        let key = key(&[], &[Tag::Feature, Tag::Team]);
        let has = tags(&[(Tag::User, "u")]);
        assert_eq!(missing(&[Tag::Team, Tag::User], Some(&key), &has), [Tag::Team, Tag::Feature]);
        assert_eq!(missing(&[Tag::Team], None, &has), [Tag::Team]);
        assert_eq!(missing(&[Tag::User], None, &has), []);
    }

    #[test]
    fn values_are_bounded() {
        for good in ["a", "Größe 3", &"x".repeat(128)] {
            check_value(good).unwrap();
        }
        for bad in ["", "a\tb", "a\u{0}", &"x".repeat(129)] {
            assert!(check_value(bad).is_err(), "{bad:?}");
        }
    }
}
