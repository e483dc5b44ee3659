use super::*;
use serde_json::json;

fn render(source: &str, messages: serde_json::Value) -> Result<String, TemplateError> {
    ChatTemplate::new(source, "<s>", "</s>")?.render(&messages, TemplateOptions::default())
}

fn check(source: &str, expected: &str) {
    let messages = json!([{ "role": "user", "content": "hi", "n": 1, "none": null, "yes": true }]);
    assert_eq!(render(source, messages).as_deref(), Ok(expected), "{source}");
}

#[test]
fn chatml_has_its_shape() {
    let messages = json!([{ "role": "system", "content": "Be short." }, { "role": "user", "content": "Hi" }]);
    let options = TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
    let text = ChatTemplate::chatml().render(&messages, options).expect("renders");
    let expected =
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text, expected);
}

#[test]
fn families_are_known_by_their_markers() {
    let check = |markers: &[&str], expected: Option<&str>| {
        let messages = json!([{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": "Ho" }]);
        let options = TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
        let template = ChatTemplate::by_markers(|text| markers.contains(&text), "<s>");
        assert!(template.as_ref().is_none_or(ChatTemplate::is_built_in));
        let text = template.map(|template| template.render(&messages, options).expect("renders"));
        assert_eq!(text.as_deref(), expected);
    };
    let gemma = "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n<start_of_turn>model\n";
    check(&["<start_of_turn>", "<end_of_turn>"], Some(gemma));
    let llama3 = "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
                  <|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>\
                  <|start_header_id|>assistant<|end_header_id|>\n\n";
    check(&["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], Some(llama3));
    check(&["<start_of_turn>", "[INST]", "<|user|>"], None);
}

#[test]
fn the_conventions_of_chat_templates_hold() {
    check("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>hi</s>");
    check("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc");
    check("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13");
    check("{{ ' a b '.strip().split(' ') | length }}", "2");
    check("{{ messages[0].get('nothing', 'else') }}", "else");
    check("{% generation %}x{% endgeneration %}", "x");
    check("{% if tools is none and documents is none and not add_generation_prompt %}ok{% endif %}", "ok");
    check("{{ tools is iterable }} {{ messages is iterable }} {{ 1 is iterable }}", "False True False");
    check("{% if nothing is defined %}no{% else %}yes{% endif %}", "yes");
    check(
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "1",
    );
    check("{{ '<b>&' }}", "<b>&");
}

#[test]
fn values_are_written_as_python_writes_them() {
    check("{{ messages[0].yes }} {{ messages[0].none }} {{ not messages[0].yes }}", "True None False");
}

#[test]
fn tojson_is_pythons() {
    check(
        "{{ {'b': [1, 2.5, none, true], 'a': '<é\\n\"'} | tojson }}",
        r#"{"b": [1, 2.5, null, true], "a": "<é\n\""}"#,
    );
    check("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", "{\n  \"b\": 1,\n  \"a\": [\n    2\n  ]\n}");
    check("{{ {'b': {}, 'a': []} | tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"a":[],"b":{}}"#);
    check("{{ 'é😀' | tojson(ensure_ascii=True) }}", r#""\u00e9\ud83d\ude00""#);
    let refused = render("{{ nothing | tojson }}", json!([]));
    assert!(matches!(refused, Err(TemplateError::Render(_))), "{refused:?}");
}

#[test]
fn the_order_of_a_messages_fields_is_kept() {
    let messages = serde_json::from_str(r#"[{"z": 1, "a": {"y": 2, "b": 3}}]"#).expect("JSON");
    assert_eq!(
        render("{{ messages[0] | tojson }}", messages).as_deref(),
        Ok(r#"{"z": 1, "a": {"y": 2, "b": 3}}"#)
    );
}

#[test]
fn extra_names_and_tools_reach_the_template() {
    let template =
        ChatTemplate::new("{{ enable_thinking }} {{ tools[0].name }} {{ messages | length }}", "", "");
    let extra = json!({ "enable_thinking": false, "messages": [1, 2, 3] });
    let options = TemplateOptions {
        tools: Some(json!([{ "name": "f" }])),
        extra: extra.as_object().expect("an object").clone(),
        ..TemplateOptions::default()
    };
    assert_eq!(template.expect("parses").render(&json!([]), options).as_deref(), Ok("False f 0"));
}

#[test]
fn errors_say_whose_fault_it_is() {
    let refused = render("{{ raise_exception('roles must alternate') }}", json!([]));
    assert_eq!(refused, Err(TemplateError::Refused("roles must alternate".to_owned())));
    assert!(matches!(render("{% if %}", json!([])), Err(TemplateError::Parse(_))));
    assert!(matches!(render("{{ messages[0].content.x.y }}", json!([])), Err(TemplateError::Render(_))));
    assert!(matches!(render("{{ strftime_now('%Q') }}", json!([])), Err(TemplateError::Render(_))));
}

#[test]
fn times_are_formatted_in_utc() {
    assert_eq!(format_time(1_700_000_000, "%d %b %Y, %H:%M").as_deref().ok(), Some("14 Nov 2023, 22:13"));
}
