//! The end: what runs is finished, what comes is refused.

use futures_util::{FutureExt, StreamExt};
use serde_json::{Value, json};

use super::harness::{Api, Test};

#[cfg(unix)]
pub(crate) const TESTS: &[Test] = &[("stop::a_server_that_stops_finishes_what_runs", |api| stop(api).boxed())];
#[cfg(not(unix))]
pub(crate) const TESTS: &[Test] = &[];

#[cfg(unix)]
async fn stop(api: Api) {
    let body = json!({ "prompt": [1], "max_tokens": 300, "ignore_eos": true });
    let mut events = api.events("/v1/completions", body).await;
    assert!(events.next().await.is_some());
    // A connection of old, and later a new one.
    assert_eq!(api.get("/health").await.0, 200);
    api.server.terminate();
    let refused = loop {
        let (status, reply) = api.post("/v1/completions", json!({ "prompt": "Once", "max_tokens": 1 })).await;
        if status != 200 {
            break (status, reply);
        }
    };
    assert_eq!((refused.0, &refused.1["error"]["code"]), (503, &json!("shutting_down")));
    assert_eq!(api.get("/health").await, (503, json!({ "status": "stopping" })));
    let rest: Vec<_> = events.collect().await;
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"));
    let last: Value = serde_json::from_str(&rest[rest.len() - 2]).unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(api.server.exit_code().await, Some(0));
    assert!(api.http.get(api.url("/health")).send().await.is_err(), "nobody listens any more");
    let log = api.server.log();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
}
