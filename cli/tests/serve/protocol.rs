//! HTTP itself: paths, methods, keys, bodies, and what is refused.

use std::time::Instant;

use futures_util::FutureExt;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::harness::{Api, HEADER_TIMEOUT, KEY, MAX_BODY, MAX_CHOICES, PATIENCE, Test, check_error};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

pub(crate) const TESTS: &[Test] = &[
    ("protocol::what_is_refused_says_which_field", |api| fields(api).boxed()),
    ("protocol::wrong_paths_and_methods_are_json_errors", |api| paths(api).boxed()),
    ("protocol::keys_are_asked_for", |api| keys(api).boxed()),
    ("protocol::bodies_are_bounded", |api| bodies(api).boxed()),
    ("protocol::slow_requests_are_cut_off", |api| slow(api).boxed()),
    ("protocol::metrics_and_health_are_there", |api| observed(api).boxed()),
];

/// Whether requests are refused with the status, and the error names the field.
async fn fields(api: Api) {
    let chat = |messages: Value| json!({ "messages": messages });
    let user = |content: Value| chat(json!([{ "role": "user", "content": content }]));
    let with = |name: &str, value: Value| {
        let mut body = json!({ "prompt": "Once", "max_tokens": 4 });
        body[name] = value;
        body
    };
    let too_many = vec!["a"; MAX_CHOICES + 1];
    for (path, body, status, param) in [
        (COMPLETIONS, json!({}), 400, json!("prompt")),
        (COMPLETIONS, json!([]), 400, json!(null)),
        (COMPLETIONS, json!("text"), 400, json!(null)),
        (COMPLETIONS, with("model", json!("gpt-4")), 404, json!("model")),
        (COMPLETIONS, with("model", json!(7)), 400, json!("model")),
        (COMPLETIONS, with("prompt", json!("")), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!([])), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!([[]])), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!([1, -1])), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!([1, 1024])), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!({ "text": "a" })), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!(vec![1; 1025])), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!("so ".repeat(2000))), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!("x".repeat(100_000))), 400, json!("prompt")),
        (COMPLETIONS, with("prompt", json!(too_many)), 400, json!("prompt")),
        (COMPLETIONS, with("n", json!(0)), 400, json!("n")),
        (COMPLETIONS, with("n", json!(MAX_CHOICES + 1)), 400, json!("n")),
        (COMPLETIONS, with("n", json!(u32::MAX)), 400, json!("n")),
        (COMPLETIONS, with("n", json!(-1)), 400, json!("n")),
        (COMPLETIONS, with("max_tokens", json!(0)), 400, json!("max_tokens")),
        (COMPLETIONS, with("max_tokens", json!("many")), 400, json!("max_tokens")),
        (COMPLETIONS, with("max_tokens", json!(1e12)), 400, json!("max_tokens")),
        (COMPLETIONS, with("temperature", json!(-1)), 400, json!("temperature")),
        (COMPLETIONS, with("temperature", json!(1e300)), 400, json!("temperature")),
        (COMPLETIONS, with("top_p", json!(0)), 400, json!("top_p")),
        (COMPLETIONS, with("top_p", json!(1.5)), 400, json!("top_p")),
        (COMPLETIONS, with("min_p", json!(-0.1)), 400, json!("min_p")),
        (COMPLETIONS, with("repetition_penalty", json!(0)), 400, json!("repetition_penalty")),
        (COMPLETIONS, with("top_k", json!(1.5)), 400, json!("top_k")),
        (COMPLETIONS, with("seed", json!(0.5)), 400, json!("seed")),
        (COMPLETIONS, with("stop", json!("")), 400, json!("stop")),
        (COMPLETIONS, with("stop", json!(vec!["a"; 17])), 400, json!("stop")),
        (COMPLETIONS, with("stop", json!("a".repeat(1025))), 400, json!("stop")),
        (COMPLETIONS, with("stop", json!([1])), 400, json!("stop")),
        (COMPLETIONS, with("stream", json!("yes")), 400, json!("stream")),
        (
            COMPLETIONS,
            with("stream_options", json!({ "include_usage": 1 })),
            400,
            json!("stream_options.include_usage"),
        ),
        (COMPLETIONS, with("best_of", json!(2)), 400, json!("best_of")),
        (COMPLETIONS, with("echo", json!(true)), 400, json!("echo")),
        (COMPLETIONS, with("suffix", json!("end")), 400, json!("suffix")),
        (COMPLETIONS, with("logprobs", json!(21)), 400, json!("logprobs")),
        (COMPLETIONS, with("logprobs", json!(true)), 400, json!("logprobs")),
        (
            COMPLETIONS,
            json!({ "prompt": [1], "n": MAX_CHOICES, "max_tokens": 1000, "logprobs": 20 }),
            400,
            json!("logprobs"),
        ),
        (COMPLETIONS, with("top_logprobs", json!(2)), 400, json!("top_logprobs")),
        (COMPLETIONS, with("logit_bias", json!({ "5": -100 })), 400, json!("logit_bias")),
        (COMPLETIONS, with("presence_penalty", json!(0.5)), 400, json!("presence_penalty")),
        (CHAT, json!({}), 400, json!("messages")),
        (CHAT, chat(json!([])), 400, json!("messages")),
        (CHAT, chat(json!("Hello")), 400, json!("messages")),
        (CHAT, chat(json!([{ "content": "a" }])), 400, json!("messages[0]")),
        (CHAT, chat(json!([{ "role": "user" }])), 400, json!("messages[0].content")),
        (CHAT, chat(json!([{ "role": "tool", "content": "4" }])), 400, json!("messages[0].role")),
        (CHAT, user(json!("")), 400, json!("messages")),
        (CHAT, user(json!(5)), 400, json!("messages[0].content")),
        (
            CHAT,
            user(json!([{ "type": "image_url", "image_url": { "url": "http://a" } }])),
            400,
            json!("messages[0].content[0]"),
        ),
        (CHAT, user(json!([{ "type": "text" }])), 400, json!("messages[0].content[0]")),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "a" }], "tools": [{ "type": "function" }] }),
            400,
            json!("tools"),
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "a" }], "logprobs": true, "top_logprobs": 21 }),
            400,
            json!("top_logprobs"),
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "a" }], "response_format": { "type": "xml" } }),
            400,
            json!("response_format.type"),
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": "a" }], "response_format":
                { "type": "json_schema", "json_schema": { "name": "a", "schema": { "type": "nothing" } } } }),
            400,
            json!("response_format"),
        ),
    ] {
        let shown = body.to_string();
        let shown = &shown[..shown.len().min(200)];
        let (got, error) = api.refused(path, body.clone()).await;
        assert_eq!((got, &error["param"]), (status, &param), "{path} {shown}: {error}");
        // A stream that is refused has not begun.
        if let Value::Object(mut fields) = body
            && !fields.contains_key("stream")
        {
            fields.insert("stream".to_owned(), json!(true));
            let (status, streamed) = api.refused(path, Value::Object(fields)).await;
            assert_eq!(
                (status, &streamed["param"], &streamed["code"]),
                (got, &error["param"], &error["code"]),
                "{shown}"
            );
        }
    }
    // Nothing of it has harmed anybody.
    assert_eq!(api.post(COMPLETIONS, with("max_tokens", json!(2))).await.0, 200);
}

