//! What comes of requests that are right.

use futures_util::FutureExt;
use serde_json::{Value, json};

use super::harness::{Api, Test};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

pub(crate) const TESTS: &[Test] = &[
    ("answers::completions_have_the_form_of_openai", |api| completions(api).boxed()),
    ("answers::streams_are_equal_to_whole_answers", |api| streams(api).boxed()),
    ("answers::chats_have_the_form_of_openai", |api| chats(api).boxed()),
    ("answers::seeds_repeat_and_answers_differ", |api| seeds(api).boxed()),
    ("answers::prompts_in_all_forms_are_the_same", |api| prompts(api).boxed()),
    ("answers::stop_strings_end_answers", |api| stops(api).boxed()),
    ("answers::text_is_utf8_however_tokens_are_cut", |api| utf8(api).boxed()),
    ("answers::what_asks_for_nothing_is_ignored", |api| nothing(api).boxed()),
    ("answers::log_probabilities_have_the_form_of_openai", |api| logprobs(api).boxed()),
    ("answers::answers_follow_a_schema", |api| schemas(api).boxed()),
    ("answers::the_models_are_listed", |api| models(api).boxed()),
];

async fn completions(api: Api) {
    let body = json!({ "model": "stories", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0 });
    let (choices, reply) = api.choices(COMPLETIONS, body).await;
    assert_eq!((choices.len(), choices[0].finish_reason.as_str()), (1, "length"));
    assert!(choices[0].text.len() > 20, "{reply}");
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-") && reply["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!((&reply["object"], &reply["model"]), (&json!("text_completion"), &json!("stories")));
    let usage = &reply["usage"];
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    assert!(prompt > 1 && usage["completion_tokens"] == 12 && usage["total_tokens"] == prompt + 12, "{usage}");
    // 16 tokens unless the request says something else.
    let (_, reply) = api.choices(COMPLETIONS, json!({ "prompt": "Once", "ignore_eos": true })).await;
    assert_eq!(reply["usage"]["completion_tokens"], 16);
}

