//! `folio serve`: OpenAI's HTTP interface on the engine.
//!
//! axum has the routes and hyper the connections. A body is read and cut into tokens beside the reactor ([`prompt`]), goes to the engine, which
//! has a thread of its own, and comes back as a stream of events ([`answer`]).

mod answer;
mod error;
mod http;
mod listen;
mod logprobs;
mod metrics;
mod prompt;
mod reply;
mod state;
#[cfg(test)]
mod tests;
mod track;
mod watched;
mod wire;

use std::io::IsTerminal;
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};
use folio::engine::{Engine, EngineHandle, EngineOptions, PromptLookup};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use tracing_subscriber::EnvFilter;

use crate::load::{LoadOptions, Loaded, load};
use crate::watch;
use listen::ConnectionLimits;
use metrics::Metrics;
use state::{Limits, ModelCard, Permits, Server};

/// Serves a model over HTTP, by OpenAI's interface
///
/// POST /v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics (Prometheus). SIGINT or SIGTERM stops it when the
/// requests that run have finished, a second one at once.
#[derive(Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    #[command(flatten)]
    load: LoadOptions,

    /// Address to listen on; 0.0.0.0 for all
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    host: String,
    /// Port to listen on; 0 takes a free one, which stderr says
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Draw the cache's blocks and the requests on the terminal; q or Ctrl-C stops the server. Logs only where --log asks for them
    #[arg(long)]
    watch: bool,
    /// Guess the next tokens by what followed the last ones before; for answers that repeat their prompt. N: that many different guesses at a
    /// time, which are checked together [default: 1]. With --exact only the first is
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1", require_equals = true, value_parser = clap::value_parser!(u8).range(1..=16))]
    prompt_lookup: Option<u8>,
    /// A key that clients must send; may be given several times. In the environment: separated by commas
    #[arg(long, value_name = "KEY", env = "FOLIO_API_KEY", hide_env_values = true, value_delimiter = ',', value_parser = key)]
    api_key: Vec<String>,
    /// What goes to stderr, as in info, or warn,folio=debug [default: RUST_LOG, else warn,folio=info]
    #[arg(long, value_name = "FILTER", value_parser = |text: &str| EnvFilter::try_new(text).map(|_| text.to_owned()))]
    log: Option<String>,

    /// Answers that are computed at the same time
    #[arg(long, default_value_t = 64, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..))]
    max_running: u32,
    /// Answers that wait; more are refused with 429
    #[arg(long, default_value_t = 256, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..))]
    max_queued: u32,
    /// Tokens that go through the model in one step
    #[arg(long, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..))]
    max_step_tokens: Option<u32>,
    /// Tokens of a prompt [default: the model's positions]
    #[arg(long, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..))]
    max_prompt_tokens: Option<u32>,
    /// Answers to one request: its prompts times n
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..))]
    max_choices: u32,
    /// Bytes of the body of a request
    #[arg(long, default_value_t = 4 << 20, value_name = "BYTES", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    max_body: u32,
    /// Open connections; more wait
    #[arg(long, default_value_t = 512, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_connections: u32,
    /// Seconds for a request, waiting included
    #[arg(long, default_value = "600", value_name = "SECONDS", help_heading = "Limits", value_parser = seconds)]
    request_timeout: Duration,
    /// Seconds for the headers of a request, and for the next request on an open connection
    #[arg(long, default_value = "30", value_name = "SECONDS", help_heading = "Limits", value_parser = seconds)]
    header_read_timeout: Duration,
    /// Seconds for the body of a request
    #[arg(long, default_value = "30", value_name = "SECONDS", help_heading = "Limits", value_parser = seconds)]
    body_read_timeout: Duration,
    /// Seconds for a client to read some of what is sent
    #[arg(long, default_value = "30", value_name = "SECONDS", help_heading = "Limits", value_parser = seconds)]
    write_timeout: Duration,
    /// Seconds for the requests that run when the server is told to stop
    #[arg(long, default_value = "60", value_name = "SECONDS", help_heading = "Limits", value_parser = seconds)]
    shutdown_timeout: Duration,
}

const EXAMPLES: &str = "\
Examples:
  folio serve
  folio serve --model ~/models/Qwen3-0.6B --port 8000
  FOLIO_API_KEY=secret folio serve --host 0.0.0.0

  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \\
       -d '{\"prompt\": \"Once upon a time\", \"max_tokens\": 50}'";

/// Sequences of full length that the cache has room for by default.
const SEQUENCES: u32 = 8;