async fn paths(api: Api) {
    for (method, path, status) in [
        (Method::GET, "/", 404),
        (Method::GET, "/v1/nothing", 404),
        (Method::POST, "/v1", 404),
        (Method::GET, "/v1/models/", 404),
        (Method::GET, "/%00/../..//etc/passwd", 404),
        (Method::GET, COMPLETIONS, 405),
        (Method::DELETE, CHAT, 405),
        (Method::OPTIONS, CHAT, 405),
        (Method::POST, "/v1/models", 405),
        (Method::PUT, "/health", 405),
    ] {
        let response = api.http.request(method.clone(), api.url(path)).send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        assert_eq!(response.headers().contains_key("allow"), status == 405, "{method} {path}");
        let body: Value = response.json().await.unwrap();
        check_error(status, &body["error"]);
    }
    for (path, status) in [("/health", 200), ("/v1/models", 200), ("/metrics", 200), ("/nothing", 404), (CHAT, 405)] {
        let response = api.http.head(api.url(path)).send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "HEAD {path}");
        assert_eq!(response.bytes().await.unwrap().len(), 0);
    }
}

async fn keys(api: Api) {
    let http = reqwest::Client::new();
    let completions = || http.post(api.url(COMPLETIONS)).json(&json!({ "prompt": "Once", "max_tokens": 1 }));
    for header in [
        "",
        "Bearer",
        "Bearer ",
        "Basic x",
        KEY,
        &format!("Bearer {KEY}x"),
        &format!("Bearer {}", &KEY[1..]),
        "Bearer another-key,",
    ] {
        let response = completions().header("authorization", header).send().await.unwrap();
        assert_eq!(
            (response.status(), &response.headers()["www-authenticate"] == "Bearer"),
            (StatusCode::UNAUTHORIZED, true)
        );
        let body: Value = response.json().await.unwrap();
        check_error(401, &body["error"]);
        assert_eq!(body["error"]["code"], "invalid_api_key", "{header:?}");
    }
    for (path, status) in [("/health", 200), ("/metrics", 401), ("/v1/models", 401), ("/nothing", 401)] {
        assert_eq!(http.get(api.url(path)).send().await.unwrap().status().as_u16(), status, "{path}");
    }
    for key in [KEY, "another-key"] {
        assert_eq!(completions().bearer_auth(key).send().await.unwrap().status(), 200);
    }
    assert_eq!(completions().header("authorization", format!("bearer {KEY}")).send().await.unwrap().status(), 200);
    assert!(!api.server.log().contains(KEY), "keys are not logged");
}

