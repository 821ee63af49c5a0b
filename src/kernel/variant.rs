//! [`Variant`]: every compile-time choice of a kernel, typed. Equal variants are the same pipeline.

use super::geometry::Geometry;
use super::rope::{RopeConfig, RopeLayout};
use super::target::{Profile, ShaderFeatures, Source, Target};
use crate::error::Result;
use crate::format::KvFormat;
use crate::layout::{HostRows, KvCacheConfig, KvLayout, MAX_HEAD_DIM, Region, RowLayout, Segments};
use crate::plan::AttentionConfig;

/// The kernels. Each is an entry point of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Writes new K and V rows into their slots.
    Append,
    /// The same of a matrix of queries, keys and values, whose queries and keys are rotated, and perhaps normalised before.
    AppendQkv,
    /// Copies whole blocks, for copy-on-write.
    CopyBlocks,
    /// Moves rows to earlier places of their sequences, for accepted paths.
    MoveRows,
    /// Copies blocks of one side into consecutive memory, or back.
    PackBlocks,
    /// Reads a sequence out of its blocks into contiguous f32 rows.
    Gather,
    /// Attention of single-token sequences.
    Decode,
    /// Attention of tiles of query rows.
    Prefill,
    /// Joins the partial states of split key ranges.
    Merge,
    /// Rotates rows by their positions, in place.
    Rope,
}

impl Kernel {
    /// All kernels.
    pub const ALL: [Self; 10] = [
        Self::Append,
        Self::AppendQkv,
        Self::CopyBlocks,
        Self::MoveRows,
        Self::PackBlocks,
        Self::Gather,
        Self::Decode,
        Self::Prefill,
        Self::Merge,
        Self::Rope,
    ];

    /// Entry point and file name.
    #[must_use]
    pub const fn entry_point(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::AppendQkv => "append_qkv",
            Self::CopyBlocks => "copy_blocks",
            Self::MoveRows => "move_rows",
            Self::PackBlocks => "pack_blocks",
            Self::Gather => "gather",
            Self::Decode => "decode",
            Self::Prefill => "prefill",
            Self::Merge => "merge",
            Self::Rope => "rope",
        }
    }
}

/// The options of an attention call that are compiled in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AttendFlags {
    /// A query sees no key behind its own position.
    pub causal: bool,
    /// A query sees only the newest keys.
    pub window: bool,
    /// Logits pass through `c * tanh(x / c)`.
    pub softcap: bool,
    /// A slope per query head times the distance is added to the logits.
    pub alibi: bool,
    /// A logit per query head joins the softmax denominator.
    pub sinks: bool,
    /// A bit per query and key says what is visible.
    pub mask: bool,
    /// The logarithm of the softmax denominator is written.
    pub lse: bool,
}

impl AttendFlags {
    /// What a configuration compiles in.
    #[must_use]
    pub fn of(config: &AttentionConfig) -> Self {
        Self {
            causal: config.causal,
            window: config.window.is_some(),
            softcap: config.softcap.is_some(),
            alibi: config.alibi_slopes.is_some(),
            sinks: config.sinks.is_some(),
            mask: config.custom_mask || config.trees,
            lse: config.lse,
        }
    }
}

/// What of a [`RopeConfig`](crate::RopeConfig) is compiled in; frequencies are data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RopeShape {
    /// Which elements of a row are rotated together.
    pub layout: RopeLayout,
    /// Elements of a row that are rotated, an even number.
    pub rotary_dim: u32,
    /// The first of them, a multiple of 8.
    pub rotary_start: u32,
}

impl RopeShape {
    /// What a configuration compiles in.
    #[must_use]
    pub const fn of(config: &RopeConfig) -> Self {
        Self { layout: config.layout, rotary_dim: config.rotary_dim, rotary_start: config.rotary_start }
    }
}

