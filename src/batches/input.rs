//! A batch's input: JSON lines, each a request with an id of the client's own.
//!
//! Does not know: what a request's body may say. That is found out when it is run, and is that line's own error.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Map, Value};

use super::Problem;

/// More problems of a file are not told.
const PROBLEMS_MAX: usize = 100;
const CUSTOM_ID_CHARS_MAX: usize = 512;
/// So much of what a client wrote is repeated to it.
const SHOWN_CHARS_MAX: usize = 80;

/// What the lines of an input must be like.
pub struct Rules<'a> {
    /// The path that all of them ask.
    pub endpoint: &'a str,
    pub lines_max: usize,
    pub line_bytes_max: usize,
    pub is_served: &'a dyn Fn(&str) -> bool,
}

/// Where a line stands in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// From 1 on; empty lines count.
    pub number: u64,
    offset: u64,
    bytes: usize,
}

impl Line {
    /// The client's id, and the request's body.
    ///
    /// # Errors
    /// When the file cannot be read, or is not what was scanned.
    pub fn read(&self, file: &File) -> io::Result<(String, Value)> {
        let mut bytes = vec![0; self.bytes];
        file.read_exact_at(&mut bytes, self.offset)?;
        let changed = || io::Error::other("the file has changed since it was validated");
        let Ok(Value::Object(mut line)) = serde_json::from_slice(&bytes) else { return Err(changed()) };
        match (line.remove("custom_id"), line.remove("body")) {
            (Some(Value::String(custom_id)), Some(body)) => Ok((custom_id, body)),
            _ => Err(changed()),
        }
    }
}

/// The lines of an input, or what is wrong with it.
pub type Scanned = Result<Vec<Line>, Vec<Problem>>;

/// Reads a whole input.
///
/// # Errors
/// When the file cannot be read; what is wrong with its text is in what is returned.
pub fn scan(path: &Path, rules: &Rules<'_>) -> io::Result<Scanned> {
    let mut reader = BufReader::with_capacity(1 << 16, File::open(path)?);
    let (mut lines, mut problems): (Vec<Line>, Vec<Problem>) = (Vec::new(), Vec::new());
    let mut ids = HashSet::new();
    let (mut offset, mut number) = (0, 0);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let read = reader.read_until(b'\n', &mut bytes)?;
        if read == 0 || problems.len() >= PROBLEMS_MAX {
            break;
        }
        number += 1;
        let line = Line { number, offset, bytes: read };
        offset += read as u64;
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        if lines.len() == rules.lines_max {
            let most = rules.lines_max;
            problems.push(problem(number, "too_many_lines", "", format!("a batch has at most {most} lines")));
            break;
        }
        if let Err(found) = check(&bytes, rules, &mut ids) {
            problems.push(Problem { line: Some(number), ..found });
        }
        lines.push(line);
    }
    if lines.is_empty() {
        let message = "the file has no lines: each is a request, as one line of JSON".to_owned();
        problems.push(Problem { code: "empty_file".into(), line: None, message, param: None });
    }
    Ok(if problems.is_empty() { Ok(lines) } else { Err(problems) })
}

fn problem(line: u64, code: &str, param: &str, message: String) -> Problem {
    let param = Some(param.to_owned()).filter(|param| !param.is_empty());
    Problem { code: code.to_owned(), line: Some(line), message, param }
}

/// What is wrong with a line, its number apart.
fn check(bytes: &[u8], rules: &Rules<'_>, ids: &mut HashSet<String>) -> Result<(), Problem> {
    let wrong = |code, param, message| problem(0, code, param, message);
    if bytes.len() > rules.line_bytes_max {
        let most = rules.line_bytes_max;
        return Err(wrong("line_too_long", "", format!("the line is over {most} bytes")));
    }
    let line: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| {
        wrong("invalid_json_line", "", format!("the line is no JSON object in UTF-8: {error}"))
    })?;
    let missing = |name: &'static str, kind: &str| {
        wrong("missing_required_parameter", name, format!("`{name}` is required: {kind}"))
    };
    let text = |name| match line.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        _ => Err(missing(name, "a string")),
    };
    let custom_id = text("custom_id")?;
    if !(1..=CUSTOM_ID_CHARS_MAX).contains(&custom_id.chars().count()) {
        let message = format!("`custom_id` has 1 to {CUSTOM_ID_CHARS_MAX} characters");
        return Err(wrong("invalid_custom_id", "custom_id", message));
    }
    if !ids.insert(custom_id.to_owned()) {
        let message = format!("another line has the `custom_id` {}", shown(custom_id));
        return Err(wrong("duplicate_custom_id", "custom_id", message));
    }
    if text("method")? != "POST" {
        return Err(wrong("invalid_method", "method", "`method` must be \"POST\"".to_owned()));
    }
    if text("url")? != rules.endpoint {
        let message = format!("`url` must be {:?}, the batch's endpoint", rules.endpoint);
        return Err(wrong("invalid_url", "url", message));
    }
    let known = ["custom_id", "method", "url", "body"];
    if let Some(name) = line.keys().find(|name| !known.contains(&name.as_str())) {
        let message = format!("unknown field {}: a line has {}", shown(name), known.join(", "));
        return Err(wrong("unknown_parameter", name, message));
    }
    let Some(Value::Object(body)) = line.get("body") else { return Err(missing("body", "an object")) };
    match body.get("model") {
        Some(Value::String(model)) if (rules.is_served)(model) => {}
        Some(Value::String(model)) => {
            let message = format!("the model {} does not exist here, or is not yours to use", shown(model));
            return Err(wrong("model_not_found", "body.model", message));
        }
        _ => {
            let message = "`body.model` is required: a string".to_owned();
            return Err(wrong("missing_required_parameter", "body.model", message));
        }
    }
    if body.get("stream").is_some_and(|stream| *stream != Value::Bool(false) && !stream.is_null()) {
        let message = "`body.stream`: a batch's answers are not streamed".to_owned();
        return Err(wrong("invalid_parameter", "body.stream", message));
    }
    Ok(())
}

