//! What a tuner chose for the linear layers of a model. The kernels are the model's, and so is what the numbers may be: here they are data, so that a
//! file of choices can be read, kept and handed on without the model.

/// What may be chosen freely for a kernel of a linear layer: how fast it is depends on it, what it computes does not (but for rounding).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct LinearSizes {
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Rows of x of a workgroup.
    pub rows: u32,
    /// Rows of W of a workgroup; on CPU adapters in units of its invocations.
    pub cols: u32,
    /// Inputs that it takes at a time.
    pub inputs: u32,
}

/// Which kernel takes how many rows of x.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct LinearThresholds {
    /// On GPUs: rows up to which the kernel for few rows is taken.
    pub matvec_rows: u32,
    /// On CPU adapters: what a tile of 16 rows takes, in quarters of what one of 8 rows does.
    pub wide_quarters: u32,
}

impl Default for LinearThresholds {
    /// GPUs, derived: two tiles of 8 rows read W twice at most and from the cache at best, and a tile for many rows does the arithmetic of 64
    /// however few there are. CPU adapters, measured on llvmpipe: 16 rows take 7/4 the time of 8.
    fn default() -> Self {
        Self { matvec_rows: 16, wide_quarters: 7 }
    }
}

/// Which layer. Bias, activation and where y is written make little difference to which sizes win.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct LinearShape {
    /// Width of x.
    pub in_features: u32,
    /// Width of y.
    pub out_features: u32,
    /// How W is stored.
    pub format: String,
    /// Inputs that share a scale; 0 without scales.
    pub group_size: u32,
    /// Whether y is the product of a gate and the rest.
    pub gated: bool,
    /// Whether x is normalised.
    pub norm: bool,
}

/// The best sizes of one kernel of a layer, and what they gain.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct TunedLinearKernel {
    /// The kernel: `rows1`, `rows2` and so on for those of a number of rows of x, `matmul` and `matmul_matrix` for many of them.
    pub kernel: String,
    /// The choice.
    pub sizes: LinearSizes,
    /// Rows of x that were timed.
    pub rows: u32,
    /// Median nanoseconds with this choice.
    pub nanos: u64,
    /// And with the default, in the same race.
    pub default_nanos: u64,
}

/// The choices for one layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(any(feature = "tune", feature = "model"), derive(serde::Serialize, serde::Deserialize))]
pub struct TunedLinear {
    /// What they are for.
    pub shape: LinearShape,
    /// Of each kernel that was timed.
    pub kernels: Vec<TunedLinearKernel>,
    /// Which kernel takes how many rows. `None`: as without a tuning.
    #[cfg_attr(any(feature = "tune", feature = "model"), serde(default, skip_serializing_if = "Option::is_none"))]
    pub thresholds: Option<LinearThresholds>,
}

impl std::fmt::Display for LinearSizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { workgroup_size, rows, cols, inputs } = self;
        write!(f, "workgroup {workgroup_size}, {rows} rows x {cols} columns")?;
        if *inputs > 0 { write!(f, ", {inputs} inputs") } else { Ok(()) }
    }
}
