//! [`PositionEmbedding`] and [`SelectRows`]: kernels that look rows up.

use std::sync::Arc;

use minijinja::context;

use super::{ELEMENTWISE_SIZE, check_distinct, check_width, elementwise_grid, upload};
use crate::BufferRef;
use crate::Gpu;
use crate::gpu::{Program, Recorder};
use crate::kernel::{Access, Binding, ShaderFeatures, Source, render};
use crate::model::Rows;
use crate::plan::MAX_GRID;
use crate::{Error, Result};

/// Widest row: far from overflowing an index.
const MAX_WIDTH: u32 = 1 << 20;

/// Learned position embeddings, as GPT-2 has them.
#[derive(Debug)]
pub struct PositionEmbedding {
    gpu: Gpu,
    width: u32,
    num_positions: u32,
    table: wgpu::Buffer,
    program: Arc<Program>,
}

impl PositionEmbedding {
    /// Compiles the kernel and uploads the table, f32 `[num_positions, width]`; `width` is a multiple of 4.
    ///
    /// # Errors
    /// [`Error::Argument`] for a table of another shape; [`Error::Unsupported`] if it doesn't fit into a binding; [`Error::Wgpu`].
    pub async fn new(gpu: &Gpu, table: &[f32], width: u32) -> Result<Self> {
        check_width(width, MAX_WIDTH)?;
        let num_positions = u32::try_from(table.len() / width as usize).unwrap_or(0);
        if num_positions == 0 || num_positions as usize * width as usize != table.len() {
            let need = format!("whole rows of width {width}, at least one");
            return Err(Error::argument("table", format!("{} values", table.len()), need));
        }
        Ok(Self {
            gpu: gpu.clone(),
            width,
            num_positions,
            table: upload(gpu, "table", table)?,
            program: Program::get(gpu, Self::source(num_positions, width)?).await?,
        })
    }

    /// The kernel's text, for reading and for tests.
    ///
    /// # Errors
    /// [`Error::Argument`] for a width that breaks the rule.
    pub fn source(num_positions: u32, width: u32) -> Result<Source> {
        check_width(width, MAX_WIDTH)?;
        if num_positions == 0 {
            return Err(Error::argument("num_positions", 0, "at least 1"));
        }
        let values = context! {
            vecs => width / 4,
            num_positions,
            grid_x => MAX_GRID,
            workgroup_size => ELEMENTWISE_SIZE,
        };
        Ok(Source {
            entry_point: "add_positions",
            text: render("model/add_positions.wgsl", values)?,
            bindings: vec![
                Binding::new("x", Access::Write),
                Binding::new("positions", Access::Read),
                Binding::new("table", Access::Read),
            ],
            workgroup_size: ELEMENTWISE_SIZE,
            workgroup_bytes: 0,
            features: ShaderFeatures::default(),
        })
    }

    /// Positions in the table.
    #[must_use]
    pub fn num_positions(&self) -> u32 {
        self.num_positions
    }

    /// Records `x[row] += table[positions[row]]`. `x` is `[rows, width]`, `positions` u32 `[rows]` in another buffer. The positions are below
    /// [`num_positions`](Self::num_positions); the kernel takes the last one for those that aren't.
    ///
    /// # Errors
    /// [`Error::Argument`] for ranges that don't fit; [`Error::Wgpu`].
    pub fn record<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        x: Rows<'_>,
        positions: impl Into<BufferRef<'a>>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        x.check(gpu, "x", x.rows, self.width)?;
        let positions = positions.into().check(gpu, "positions", x.rows.into(), false)?;
        check_distinct("x", x.buffer, &[positions.buffer()])?;
        let resources = vec![x.binding(), positions.binding(), self.table.as_entire_binding()];
        self.program.record(gpu, recorder.into(), resources, elementwise_grid("x", &x, 4)?)
    }
}

/// Copies chosen rows: the last token of each sequence, before the head.
#[derive(Debug)]
pub struct SelectRows {
    gpu: Gpu,
    width: u32,
    program: Arc<Program>,
}

impl SelectRows {
    /// Compiles the kernel; `width` is a multiple of 4.
    ///
    /// # Errors
    /// [`Error::Argument`] for a width that breaks the rule; [`Error::Wgpu`].
    pub async fn new(gpu: &Gpu, width: u32) -> Result<Self> {
        Ok(Self { gpu: gpu.clone(), width, program: Program::get(gpu, Self::source(width)?).await? })
    }

    /// The kernel's text, for reading and for tests.
    ///
    /// # Errors
    /// [`Error::Argument`] for a width that breaks the rule.
    pub fn source(width: u32) -> Result<Source> {
        check_width(width, MAX_WIDTH)?;
        let values = context! {
            vecs => width / 4,
            grid_x => MAX_GRID,
            workgroup_size => ELEMENTWISE_SIZE,
        };
        Ok(Source {
            entry_point: "select_rows",
            text: render("model/select_rows.wgsl", values)?,
            bindings: vec![
                Binding::new("x", Access::Read),
                Binding::new("indices", Access::Read),
                Binding::new("out", Access::Write),
            ],
            workgroup_size: ELEMENTWISE_SIZE,
            workgroup_bytes: 0,
            features: ShaderFeatures::default(),
        })
    }

    /// Records `out[i] = x[indices[i]]`. `x` is `[rows, width]`, `indices` u32 `[out.rows]`, and `out` `[out.rows, width]` in a buffer of its
    /// own. The indices are below `x.rows`; the kernel takes the last row for those that aren't.
    ///
    /// # Errors
    /// [`Error::Argument`] for ranges that don't fit; [`Error::Wgpu`].
    pub fn record<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        x: Rows<'_>,
        indices: impl Into<BufferRef<'a>>,
        out: Rows<'_>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        x.check(gpu, "x", x.rows, self.width)?;
        out.check(gpu, "out", out.rows, self.width)?;
        let indices = indices.into().check(gpu, "indices", out.rows.into(), false)?;
        check_distinct("out", out.buffer, &[x.buffer, indices.buffer()])?;
        let resources = vec![x.binding(), indices.binding(), out.binding()];
        self.program.record(gpu, recorder.into(), resources, elementwise_grid("out", &out, 4)?)
    }
}