async fn streams(api: Api) {
    for body in [
        json!({ "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0 }),
        json!({ "prompt": ["Tom went", "The cat"], "n": 2, "max_tokens": 20, "seed": 7, "top_p": 0.9, "top_k": 50 }),
        json!({ "prompt": "Once", "max_tokens": 30, "seed": 1, "temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.1 }),
    ] {
        let (whole, reply) = api.choices(COMPLETIONS, body.clone()).await;
        let mut with_usage = body.clone();
        with_usage["stream_options"] = json!({ "include_usage": true });
        let (streamed, mut chunks) = api.streamed(COMPLETIONS, with_usage).await;
        assert_eq!(whole, streamed);
        let last = chunks.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &reply["usage"]["total_tokens"]));
        assert!(
            chunks.len() > 5
                && chunks.iter().all(|chunk| chunk["usage"] == Value::Null && chunk.get("usage").is_some())
        );
        assert!(chunks.iter().all(|chunk| chunk["id"] == last["id"] && chunk["object"] == "text_completion"));
        let (streamed, chunks) = api.streamed(COMPLETIONS, body).await;
        assert_eq!(whole, streamed);
        assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    }
}

async fn chats(api: Api) {
    let story = "Tom hid the silver key under the old bridge. Mia loved plum cake.";
    let body = json!({
        "model": "stories",
        "messages": [
            { "role": "system", "content": story },
            { "role": "user", "content": [{ "type": "text", "text": "Question: Where is the " }, { "type": "text", "text": "silver key?" }] },
            { "role": "assistant", "content": "Answer:" },
        ],
        "max_completion_tokens": 24,
        "temperature": 0,
        "stop": "\n",
    });
    let (choices, reply) = api.choices(CHAT, body.clone()).await;
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(
        (&reply["choices"][0]["message"]["role"], choices[0].finish_reason.as_str()),
        (&json!("assistant"), "stop")
    );
    // Without a template the contents are the lines of one text, as the model was trained on.
    let prompt = format!("{story}\nQuestion: Where is the silver key?\nAnswer:");
    let same = json!({ "prompt": prompt, "max_tokens": 24, "temperature": 0, "stop": "\n" });
    assert_eq!(api.choices(COMPLETIONS, same).await.0, choices);
    let (streamed, chunks) = api.streamed(CHAT, body).await;
    assert_eq!(streamed, choices);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    assert_eq!(chunks.last().unwrap()["choices"][0]["delta"], json!({}));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
    // A chat without a limit goes on to the model's own end, or its last position.
    let long = json!({ "messages": [{ "role": "user", "content": "Where" }], "temperature": 0 });
    let (_, reply) = api.choices(CHAT, long).await;
    assert!(reply["usage"]["completion_tokens"].as_u64().unwrap() > 0);
}

async fn seeds(api: Api) {
    let body = |seed: i64| json!({ "prompt": "Once upon a time", "max_tokens": 24, "seed": seed, "n": 3 });
    let (one, _) = api.choices(COMPLETIONS, body(5)).await;
    assert_eq!(one, api.choices(COMPLETIONS, body(5)).await.0);
    assert!(one[0] != one[1] && one[1] != one[2] && one[0] != one[2], "{one:?}");
    assert_ne!(one, api.choices(COMPLETIONS, body(-5)).await.0);
    let unseeded = json!({ "prompt": "Once upon a time", "max_tokens": 24 });
    let (a, b) = (api.choices(COMPLETIONS, unseeded.clone()).await.0, api.choices(COMPLETIONS, unseeded).await.0);
    assert_ne!(a, b, "without a seed it is left to chance");
}

async fn prompts(api: Api) {
    let with = |prompt: Value| json!({ "prompt": prompt, "max_tokens": 10, "temperature": 0 });
    let (text, reply) = api.choices(COMPLETIONS, with(json!("Once upon a time"))).await;
    assert_eq!(api.choices(COMPLETIONS, with(json!(["Once upon a time"]))).await.0, text);
    let (tokens, _) = api.choices(COMPLETIONS, with(json!([5, 6, 7, 8]))).await;
    let (lists, both) = api.choices(COMPLETIONS, with(json!([[5, 6, 7, 8], [9]]))).await;
    assert_eq!((lists.len(), &lists[0]), (2, &tokens[0]));
    assert_eq!((&both["usage"]["prompt_tokens"], &both["usage"]["completion_tokens"]), (&json!(5), &json!(20)));
    // Several answers count their prompt once.
    let several = json!({ "prompt": "Once upon a time", "max_tokens": 10, "n": 4, "seed": 1, "ignore_eos": true });
    let (choices, several) = api.choices(COMPLETIONS, several).await;
    assert_eq!((choices.len(), &several["usage"]["prompt_tokens"]), (4, &reply["usage"]["prompt_tokens"]));
    assert_eq!(several["usage"]["completion_tokens"], 40);
}

async fn stops(api: Api) {
    let body = |stop: Value| json!({ "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "stop": stop });
    let (whole, _) = api.choices(COMPLETIONS, body(json!(null))).await;
    let text = &whole[0].text;
    // Across words, and so across tokens.
    let (from, _) = text.char_indices().nth(31).unwrap();
    let stop = &text[from..from + 7];
    for stops in [json!(stop), json!(["never in there", stop])] {
        let (stopped, _) = api.choices(COMPLETIONS, body(stops.clone())).await;
        assert_eq!(
            (stopped[0].text.as_str(), stopped[0].finish_reason.as_str()),
            (&text[..text.find(stop).unwrap()], "stop")
        );
        assert_eq!(api.streamed(COMPLETIONS, body(stops)).await.0, stopped, "nothing of the stop leaks into a stream");
    }
}

async fn utf8(api: Api) {
    // So hot that all bytes come, in an order that is no text.
    for seed in 0..4 {
        let body = json!({ "prompt": "Grüße, 漢字 🙂", "max_tokens": 60, "temperature": 50, "seed": seed, "ignore_eos": true });
        let (whole, _) = api.choices(COMPLETIONS, body.clone()).await;
        assert!(!whole[0].text.is_ascii(), "{whole:?}");
        assert_eq!(api.streamed(COMPLETIONS, body).await.0, whole);
    }
}

async fn nothing(api: Api) {
    let plain = json!({ "prompt": "Tom", "max_tokens": 8, "temperature": 0 });
    let mut full = plain.clone();
    for (name, value) in [
        ("best_of", json!(1)),
        ("echo", json!(false)),
        ("frequency_penalty", json!(0)),
        ("function_call", json!("auto")),
        ("logit_bias", json!({})),
        ("logprobs", json!(null)),
        ("modalities", json!(["text"])),
        ("presence_penalty", json!(0.0)),
        ("response_format", json!({ "type": "text" })),
        ("stop", json!([])),
        ("stream", json!(null)),
        ("suffix", json!("")),
        ("tool_choice", json!("none")),
        ("tools", json!([])),
        ("top_k", json!(-1)),
        ("user", json!("somebody")),
        ("a_field_of_next_year", json!({ "deep": [1, 2, { "x": null }] })),
    ] {
        full[name] = value;
    }
    assert_eq!(api.choices(COMPLETIONS, full).await.0, api.choices(COMPLETIONS, plain).await.0);
}

async fn schemas(api: Api) {
    let schema = json!({ "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": { "name": { "type": "string", "maxLength": 8 }, "age": { "type": "integer", "minimum": 1, "maximum": 99 } } });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "person", "strict": true, "schema": schema } });
    for (path, mut body) in [
        (CHAT, json!({ "messages": [{ "role": "user", "content": "Mia was" }] })),
        (COMPLETIONS, json!({ "prompt": "Mia was", "max_tokens": 60 })),
    ] {
        body["response_format"] = format.clone();
        body["n"] = json!(2);
        let (choices, _) = api.choices(path, body.clone()).await;
        for choice in &choices {
            let person: Value = serde_json::from_str(&choice.text).unwrap();
            assert!(person["name"].is_string() && (1..=99).contains(&person["age"].as_i64().unwrap()), "{choice:?}");
            assert_eq!(choice.finish_reason, "stop");
        }
        body["seed"] = json!(7);
        let (whole, _) = api.choices(path, body.clone()).await;
        assert_eq!(api.streamed(path, body).await.0, whole);
    }
}

async fn models(api: Api) {
    let (status, list) = api.get("/v1/models").await;
    assert_eq!((status, &list["object"], &list["data"][0]["id"]), (200, &json!("list"), &json!("stories")));
    let (status, model) = api.get("/v1/models/stories").await;
    assert_eq!((status, &model), (200, &list["data"][0]));
    assert_eq!((&model["object"], &model["max_model_len"]), (&json!("model"), &json!(1024)));
    for missing in ["other", "a%2Fb", "%FF", "stories%00", "%F0%9F%99%82"] {
        let response = api.http.get(api.url(&format!("/v1/models/{missing}"))).send().await.unwrap();
        let status = response.status().as_u16();
        let body: Value = response.json().await.unwrap();
        super::harness::check_error(status, &body["error"]);
        assert!(status == 404 || missing == "%FF", "{missing}: {status}");
    }
}

/// Of a chunk or a choice: the texts of tokens, their log-probabilities, and those of the best tokens.
fn told(choice: &Value, is_chat: bool) -> Vec<(String, f64, Vec<f64>)> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let logprobs = &choice["logprobs"];
    if is_chat {
        let number = |token: &Value| token["logprob"].as_f64().unwrap();
        let told = |token: &Value| {
            let text = token["token"].as_str().unwrap().to_owned();
            assert_eq!(token["bytes"], json!(text.as_bytes()));
            (text, number(token), list(&token["top_logprobs"]).iter().map(number).collect())
        };
        return list(&logprobs["content"]).iter().map(told).collect();
    }
    let each = list(&logprobs["tokens"]).into_iter().zip(list(&logprobs["token_logprobs"]));
    let told = |((token, logprob), top): ((Value, Value), Value)| {
        let mut top: Vec<f64> = top.as_object().unwrap().values().map(|value| value.as_f64().unwrap()).collect();
        top.sort_by(|a, b| b.total_cmp(a));
        (token.as_str().unwrap().to_owned(), logprob.as_f64().unwrap(), top)
    };
    each.zip(list(&logprobs["top_logprobs"])).map(told).collect()
}

