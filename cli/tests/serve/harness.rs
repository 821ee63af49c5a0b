//! The server as a child, and a client for it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use eventsource_stream::Eventsource;
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt};
use reqwest::header::{HeaderMap, HeaderValue};
use serde_json::{Value, json};

/// A name, and what is done.
pub(crate) type Test = (&'static str, fn(Api) -> BoxFuture<'static, ()>);

/// What clients send, at least those that may.
pub(crate) const KEY: &str = "a-key-of-24-characters-ok";
pub(crate) const MAX_RUNNING: usize = 4;
pub(crate) const MAX_QUEUED: usize = 48;
pub(crate) const MAX_CHOICES: usize = 60;
pub(crate) const MAX_BODY: usize = 128 << 10;
pub(crate) const HEADER_TIMEOUT: Duration = Duration::from_secs(2);

/// Nothing here may hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The child. It is killed when this goes.
pub(crate) struct Server {
    child: Mutex<Child>,
    base: String,
    log: Arc<Mutex<String>>,
    runtime: tokio::runtime::Runtime,
}

impl Server {
    /// `None` if there is no adapter, and none is required.
    pub(crate) fn start() -> Option<Self> {
        let numbers = [
            ("--port", 0),
            ("--max-running", MAX_RUNNING),
            ("--max-queued", MAX_QUEUED),
            ("--max-choices", MAX_CHOICES),
            ("--max-body", MAX_BODY),
            ("--header-read-timeout", HEADER_TIMEOUT.as_secs() as usize),
            ("--body-read-timeout", 3),
            ("--write-timeout", 3),
            ("--shutdown-timeout", 30),
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_folio"));
        command.arg("serve").args(numbers.iter().flat_map(|(name, value)| [(*name).to_owned(), value.to_string()]));
        command.env("FOLIO_API_KEY", format!("another-key,{KEY}")).env_remove("RUST_LOG").stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (listening, port) = mpsc::channel();
        let log = Arc::new(Mutex::new(String::new()));
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if let Some(base) = line.strip_prefix("listening on ") {
                    let _ = listening.send(base.to_owned());
                }
                *lines.lock().unwrap() += &(line + "\n");
            }
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        match port.recv_timeout(PATIENCE) {
            Ok(base) => Some(Self { child: Mutex::new(child), base, log, runtime }),
            Err(error) => {
                let _ = child.kill();
                let log = log.lock().unwrap().clone();
                let is_required = std::env::var("FOLIO_REQUIRE_GPU").is_ok_and(|value| value == "1");
                assert!(log.contains("found no adapter") && !is_required, "{error}: {log}");
                eprintln!("skipped: {log}");
                None
            }
        }
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Runs a test. Its tasks go on after it.
    pub(crate) fn run(self: &Arc<Self>, test: fn(Api) -> BoxFuture<'static, ()>) {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_str(&format!("Bearer {KEY}")).unwrap());
        let http = reqwest::Client::builder().default_headers(headers).timeout(PATIENCE).build().unwrap();
        let api = Api { base: self.base.clone(), http, server: Arc::clone(self) };
        self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, test(api)).await.expect("a test must not hang");
        });
    }

    #[cfg(unix)]
    pub(crate) fn terminate(&self) {
        let pid = self.child.lock().unwrap().id();
        assert!(Command::new("kill").args(["-TERM", &pid.to_string()]).status().unwrap().success());
    }

    /// The exit code, once the server has ended.
    pub(crate) async fn exit_code(&self) -> Option<i32> {
        loop {
            if let Some(status) = self.child.lock().unwrap().try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A client.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) base: String,
    pub(crate) http: reqwest::Client,
    pub(crate) server: Arc<Server>,
}

/// What a choice was.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) finish_reason: String,
}

impl Api {
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Where the server listens, for those who speak no proper HTTP.
    pub(crate) fn address(&self) -> &str {
        self.base.strip_prefix("http://").unwrap()
    }

    pub(crate) async fn send(&self, path: &str, body: &Value) -> reqwest::Response {
        self.http.post(self.url(path)).json(body).send().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let response = self.send(path, &body).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.http.get(self.url(path)).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// The choices of a request that goes well, and the whole reply.
    pub(crate) async fn choices(&self, path: &str, body: Value) -> (Vec<Choice>, Value) {
        let (status, reply) = self.post(path, body).await;
        assert_eq!(status, 200, "{reply}");
        let choice = |(i, choice): (usize, &Value)| {
            assert_eq!(choice["index"], i);
            let text = choice.get("text").unwrap_or_else(|| &choice["message"]["content"]);
            let finish_reason = choice["finish_reason"].as_str().unwrap().to_owned();
            Choice { text: text.as_str().unwrap().to_owned(), finish_reason }
        };
        (reply["choices"].as_array().unwrap().iter().enumerate().map(choice).collect(), reply)
    }

    /// The data of a stream's events.
    pub(crate) async fn events(&self, path: &str, mut body: Value) -> impl Stream<Item = String> + Unpin + use<> {
        body["stream"] = json!(true);
        let response = self.send(path, &body).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Box::pin(response.bytes_stream().eventsource().map(|event| event.unwrap().data))
    }

    /// The choices of a request as a stream, put together, and the chunks.
    pub(crate) async fn streamed(&self, path: &str, body: Value) -> (Vec<Choice>, Vec<Value>) {
        let mut events: Vec<_> = self.events(path, body).await.collect().await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        let chunks: Vec<Value> = events.iter().map(|data| serde_json::from_str(data).unwrap()).collect();
        let mut choices: Vec<Choice> = Vec::new();
        for piece in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
            let index = piece["index"].as_u64().unwrap() as usize;
            choices.resize_with(choices.len().max(index + 1), Choice::default);
            let choice = &mut choices[index];
            assert_eq!(choice.finish_reason, "", "nothing comes after the end");
            let text = piece.get("text").or_else(|| piece["delta"].get("content"));
            choice.text += text.map_or("", |text| text.as_str().unwrap());
            choice.finish_reason += piece["finish_reason"].as_str().unwrap_or("");
        }
        (choices, chunks)
    }

    /// A request that is refused: its status and the error.
    pub(crate) async fn refused(&self, path: &str, body: Value) -> (u16, Value) {
        let (status, mut reply) = self.post(path, body).await;
        let error = reply["error"].take();
        check_error(status, &error);
        (status, error)
    }

    /// A sample of the server's metrics; 0 if it isn't there yet.
    pub(crate) async fn metric(&self, sample: &str) -> f64 {
        let response = self.http.get(self.url("/metrics")).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let text = response.text().await.unwrap();
        assert!(text.ends_with("# EOF\n"), "{text}");
        let value = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a sample has a value.
    pub(crate) async fn wait_for(&self, sample: &str, is_right: impl Fn(f64) -> bool) {
        let start = Instant::now();
        loop {
            let value = self.metric(sample).await;
            if is_right(value) {
                return;
            }
            assert!(start.elapsed() < PATIENCE / 2, "{sample} is {value}");
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    }
}

/// An error is as OpenAI's clients read it.
pub(crate) fn check_error(status: u16, error: &Value) {
    assert!((400..600).contains(&status), "{status}: {error}");
    let message = error["message"].as_str().unwrap_or_else(|| panic!("{status}: {error}"));
    assert!(!message.is_empty() && message.len() < 2000, "{message}");
    assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(), "{error}");
}