/// Every compile-time choice of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// The kernel.
    pub kernel: Kernel,
    /// What the adapter offers.
    pub target: Target,
    /// Elements of a query and of a key.
    pub head_dim: u32,
    /// Elements of a value and of a result.
    pub value_dim: u32,
    /// Heads of K and V.
    pub num_kv_heads: u32,
    /// Query heads per KV head; 1 for kernels that see no queries.
    pub group_size: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// How K is stored.
    pub k_format: KvFormat,
    /// How V is stored.
    pub v_format: KvFormat,
    /// Whether values are the first elements of keys: there is no V side then.
    pub latent: bool,
    /// How K is cut.
    pub k_segments: Segments,
    /// How V is cut.
    pub v_segments: Segments,
    /// Options of the attention call.
    pub flags: AttendFlags,
    /// Where queries lie (decode and prefill), or what is rotated (`rope`).
    pub q_rows: HostRows,
    /// Where results lie (decode, prefill and merge).
    pub out_rows: HostRows,
    /// Where new keys lie (`append`).
    pub k_rows: HostRows,
    /// Where new values lie (`append`).
    pub v_rows: HostRows,
    /// Rotary embedding: what `rope` and `append_qkv` do always, and `append` to K if it is there.
    pub rope: Option<RopeShape>,
    /// Whether `append_qkv` normalises queries and keys before, and `append` the values of latents.
    pub head_norm: bool,
    /// `append_qkv` writes the queries a second time, rotated by their positions up to this one, for sink tokens.
    pub sink_position: Option<u32>,
    /// Whether scores are integer dot products of quantised queries with the codes of K (`decode`).
    pub packed_dots: bool,
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Query rows of a workgroup (decode and prefill).
    pub tile_q: u32,
    /// Keys that a workgroup handles at a time (decode and prefill).
    pub tile_kv: u32,
}

/// Largest group that the decode kernel serves in one workgroup. It keeps the state of every head of the group in registers; larger
/// groups go to the prefill kernel, whose rows are (token, head in group) and which reads each K and V element once for all of them.
pub const MAX_DECODE_GROUP: u32 = 8;

/// Largest group that the decode kernel serves of a cache. Of more than 256 elements it is 4, whose queries take 9 of the 16 KiB of workgroup
/// memory that WebGPU promises.
#[must_use]
pub const fn max_decode_group(config: &KvCacheConfig) -> u32 {
    if config.head_dim > 256 || config.value_dim() > 256 { MAX_DECODE_GROUP / 2 } else { MAX_DECODE_GROUP }
}

/// Largest head_dim of the kernel for matrix units, which keeps a tile of queries in workgroup memory.
const MAX_MATRIX_DIM: u32 = 256;

/// Subgroup sizes that the CPU kernels are written for: 4 (SSE, NEON), 8 (AVX2), 16 (AVX-512) lanes of f32. With any other size, or a size that
/// varies, they share through workgroup memory instead.
const CPU_SUBGROUP_SIZES: [u32; 3] = [4, 8, 16];

impl Variant {
    /// A kernel for a cache, with the sizes that suit the target; see [`super::tuning`].
    ///
    /// The configuration must be [valid](KvCacheConfig::validate): a head_dim that no kernel has is taken for the next one below it.
    #[must_use]
    pub fn new(kernel: Kernel, target: Target, config: &KvCacheConfig, group_size: u32, flags: AttendFlags) -> Self {
        let [head_dim, value_dim] = [config.head_dim, config.value_dim()].map(|dim| dim.clamp(8, MAX_HEAD_DIM) / 8 * 8);
        let (num_kv_heads, group_size) = (config.num_kv_heads.max(1), group_size.max(1));
        let num_q_heads = num_kv_heads.saturating_mul(group_size);
        let mut variant = Self {
            kernel,
            target,
            head_dim,
            value_dim,
            num_kv_heads,
            group_size,
            q_rows: RowLayout::DENSE.resolve(num_q_heads, head_dim),
            out_rows: RowLayout::DENSE.resolve(num_q_heads, value_dim),
            k_rows: RowLayout::DENSE.resolve(num_kv_heads, head_dim),
            v_rows: RowLayout::DENSE.resolve(num_kv_heads, value_dim),
            block_size: config.block_size.max(1),
            k_format: config.k_format,
            v_format: config.v_format,
            latent: config.latent,
            k_segments: Segments::ONE,
            v_segments: Segments::ONE,
            flags,
            rope: None,
            head_norm: false,
            sink_position: None,
            packed_dots: false,
            workgroup_size: 0,
            tile_q: 0,
            tile_kv: 0,
        };
        if target.profile == Profile::Cpu && !CPU_SUBGROUP_SIZES.contains(&target.subgroup_size) {
            (variant.target.subgroups, variant.target.subgroup_size) = (false, 0);
        }
        if !variant.may_use_matrices() {
            variant.target.matrix = None;
        }
        variant.target.packed_dots &= variant.may_pack_dots();
        super::tuning::choose(&mut variant);
        variant
    }

