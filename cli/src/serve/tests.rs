//! What can't be brought about from outside: a request whose time is up, and a device that is lost.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body as HttpBody;
use axum::http::{Request, StatusCode};
use axum::response::Response;
use clap::Parser;
use futures_util::StreamExt;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::http::router;
use super::wire::Body;
use super::{Options, start};
use crate::load::load;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

fn options(arguments: &[&str]) -> Options {
    Arguments::parse_from(["folio"].iter().chain(arguments)).options
}

async fn send(router: &Router, path: &str, body: Value) -> Response {
    let request = Request::post(path).header("content-type", "application/json");
    router.clone().oneshot(request.body(HttpBody::from(body.to_string())).unwrap()).await.unwrap()
}

async fn read(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap())
}

async fn get(router: &Router, path: &str) -> (StatusCode, Vec<u8>) {
    let request = Request::get(path).body(HttpBody::empty()).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    (response.status(), response.into_body().collect().await.unwrap().to_bytes().to_vec())
}

#[tokio::test]
async fn a_request_whose_time_is_up_and_a_device_that_is_lost_are_errors() {
    let options = options(&["--blocks", "80", "--request-timeout", "0.2"]);
    let loaded = match load(&options.load, 1, |decoder| decoder.prefix_cache = true) {
        Ok(loaded) => loaded,
        Err(error) => {
            let is_required = std::env::var("FOLIO_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(format!("{error:#}").contains("found no adapter") && !is_required, "{error:#}");
            return;
        }
    };
    let gpu = loaded.gpu.clone();
    let (mut server, engine) = start(loaded, &options).unwrap();
    let long = json!({ "prompt": [1], "max_tokens": 1000, "ignore_eos": true });
    let stream = json!({ "prompt": [1], "max_tokens": 1000, "ignore_eos": true, "stream": true });

    let timed = router(Arc::clone(&server));
    let (status, reply) = read(send(&timed, "/v1/completions", long.clone()).await).await;
    assert_eq!((status, &reply["error"]["code"]), (StatusCode::GATEWAY_TIMEOUT, &json!("timeout")), "{reply}");
    let response = send(&timed, "/v1/completions", stream.clone()).await;
    assert_eq!(response.status(), StatusCode::OK);
    let events = response.into_body().collect().await.unwrap().to_bytes();
    let events = String::from_utf8(events.to_vec()).unwrap();
    let last = events.trim_end().lines().last().unwrap();
    let last: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "timeout", "{events}");
    drop(timed);

    Arc::get_mut(&mut server).expect("all requests have ended").limits.request_timeout = Duration::from_secs(100);
    let router = router(Arc::clone(&server));
    assert_eq!(get(&router, "/health").await.0, StatusCode::OK);
    let mut events = send(&router, "/v1/completions", stream).await.into_body().into_data_stream();
    let first = events.next().await.unwrap().unwrap();
    assert!(first.starts_with(b"data: {\"id\""));
    let whole = {
        let (router, long) = (router.clone(), long.clone());
        tokio::spawn(async move { read(send(&router, "/v1/completions", long).await).await })
    };
    gpu.device().destroy();
    // The one that streams, one that was on its way or came too late, and one that surely came too late.
    let mut text = String::new();
    while let Some(event) = events.next().await {
        text += std::str::from_utf8(&event.unwrap()).unwrap();
    }
    assert!(text.contains("\"engine_failed\"") && !text.contains("[DONE]"), "{text}");
    let (status, reply) = whole.await.unwrap();
    assert_eq!((status, &reply["error"]["code"]), (StatusCode::INTERNAL_SERVER_ERROR, &json!("engine_failed")));
    let start = Instant::now();
    while server.client.is_running() {
        assert!(start.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (status, reply) = read(send(&router, "/v1/completions", long).await).await;
    assert_eq!((status, &reply["error"]["type"]), (StatusCode::INTERNAL_SERVER_ERROR, &json!("server_error")));
    assert_eq!(get(&router, "/health").await, (StatusCode::SERVICE_UNAVAILABLE, b"{\"status\":\"failed\"}".to_vec()));
    let (status, metrics) = get(&router, "/metrics").await;
    let metrics = String::from_utf8(metrics).unwrap();
    assert_eq!(status, StatusCode::OK);
    for outcome in ["timeout", "failed"] {
        let sample = format!("folio_requests_total{{endpoint=\"/v1/completions\",outcome=\"{outcome}\"}}");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&sample)).unwrap_or_else(|| panic!("{metrics}"));
        assert!(count.trim().parse::<u32>().unwrap() >= 2, "{outcome} {count}");
    }
    tokio::task::spawn_blocking(move || engine.finish().unwrap_err()).await.unwrap();
}

#[test]
fn options_are_checked() {
    let parse = |arguments: &[&str]| Arguments::try_parse_from(["folio"].iter().chain(arguments));
    let lookup = |arguments: &[&str]| options(arguments).prompt_lookup;
    assert_eq!((lookup(&[]), lookup(&["--prompt-lookup"]), lookup(&["--prompt-lookup=3"])), (None, Some(1), Some(3)));
    let keys = options(&["--api-key", "a,b", "--api-key", "c"]).api_key;
    assert_eq!(keys, ["a", "b", "c"]);
    for wrong in [
        ["--api-key", ""],
        ["--api-key", "a,,b"],
        ["--api-key", "with space"],
        ["--request-timeout", "0"],
        ["--request-timeout", "NaN"],
        ["--request-timeout", "1e30"],
        ["--write-timeout", "-1"],
        ["--max-body", "0"],
        ["--max-queued", "0"],
        ["--port", "65536"],
        ["--watch", "--prompt-lookup=0"],
        ["--watch", "--prompt-lookup=17"],
        ["--log", "folio=loud"],
    ] {
        assert!(parse(&wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn stops_and_sampling_are_read() {
    let body = json!({ "stop": ["a", "b"], "seed": -1, "top_k": 0, "max_tokens": 5, "max_completion_tokens": 7 });
    let mut body = Body::parse(body.to_string().as_bytes()).unwrap();
    assert_eq!((body.stop_strings().unwrap(), body.max_tokens()), (vec!["a".to_owned(), "b".to_owned()], Some(7)));
    let sampling = body.sampling();
    assert_eq!((sampling.seed, sampling.top_k, sampling.temperature), (u64::MAX, None, 1.0));
    let body = json!({ "seed": u64::MAX, "top_k": 1_u64 << 40 });
    let sampling = Body::parse(body.to_string().as_bytes()).unwrap().sampling();
    assert_eq!((sampling.seed, sampling.top_k), (u64::MAX, Some(u32::MAX)));
}
