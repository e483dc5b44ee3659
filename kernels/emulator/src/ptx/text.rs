//! Cutting PTX text into pieces.

/// The text with comments blanked out, so that places in it stay where they were.
pub(super) fn without_comments(text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|&b| matches!(b, b'/' | b'"')) {
        at += found;
        let rest = &bytes[at..];
        let end = match (rest[0], rest.get(1)) {
            (b'"', _) => {
                at += 2 + rest[1..].iter().position(|&b| b == b'"').unwrap_or(rest.len() - 1);
                at = at.min(bytes.len());
                continue;
            }
            (_, Some(b'/')) => rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len()),
            (_, Some(b'*')) => rest.windows(2).position(|w| w == b"*/").map_or(rest.len(), |p| p + 2),
            _ => {
                at += 1;
                continue;
            }
        };
        for byte in &mut bytes[at..at + end] {
            // Lines stay lines, and what is not ASCII is a comment's own.
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at += end;
    }
    String::from_utf8(bytes).expect("whole comments were replaced by ASCII")
}

/// The pieces between separators that are in no bracket of any kind, trimmed. An empty text has none.
pub(crate) fn split(text: &str, separator: u8) -> Vec<&str> {
    let mut pieces = Vec::new();
    let (mut depth, mut start) = (0_i32, 0);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' | b'[' | b'(' => depth += 1,
            b'}' | b']' | b')' => depth -= 1,
            _ if byte == separator && depth == 0 => {
                pieces.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    let last = text[start..].trim();
    if !last.is_empty() || start > 0 {
        pieces.push(last);
    }
    pieces
}

/// Where the brace that opens at `open` closes.
pub(super) fn closing_brace(text: &str, open: usize) -> Option<usize> {
    let mut depth = 0_i32;
    for (at, byte) in text.as_bytes()[open..].iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return Some(open + at);
        }
    }
    None
}

/// The bits of a number as PTX writes it: decimal, hexadecimal, octal or binary, with sign and `U`.
pub(crate) fn integer(text: &str) -> Option<u64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest.trim_start()),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let digits = digits.strip_suffix('U').unwrap_or(digits);
    let value = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => u64::from_str_radix(&digits[2..], 16),
        [b'0', b'b' | b'B', ..] => u64::from_str_radix(&digits[2..], 2),
        [b'0', _, ..] => u64::from_str_radix(&digits[1..], 8),
        _ => digits.parse(),
    };
    value.ok().map(|v| if negative { v.wrapping_neg() } else { v })
}

/// A float as PTX writes it: `0f` or `0d` and its bits, or decimal.
pub(crate) fn float(text: &str) -> Option<f64> {
    match text.as_bytes() {
        [b'0', b'f' | b'F', ..] => {
            u32::from_str_radix(&text[2..], 16).ok().map(|bits| f64::from(f32::from_bits(bits)))
        }
        [b'0', b'd' | b'D', ..] => u64::from_str_radix(&text[2..], 16).ok().map(f64::from_bits),
        _ if text.contains('.') => text.parse().ok(),
        _ => None,
    }
}