    /// Whether the kernel has a form for matrix units, and its products are of halves anyway: a cache of f32 is not rounded.
    fn may_use_matrices(&self) -> bool {
        let Self { kernel, target, head_dim, value_dim, k_format, v_format, .. } = *self;
        kernel == Kernel::Prefill
            && value_dim == head_dim
            && head_dim <= MAX_MATRIX_DIM
            && target.profile == Profile::Gpu
            && target.subgroups
            && k_format != KvFormat::F32
            && v_format != KvFormat::F32
    }

    /// Whether the kernel has a form for packed dot products, and K has codes for them.
    fn may_pack_dots(&self) -> bool {
        self.kernel == Kernel::Decode && self.target.profile == Profile::Gpu && self.k_format.has_codes()
    }

    /// The same kernel without matrix units, with the sizes that suit it then.
    #[must_use]
    pub fn without_matrices(mut self) -> Self {
        if self.target.matrix.take().is_some() {
            super::tuning::choose(&mut self);
        }
        self
    }

    /// The same kernel over a cache whose sides are cut into segments.
    #[must_use]
    pub fn with_segments(self, [k_segments, v_segments]: [Segments; 2]) -> Self {
        Self { k_segments, v_segments, ..self }
    }

    /// Layout of the K side.
    #[must_use]
    pub fn k_layout(&self) -> KvLayout {
        self.layout(self.head_dim, self.k_format)
    }

    /// Layout of the side that values are read from.
    #[must_use]
    pub fn v_layout(&self) -> KvLayout {
        let row_dim = if self.latent { self.head_dim } else { self.value_dim };
        self.layout(row_dim, self.v_format)
    }

    fn layout(&self, row_dim: u32, format: KvFormat) -> KvLayout {
        let Self { num_kv_heads, block_size, .. } = *self;
        KvLayout { num_kv_heads, row_dim, block_size, format }
    }

    /// Whether a side has a scale per row.
    pub(crate) const fn has_row_scales(&self) -> bool {
        self.k_format.has_row_scales() || self.v_format.has_row_scales()
    }

    /// Whether the invocations of a row share what they know, so that a workgroup has whole rows.
    pub(crate) const fn shares_rows(&self) -> bool {
        matches!(self.kernel, Kernel::AppendQkv) || self.has_row_scales() || self.head_norm
    }

    /// Elements per token of the regions that `append_qkv` reads: queries, keys, values.
    pub(crate) fn qkv_regions(&self) -> [Region; 3] {
        let kv_width = self.num_kv_heads.saturating_mul(self.head_dim);
        Region::of([kv_width.saturating_mul(self.group_size), kv_width, kv_width])
    }

    /// Vec8s (8 elements) of a row of K or of V, whichever has more: invocations that append it.
    pub(crate) const fn row_vec8s(&self) -> u32 {
        (if self.head_dim > self.value_dim { self.head_dim } else { self.value_dim }) / 8
    }

