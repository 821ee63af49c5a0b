//! What OpenAI's own client sends, without the client: `scripts/check_serve.py --record` wrote it down.

use futures_util::{FutureExt, StreamExt};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::harness::{Api, KEY, Test, check_error};

pub(crate) const TESTS: &[Test] =
    &[("recorded::what_the_openai_client_sends_is_answered", |api| recorded(api).boxed())];

/// A request of the client's, and what it was content with.
#[derive(Deserialize)]
struct Call {
    method: String,
    path: String,
    headers: Map<String, Value>,
    has_key: bool,
    body: String,
    status: u16,
    content_type: String,
    /// Names and types of the reply's fields. The texts differ between adapters.
    form: Option<Value>,
}

async fn recorded(api: Api) {
    let calls: Vec<Call> = serde_json::from_str(include_str!("openai_client.json")).unwrap();
    assert!(calls.len() > 25, "the recording has {} requests", calls.len());
    let client = reqwest::Client::new();
    for call in calls {
        let mut request = client.request(call.method.parse().unwrap(), api.url(&call.path));
        for (name, value) in &call.headers {
            request = request.header(name, value.as_str().unwrap());
        }
        let key = if call.has_key { KEY } else { "wrong" };
        let response = request.bearer_auth(key).body(call.body.clone()).send().await.unwrap();
        let what = format!("{} {} {}", call.method, call.path, call.body);
        assert_eq!(response.status(), call.status, "{what}");
        assert_eq!(response.headers()["content-type"], call.content_type.as_str(), "{what}");
        match call.form {
            Some(form) => {
                let reply: Value = response.json().await.unwrap();
                if call.status != 200 {
                    check_error(call.status, &reply["error"]);
                }
                check_form(&form, &reply, &what);
            }
            None => {
                let events = eventsource_stream::Eventsource::eventsource(response.bytes_stream());
                let events: Vec<_> = events.map(|event| event.unwrap().data).collect().await;
                assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{what}");
                assert!(events.len() > 2, "{what}");
            }
        }
    }
}

/// The fields are those that the client was given, with their types. Lists have the form of their first element, maps with any names that of `*`.
fn check_form(form: &Value, value: &Value, what: &str) {
    match (form, value) {
        (Value::Object(fields), Value::Object(values)) => {
            if let Some(form) = fields.get("*") {
                values.values().for_each(|value| check_form(form, value, what));
                return;
            }
            assert!(fields.keys().eq(values.keys()), "{what}: {values:?} has not the fields {fields:?}");
            for (name, form) in fields {
                check_form(form, &values[name], &format!("{what}: {name}"));
            }
        }
        (Value::Array(forms), Value::Array(values)) => {
            if let Some(form) = forms.first() {
                assert!(!values.is_empty(), "{what}");
                values.iter().for_each(|value| check_form(form, value, what));
            }
        }
        (Value::String(name), value) => {
            let has = match value {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(_) => "number",
                _ => "string",
            };
            assert!(name == has, "{what}: {value} is no {name}");
        }
        _ => panic!("{what}: {value} has not the form {form}"),
    }
}
