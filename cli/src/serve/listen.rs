//! Connections, and how the server stops.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use folio::engine::EngineHandle;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_io_timeout::TimeoutStream;

use super::http::router;
use super::state::Server;

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionLimits {
    pub(crate) max_connections: usize,
    /// For the headers of a request, also of the next one on an open connection.
    pub(crate) header_timeout: Duration,
    /// For a client to take anything of what is sent.
    pub(crate) write_timeout: Duration,
    /// For what runs when the server is told to stop.
    pub(crate) shutdown_timeout: Duration,
}

/// Bytes of the headers of a request, at most.
const MAX_HEADER_BYTES: usize = 32 << 10;

/// A connection reads so much ahead, at most.
const MAX_BUFFER: usize = 128 << 10;

/// How long connections may take to send what is left when everything has ended.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// How long the server waits when the system has no more sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves until the process is told to stop, and everything has ended.
///
/// # Errors
/// If the system has no signals, or the engine had failed.
pub(crate) async fn serve(
    listener: std::net::TcpListener,
    server: Arc<Server>,
    engine: EngineHandle,
    limits: ConnectionLimits,
) -> Result<()> {
    let listener = TcpListener::from_std(listener).context("listening")?;
    let mut signals = Signals::new().context("listening for signals")?;
    let address = listener.local_addr().context("listening")?;
    eprintln!("listening on http://{address}");
    let slots = Arc::new(Semaphore::new(limits.max_connections));
    let connections = GracefulShutdown::new();
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_header_size(MAX_HEADER_BYTES)
        .max_buf_size(MAX_BUFFER);
    let service = TowerToHyperService::new(router(Arc::clone(&server)));

    // While it stops it goes on accepting: whoever comes is told so.
    let mut deadline = None;
    let is_forced = loop {
        tokio::select! {
            biased;
            () = async { tokio::select! { () = signals.next() => {}, () = server.stop_wish.notified() => {} } } => {
                if deadline.is_some() {
                    break true;
                }
                tracing::info!("stopping: running requests finish, new ones are refused");
                server.stop();
                deadline = Some(Instant::now() + limits.shutdown_timeout);
            }
            () = server.requests.wait() => break false,
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => break true,
            accepted = accept(&listener, &slots) => match accepted {
                Ok((stream, slot)) => {
                    let mut stream = TimeoutStream::new(stream);
                    stream.set_write_timeout(Some(limits.write_timeout));
                    let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), service.clone());
                    let connection = connections.watch(connection);
                    let open = OpenConnection::new(Arc::clone(&server), slot);
                    tokio::spawn(async move {
                        if let Err(error) = connection.await {
                            // Clients go as they like.
                            tracing::debug!(%error, "connection");
                        }
                        drop(open);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "no connection accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    };
    drop(listener);
    if is_forced {
        tracing::warn!("stopping now: requests that run are ended");
    }
    // It waits for the step that runs now.
    let end = tokio::task::spawn_blocking(move || if is_forced { engine.shutdown() } else { engine.finish() });
    let ended = timeout(limits.shutdown_timeout.max(FLUSH_TIME), end).await;
    if timeout(FLUSH_TIME, connections.shutdown()).await.is_err() {
        tracing::warn!("connections are closed that have not sent everything");
    }
    ended.context("the engine does not end")?.context("the engine's thread")?.context("the engine had failed")?;
    Ok(())
}

/// A connection, once there is room for it: until then it waits in the system's queue.
async fn accept(listener: &TcpListener, slots: &Arc<Semaphore>) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Tokens go out one by one. It fails where the client has gone already, which shows soon enough.
    let _ = stream.set_nodelay(true);
    Ok((stream, slot))
}

/// Counts a connection as long as it is open.
struct OpenConnection {
    server: Arc<Server>,
    _slot: OwnedSemaphorePermit,
}

impl OpenConnection {
    fn new(server: Arc<Server>, slot: OwnedSemaphorePermit) -> Self {
        server.metrics.connections.inc();
        Self { server, _slot: slot }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.server.metrics.connections.dec();
    }
}

/// What tells the process to stop.
#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// What tells the process to stop.
#[cfg(windows)]
struct Signals {
    interrupt: tokio::signal::windows::CtrlC,
    close: tokio::signal::windows::CtrlClose,
}

#[cfg(windows)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::windows::{ctrl_c, ctrl_close};
        Ok(Self { interrupt: ctrl_c()?, close: ctrl_close()? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.close.recv() => {}
        }
    }
}
