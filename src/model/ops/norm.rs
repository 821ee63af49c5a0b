//! [`Norm`]: RMSNorm and LayerNorm.

use std::sync::Arc;

use minijinja::context;

use super::{check_distinct, check_width, element_features, element_len, grid, upload};
use crate::gpu::{Program, Recorder};
use crate::kernel::Target;
use crate::kernel::{Access, Binding, Source, render};
use crate::model::Rows;
use crate::plan::MAX_GRID;
use crate::{Error, Result};
use crate::{Gpu, Profile};

/// Widest row. On GPUs a lane holds its part of a row in registers: at this width 16 `vec4`s.
const MAX_WIDTH: u32 = 16_384;

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) * weight`
    Rms,
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight`, with the variance over `width`, not `width - 1`.
    Layer,
}

/// What a [`Norm`] computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormConfig {
    /// Which normalisation.
    pub kind: NormKind,
    /// f32 per row; a multiple of 4, at most 16384.
    pub width: u32,
    /// Added to the mean square or the variance; above 0.
    pub eps: f32,
    /// Whether a bias is added at the end.
    pub bias: bool,
    /// Added to the weights: 0, or 1 for checkpoints (Gemma's) that store `weight - 1`.
    pub weight_offset: f32,
    /// Whether the result is added to `out` instead of written over it: a norm of what a layer adds to a residual stream.
    pub accumulate: bool,
}

impl NormConfig {
    /// A norm without bias, with weights as they are.
    #[must_use]
    pub const fn new(kind: NormKind, width: u32, eps: f32) -> Self {
        Self { kind, width, eps, bias: false, weight_offset: 0.0, accumulate: false }
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        check_width(self.width, MAX_WIDTH)?;
        // Rows of zeros would be divided by zero, and a value that is flushed to zero is one.
        if !(self.eps.is_finite() && self.eps >= f32::MIN_POSITIVE) {
            return Err(Error::argument("eps", self.eps, "a normal number above 0"));
        }
        if !self.weight_offset.is_finite() {
            return Err(Error::argument("weight_offset", self.weight_offset, "a finite number"));
        }
        Ok(())
    }

    /// Invocations per row, and rows per workgroup.
    fn shape(&self, profile: Profile) -> (u32, u32) {
        let vecs = self.width / 4;
        match profile {
            // Two vec4s per lane, so that a row of a single token still spreads over a workgroup, and the rows of heads share one.
            Profile::Gpu => {
                let lanes = vecs.div_ceil(2).next_power_of_two().min(256);
                (lanes, (256 / lanes).min(16))
            }
            // Narrow rows are those of heads, which are many: one lane each needs no sums across lanes.
            Profile::Cpu if self.width <= 256 => (1, 8),
            Profile::Cpu => (8, 1),
        }
    }

    /// The kernel's text, for reading and for tests.
    ///
    /// # Errors
    /// Those of [`NormConfig::validate`].
    pub fn source(&self, target: Target, in_place: bool) -> Result<Source> {
        self.validate()?;
        let (lanes, rows) = self.shape(target.profile);
        let element_len = element_len(target, self.width);
        let layer = self.kind == NormKind::Layer;
        let text = render(
            "model/norm.wgsl",
            context! {
                width => self.width,
                vecs => self.width / element_len,
                wide => element_len == 8,
                lanes,
                rows,
                layer,
                held => target.profile == Profile::Gpu,
                in_place,
                accumulate => self.accumulate,
                bias => self.bias,
                eps => format!("{:e}", self.eps),
                grid_x => MAX_GRID,
            },
        )?;
        let mut bindings = Vec::new();
        if !in_place {
            bindings.push(Binding::new("x", Access::Read));
        }
        bindings.extend([Binding::new("out", Access::Write), Binding::new("weight", Access::Read)]);
        if self.bias {
            bindings.push(Binding::new("bias", Access::Read));
        }
        let arrays = match lanes {
            1 => 0,
            2..=16 => 1,
            _ => 2,
        };
        let array_bytes = (lanes * rows * if layer { 8 } else { 4 }).next_multiple_of(16);
        Ok(Source {
            entry_point: "norm",
            text,
            bindings,
            workgroup_size: lanes * rows,
            workgroup_bytes: arrays * array_bytes,
            features: element_features(element_len),
        })
    }
}