fn shown(text: &str) -> String {
    let head: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if head.len() == text.len() { format!("{text:?}") } else { format!("{head:?}...") }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn scanned(text: &str) -> Scanned {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let is_served = |model: &str| model == "m";
        let rules =
            Rules { endpoint: "/v1/completions", lines_max: 4, line_bytes_max: 200, is_served: &is_served };
        scan(file.path(), &rules).unwrap()
    }

    fn line(custom_id: &str) -> String {
        format!(
            r#"{{"custom_id":"{custom_id}","method":"POST","url":"/v1/completions","body":{{"model":"m"}}}}"#
        )
    }

    #[test]
    fn good_lines_are_found_where_they_stand() {
        let text = format!("{}\n\n  \r\n{}\r\n{}", line("a"), line("b"), line("c"));
        let lines = scanned(&text).unwrap();
        assert_eq!(lines.iter().map(|line| line.number).collect::<Vec<_>>(), [1, 4, 5]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let ids = lines.iter().map(|line| line.read(file.as_file()).unwrap().0).collect::<Vec<_>>();
        assert_eq!(ids, ["a", "b", "c"]);
        let other = tempfile::NamedTempFile::new().unwrap();
        assert!(lines[0].read(other.as_file()).is_err(), "a file that has changed");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_code() {
        let check = |text: &str, expected: &[(Option<u64>, &str, Option<&str>)]| {
            let problems = scanned(text).unwrap_err();
            let told: Vec<_> =
                problems.iter().map(|p| (p.line, p.code.as_str(), p.param.as_deref())).collect();
            assert_eq!(told, expected, "{text}");
        };
        check("", &[(None, "empty_file", None)]);
        check("\n \n", &[(None, "empty_file", None)]);
        let first = line("a");
        let second = |from: &str, to: &str| format!("{first}\n{}\n", line("b").replace(from, to));
        let bad = |from, to, code, param| check(&second(from, to), &[(Some(2), code, param)]);
        bad("{\"custom_id\"", "\"custom_id\"", "invalid_json_line", None);
        bad("\"custom_id\":\"b\",", "", "missing_required_parameter", Some("custom_id"));
        bad("\"b\"", "7", "missing_required_parameter", Some("custom_id"));
        bad("\"b\"", "\"\"", "invalid_custom_id", Some("custom_id"));
        bad("\"b\"", "\"a\"", "duplicate_custom_id", Some("custom_id"));
        bad("POST", "GET", "invalid_method", Some("method"));
        bad("/v1/completions", "/v1/chat/completions", "invalid_url", Some("url"));
        bad("\"body\"", "\"bodi\"", "unknown_parameter", Some("bodi"));
        bad("{\"model\":\"m\"}", "[]", "missing_required_parameter", Some("body"));
        bad("{\"model\":\"m\"}", "{}", "missing_required_parameter", Some("body.model"));
        bad("\"m\"", "\"other\"", "model_not_found", Some("body.model"));
        bad("\"m\"", "\"m\",\"stream\":true", "invalid_parameter", Some("body.stream"));
        bad("\"m\"", &format!("\"m\",\"prompt\":\"{}\"", "x".repeat(200)), "line_too_long", None);
        let five: Vec<String> = ["a", "b", "c", "d", "e"].into_iter().map(line).collect();
        check(&five.join("\n"), &[(Some(5), "too_many_lines", None)]);
        check(
            &format!("x\n{}\ny", first),
            &[(Some(1), "invalid_json_line", None), (Some(3), "invalid_json_line", None)],
        );
    }
}