async fn bodies(api: Api) {
    let post =
        |body: Vec<u8>| api.http.post(api.url(COMPLETIONS)).header("content-type", "application/json").body(body);
    let error = async |response: reqwest::Response| {
        let status = response.status().as_u16();
        let body: Value = response.json().await.unwrap();
        check_error(status, &body["error"]);
        status
    };
    // A body of exactly the limit is read: only its prompt is too long. One of a byte more is not.
    let body = |len: usize| format!("{{\"prompt\": \"{}\"}}", "a".repeat(len - 14)).into_bytes();
    assert_eq!(body(MAX_BODY).len(), MAX_BODY);
    assert_eq!(error(post(body(MAX_BODY)).send().await.unwrap()).await, 400);
    assert_eq!(error(post(body(MAX_BODY + 1)).send().await.unwrap()).await, 413);
    assert_eq!(error(post(body(10 * MAX_BODY)).send().await.unwrap()).await, 413);
    // Chunks of unknown number.
    let piece = || vec![b' '; 16 << 10];
    let chunks = futures_util::stream::iter((0..40).map(move |_| Ok::<_, std::io::Error>(piece())));
    let request = post(Vec::new()).body(reqwest::Body::wrap_stream(chunks));
    assert_eq!(error(request.send().await.unwrap()).await, 413);
    // One that says so before it sends: it is not asked for.
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n\
         Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 413");
    // What is no JSON.
    for bytes in [
        &b""[..],
        b"{",
        b"\xff\xfe",
        b"{\"prompt\": \"\xff\"}",
        b"null",
        b"{\"prompt\": \"a\"} x",
        b"{\"prompt\": \"a\", \"prompt\": \"b\"}",
    ] {
        assert_eq!(error(post(bytes.to_vec()).send().await.unwrap()).await, 400, "{bytes:?}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(error(post(format!("{{\"prompt\": {deep}").into_bytes()).send().await.unwrap()).await, 400);
    assert_eq!(error(post(format!("{{\"x\": {deep}").into_bytes()).send().await.unwrap()).await, 400);
    for kind in ["text/plain", "application/x-www-form-urlencoded", "", "json"] {
        let request = api.http.post(api.url(COMPLETIONS)).header("content-type", kind).body("{\"prompt\": \"a\"}");
        assert_eq!(error(request.send().await.unwrap()).await, 415, "{kind}");
    }
}

