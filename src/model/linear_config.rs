//! [`LinearConfig`]: shape and options of a linear layer.

use super::ops::{ActivationKind, MAX_EXPERTS};
use super::quantise::WeightFormat;
use crate::layout::Region;
use crate::{Error, Result};

/// A finite number above 0. Configurations that hold it are compared and hashed by its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Factor(u32);

impl Factor {
    /// This number.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is not finite and above 0.
    pub fn new(value: f32) -> Result<Self> {
        let fits = value.is_finite() && value > 0.0;
        fits.then(|| Self(value.to_bits())).ok_or_else(|| Error::argument("factor", value, "a finite number above 0"))
    }

    /// 1.
    pub const ONE: Self = Self(1.0_f32.to_bits());

    /// The number.
    #[must_use]
    pub const fn get(self) -> f32 {
        f32::from_bits(self.0)
    }

    /// As WGSL writes it.
    pub(crate) fn literal(self) -> String {
        format!("{:e}", self.get())
    }
}

impl std::fmt::Debug for Factor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.get().fmt(f)
    }
}

/// Linear layers of the same shape, of which each row of x goes to some: the experts of a mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearExperts {
    /// How many there are.
    pub count: u32,
    /// To how many of them a row of x goes: y has so many rows for each.
    pub per_row: u32,
}

/// Shape and options of a [`Linear`](super::Linear) layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearConfig {
    /// Width of x: columns of W.
    pub in_features: u32,
    /// Width of y: rows of W.
    pub out_features: u32,
    /// How W is stored.
    pub format: WeightFormat,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether the result is added to y instead of written over it: a residual connection.
    pub accumulate: bool,
    /// What is applied to `x W^T + bias`.
    pub activation: Option<ActivationKind>,
    /// `c * tanh(y / c)` in place of an activation, for the logits of a head (Gemma 2).
    pub softcap: Option<Factor>,
    /// What [`Linear::gather_rows`](super::Linear::gather_rows) multiplies rows of W by (Gemma's embedding).
    pub gather_scale: Option<Factor>,
    /// Whether W has `2 * out_features` rows (and the bias as many values): those of a gate, then those of up, and y is `activation(gate) * up`.
    pub gated: bool,
    /// Widths of matrices that y is cut into, one after another in its buffer: of queries, keys and values. Multiples of 4 whose sum is
    /// `out_features`; the last one may be 0. See [`LinearConfig::y_width`].
    pub regions: Option<[u32; 3]>,
    /// Whether x is normalised first, row by row: RMSNorm with the weights that [`Linear::new`](super::Linear::new) is given.
    pub norm: bool,
    /// Whether a row of y has the same bits whatever other rows are computed with it, and however many. Then all kernels of the layer add in the
    /// same order: one or two rows take the kernel for 4 on CPU adapters, many rows that for 8 on GPUs, and tunings and matrix units play no part.
    pub exact: bool,
    /// Whether there are several layers, and each row of x goes to some of them: see [`Linear::record_routed`](super::Linear::record_routed). W and the bias
    /// are then those of the first expert, those of the second, and so on.
    pub experts: Option<LinearExperts>,
}

impl LinearConfig {
    /// A layer without bias and activation that writes its result.
    #[must_use]
    pub const fn new(in_features: u32, out_features: u32, format: WeightFormat) -> Self {
        Self {
            in_features,
            out_features,
            format,
            bias: false,
            accumulate: false,
            activation: None,
            softcap: None,
            gather_scale: None,
            gated: false,
            regions: None,
            norm: false,
            exact: false,
            experts: None,
        }
    }

    /// f32 of y per row of x: `out_features`, or with regions the sum of their widths, each padded to a multiple of 64. A region starts behind
    /// `rows` times the padded widths before it, where every device can bind it, and has its padding behind its last row.
    #[must_use]
    pub fn y_width(&self) -> u32 {
        self.regions.map_or(self.out_features, |widths| Region::of(widths).iter().map(Region::padded_width).sum())
    }

    /// Rows of W, of all experts. Sizes that passed [`check_experts`] don't overflow it.
    pub(super) fn weight_rows(&self) -> u32 {
        self.num_experts() * self.expert_rows()
    }

    /// Rows of W of an expert, or of the one layer that there is.
    pub(super) fn expert_rows(&self) -> u32 {
        if self.gated { 2 * self.out_features } else { self.out_features }
    }

    /// Layers of this shape.
    pub(super) fn num_experts(&self) -> u32 {
        self.experts.map_or(1, |experts| experts.count)
    }
}

/// A soft cap takes the place of an activation.
pub(super) fn check_softcap(config: &LinearConfig) -> Result<()> {
    match config.softcap {
        Some(cap) if config.activation.is_some() || config.gated => {
            Err(Error::argument("softcap", cap.get(), "none beside an activation or a gate"))
        }
        _ => Ok(()),
    }
}

/// Rows of W of all experts are numbered as those of one layer are.
pub(super) fn check_experts(config: &LinearConfig, max_rows: u32) -> Result<()> {
    let Some(LinearExperts { count, per_row }) = config.experts else { return Ok(()) };
    let max = (max_rows / config.out_features.max(1) / if config.gated { 2 } else { 1 }).min(MAX_EXPERTS);
    if count == 0 || count > max {
        return Err(Error::argument("experts.count", count, format!("1 to {max}")));
    }
    if per_row == 0 || per_row > count {
        return Err(Error::argument("experts.per_row", per_row, format!("1 to {count}, the number of experts")));
    }
    if config.regions.is_some() || config.softcap.is_some() || config.accumulate || config.gather_scale.is_some() {
        let got = "regions, a soft cap, a residual or the scale of an embedding";
        return Err(Error::argument("experts", got, "none of them beside experts"));
    }
    Ok(())
}

/// Regions start at whole `vec4`s, and are all of y.
pub(super) fn check_regions(config: &LinearConfig) -> Result<()> {
    let fits = |widths: [u32; 3]| {
        let sum = widths.iter().map(|&width| u64::from(width)).sum::<u64>();
        let [first, second, _] = widths;
        let multiples = widths.iter().all(|width| width.is_multiple_of(4));
        sum == u64::from(config.out_features) && multiples && first > 0 && second > 0
    };
    match config.regions {
        Some(widths) if !fits(widths) => {
            let rule =
                format!("multiples of 4, the first two above 0, whose sum is out_features, {}", config.out_features);
            Err(Error::argument("regions", format!("{widths:?}"), rule))
        }
        _ => Ok(()),
    }
}
