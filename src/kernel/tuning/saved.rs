//! [`Tuning`]: what a tuner found out about an adapter.

use super::candidates::Sizes;
use super::linear::TunedLinear;
use crate::error::{Error, Result};
use crate::format::KvFormat;
use crate::kernel::variant::{Kernel, Variant};
use crate::plan::SplitPolicy;

/// What a tuning holds good for. Kernels are compiled by the driver, so it counts as much as the adapter does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model", feature = "verify"), derive(serde::Serialize, serde::Deserialize))]
pub struct TunedFor {
    /// The adapter's name.
    pub adapter: String,
    /// The graphics API, by its lower-case name.
    pub backend: String,
    /// Driver and its version, as the adapter reports them.
    pub driver: String,
    /// Whether wgpu's shader checks were in.
    pub full_checks: bool,
    /// Rows of the matrices that matrix units multiply; 0 without any.
    pub matrix_rows: u32,
    /// Whether queries may be quantised for packed dot products.
    #[cfg_attr(any(feature = "tune", feature = "model", feature = "verify"), serde(default))]
    pub packed_dots: bool,
    /// folio's version.
    pub folio: String,
}

/// Which kernel, for which shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct TunedShape {
    /// The kernel's entry point.
    pub kernel: String,
    /// Elements of a query and of a key.
    pub head_dim: u32,
    /// Elements of a value, where those are others.
    #[cfg_attr(any(feature = "tune", feature = "model"), serde(default, skip_serializing_if = "Option::is_none"))]
    pub value_dim: Option<u32>,
    /// Query heads per KV head; 1 for kernels that see no queries.
    pub group_size: u32,
    /// How K is stored.
    pub k_format: String,
    /// How V is stored.
    pub v_format: String,
}

impl TunedShape {
    /// What a variant is filed under: block size, flags and segments make no difference to which sizes win.
    #[must_use]
    pub fn of(variant: &Variant) -> Self {
        Self {
            kernel: variant.kernel.entry_point().into(),
            head_dim: variant.head_dim,
            value_dim: (variant.value_dim != variant.head_dim).then_some(variant.value_dim),
            group_size: variant.group_size,
            k_format: variant.k_format.to_string(),
            v_format: variant.v_format.to_string(),
        }
    }

    /// Like `*self == Self::of(variant)`, but makes no strings.
    fn is_of(&self, variant: &Variant) -> bool {
        let is = |name: &str, format| name.parse::<KvFormat>().is_ok_and(|named| named == format);
        self.kernel == variant.kernel.entry_point()
            && (self.head_dim, self.value_dim.unwrap_or(self.head_dim), self.group_size)
                == (variant.head_dim, variant.value_dim, variant.group_size)
            && is(&self.k_format, variant.k_format)
            && is(&self.v_format, variant.v_format)
    }
}

/// When keys are split: the two numbers of [`SplitPolicy`] that depend on the adapter only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct TunedSplit {
    /// Workgroups that keep the adapter busy.
    pub target_workgroups: u32,
    /// Keys below which a range is not split further.
    pub min_split_len: u32,
}

/// The best sizes for one kernel and shape, and what they gain.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct TunedKernel {
    /// What they are for.
    pub shape: TunedShape,
    /// The choice.
    pub sizes: Sizes,
    /// Of decode: when to split. `None`: as without a tuning.
    #[cfg_attr(any(feature = "tune", feature = "model"), serde(default, skip_serializing_if = "Option::is_none"))]
    pub split: Option<TunedSplit>,
    /// What was timed: batch, lengths, heads.
    pub workload: String,
    /// Median nanoseconds of the workload with this choice.
    pub nanos: u64,
    /// And with the default, in the same race.
    pub default_nanos: u64,
}

/// Choices for one adapter, to be kept by the host and handed to `Gpu::with_tuning`.
///
/// With the features `tune` and `model` it is serialisable by serde; with `tune` it is made by `Gpu::tune`. Entries that are not among the candidates of their kernel
/// (edited by hand, of another version) count as absent: whatever a file says, only tested kernels run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct Tuning {
    /// What it holds good for.
    #[cfg_attr(any(feature = "tune", feature = "model"), serde(rename = "for"))]
    pub tuned_for: TunedFor,
    /// The choices for attention.
    pub kernels: Vec<TunedKernel>,
    /// The choices for linear layers, made by `Gpu::tune_linear`.
    #[cfg_attr(any(feature = "tune", feature = "model"), serde(default, skip_serializing_if = "Vec::is_empty"))]
    pub linear: Vec<TunedLinear>,
}

impl Tuning {
    /// No choices yet.
    #[must_use]
    pub const fn new(tuned_for: TunedFor) -> Self {
        Self { tuned_for, kernels: Vec::new(), linear: Vec::new() }
    }

    /// The entry of a variant, if it has one that is among its candidates.
    fn entry(&self, variant: &Variant) -> Option<&TunedKernel> {
        let entry = self.kernels.iter().find(|entry| entry.shape.is_of(variant))?;
        variant.candidates().contains(&entry.sizes).then_some(entry)
    }

    /// A variant with the tuned sizes, or as it was.
    #[must_use]
    pub fn apply(&self, variant: Variant) -> Variant {
        self.entry(&variant).map_or(variant, |entry| variant.with_sizes(entry.sizes))
    }

    /// A policy with the split lengths that were tuned for decode's variant. The bounds of [`SplitPolicy`] that keep results right stay.
    pub(crate) fn apply_split(&self, policy: &mut SplitPolicy, decode: &Variant) {
        debug_assert_eq!(decode.kernel, Kernel::Decode);
        if let Some(TunedSplit { target_workgroups, min_split_len }) = self.entry(decode).and_then(|entry| entry.split)
        {
            policy.target_workgroups = target_workgroups.clamp(1, MAX_TARGET_WORKGROUPS);
            policy.min_split_len = min_split_len.clamp(1, policy.max_split_len);
        }
    }

    /// Adds choices, in place of those for the same shapes.
    ///
    /// # Errors
    /// [`Error::Argument`] if the other tuning is for another adapter, driver or version.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        if self.tuned_for != other.tuned_for {
            return Err(other.tuned_for.mismatch(&self.tuned_for));
        }
        self.kernels.retain(|mine| other.kernels.iter().all(|theirs| theirs.shape != mine.shape));
        self.kernels.extend(other.kernels);
        self.linear.retain(|mine| other.linear.iter().all(|theirs| theirs.shape != mine.shape));
        self.linear.extend(other.linear);
        Ok(())
    }
}

/// More workgroups than any device runs at once; it bounds the partial states that a damaged file can ask for.
const MAX_TARGET_WORKGROUPS: u32 = 1 << 16;

impl TunedFor {
    /// The error of a tuning that is for something else.
    pub(crate) fn mismatch(&self, have: &Self) -> Error {
        Error::argument("tuning", format!("one for {self}"), format!("one for {have}; tune again"))
    }
}

impl std::fmt::Display for TunedFor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { adapter, backend, driver, full_checks, matrix_rows, packed_dots, folio } = self;
        let checks = if *full_checks { "full" } else { "trusted" };
        write!(f, "{adapter} ({backend}, driver {driver}, {checks} checks")?;
        if *matrix_rows > 0 {
            write!(f, ", matrices of {matrix_rows}")?;
        }
        if *packed_dots {
            write!(f, ", packed dot products")?;
        }
        write!(f, ") with folio {folio}")
    }
}
