//! Clients that leave, and more of them than there is room for.

use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::harness::{Api, KEY, MAX_QUEUED, MAX_RUNNING, Test};

const COMPLETIONS: &str = "/v1/completions";

pub(crate) const TESTS: &[Test] = &[
    ("load::a_full_queue_refuses_and_serves_on", |api| full(api).boxed()),
    ("load::whoever_hangs_up_frees_blocks", |api| gone(api).boxed()),
    ("load::a_slow_reader_holds_nobody_up", |api| slow_reader(api).boxed()),
];

/// The longest there is.
fn long(stream: bool) -> Value {
    json!({ "prompt": [1], "max_tokens": 1000, "ignore_eos": true, "stream": stream })
}

/// Sends a request, and reads nothing.
async fn send_raw(api: &Api, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

const RUNNING: &str = "folio_answers{phase=\"running\"}";
const WAITING: &str = "folio_answers{phase=\"waiting\"}";
const USED: &str = "folio_pool_blocks{state=\"used\"}";

/// A full queue is 429, and those who hold it are served all the same.
async fn full(api: Api) {
    let mut running = Vec::new();
    for _ in 0..MAX_RUNNING {
        let mut events = api.events(COMPLETIONS, long(true)).await;
        assert!(events.next().await.is_some());
        running.push(events);
    }
    let half = json!({ "prompt": vec![[1]; MAX_QUEUED / 2], "max_tokens": 1 });
    let waiting = [(); 2].map(|()| {
        let (api, body) = (api.clone(), half.clone());
        tokio::spawn(async move { api.choices(COMPLETIONS, body).await.0.len() })
    });
    api.wait_for(WAITING, |waiting| waiting == MAX_QUEUED as f64).await;
    let refused = api.send(COMPLETIONS, &half).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    let error = refused.json::<Value>().await.unwrap();
    assert_eq!((&error["error"]["code"], &error["error"]["type"]), (&json!("queue_full"), &json!("rate_limit_error")));
    drop(running);
    for answers in waiting {
        assert_eq!(answers.await.unwrap(), MAX_QUEUED / 2);
    }
}

/// Whoever hangs up frees what the answer held, in every phase of it.
async fn gone(api: Api) {
    let endpoint = "endpoint=\"/v1/completions\"";
    let cancelled = format!("folio_requests_total{{{endpoint},outcome=\"cancelled\"}}");
    let before = api.metric(&cancelled).await;
    // Streams that have begun, and some that wait.
    let body = long(true);
    let open = join_all((0..MAX_RUNNING + 2).map(|_| api.send(COMPLETIONS, &body))).await;
    api.wait_for(USED, |used| used > 0.0).await;
    drop(open);
    // One that isn't streamed: only the connection says that the client has gone.
    let whole = send_raw(&api, &long(false)).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    drop(whole);
    api.wait_for(RUNNING, |running| running == 0.0).await;
    api.wait_for(WAITING, |waiting| waiting == 0.0).await;
    api.wait_for(USED, |used| used == 0.0).await;
    let least = before + MAX_RUNNING as f64 + 3.0;
    api.wait_for(&cancelled, |count| count >= least).await;
}

/// A client that reads nothing keeps nobody else from being served, and is cut off where its answers don't fit on the way.
async fn slow_reader(api: Api) {
    let mut body = long(true);
    body["max_tokens"] = json!(250);
    let mut readers = Vec::new();
    for _ in 0..MAX_RUNNING {
        readers.push(send_raw(&api, &body).await);
    }
    api.wait_for(RUNNING, |running| running == MAX_RUNNING as f64).await;
    // One that asks on and on meanwhile, and reads nothing of what it gets.
    let (mut reader, mut writer) = TcpStream::connect(api.address()).await.unwrap().into_split();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n\r\n").repeat(100);
    let asked = tokio::spawn(async move {
        let mut sent = 0;
        while writer.write_all(request.as_bytes()).await.is_ok() {
            sent += 100;
        }
        sent
    });
    let (choices, _) = api.choices(COMPLETIONS, json!({ "prompt": "Once", "max_tokens": 5 })).await;
    assert_eq!(choices.len(), 1);
    api.wait_for(USED, |used| used == 0.0).await;
    // All that was made for them is on its way.
    for mut reader in readers {
        let mut text = String::new();
        reader.read_to_string(&mut text).await.unwrap();
        assert!(text.contains("data: [DONE]"), "{text}");
    }
    let sent = asked.await.unwrap();
    let mut answered = Vec::new();
    let _ = reader.read_to_end(&mut answered).await;
    let answered = String::from_utf8_lossy(&answered).matches("HTTP/1.1 200").count();
    assert!(answered < sent, "{answered} of {sent} requests are answered");
}