    /// Invocations of `append` for a number of rows of K and V, which take 8 elements each. Those of a row whose range they share are of one
    /// workgroup, which has whole rows.
    pub(crate) const fn append_invocations(&self, num_rows: u64) -> u64 {
        let vec8s = self.row_vec8s();
        if self.shares_rows() {
            num_rows.div_ceil((self.workgroup_size / vec8s) as u64) * self.workgroup_size as u64
        } else {
            num_rows * vec8s as u64
        }
    }

    /// The same kernel with a rotary embedding; `append`, `append_qkv` and `rope` know it.
    #[must_use]
    pub fn with_rope(self, rope: RopeShape) -> Self {
        Self { rope: Some(rope), ..self }
    }

    /// The same kernel with queries and results that lie so; decode, prefill, merge and `rope` know it.
    #[must_use]
    pub fn with_rows(self, q: RowLayout, out: RowLayout) -> Self {
        let num_q_heads = self.num_kv_heads.saturating_mul(self.group_size);
        let (q, out) = (q.resolve(num_q_heads, self.head_dim), out.resolve(num_q_heads, self.value_dim));
        match self.kernel {
            Kernel::Decode | Kernel::Prefill => Self { q_rows: q, out_rows: out, ..self },
            Kernel::Rope => Self { q_rows: q, ..self },
            Kernel::Merge => Self { out_rows: out, ..self },
            _ => self,
        }
    }

    /// The same kernel with new keys and values that lie so; `append` knows it.
    #[must_use]
    pub fn with_new_rows(self, k: RowLayout, v: RowLayout) -> Self {
        if self.kernel != Kernel::Append {
            return self;
        }
        let heads = self.num_kv_heads;
        Self { k_rows: k.resolve(heads, self.head_dim), v_rows: v.resolve(heads, self.value_dim), ..self }
    }

    /// The same kernel with RMSNorm: `append_qkv` of each head of queries and keys, `append` to a latent cache of the values within its rows.
    #[must_use]
    pub fn with_head_norm(mut self) -> Self {
        self.head_norm = true;
        // The invocations of a row share its squares, so that a workgroup has whole rows.
        super::tuning::choose(&mut self);
        self
    }

    /// The same kernel that writes queries for sink tokens beside the others, rotated by their positions up to `position`; `append_qkv` knows it.
    #[must_use]
    pub fn with_sink_queries(self, position: u32) -> Self {
        Self { sink_position: Some(position), ..self }
    }

    /// Bytes of workgroup memory that the kernel declares. Checked against the device before a pipeline is made, because wgpu does not.
    #[must_use]
    pub fn workgroup_bytes(&self) -> u32 {
        Geometry::of(self).workgroup_bytes()
    }

    /// Whether the kernel binds [`AttentionConfig::head_params`]: slopes and sinks, of which merge reads the sinks only.
    #[must_use]
    pub const fn reads_heads(&self) -> bool {
        match self.kernel {
            Kernel::Decode | Kernel::Prefill => self.flags.alibi || self.flags.sinks,
            Kernel::Merge => self.flags.sinks,
            _ => false,
        }
    }

    /// Features that the text needs.
    #[must_use]
    pub fn features(&self) -> ShaderFeatures {
        let attends = matches!(self.kernel, Kernel::Decode | Kernel::Prefill);
        ShaderFeatures {
            subgroups: attends && self.target.subgroups,
            int64: attends && self.target.profile == Profile::Cpu && self.target.int64,
            matrix: attends && self.target.matrix.is_some(),
            packed_dots: self.packed_dots,
        }
    }

    /// The kernel with its interface.
    ///
    /// # Errors
    /// [`Error::Shader`](crate::Error::Shader) if a template is broken, which tests over all variants exclude.
    pub fn source(&self) -> Result<Source> {
        Ok(Source {
            entry_point: self.kernel.entry_point(),
            text: super::compose(self)?,
            bindings: super::bindings(self),
            workgroup_size: self.workgroup_size,
            workgroup_bytes: self.workgroup_bytes(),
            features: self.features(),
        })
    }
}
