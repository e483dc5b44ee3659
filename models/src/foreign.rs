//! What a file is that is not what its name or place says: the usual mistakes by their first bytes.

/// Says what a file that begins with `bytes` is instead of a model's, and what to do; none where it is nothing
/// that is known.
pub(crate) fn recognize(bytes: &[u8]) -> Option<&'static str> {
    let text = bytes.trim_ascii_start();
    let begins =
        |start: &str| text.get(..start.len()).is_some_and(|b| b.eq_ignore_ascii_case(start.as_bytes()));
    if begins("version https://git-lfs") {
        return Some(
            "it is a Git LFS pointer, which only names the real file; download that (`git lfs pull`, or `obol pull`)",
        );
    }
    if begins("<!doctype html") || begins("<html") {
        return Some("it is an HTML page, such as a site's login or error page; download the file itself");
    }
    if bytes.starts_with(b"PK\x03\x04") {
        return Some(
            "it is a zip archive, as those of PyTorch are; a GGUF file or a directory with safetensors is needed",
        );
    }
    if bytes.starts_with(b"GGUF") {
        return Some(
            "it is a GGUF file; give it a name that ends in .gguf, and name it instead of the directory",
        );
    }
    if bytes.get(8..10) == Some(b"{\"") {
        return Some(
            "it is a safetensors file; name the directory that has it and the model's config.json and tokenizer.json",
        );
    }
    None
}
