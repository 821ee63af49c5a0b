//! [`Engine::spawn`]: a thread that steps an engine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use futures_channel::oneshot;

use super::{Answer, Engine, Failure, Inspection, Request, SubmitError};
use crate::model::{Decoder, ModelError, ModelResult};

/// What a handle asks of the thread.
enum Command {
    Submit(Box<Request>, oneshot::Sender<Result<Answer, SubmitError>>),
    SubmitMany(Box<Request>, u32, oneshot::Sender<Result<Vec<Answer>, SubmitError>>),
    Inspect(oneshot::Sender<Inspection>),
    /// Runs what is there, and takes nothing new.
    Finish,
    /// Ends what is there.
    Shutdown,
}

/// An engine on a thread of its own. Dropping it ends all requests, and waits for the thread.
#[derive(Debug)]
pub struct EngineHandle {
    commands: Sender<Command>,
    status: Arc<Status>,
    thread: Option<JoinHandle<(ModelResult<()>, Decoder)>>,
}

/// Hands requests to a spawned engine. Cheap to clone, and can be sent to other threads.
#[derive(Clone, Debug)]
pub struct EngineClient {
    commands: Sender<Command>,
    status: Arc<Status>,
}

/// How the thread is, for those who ask without waiting for it.
#[derive(Debug, Default)]
struct Status {
    has_ended: AtomicBool,
    failure: OnceLock<Failure>,
}

/// Notes that the thread has ended, also where it panics.
struct EndNote(Arc<Status>);

impl Drop for EndNote {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::Release);
    }
}

impl Engine {
    /// Moves the engine to a thread that steps it as long as there are requests, and sleeps otherwise.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if the system has no thread for it.
    pub fn spawn(self) -> ModelResult<EngineHandle> {
        let (commands, inbox) = channel();
        let status = Arc::new(Status::default());
        let note = EndNote(Arc::clone(&status));
        let thread = std::thread::Builder::new()
            .name("folio engine".to_owned())
            .spawn(move || run(self, &inbox, &note))
            .map_err(|error| ModelError::argument("thread", error, "a thread of the system's"))?;
        Ok(EngineHandle { commands, status, thread: Some(thread) })
    }
}

/// Commands that a busy engine takes between two steps, so that callers who keep trying don't keep it from stepping.
const MAX_COMMANDS: u32 = 64;

/// The thread. Ends when it is told to, which dropping the handle does, or when the device fails.
fn run(mut engine: Engine, inbox: &Receiver<Command>, note: &EndNote) -> (ModelResult<()>, Decoder) {
    let gpu = engine.gpu().clone();
    let mut is_open = true;
    let mut num_taken = 0;
    let mut result = Ok(());
    while is_open || !engine.is_idle() {
        // An idle engine waits; a busy one looks whether there is something new, but not for ever.
        let command = if engine.is_idle() {
            inbox.recv().map_err(|_| TryRecvError::Disconnected)
        } else if num_taken >= MAX_COMMANDS {
            Err(TryRecvError::Empty)
        } else {
            inbox.try_recv()
        };
        num_taken += 1;
        match command {
            // A caller that has gone already costs no more than this.
            Ok(Command::Submit(_, reply)) if reply.is_canceled() => continue,
            Ok(Command::SubmitMany(_, _, reply)) if reply.is_canceled() => continue,
            Ok(Command::Inspect(reply)) if reply.is_canceled() => continue,
            Ok(Command::Submit(request, reply)) => {
                let answer = if is_open { engine.submit(*request) } else { Err(SubmitError::Shutdown) };
                // A caller that has gone drops the answer, which cancels the request.
                let _ = reply.send(answer);
                continue;
            }
            Ok(Command::SubmitMany(request, count, reply)) => {
                let answers = if is_open { engine.submit_many(*request, count) } else { Err(SubmitError::Shutdown) };
                let _ = reply.send(answers);
                continue;
            }
            Ok(Command::Inspect(reply)) => {
                let _ = reply.send(engine.inspect());
                continue;
            }
            Ok(Command::Finish) => {
                is_open = false;
                continue;
            }
            Ok(Command::Shutdown) => break,
            Err(TryRecvError::Disconnected) if engine.is_idle() => break,
            Err(_) => {}
        }
        num_taken = 0;
        result = gpu.block_on(engine.step()).map(|_| ());
        if let Err(error) = &result {
            // Before the inbox is gone, so that whoever finds it gone finds the reason.
            let _ = note.0.failure.set(error.into());
            break;
        }
    }
    (result, engine.shutdown())
}