/// RMSNorm or LayerNorm of rows: the compiled kernels, which all norms of a model with the same [`NormConfig`] share.
#[derive(Debug)]
pub struct Norm {
    gpu: Gpu,
    config: NormConfig,
    rows_per_workgroup: u32,
    program: Arc<Program>,
    program_in_place: Arc<Program>,
}

/// The weights of one norm of a model, on the GPU.
#[derive(Debug)]
pub struct NormParameters {
    weight: wgpu::Buffer,
    bias: Option<wgpu::Buffer>,
}

impl Norm {
    /// Compiles the kernels.
    ///
    /// # Errors
    /// Those of [`NormConfig::validate`]; [`Error::Wgpu`].
    pub async fn new(gpu: &Gpu, config: NormConfig) -> Result<Self> {
        let target = gpu.target();
        Ok(Self {
            gpu: gpu.clone(),
            config,
            rows_per_workgroup: config.shape(gpu.profile()).1,
            program: Program::get(gpu, config.source(target, false)?).await?,
            program_in_place: Program::get(gpu, config.source(target, true)?).await?,
        })
    }

    /// Uploads the weights of one norm: `[width]`, and a bias of the same shape exactly if the configuration has one.
    ///
    /// # Errors
    /// [`Error::Argument`] for another shape; [`Error::Wgpu`].
    pub fn weights(&self, weight: &[f32], bias: Option<&[f32]>) -> Result<NormParameters> {
        let gpu = &self.gpu;
        let width = self.config.width as usize;
        if weight.len() != width {
            return Err(Error::argument("weight", format!("{} values", weight.len()), format!("width, {width}")));
        }
        let need = self.config.bias.then_some(width);
        if bias.map(<[f32]>::len) != need {
            let count = |n: Option<usize>| n.map_or("none".to_owned(), |n| format!("{n} values"));
            return Err(Error::argument("bias", count(bias.map(<[f32]>::len)), count(need)));
        }
        let weight: Vec<f32> = weight.iter().map(|w| w + self.config.weight_offset).collect();
        let weight = upload(gpu, "weight", &weight)?;
        let bias = match bias {
            Some(bias) => Some(upload(gpu, "bias", bias)?),
            None => None,
        };
        Ok(NormParameters { weight, bias })
    }

    /// What it computes.
    #[must_use]
    pub fn config(&self) -> &NormConfig {
        &self.config
    }

    /// Records `out = norm(x)`, or `out +=` that; both `[rows, width]`, in different buffers.
    ///
    /// # Errors
    /// [`Error::Argument`] for rows that don't fit, or weights of another configuration; [`Error::Wgpu`].
    pub fn record<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        weights: &NormParameters,
        x: Rows<'_>,
        out: Rows<'_>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        x.check(gpu, "x", x.rows, self.config.width)?;
        out.check(gpu, "out", x.rows, self.config.width)?;
        check_distinct("out", out.buffer, &[x.buffer])?;
        self.dispatch(recorder.into(), &self.program, weights, &[x.binding(), out.binding()], x.rows)
    }

    /// Records `x = norm(x)`, or `x +=` that; `x` is `[rows, width]`.
    ///
    /// # Errors
    /// Those of [`Norm::record`].
    pub fn record_in_place<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        weights: &NormParameters,
        x: Rows<'_>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        x.check(gpu, "x", x.rows, self.config.width)?;
        self.dispatch(recorder.into(), &self.program_in_place, weights, &[x.binding()], x.rows)
    }

    fn dispatch(
        &self,
        recorder: Recorder<'_>,
        program: &Arc<Program>,
        weights: &NormParameters,
        rows: &[wgpu::BindingResource<'_>],
        num_rows: u32,
    ) -> Result<()> {
        let bytes = u64::from(self.config.width) * 4;
        if weights.weight.size() != bytes || weights.bias.is_some() != self.config.bias {
            return Err(Error::argument("weights", "those of another configuration", "those of this norm"));
        }
        let mut resources = rows.to_vec();
        resources.push(weights.weight.as_entire_binding());
        resources.extend(weights.bias.as_ref().map(wgpu::Buffer::as_entire_binding));
        program.record(&self.gpu, recorder, resources, grid("x", num_rows.div_ceil(self.rows_per_workgroup).into())?)
    }
}
