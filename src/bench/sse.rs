//! Server-sent events out of bytes as they come, cut anywhere (WHATWG HTML, "Server-sent events"). Only
//! `data` is kept: nothing else means anything to an OpenAI stream.

/// More than any event of an answer takes.
const EVENT_BYTES_MAX: usize = 16 << 20;

/// What has come of the next events.
#[derive(Debug, Default)]
pub(super) struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// The last byte ended a line and was a carriage return: a line feed after it ends nothing.
    after_return: bool,
    started: bool,
}

impl Events {
    /// Takes bytes, and hands each event that they complete to `event`.
    pub(super) fn push<E>(
        &mut self,
        bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E>
    where
        E: From<TooLong>,
    {
        for &byte in bytes {
            let again = std::mem::take(&mut self.after_return) && byte == b'\n';
            match byte {
                _ if again => {}
                b'\r' | b'\n' => {
                    self.after_return = byte == b'\r';
                    self.end_line(&mut event)?;
                }
                _ => self.line.push(byte),
            }
        }
        if self.line.len() + self.data.len() > EVENT_BYTES_MAX { Err(TooLong.into()) } else { Ok(()) }
    }

    fn end_line<E>(&mut self, event: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut line = std::mem::take(&mut self.line);
        // A byte order mark may begin the stream.
        if !std::mem::replace(&mut self.started, true) && line.starts_with(b"\xef\xbb\xbf") {
            line.drain(..3);
        }
        let outcome = if line.is_empty() { self.dispatch(event) } else { Ok(()) };
        if let Some(value) = line.strip_prefix(b"data").filter(|rest| rest.first().is_none_or(|&b| b == b':'))
        {
            let value = value.strip_prefix(b":").unwrap_or(value);
            if std::mem::replace(&mut self.has_data, true) {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
        line.clear();
        self.line = line;
        outcome
    }

    fn dispatch<E>(&mut self, event: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if !std::mem::take(&mut self.has_data) {
            return Ok(());
        }
        let outcome = event(&self.data);
        self.data.clear();
        outcome
    }
}

/// An event that is no event.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

#[cfg(test)]
mod tests {
    use super::*;

    fn events(parts: &[&[u8]]) -> Vec<String> {
        let (mut events, mut found) = (Events::default(), Vec::new());
        for part in parts {
            let pushed: Result<(), TooLong> = events.push(part, |data| {
                found.push(String::from_utf8_lossy(data).into_owned());
                Ok(())
            });
            pushed.unwrap();
        }
        found
    }

    #[test]
    fn events_are_the_same_wherever_the_bytes_are_cut() {
        let stream = "\u{feff}data: {\"a\": 1}\n\n: keep-alive\n\nevent: x\ndata:two\ndata:  lines\r\n\r\n\
            id: 3\rdata: r\u{e9}turns\r\rdata\n\ndatabase: none\n\ndata: [DONE]\n\ndata: never ended\n"
            .as_bytes();
        let expected = ["{\"a\": 1}", "two\n lines", "r\u{e9}turns", "", "[DONE]"];
        assert_eq!(events(&[stream]), expected);
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let parts = [&stream[..first], &stream[first..second], &stream[second..]];
                assert_eq!(events(&parts), expected, "cut at {first} and {second}");
            }
        }
        let single: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(events(&single), expected);
    }

    #[test]
    fn a_line_without_an_end_is_refused() {
        let mut events = Events::default();
        let long = vec![b'x'; EVENT_BYTES_MAX + 1];
        assert_eq!(events.push(&long, |_| Ok::<(), TooLong>(())), Err(TooLong));
    }

    #[test]
    fn the_readers_error_ends_the_stream() {
        #[derive(Debug, PartialEq)]
        enum Error {
            Reader,
            Long,
        }
        impl From<TooLong> for Error {
            fn from(TooLong: TooLong) -> Self {
                Self::Long
            }
        }
        let mut events = Events::default();
        assert_eq!(events.push(b"data: x\n\n", |_| Err(Error::Reader)), Err(Error::Reader));
    }
}
