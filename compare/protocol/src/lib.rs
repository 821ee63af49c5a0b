//! What the driver and a contestant say to each other: one JSON object per line, on the contestant's standard input and output.
//!
//! A contestant is a process of its own, so that libraries with their own threads, allocators and devices don't meet, and sleeps until it is asked:
//! samples of all contestants interleave. `torch_attention.py` speaks the same.

use std::error::Error;
use std::fs;
use std::io::{self, BufRead, Write};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Attention of a batch of equal sequences, causal and bottom-right aligned, scale `1/sqrt(head_dim)`.
///
/// The files hold little-endian f32: q `[batch, query_len, num_q_heads, head_dim]`, k and v `[batch, seq_len, num_kv_heads, head_dim]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Problem {
    pub batch: usize,
    pub query_len: usize,
    pub seq_len: usize,
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// How K and V are stored: `f32` or `f16`. Their values are representable in it.
    pub format: String,
    pub q: PathBuf,
    pub k: PathBuf,
    pub v: PathBuf,
}

impl Problem {
    pub fn group_size(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    pub fn is_decode(&self) -> bool {
        self.query_len == 1
    }

    /// For each query and key, in this order, whether the key is hidden from the query.
    pub fn hidden(&self) -> Vec<bool> {
        let context_len = self.seq_len - self.query_len;
        (0..self.query_len).flat_map(|i| (0..self.seq_len).map(move |j| j > i + context_len)).collect()
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "op")]
pub enum Request {
    /// Take the operands, in whatever layout suits; forget the ones before. Untimed.
    Load(Problem),
    /// Compute in one of the ways and write the result, `[batch, query_len, num_q_heads, head_dim]`, little-endian f32. Untimed.
    Output { way: String, out: PathBuf },
    /// Compute in one of the ways and say how long it took, from the call until the result is there.
    Time { way: String },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The first line: the library and its version, and what it runs on.
    Ready {
        name: String,
        about: String,
    },
    /// The ways to compute what was loaded.
    Loaded {
        ways: Vec<String>,
    },
    /// The output is written.
    Done,
    Seconds(f64),
    /// What can't be done, such as a format that the library hasn't got.
    Failed(String),
}

/// What any function of a contestant may fail with.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A library that computes attention.
pub trait Contestant {
    /// The library and its version, and what it runs on.
    fn about(&self) -> (String, String);
    fn load(&mut self, problem: &Problem) -> Result<Vec<String>>;
    /// Computes and gives the seconds, and the output if it is wanted, which isn't timed.
    fn run(&mut self, way: &str, wants_output: bool) -> Result<(f64, Vec<f32>)>;
}

/// Answers until standard input ends.
pub fn serve(contestant: &mut impl Contestant) -> Result<()> {
    let (name, about) = contestant.about();
    say(&Answer::Ready { name, about })?;
    for line in io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?)?;
        // Some libraries panic where they can't do something. The driver checks every result, so a contestant may go on.
        let answer = panic::catch_unwind(AssertUnwindSafe(|| obey(contestant, request)));
        let answer = answer.unwrap_or_else(|_| Err("a panic".into()));
        say(&answer.unwrap_or_else(|error| Answer::Failed(error.to_string())))?;
    }
    Ok(())
}

fn obey(contestant: &mut impl Contestant, request: Request) -> Result<Answer> {
    Ok(match request {
        Request::Load(problem) => Answer::Loaded { ways: contestant.load(&problem)? },
        Request::Time { way } => Answer::Seconds(contestant.run(&way, false)?.0),
        Request::Output { way, out } => {
            write_f32(&out, &contestant.run(&way, true)?.1)?;
            Answer::Done
        }
    })
}

fn say(answer: &Answer) -> Result<()> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, answer)?;
    stdout.write_all(b"\n")?;
    Ok(stdout.flush()?)
}

/// The f32 of a file.
pub fn read_f32(path: &Path) -> io::Result<Vec<f32>> {
    let bytes = fs::read(path)?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// Writes f32 to a file.
pub fn write_f32(path: &Path, values: &[f32]) -> io::Result<()> {
    fs::write(path, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}
