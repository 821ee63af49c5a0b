//! Bodies that were right before something happened to them.

use futures_util::FutureExt;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};

use super::harness::{Api, Test, check_error};

pub(crate) const TESTS: &[Test] = &[
    ("fuzz::mutated_bodies_are_answered", |api| mutated(api, bodies(&bytes())).boxed()),
    ("fuzz::fields_of_any_value_are_answered", |api| mutated(api, bodies(&values())).boxed()),
];

const COUNT: u32 = 200;

fn seeds() -> [Value; 2] {
    [
        json!({
            "model": "stories", "prompt": "Once upon a time", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 3,
            "stop": ["\n", "end"], "stream": false, "stream_options": { "include_usage": true }, "logit_bias": {}, "user": "a"
        }),
        json!({
            "messages": [
                { "role": "system", "content": "Tell 🙂" },
                { "role": "user", "content": [{ "type": "text", "text": "a\u{0}b" }] },
            ],
            "max_completion_tokens": 2, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop": "x", "tools": [],
        }),
    ]
}

fn seed() -> impl Strategy<Value = Value> {
    proptest::sample::select(seeds().to_vec())
}

/// Bytes that are changed, left out, doubled or cut off.
fn bytes() -> BoxedStrategy<Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..5_u8), 1..6);
    let mutate = |(seed, changes): (Value, Vec<(prop::sample::Index, u8, u8)>)| {
        let mut bytes = seed.to_string().into_bytes();
        for (at, byte, kind) in changes {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, byte),
                3 => bytes[at] = b"{}[]\",:0-.eE\\untf"[usize::from(byte) % 17],
                _ => bytes.truncate(at),
            }
        }
        bytes
    };
    (seed(), changes).prop_map(mutate).boxed()
}

/// A value of any type.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3..40_i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{0,6}|type|text|role|content", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

/// Fields, also those of messages, with a value of another kind.
fn values() -> BoxedStrategy<Vec<u8>> {
    let replace = |(mut seed, at, inner, value): (Value, prop::sample::Index, bool, Value)| {
        let fields = match seed.pointer_mut("/messages/1") {
            Some(Value::Object(message)) if inner => message,
            _ => seed.as_object_mut().unwrap(),
        };
        let name = fields.keys().nth(at.index(fields.len())).unwrap().clone();
        fields[&name] = value;
        seed.to_string().into_bytes()
    };
    (seed(), any::<prop::sample::Index>(), any::<bool>(), value()).prop_map(replace).boxed()
}

/// What the strategy makes, always the same.
fn bodies(strategy: &BoxedStrategy<Vec<u8>>) -> Vec<Vec<u8>> {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    (0..COUNT).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
}

/// Sends bodies, and looks at what comes back.
async fn mutated(api: Api, bodies: Vec<Vec<u8>>) {
    let mut statuses = [0; 2];
    for body in bodies {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let request = api.http.post(api.url(path)).header("content-type", "application/json");
            let response = request.body(body.clone()).send().await.unwrap();
            let status = response.status().as_u16();
            let text = response.text().await.unwrap();
            let shown = String::from_utf8_lossy(&body);
            match status {
                200 => statuses[0] += 1,
                // The load tests fill the queue meanwhile.
                400 | 404 | 429 => {
                    statuses[1] += 1;
                    let reply: Value = serde_json::from_str(&text).unwrap();
                    check_error(status, &reply["error"]);
                }
                _ => panic!("{status} for {shown}: {text}"),
            }
        }
    }
    // Some still mean something, or nothing would be tested.
    assert!(statuses[0] > 5 && statuses[1] > 50, "{statuses:?}");
    assert_eq!(api.get("/health").await.0, 200);
}