impl EngineClient {
    /// Hands over a request, and waits until it is taken: until the step that runs now has ended.
    ///
    /// # Errors
    /// Those of [`Engine::submit`], and [`SubmitError::Shutdown`].
    pub async fn submit(&self, request: Request) -> Result<Answer, SubmitError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Submit(Box::new(request), reply);
        self.commands.send(command).map_err(|_| SubmitError::Shutdown)?;
        answer.await.map_err(|_| SubmitError::Shutdown)?
    }

    /// [`EngineClient::submit`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`EngineClient::submit`].
    pub fn submit_blocking(&self, request: Request) -> Result<Answer, SubmitError> {
        pollster::block_on(self.submit(request))
    }

    /// [`Engine::submit_many`] on the engine's thread: hands over a request for `count` answers, all of them or none.
    ///
    /// # Errors
    /// Those of [`Engine::submit_many`], and [`SubmitError::Shutdown`].
    pub async fn submit_many(&self, request: Request, count: u32) -> Result<Vec<Answer>, SubmitError> {
        let (reply, answers) = oneshot::channel();
        let command = Command::SubmitMany(Box::new(request), count, reply);
        self.commands.send(command).map_err(|_| SubmitError::Shutdown)?;
        answers.await.map_err(|_| SubmitError::Shutdown)?
    }

    /// [`Engine::inspect`] on the engine's thread, between two steps: waits until the step that runs now has ended.
    ///
    /// # Errors
    /// [`SubmitError::Shutdown`].
    pub async fn inspect(&self) -> Result<Inspection, SubmitError> {
        let (reply, inspection) = oneshot::channel();
        self.commands.send(Command::Inspect(reply)).map_err(|_| SubmitError::Shutdown)?;
        inspection.await.map_err(|_| SubmitError::Shutdown)
    }

    /// [`EngineClient::inspect`] for programs without an async runtime.
    ///
    /// # Errors
    /// Those of [`EngineClient::inspect`].
    pub fn inspect_blocking(&self) -> Result<Inspection, SubmitError> {
        pollster::block_on(self.inspect())
    }

    /// Whether the engine's thread runs. Does not wait.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !self.status.has_ended.load(Ordering::Acquire)
    }

    /// The failure that ended the engine, if one did: the device was lost, say. Does not wait.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.status.failure.get()
    }
}

impl EngineHandle {
    /// Something to submit requests with, for other threads and tasks.
    #[must_use]
    pub fn client(&self) -> EngineClient {
        EngineClient { commands: self.commands.clone(), status: Arc::clone(&self.status) }
    }

    /// Takes no more requests, waits until those that are there have ended, and gives the decoder back.
    ///
    /// # Errors
    /// That of the step that failed, if one did.
    pub fn finish(self) -> ModelResult<Decoder> {
        self.close(Command::Finish)
    }

    /// Ends all requests, and gives the decoder back.
    ///
    /// # Errors
    /// That of the step that failed, if one did.
    pub fn shutdown(self) -> ModelResult<Decoder> {
        self.close(Command::Shutdown)
    }

    fn close(mut self, command: Command) -> ModelResult<Decoder> {
        // A thread that has ended already hears nothing.
        let _ = self.commands.send(command);
        let ended = self.thread.take().and_then(|thread| thread.join().ok());
        let (result, decoder) = ended.ok_or_else(|| ModelError::argument("engine", "a panic", "a running thread"))?;
        result.map(|()| decoder)
    }
}

impl Drop for EngineHandle {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.commands.send(Command::Shutdown);
            let _ = thread.join();
        }
    }
}
