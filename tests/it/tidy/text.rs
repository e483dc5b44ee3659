//! Reads Rust without a parser: blanks out comments, strings or tests, and splits what is left into words.
//!
//! Knows where literals begin and end and nothing else of the language; lines are never lost, so every
//! complaint can name its own.

/// Which parts of a source are kept; the rest becomes spaces, so that line numbers stay.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Keep {
    Code,
    Strings,
}

/// Blanks comments, and either the contents of strings or everything but them.
pub(super) fn keep(source: &str, what: Keep) -> String {
    let bytes = source.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        let (length, kind) = lexeme(rest, at.checked_sub(1).map(|i| bytes[i]));
        let text = &bytes[at..at + length];
        let kept = match kind {
            Lexeme::Comment => false,
            Lexeme::String => what == Keep::Strings,
            Lexeme::Other => what == Keep::Code,
        };
        out.extend(text.iter().map(|b| if kept || *b == b'\n' { *b } else { b' ' }));
        at += length;
    }
    String::from_utf8(out).expect("lexemes end at character borders; this is a bug")
}

enum Lexeme {
    Comment,
    String,
    Other,
}

/// Length in bytes and kind of what `rest` starts with.
fn lexeme(rest: &str, before: Option<u8>) -> (usize, Lexeme) {
    let first = rest.chars().next().expect("the caller has checked that something is left");
    if rest.starts_with("//") {
        return (rest.find('\n').unwrap_or(rest.len()), Lexeme::Comment);
    }
    if rest.starts_with("/*") {
        return (block_comment(rest), Lexeme::Comment);
    }
    if first == '"' {
        return (quoted(rest), Lexeme::String);
    }
    let in_word = before.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !in_word && let Some(length) = raw_string(rest) {
        return (length, Lexeme::String);
    }
    if first == '\'' {
        return (character(rest), Lexeme::Other);
    }
    (first.len_utf8(), Lexeme::Other)
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        let tail = &rest.as_bytes()[at..];
        if tail.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if tail.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

fn quoted(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// `r"..."`, `r#"..."#`, `br"..."`: the length of the whole literal.
fn raw_string(rest: &str) -> Option<usize> {
    let after_r = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = after_r.len() - after_r.trim_start_matches('#').len();
    let body = after_r[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let end = body.find(&close).map_or(body.len(), |at| at + close.len());
    Some(rest.len() - body.len() + end)
}

/// A character literal, or the one quote of a lifetime.
fn character(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            rest[2..].char_indices().skip(1).find(|(_, c)| *c == '\'').map_or(1, |(at, _)| at + 3)
        }
        Some(_) => match chars.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

/// Blanks `#[cfg(test)] mod name { .. }` in code from which comments and strings are gone.
pub(super) fn without_tests(code: &str) -> String {
    let mut out = code.to_owned();
    let mut from = 0;
    while let Some(start) = out[from..].find("#[cfg(test)]").map(|at| at + from) {
        let head = &out[start..];
        let Some(open) = head.find('{').map(|at| at + start) else { break };
        from = start + 1;
        if !out[start..open].contains("mod ") {
            continue;
        }
        let mut depth = 0_usize;
        let end = out[open..]
            .char_indices()
            .find_map(|(at, c)| {
                depth = match c {
                    '{' => depth + 1,
                    '}' => depth - 1,
                    _ => depth,
                };
                (depth == 0).then_some(open + at + 1)
            })
            .unwrap_or(out.len());
        let blank: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(start..end, &blank);
    }
    out
}

/// Identifiers and single punctuation marks (`::` as one) with their lines, counted from 1.
pub(super) fn words(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            let length = if is_word(first) {
                rest.find(|c| !is_word(c)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            found.push((number + 1, &rest[..length]));
            rest = rest[length..].trim_start();
        }
    }
    found
}

#[test]
fn comments_and_strings_are_told_apart_from_code() {
    let source = "a /* b /* c */ d */ \"e \\\" f\" // g\nh r#\"i \" j\"# 'k' '\\'' &'life l br\"m\"";
    let squeeze = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(squeeze(keep(source, Keep::Code)), "a h 'k' '\\'' &'life l");
    assert_eq!(squeeze(keep(source, Keep::Strings)), "\"e \\\" f\" r#\"i \" j\"# br\"m\"");
    assert_eq!(keep("x // \u{e9}\ny", Keep::Code).lines().count(), 2, "lines stay");
    assert_eq!(squeeze(keep("for x in y { r.z }", Keep::Code)), "for x in y { r.z }");
}
