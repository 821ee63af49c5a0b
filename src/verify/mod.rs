//! How accurate the kernels are on an adapter: [`verify`] computes a fixed [grid of cases](Case::grid) there, and says how far each result is from an f64
//! oracle, in units of the error that f32 arithmetic can account for ([`ErrorModel`](crate::reference::ErrorModel)).
//!
//! Results are plain data, to be kept as JSON and compared: with other adapters, drivers and versions. A figure above 1 is a bug, of folio or of the
//! driver. The hash of a case tells whether two runs gave the same bits.

mod grid;
mod rows;

use std::fmt;

pub use grid::Case;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gpu::{Gpu, ShaderChecks};
use crate::kernel::Profile;
use crate::kernel::tuning::TunedFor;
use crate::reference::{BoundedOutput, compare};

/// What an adapter gave for a grid of cases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// Version of this structure: [`Report::SCHEMA`].
    pub schema: u32,
    /// Adapter, driver and folio's version.
    pub adapter: TunedFor,
    /// The kernel family: `gpu` or `cpu`.
    pub kernels: String,
    /// wgpu's shader checks: `full` or `trusted`.
    pub checks: String,
    /// Invocations of a subgroup; `None` where kernels use none.
    pub subgroup_size: Option<u32>,
    /// Bytes of a storage binding.
    pub max_binding_bytes: u64,
    /// Bytes of workgroup memory.
    pub max_workgroup_bytes: u32,
    /// Invocations of a workgroup.
    pub max_workgroup_size: u32,
    /// What each case gave.
    pub cases: Vec<CaseResult>,
}

/// What one case gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CaseResult {
    /// [`Case::id`].
    pub id: String,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// It was computed.
    Computed(Accuracy),
    /// It could not be computed, and why.
    Failed(String),
}

/// How far results are from the exact ones. Errors are in units of their bound: up to 1 if all is well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Accuracy {
    /// Elements of the result.
    pub elements: u64,
    /// Elements of the result, and of the logarithms of softmax denominators, that are beyond their bound.
    pub num_beyond: u64,
    /// Largest error of an element. `None`: infinite, because a result is no number, or a number where there should be none.
    pub worst: Option<f64>,
    /// Mean error of those elements that have an error.
    pub mean: Option<f64>,
    /// Largest error of a logarithm of a softmax denominator.
    pub worst_lse: Option<f64>,
    /// CRC-32 of the bits of all results.
    pub hash: u32,
}

impl Accuracy {
    /// Whether every element is within its bound.
    #[must_use]
    pub fn is_within(&self) -> bool {
        self.num_beyond == 0
    }

    fn new(expected: &[BoundedOutput], out: &[f32], lse: &[f32]) -> Self {
        let (mut rest, mut lse_rest) = (out, lse);
        let [mut worst, mut worst_lse] = [0.0_f64; 2];
        let (mut sum, mut count, mut num_beyond) = (0.0, 0_u64, 0);
        for expected in expected {
            let (own, after) = rest.split_at(expected.output.out.len().min(rest.len()));
            let (own_lse, lse_after) = lse_rest.split_at(expected.output.lse.len().min(lse_rest.len()));
            (rest, lse_rest) = (after, lse_after);
            let [of_out, of_lse] = [compare::out(expected, own), compare::lse(expected, own_lse)];
            (worst, worst_lse) = (worst.max(of_out.badness()), worst_lse.max(of_lse.badness()));
            // (Nothing was compared if a result is too short.)
            let beyond = |of: &compare::Comparison| of.num_beyond.max(usize::from(!of.is_within())) as u64;
            num_beyond += beyond(&of_out) + beyond(&of_lse);
            let errors = own.iter().zip(&expected.output.out).zip(&expected.out_bound);
            for ((&got, want), bound) in errors.filter(|(_, bound)| **bound > 0.0 && bound.is_finite()) {
                (sum, count) = (sum + (f64::from(got) - want).abs() / bound, count + 1);
            }
        }
        let finite = |x: f64| Some(x).filter(|x| x.is_finite());
        let mut hash = crc32fast::Hasher::new();
        [out, lse].iter().for_each(|values| hash.update(bytemuck::cast_slice(values)));
        Self {
            elements: out.len() as u64,
            num_beyond,
            worst: finite(worst),
            mean: finite(sum / count.max(1) as f64),
            worst_lse: finite(worst_lse),
            hash: hash.finalize(),
        }
    }
}

impl CaseResult {
    /// Whether it was computed, and every element is within its bound.
    #[must_use]
    pub fn is_within(&self) -> bool {
        matches!(&self.outcome, Outcome::Computed(accuracy) if accuracy.is_within())
    }
}

impl fmt::Display for CaseResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |x: Option<f64>| x.map_or_else(|| "not finite".to_owned(), |x| format!("{x:.4}"));
        match &self.outcome {
            Outcome::Computed(a) => {
                write!(f, "{}: worst {}, mean {}, lse {}", self.id, shown(a.worst), shown(a.mean), shown(a.worst_lse))?;
                if a.is_within() { Ok(()) } else { write!(f, "; {} elements beyond their bound", a.num_beyond) }
            }
            Outcome::Failed(why) => write!(f, "{}: {why}", self.id),
        }
    }
}

impl Report {
    /// The version of the structure that this folio writes.
    pub const SCHEMA: u32 = 1;

    /// A report of no cases yet.
    #[must_use]
    pub fn new(gpu: &Gpu) -> Self {
        let limits = gpu.limits();
        Self {
            schema: Self::SCHEMA,
            adapter: gpu.tuned_for(),
            kernels: if gpu.profile() == Profile::Cpu { "cpu" } else { "gpu" }.to_owned(),
            checks: if gpu.shader_checks() == ShaderChecks::Full { "full" } else { "trusted" }.to_owned(),
            subgroup_size: gpu.subgroup_size().filter(|_| gpu.has_subgroups()),
            max_binding_bytes: limits.max_storage_buffer_binding_size,
            max_workgroup_bytes: limits.max_compute_workgroup_storage_size,
            max_workgroup_size: limits.max_compute_invocations_per_workgroup,
            cases: Vec::new(),
        }
    }

    /// Whether all cases were computed, and every element is within its bound.
    #[must_use]
    pub fn is_within(&self) -> bool {
        self.cases.iter().all(CaseResult::is_within)
    }
}

/// Computes one case on a device, and compares it with the oracle. What can't be computed there (a kernel that doesn't compile, too small a binding) is part of
/// the result.
///
/// # Errors
/// [`Error::DeviceLost`].
pub async fn check(gpu: &Gpu, case: &Case) -> Result<CaseResult> {
    let rows = case.rows();
    let computed = async {
        let (out, lse) = rows::computed(gpu, case, &rows).await?;
        Ok(Accuracy::new(&rows::expected(gpu, case, &rows)?, &out, &lse))
    };
    let outcome = match computed.await {
        Ok(accuracy) => Outcome::Computed(accuracy),
        Err(error @ Error::DeviceLost { .. }) => return Err(error),
        Err(error) => Outcome::Failed(error.to_string()),
    };
    Ok(CaseResult { id: case.id().to_owned(), outcome })
}

/// [`check`]s all cases of the [grid](Case::grid), and tells of each.
///
/// # Errors
/// Those of [`check`].
pub async fn verify(gpu: &Gpu, mut done: impl FnMut(&CaseResult)) -> Result<Report> {
    let mut report = Report::new(gpu);
    for case in Case::grid() {
        let result = check(gpu, &case).await?;
        done(&result);
        report.cases.push(result);
    }
    Ok(report)
}
