//! [`Activation`]: the nonlinearity of an MLP.

use std::sync::Arc;

use minijinja::context;

use super::{ELEMENTWISE_SIZE, check_distinct, check_width, element_features, element_len, elementwise_grid};
use crate::Gpu;
use crate::Result;
use crate::gpu::{Program, Recorder};
use crate::kernel::Target;
use crate::kernel::{Access, Binding, Source, render};
use crate::model::Rows;
use crate::model::linear_config::Factor;
use crate::plan::MAX_GRID;

/// Widest row: with gate and up far from overflowing an index.
pub(crate) const MAX_WIDTH: u32 = 1 << 20;

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivationKind {
    /// `x * sigmoid(x)`; `"silu"` or `"swish"` in Hugging Face configurations. Gated: SwiGLU.
    Silu,
    /// `x * Phi(x)`, the exact form with erf; `"gelu"`. Gated: GeGLU.
    Gelu,
    /// The form with tanh; `"gelu_new"`, `"gelu_pytorch_tanh"`.
    GeluTanh,
    /// `max(x, 0)`; `"relu"`.
    Relu,
    /// gpt-oss: gated, with `g = min(gate, limit)`, `g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + 1)`. Alone it is that without the last factor.
    ClampedSwiglu {
        /// What the logit of the sigmoid is multiplied by.
        alpha: Factor,
        /// The largest gate, and the largest up.
        limit: Factor,
    },
}

impl ActivationKind {
    /// Those without settings.
    pub const ALL: [Self; 4] = [Self::Silu, Self::Gelu, Self::GeluTanh, Self::Relu];

    pub(crate) const fn shader_name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Relu => "relu",
            Self::ClampedSwiglu { .. } => "clamped_swiglu",
        }
    }

    /// What the shaders know of its settings.
    pub(crate) fn context(self) -> minijinja::Value {
        match self {
            Self::ClampedSwiglu { alpha, limit } => context! { alpha => alpha.literal(), limit => limit.literal() },
            _ => context! {},
        }
    }
}

/// An activation of `[rows, width]`, alone or gated.
#[derive(Debug)]
pub struct Activation {
    gpu: Gpu,
    width: u32,
    gated: bool,
    element_len: u32,
    program: Arc<Program>,
}

impl Activation {
    /// Compiles the kernel. `width` is that of the result, a multiple of 4.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a width that breaks the rule; [`Error::Wgpu`](crate::Error::Wgpu).
    pub async fn new(gpu: &Gpu, kind: ActivationKind, gated: bool, width: u32) -> Result<Self> {
        let target = gpu.target();
        let program = Program::get(gpu, Self::source(target, kind, gated, width)?).await?;
        Ok(Self { gpu: gpu.clone(), width, gated, element_len: element_len(target, width), program })
    }

    /// The kernel's text, for reading and for tests.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a width that breaks the rule.
    pub fn source(target: Target, kind: ActivationKind, gated: bool, width: u32) -> Result<Source> {
        check_width(width, MAX_WIDTH)?;
        let element_len = element_len(target, width);
        let values = context! {
            wide => element_len == 8,
            kind => kind.shader_name(),
            settings => kind.context(),
            gated,
            vecs => width / element_len,
            grid_x => MAX_GRID,
            workgroup_size => ELEMENTWISE_SIZE,
        };
        Ok(Source {
            entry_point: "activation",
            text: render("model/activation.wgsl", values)?,
            bindings: vec![Binding::new("x", Access::Read), Binding::new("out", Access::Write)],
            workgroup_size: ELEMENTWISE_SIZE,
            workgroup_bytes: 0,
            features: element_features(element_len),
        })
    }

    /// Records `out = act(x)`, or `out = act(gate) * up` if gated: then `x` is `[rows, 2 * width]`, gate before up in each row, as a fused
    /// linear layer yields them. `out` is `[rows, width]`, in another buffer.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for rows that don't fit; [`Error::Wgpu`](crate::Error::Wgpu).
    pub fn record<'a>(&self, recorder: impl Into<Recorder<'a>>, x: Rows<'_>, out: Rows<'_>) -> Result<()> {
        let gpu = &self.gpu;
        x.check(gpu, "x", x.rows, if self.gated { 2 * self.width } else { self.width })?;
        out.check(gpu, "out", x.rows, self.width)?;
        check_distinct("out", out.buffer, &[x.buffer])?;
        let resources = vec![x.binding(), out.binding()];
        self.program.record(gpu, recorder.into(), resources, elementwise_grid("out", &out, self.element_len)?)
    }
}