/// What is logged unless somebody says otherwise. wgpu tells much that is none of an operator's business.
const DEFAULT_LOG: &str = "warn,folio=info";

fn key(text: &str) -> Result<String, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("need a key of visible ASCII characters, at least one".to_owned());
    }
    Ok(text.to_owned())
}

/// A time that is more than nothing.
fn seconds(text: &str) -> Result<Duration, String> {
    /// What the clocks of all systems can add.
    const MOST: f64 = 1e7;
    let seconds: f64 = text.parse().map_err(|_| format!("got {text:?}, need a number of seconds"))?;
    if !(0.001..=MOST).contains(&seconds) {
        return Err(format!("got {text}, need 0.001 to {MOST} seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

pub(crate) fn run(options: Options) -> ExitCode {
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &Options) -> Result<()> {
    if options.watch {
        watch::check_terminal()?;
    }
    if !options.watch || options.log.is_some() {
        log_to_stderr(options)?;
    }
    // First, since it is over in no time if somebody else has the port. Clients that come too early wait until the model is loaded.
    let listener = TcpListener::bind((options.host.as_str(), options.port))
        .with_context(|| format!("listening on {}, port {}", options.host, options.port))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let loaded = load(&options.load, SEQUENCES, |decoder| {
        decoder.prefix_cache = true;
        decoder.max_step_tokens = options.max_step_tokens.unwrap_or(decoder.max_step_tokens);
    })?;
    let (server, engine) = start(loaded, options)?;
    let limits = ConnectionLimits {
        max_connections: options.max_connections as usize,
        header_timeout: options.header_read_timeout,
        write_timeout: options.write_timeout,
        shutdown_timeout: options.shutdown_timeout,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let watcher = options.watch.then(|| watched::spawn(Arc::clone(&server), address)).transpose()?;
    let served = runtime.block_on(listen::serve(listener, server, engine, limits));
    let watched = watcher.map_or(Ok(()), watched::Watcher::end);
    // What still reads a body when all clients have gone is of no use.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served.and(watched)
}

/// The engine, and what requests share.
fn start(loaded: Loaded, options: &Options) -> Result<(Arc<Server>, EngineHandle)> {
    let Loaded { gpu, decoder, tokenizer, template, name, stop_tokens } = loaded;
    let max_positions = decoder.model().config().max_positions;
    let max_cached_tokens = decoder.cache().config().longest_sequence(decoder.options().max_step_tokens);
    let mut engine_options = EngineOptions::default();
    engine_options.max_running = options.max_running;
    engine_options.max_queued = options.max_queued;
    let mut engine = Engine::new(decoder, Some(tokenizer.clone()), engine_options)?;
    if let Some(branches) = options.prompt_lookup {
        let mut lookup = PromptLookup::default();
        lookup.branches = branches.into();
        engine = engine.with_proposer(lookup);
    }
    let engine = engine.spawn()?;
    let server = Server {
        client: engine.client(),
        longest_token: Server::longest_token(&tokenizer),
        tokenizer,
        template,
        model: ModelCard::new(name, max_positions),
        stop_tokens,
        max_cached_tokens,
        limits: Limits {
            max_body: options.max_body as usize,
            max_prompt_tokens: options.max_prompt_tokens.unwrap_or(max_positions).min(max_positions),
            max_choices: options.max_choices,
            request_timeout: options.request_timeout,
            body_timeout: options.body_read_timeout,
        },
        keys: options.api_key.clone(),
        metrics: Metrics::new(),
        requests: TaskTracker::new(),
        is_stopping: AtomicBool::new(false),
        stop_wish: Notify::new(),
        permits: Permits::new(),
        inspection: Arc::default(),
    };
    tracing::info!(
        model = %server.model.name,
        adapter = %gpu.adapter_info().name,
        positions = max_positions,
        cached_tokens = max_cached_tokens,
        chat_template = server.template.is_some(),
        keys = server.keys.len(),
        "ready"
    );
    Ok((Arc::new(server), engine))
}

fn log_to_stderr(options: &Options) -> Result<()> {
    let filter = match &options.log {
        Some(filter) => EnvFilter::try_new(filter)?,
        None if std::env::var_os(EnvFilter::DEFAULT_ENV).is_some() => EnvFilter::try_from_default_env()?,
        None => EnvFilter::try_new(DEFAULT_LOG)?,
    };
    let wants_colour =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let installed = subscriber.with_ansi(wants_colour).try_init();
    installed.map_err(|error| anyhow::anyhow!("log: {error}"))
}
