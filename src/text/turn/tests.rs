use super::*;
use crate::text::Random;

fn form(calls: CallFormat) -> TurnForm {
    TurnForm { calls: Some(calls), tools: vec!["add".into(), "find".into()], ..TurnForm::default() }
}

fn thinking(thinks: bool) -> TurnForm {
    TurnForm { thinks: Some(thinks), ..form(CallFormat::Hermes) }
}

fn text(text: &str) -> Part {
    Part::Text(text.into())
}

fn thought(text: &str) -> Part {
    Part::Thought(text.into())
}

fn call(index: u32, name: &str, arguments: &str) -> [Part; 2] {
    [Part::Call { index, name: name.into() }, Part::Arguments { index, text: arguments.into() }]
}

/// The parts of a turn that comes in these pieces.
fn parts<'a>(form: &TurnForm, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Part> {
    let mut reader = TurnReader::new(form.clone());
    let mut parts: Vec<Part> = pieces.into_iter().flat_map(|piece| reader.push(piece)).collect();
    parts.extend(reader.finish());
    let calls = parts.iter().filter(|part| matches!(part, Part::Call { .. })).count();
    assert_eq!(reader.calls() as usize, calls);
    join(parts)
}

/// The turn at once, in characters, and cut at random, gives these parts.
fn check(form: &TurnForm, turn: &str, expected: &[Part]) {
    assert_eq!(parts(form, [turn]), expected, "{turn:?}");
    let characters = turn.char_indices().map(|(at, c)| &turn[at..at + c.len_utf8()]);
    assert_eq!(parts(form, characters), expected, "{turn:?} by characters");
    let mut random = Random(turn.len() as u64 + 1);
    for _ in 0..20 {
        let (mut pieces, mut left) = (Vec::new(), turn);
        while !left.is_empty() {
            let most = left.chars().count();
            let length = left.chars().take(1 + random.below(most)).map(char::len_utf8).sum();
            pieces.push(&left[..length]);
            left = &left[length..];
        }
        assert_eq!(parts(form, pieces.iter().copied()), expected, "{pieces:?}");
    }
}

#[test]
fn plain_text_comes_as_it_is() {
    for turn in ["Hello", " spaces \n kept ", "a < b <tool", "{\"a\": 1}"] {
        check(&TurnForm::default(), turn, &[text(turn)]);
    }
    check(&form(CallFormat::Hermes), "  Hello <tool_ca world ", &[text("  Hello <tool_ca world ")]);
    check(&form(CallFormat::Hermes), "{\"name\": \"add\"}", &[text("{\"name\": \"add\"}")]);
}

#[test]
fn hermes_calls() {
    let form = form(CallFormat::Hermes);
    let one = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": \"}\\\"\"}}\n</tool_call>";
    let added = call(0, "add", "{\"a\": 1, \"b\": \"}\\\"\"}");
    check(&form, one, &added);
    check(&form, &format!("Let me see.\n\n{one}\n"), &[&[text("Let me see.")], &added[..]].concat());
    let two = "<tool_call>{\"arguments\":{},\"name\":\"find\"}</tool_call>";
    check(&form, &format!("{one}\n{two}"), &[added.clone(), call(1, "find", "{}")].concat());
    check(&form, &format!("{one}\nDone."), &[&added[..], &[text("Done.")]].concat());
    // An end that never comes, arguments as a string, and none.
    check(&form, "<tool_call>{\"name\": \"add\", \"arguments\": {}}", &call(0, "add", "{}"));
    check(
        &form,
        "<tool_call>{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":1}\"}</tool_call>",
        &call(0, "f", "{\"a\":1}"),
    );
    check(&form, "<tool_call>{\"name\": \"f\"}</tool_call>", &call(0, "f", "{}"));
    // Cut short by the length.
    check(&form, "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1", &call(0, "add", "{\"a\": 1"));
}

#[test]
fn what_is_no_call_is_text() {
    for turn in [
        "<tool_call>add 1 and 2</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": 5}",
        "<tool_call>",
        "<tool_call>{\"name\": \"ad",
        "<tool_call>[1, 2]",
    ] {
        check(&form(CallFormat::Hermes), turn, &[text(turn)]);
    }
    let second = "<tool_call>no <tool_call>{\"name\": \"add\"}";
    let expected = [&[text("<tool_call>no")], &call(0, "add", "{}")[..]].concat();
    check(&form(CallFormat::Hermes), second, &expected);
}

#[test]
fn llama_calls_have_a_mark_or_are_all_that_is_said() {
    let form = form(CallFormat::Llama3);
    let add = "{\"name\": \"add\", \"parameters\": {\"a\": [1, {\"b\": 2}]}}";
    let added = call(0, "add", "{\"a\": [1, {\"b\": 2}]}");
    check(&form, add, &added);
    check(&form, &format!("<|python_tag|>{add}"), &added);
    check(
        &form,
        &format!("{add}; {{\"name\": \"find\", \"parameters\": {{}}}}"),
        &[added, call(1, "find", "{}")].concat(),
    );
    for turn in
        ["{\"name\": \"other\", \"parameters\": {}}", "{\"answer\": 42}", "It is {\"name\": \"add\"}", "{"]
    {
        check(&form, turn, &[text(turn)]);
    }
}

#[test]
fn mistral_calls_are_a_list_or_stand_alone() {
    let form = form(CallFormat::Mistral);
    let both = [call(0, "add", "{\"a\": 1}"), call(1, "find", "{}")].concat();
    check(
        &form,
        "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"a\": 1}}, {\"name\": \"find\", \"arguments\": {}}]",
        &both,
    );
    check(&form, "[TOOL_CALLS]add[ARGS]{\"a\": 1}[TOOL_CALLS]find{}", &both);
    check(&form, "[TOOL_CALLS]add or not", &[text("[TOOL_CALLS]add or not")]);
}

#[test]
fn only_the_first_call_counts_where_one_is_asked_for() {
    let single = |calls| TurnForm { single: true, ..form(calls) };
    let one = "<tool_call>{\"name\": \"add\"}</tool_call>";
    check(&single(CallFormat::Hermes), &format!("{one}\n{one}\nand so on"), &call(0, "add", "{}"));
    let list = "[TOOL_CALLS][{\"name\": \"add\"}, {\"name\": \"find\"}]";
    check(&single(CallFormat::Mistral), list, &call(0, "add", "{}"));
}

#[test]
fn thoughts_stand_apart() {
    let said = [thought("Hm, <b>."), text("Yes.")];
    check(&thinking(false), "<think>Hm, <b>.\n</think>\n\nYes.", &said);
    check(&thinking(false), "\n<think>Hm, <b>.</think>Yes.", &said);
    check(&thinking(true), "Hm, <b>.</think>\nYes.", &said);
    check(&thinking(false), "Yes. <think>", &[text("Yes. <think>")]);
    check(&thinking(true), "never ends", &[thought("never ends")]);
    check(&thinking(false), "<think></think>Yes.", &[text("Yes.")]);
    let called = [&[thought("So.")], &call(0, "add", "{}")[..]].concat();
    check(&thinking(false), "<think>So.</think><tool_call>{\"name\": \"add\"}</tool_call>", &called);
}
