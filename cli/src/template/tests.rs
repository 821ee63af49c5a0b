//! Templates in the styles of published models, and broken ones.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{ChatTemplate, Message};

/// A folder with a `tokenizer_config.json`.
fn folder(config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn template(source: &str) -> ChatTemplate {
    let config =
        json!({ "chat_template": source, "bos_token": "<s>", "eos_token": { "content": "</s>", "lstrip": false } });
    ChatTemplate::from_folder(folder(&config).path()).unwrap().unwrap()
}

fn error_of(source: &str) -> String {
    let config = json!({ "chat_template": source });
    match ChatTemplate::from_folder(folder(&config).path()) {
        Err(error) => format!("{error:#}"),
        Ok(template) => format!("{:#}", template.unwrap().render(&talk(), true).unwrap_err()),
    }
}

fn system() -> Message {
    Message::new("system", "Be brief.")
}

fn talk() -> Vec<Message> {
    vec![Message::new("user", "Hi"), Message::new("assistant", "Hello!"), Message::new("user", " 2+2? ")]
}

const CHATML: &str = "\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- set ns = namespace(asked=false) %}
{%- for message in messages[::-1] %}
    {%- if message.content is string and message.role == 'user' and not ns.asked %}
        {%- set ns.asked = true %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

#[test]
fn chatml_with_thoughts_left_out() {
    let template = template(CHATML);
    let mut messages = [&[system()], &talk()[..]].concat();
    messages[2].content = "<think>\nA greeting.\n</think>\n\nHello!".to_owned();
    assert_eq!(
        template.render(&messages, true).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n\
         <|im_start|>user\n 2+2? <|im_end|>\n<|im_start|>assistant\n"
    );
    assert!(template.render(&talk(), false).unwrap().ends_with(" 2+2? <|im_end|>\n"));
    assert_eq!(template.eos_token(), Some("</s>"));
}

/// Blocks on lines of their own, whose indentation and line ends are not part of the text, a date, and tools, of which there are none.
const HEADERS: &str = "\
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if tools is not none %}{{ raise_exception('tools: ' + (tools | tojson)) }}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- set header = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' %}
    {% if loop.index0 == 0 %}
        {{- 'Today: ' + date_string }}
    {% endif %}
    {{- header + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}";

#[test]
fn headers_with_a_date() {
    let text = template(HEADERS).render(&talk()[2..], true).unwrap();
    let (today, rest) = text.split_once('\n').unwrap();
    let today = today.strip_prefix("<s>Today: ").unwrap_or_else(|| panic!("{text}"));
    assert!(jiff::civil::Date::strptime("%d %b %Y", today).is_ok(), "{today}");
    let start = |role| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
    assert_eq!(rest, format!("{}2+2?<|eot_id|>{}", start("user"), start("assistant")));
}

const INSTRUCTIONS: &str = "\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{% endif %}
{% endfor %}";

#[test]
fn instructions_that_refuse_a_system_message() {
    let template = template(INSTRUCTIONS);
    let text = template.render(&talk(), true).unwrap();
    assert_eq!(text, "<s>[INST] Hi [/INST]\n Hello!</s>\n[INST] 2+2? [/INST]\n");
    let error = format!("{:#}", template.render(&[&[system()], &talk()[..]].concat(), true).unwrap_err());
    assert!(error.contains("tokenizer_config.json: chat template: "), "{error}");
    assert!(error.contains("Conversation roles must alternate user/assistant/user/assistant/..."), "{error}");
}

const TURNS: &str = "\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}";

#[test]
fn turns_of_a_model() {
    let template = template(TURNS);
    assert_eq!(
        template.render(&talk(), true).unwrap(),
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n\
         <start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n"
    );
    let error = template.render(&[system()], true).unwrap_err().to_string();
    assert!(error.contains("System role not supported"), "{error}");
}

#[test]
fn json_is_that_of_python() {
    let render = |expression: &str| template(&format!("{{{{ {expression} }}}}")).render(&talk()[..1], false).unwrap();
    assert_eq!(render("messages | tojson"), r#"[{"role": "user", "content": "Hi"}]"#);
    assert_eq!(
        render("{'b': '<ä>\\'', 'a': [1, none, true]} | tojson(ensure_ascii=False)"),
        r#"{"b": "<ä>'", "a": [1, null, true]}"#
    );
    assert_eq!(render("[1] | tojson(indent=4)"), "[\n    1\n]");
}

#[test]
fn templates_are_found_where_they_are() {
    let render = |folder: &TempDir| {
        ChatTemplate::from_folder(folder.path()).unwrap().map(|template| template.render(&[], false).unwrap())
    };
    let nothing = tempfile::tempdir().unwrap();
    assert_eq!(render(&nothing), None);
    assert_eq!(render(&folder(&json!({ "model_max_length": 1e30 }))), None);
    let named = json!([{ "name": "tool_use", "template": "a" }, { "name": "default", "template": "b" }]);
    let several = folder(&json!({ "chat_template": named, "bos_token": null }));
    assert_eq!(render(&several).as_deref(), Some("b"));
    // A file of its own counts more.
    fs::write(several.path().join("chat_template.jinja"), "c").unwrap();
    assert_eq!(render(&several).as_deref(), Some("c"));
    fs::write(nothing.path().join("chat_template.json"), r#"{"chat_template": "d"}"#).unwrap();
    assert_eq!(render(&nothing).as_deref(), Some("d"));
}

#[test]
fn broken_ones_are_errors() {
    for (source, want) in [
        ("{% for message in messages %}", "syntax error"),
        ("{{ messages[0].content.upside_down() }}", "upside_down"),
        ("{{ nobody.knows }}", "undefined"),
        ("{{ strftime_now('%') }}", "strftime_now: "),
        ("{{ 1 | tojson(indent=1000) }}", "tojson: got indent 1000, need at most 16"),
        ("{{ 'x' * 1000000000000 }}", "too large"),
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "fuel"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ] {
        let error = error_of(source);
        assert!(error.contains("tokenizer_config.json: chat template: ") && error.contains(want), "{source}: {error}");
    }
    for (config, want) in [
        (json!({ "chat_template": 7 }), "chat_template: need a text, or a list of {name, template}"),
        (
            json!({ "chat_template": [{ "name": "rag", "template": "" }] }),
            "got templates named [\"rag\"], need one named \"default\"",
        ),
        (json!({ "chat_template": "", "bos_token": 3 }), "need a text, or an object with a text named content"),
        (json!("text"), "tokenizer_config.json: invalid"),
    ] {
        let error = format!("{:#}", ChatTemplate::from_folder(folder(&config).path()).unwrap_err());
        assert!(error.contains(want), "{config}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("tokenizer_config.json")).unwrap();
    let error = format!("{:#}", ChatTemplate::from_folder(folder.path()).unwrap_err());
    assert!(error.contains("got a directory or a device, need a regular file"), "{error}");
}

#[test]
fn a_gguf_file_has_a_template() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf");
    let template = ChatTemplate::from_gguf(&fixtures.join("qwen2/model.gguf")).unwrap().unwrap();
    let text = template.render(&[Message::new("user", "Hi")], true).unwrap();
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(template.eos_token(), Some("<|im_end|>"));
    assert!(ChatTemplate::from_gguf(&fixtures.join("llama/model.gguf")).unwrap().is_none());
    let error = ChatTemplate::from_gguf(&fixtures.join("llama/config.json")).unwrap_err();
    assert!(format!("{error:#}").contains("need a GGUF file"), "{error:#}");
}
