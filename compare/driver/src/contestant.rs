//! A contestant in a process of its own.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use compare_protocol::{Answer, Problem, Request, read_f32};

pub struct Contestant {
    /// The library and its version.
    pub name: String,
    /// What it runs on.
    pub about: String,
    process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Contestant {
    /// Starts a command line, split at spaces. It inherits the environment, the number of threads included.
    pub fn start(command: &str) -> Result<Self> {
        let mut words = command.split_whitespace();
        let mut process = Command::new(words.next().context("an empty command")?)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| command.to_owned())?;
        let requests = process.stdin.take().context("stdin of the contestant")?;
        let answers = BufReader::new(process.stdout.take().context("stdout of the contestant")?);
        let mut contestant = Self { name: String::new(), about: String::new(), process, requests, answers };
        match contestant.answer()? {
            Answer::Ready { name, about } => (contestant.name, contestant.about) = (name, about),
            other => bail!("{command} began with {other:?}"),
        }
        Ok(contestant)
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the process ended");
        }
        serde_json::from_str(&line).with_context(|| format!("it said {line:?}"))
    }

    fn ask(&mut self, request: &Request) -> Result<Answer> {
        writeln!(self.requests, "{}", serde_json::to_string(request)?)?;
        match self.answer()? {
            Answer::Failed(reason) => bail!("{reason}"),
            answer => Ok(answer),
        }
    }

    /// The ways in which it computes this.
    pub fn load(&mut self, problem: &Problem) -> Result<Vec<String>> {
        match self.ask(&Request::Load(problem.clone()))? {
            Answer::Loaded { ways } => Ok(ways),
            other => bail!("it said {other:?}"),
        }
    }

    pub fn output(&mut self, way: &str, file: &Path) -> Result<Vec<f32>> {
        self.ask(&Request::Output { way: way.to_owned(), out: file.to_owned() })?;
        Ok(read_f32(file)?)
    }

    /// Seconds of one computation.
    pub fn time(&mut self, way: &str) -> Result<f64> {
        match self.ask(&Request::Time { way: way.to_owned() })? {
            Answer::Seconds(seconds) => Ok(seconds),
            other => bail!("it said {other:?}"),
        }
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        // It ends by itself with its input; nothing is lost if it can't be stopped sooner.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