async fn logprobs(api: Api) {
    let completion = json!({ "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "logprobs": 3 });
    let chat = json!({
        "messages": [{ "role": "user", "content": "Once upon a time" }], "max_tokens": 12, "temperature": 0, "logprobs": true, "top_logprobs": 3
    });
    let mut of_both = Vec::new();
    for (path, body, is_chat) in [(COMPLETIONS, completion.clone(), false), (CHAT, chat, true)] {
        let (choices, reply) = api.choices(path, body.clone()).await;
        let whole = told(&reply["choices"][0], is_chat);
        assert_eq!(whole.len(), 12);
        assert_eq!(whole.iter().map(|(token, ..)| token.as_str()).collect::<String>(), choices[0].text);
        for (token, logprob, top) in &whole {
            // Greedy: the most probable token was taken.
            assert!(top.len() == 3 && *logprob < 0.0 && (logprob - top[0]).abs() < 1e-5, "{token:?} {logprob} {top:?}");
            assert!(top[0] >= top[1] && top[1] >= top[2] && top.iter().map(|x| x.exp()).sum::<f64>() < 1.0 + 1e-5);
        }
        let (_, chunks) = api.streamed(path, body).await;
        let streamed: Vec<_> = chunks.iter().flat_map(|chunk| told(&chunk["choices"][0], is_chat)).collect();
        assert_eq!(streamed.len(), whole.len());
        assert!(
            streamed.iter().zip(&whole).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-3),
            "{streamed:?} {whole:?}"
        );
        of_both.push(whole);
    }
    assert!(of_both[0].iter().zip(&of_both[1]).all(|(a, b)| a.0 == b.0), "{of_both:?}");
    let (choices, reply) = api.choices(COMPLETIONS, completion).await;
    let offsets = reply["choices"][0]["logprobs"]["text_offset"].as_array().unwrap().clone();
    for (offset, (token, ..)) in offsets.iter().zip(&of_both[0]) {
        let rest: String = choices[0].text.chars().skip(offset.as_u64().unwrap() as usize).collect();
        assert!(rest.starts_with(token.as_str()));
    }
    let none = json!({ "prompt": "Once", "max_tokens": 2, "logprobs": 0 });
    let (_, reply) = api.choices(COMPLETIONS, none).await;
    assert_eq!(reply["choices"][0]["logprobs"]["top_logprobs"], json!([{}, {}]));
}
