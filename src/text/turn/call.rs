//! The calls behind a mark, as far as their text has come. It is read anew each time: calls are short.

use super::CallFormat;

/// Between a name that stands alone and its arguments.
const MISTRAL_ARGUMENTS: &str = "[ARGS]";
/// Deepest nesting of arguments.
const DEPTH_MAX: usize = 128;

/// One call. What is known of it only grows when more comes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) name: Option<String>,
    /// A JSON object's text, or its beginning.
    pub(super) arguments: String,
}

/// How far a reading came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// More must come.
    More,
    /// The calls are complete with so many bytes.
    Done(usize),
    /// What came is no call.
    Broken,
}

enum Stop {
    More,
    Broken,
}

/// Reads what came behind a mark.
pub(super) fn read(format: CallFormat, text: &str) -> (Vec<Found>, Outcome) {
    let mut reader = Reader { text, at: 0, found: Vec::new() };
    let outcome = match reader.calls(format) {
        Ok(()) => Outcome::Done(reader.at),
        Err(Stop::More) => Outcome::More,
        Err(Stop::Broken) => Outcome::Broken,
    };
    (reader.found, outcome)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    found: Vec<Found>,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// The next character that is no space.
    fn peek(&mut self) -> Result<char, Stop> {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
        self.rest().chars().next().ok_or(Stop::More)
    }

    fn expect(&mut self, wanted: char) -> Result<(), Stop> {
        if self.peek()? != wanted {
            return Err(Stop::Broken);
        }
        self.at += wanted.len_utf8();
        Ok(())
    }

    fn calls(&mut self, format: CallFormat) -> Result<(), Stop> {
        match (format, self.peek()?) {
            (CallFormat::Mistral, '[') => self.list(),
            (CallFormat::Mistral, c) if c != '{' => self.bare(),
            _ => self.object(),
        }
    }

    fn list(&mut self) -> Result<(), Stop> {
        self.expect('[')?;
        loop {
            self.object()?;
            match self.peek()? {
                ',' => self.expect(',')?,
                _ => return self.expect(']'),
            }
        }
    }

    /// `name[ARGS]{..}` or `name{..}`.
    fn bare(&mut self) -> Result<(), Stop> {
        let rest = self.rest();
        let end = rest.find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-' | '.')));
        let end = end.ok_or(Stop::More)?;
        self.at += end;
        if self.rest().starts_with('[') {
            if super::is_beginning(self.rest(), MISTRAL_ARGUMENTS) {
                return Err(Stop::More);
            }
            self.at += self.rest().strip_prefix(MISTRAL_ARGUMENTS).map_or(0, |_| MISTRAL_ARGUMENTS.len());
        }
        if end == 0 || self.peek()? != '{' {
            return Err(Stop::Broken);
        }
        self.found.push(Found { name: Some(rest[..end].to_owned()), arguments: String::new() });
        self.arguments()
    }

    fn object(&mut self) -> Result<(), Stop> {
        self.expect('{')?;
        self.found.push(Found::default());
        let mut first = true;
        loop {
            match self.peek()? {
                '}' => break,
                ',' if !first => self.expect(',')?,
                '"' if first => {}
                _ => return Err(Stop::Broken),
            }
            first = false;
            self.peek()?;
            let key = self.string()?;
            self.expect(':')?;
            self.peek()?;
            match key.as_str() {
                "name" => {
                    let name = self.string()?;
                    self.call().name = Some(name);
                }
                "arguments" | "parameters" => self.arguments()?,
                _ => drop(self.value()?),
            }
        }
        self.expect('}')?;
        let call = self.call();
        if call.name.is_none() {
            return Err(Stop::Broken);
        }
        if call.arguments.is_empty() {
            call.arguments.push_str("{}");
        }
        Ok(())
    }

    fn call(&mut self) -> &mut Found {
        self.found.last_mut().expect("a call is being read")
    }

    fn string(&mut self) -> Result<String, Stop> {
        if self.peek()? != '"' {
            return Err(Stop::Broken);
        }
        let value = self.value()?;
        serde_json::from_str(value).map_err(|_| Stop::Broken)
    }

    /// Arguments that are a string hold the object's text: they are known at their end.
    fn arguments(&mut self) -> Result<(), Stop> {
        let start = self.at;
        match (self.peek()?, self.value()) {
            ('"', Ok(text)) => {
                self.call().arguments = serde_json::from_str(text).map_err(|_| Stop::Broken)?;
            }
            ('{', Ok(text)) => self.call().arguments = text.to_owned(),
            ('{', Err(Stop::More)) => {
                self.call().arguments = self.text[start..].trim_start().to_owned();
                return Err(Stop::More);
            }
            // What some models write for none.
            ('n', Ok("null")) => {}
            (_, Err(Stop::More)) => return Err(Stop::More),
            _ => return Err(Stop::Broken),
        }
        Ok(())
    }

    /// The text of the value that begins here.
    fn value(&mut self) -> Result<&'a str, Stop> {
        let start = self.at;
        let (mut depth, mut in_string, mut escaped) = (0, false, false);
        for (at, c) in self.rest().char_indices() {
            let next = start + at + c.len_utf8();
            if in_string {
                match c {
                    _ if escaped => escaped = false,
                    '\\' => escaped = true,
                    '"' if depth == 0 => return Ok(self.up_to(next)),
                    '"' => in_string = false,
                    _ => {}
                }
                continue;
            }
            match c {
                '"' => in_string = true,
                '{' | '[' if depth == DEPTH_MAX => return Err(Stop::Broken),
                '{' | '[' => depth += 1,
                '}' | ']' if depth == 1 => return Ok(self.up_to(next)),
                '}' | ']' if depth > 1 => depth -= 1,
                '}' | ']' | ',' if depth == 0 => {
                    return if at == 0 { Err(Stop::Broken) } else { Ok(self.up_to(start + at)) };
                }
                c if depth == 0 && c.is_whitespace() => return Ok(self.up_to(start + at)),
                _ => {}
            }
        }
        Err(Stop::More)
    }

    fn up_to(&mut self, end: usize) -> &'a str {
        let value = &self.text[self.at..end];
        self.at = end;
        value
    }
}