/// Reads until the server closes the connection.
async fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A reset is an end, too.
    let _ = tokio::time::timeout(PATIENCE / 2, stream.read_to_end(&mut bytes)).await.expect("the server hangs up");
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn slow(api: Api) {
    let start = Instant::now();
    let mut headers = TcpStream::connect(api.address()).await.unwrap();
    headers.write_all(b"GET /health HTTP/1.1\r\nHost:").await.unwrap();
    let silent = TcpStream::connect(api.address()).await.unwrap();
    let mut idle = TcpStream::connect(api.address()).await.unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut body = TcpStream::connect(api.address()).await.unwrap();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n\
         Content-Length: 20\r\n\r\n{{\"prompt\""
    );
    body.write_all(head.as_bytes()).await.unwrap();
    let (headers, silent, idle, body) =
        futures_util::future::join4(rest(headers), rest(silent), rest(idle), rest(body)).await;
    assert!(start.elapsed() >= HEADER_TIMEOUT);
    assert!(!headers.contains("200") && silent.is_empty(), "{headers:?} {silent:?}");
    assert!(idle.starts_with("HTTP/1.1 200") && body.starts_with("HTTP/1.1 408"), "{idle:?} {body:?}");
    assert!(body.contains("request_timeout"), "{body}");
    // No HTTP at all.
    let mut noise = TcpStream::connect(api.address()).await.unwrap();
    noise.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").await.unwrap();
    assert!(rest(noise).await.starts_with("HTTP/1.1 400"));
    let mut long = TcpStream::connect(api.address()).await.unwrap();
    let _ = long.write_all(&[&b"GET /health HTTP/1.1\r\nA: "[..], &[b'a'; 256 << 10]].concat()).await;
    let long = rest(long).await;
    assert!(long.is_empty() || long.starts_with("HTTP/1.1 431"), "{long}");
}

async fn observed(api: Api) {
    assert_eq!(api.get("/health").await, (200, json!({ "status": "ok" })));
    let count = "folio_requests_total{endpoint=\"/v1/completions\",outcome=\"ok\"}";
    let before = (api.metric(count).await, api.metric("folio_tokens_total{kind=\"generated\"}").await);
    let response = api.send(COMPLETIONS, &json!({ "prompt": "Once", "max_tokens": 6, "ignore_eos": true })).await;
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(response.json::<Value>().await.unwrap()["id"], format!("cmpl-{id}"));
    api.wait_for(count, |value| value > before.0).await;
    assert!(api.metric("folio_tokens_total{kind=\"generated\"}").await >= before.1 + 6.0);
    for name in ["time_to_first_token", "token_gap", "request_time"] {
        assert!(api.metric(&format!("folio_{name}_seconds_count")).await > 0.0, "{name}");
        assert!(api.metric(&format!("folio_{name}_seconds_sum")).await > 0.0, "{name}");
    }
    let state = async |state| api.metric(&format!("folio_pool_blocks{{state=\"{state}\"}}")).await;
    // 8 sequences of 1024 positions in blocks of 16. Others run meanwhile, so only their sum is the same in one scrape; each is from one of its own.
    assert!(state("free").await > 0.0 && state("free").await <= 8.0 * 65.0);
    let log = api.server.log();
    let line = log.lines().find(|line| line.contains(&id)).unwrap_or_else(|| panic!("{id}: {log}"));
    for part in ["POST", "/v1/completions", "status=200", "new_tokens=6"] {
        assert!(line.contains(part), "{line}");
    }
    assert!(!log.contains("Once"), "prompts are not logged");
}
