//! Builds a cache with adversarial surroundings, runs one attention call, and compares it with the oracle.

use fastrand::Rng;
use folio::reference::compare::{self, Comparison};
use folio::reference::quantise::stored;
use folio::reference::{BoundedOutput, ErrorModel, Options, Problem, attention_with_bound};
use folio::wgpu::{self, util::DeviceExt};
use folio::{
    Attention, AttentionConfig, Gpu, KvCache, KvCacheConfig, KvFormat, Recorder, RowElement, SequenceId, Step,
};

use crate::host_rows;

/// One step over a ragged batch, and everything that shapes it.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// (context_len, query_len) of each sequence.
    pub(crate) lens: Vec<(u32, u32)>,
    /// Tokens at the start of every context that are those of the first: the others are forks of it.
    pub(crate) prefix: u32,
    pub(crate) num_kv_heads: u32,
    pub(crate) head_dim: u32,
    /// Elements of a value.
    pub(crate) value_dim: u32,
    /// Whether values are the first elements of keys.
    pub(crate) latent: bool,
    pub(crate) block_size: u32,
    /// Blocks of the pool. `None`: three more than the case needs.
    pub(crate) num_blocks: Option<u32>,
    pub(crate) k_format: KvFormat,
    pub(crate) v_format: KvFormat,
    /// Factor of q: large logits.
    pub(crate) q_scale: f32,
    pub(crate) config: AttentionConfig,
    /// For `config.custom_mask`: probability that a bit is set.
    pub(crate) mask_density: f32,
    pub(crate) seed: u64,
    /// Whether the kernels may multiply halves.
    pub(crate) f16_products: bool,
    /// Whether they may quantise queries.
    pub(crate) packed_dots: bool,
}

/// The rows of one sequence.
pub(crate) struct Rows {
    /// `[query_len, num_q_heads, head_dim]`
    pub(crate) q: Vec<f32>,
    /// `[seq_len, num_kv_heads, head_dim]`
    pub(crate) k: Vec<f32>,
    /// `[seq_len, num_kv_heads, value_dim]`
    pub(crate) v: Vec<f32>,
    pub(crate) mask: Vec<u32>,
}

impl Case {
    /// A causal F32 case with blocks of 16 tokens.
    pub(crate) fn new(lens: &[(u32, u32)], num_q_heads: u32, num_kv_heads: u32, head_dim: u32) -> Self {
        Self {
            name: String::new(),
            lens: lens.to_vec(),
            prefix: 0,
            num_kv_heads,
            head_dim,
            value_dim: head_dim,
            latent: false,
            block_size: 16,
            num_blocks: None,
            k_format: KvFormat::F32,
            v_format: KvFormat::F32,
            q_scale: 1.0,
            config: AttentionConfig::new(num_q_heads),
            mask_density: 0.5,
            seed: 1,
            f16_products: false,
            packed_dots: false,
        }
    }

    pub(crate) fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    pub(crate) fn block_size(mut self, block_size: u32) -> Self {
        self.block_size = block_size;
        self
    }

    pub(crate) fn formats(mut self, k_format: KvFormat, v_format: KvFormat) -> Self {
        (self.k_format, self.v_format) = (k_format, v_format);
        self
    }

    pub(crate) fn value_dim(mut self, value_dim: u32) -> Self {
        self.value_dim = value_dim;
        self
    }

    /// Values are the first `value_dim` elements of keys, in one format.
    pub(crate) fn latent(mut self, value_dim: u32) -> Self {
        (self.value_dim, self.latent, self.v_format) = (value_dim, true, self.k_format);
        self
    }

    pub(crate) fn config(mut self, change: impl FnOnce(&mut AttentionConfig)) -> Self {
        change(&mut self.config);
        self
    }

    pub(crate) fn q_scale(mut self, q_scale: f32) -> Self {
        self.q_scale = q_scale;
        self
    }

    /// Random rows, about normally distributed; none of their elements is so near to the middle of two codes that f32 decides which it gets.
    pub(crate) fn rows(&self) -> Vec<Rows> {
        let mut rng = Rng::with_seed(self.seed);
        let mut normal = |n: u32, scale: f32| -> Vec<f32> {
            // The sum of four uniform numbers has variance 1/3.
            (0..n).map(|_| (0..4).map(|_| rng.f32() - 0.5).sum::<f32>() * 1.732 * scale).collect()
        };
        let mut rows: Vec<Rows> = self
            .lens
            .iter()
            .map(|&(context_len, query_len)| {
                let seq_len = context_len + query_len;
                Rows {
                    q: normal(query_len * self.config.num_q_heads * self.head_dim, self.q_scale),
                    k: normal(seq_len * self.num_kv_heads * self.head_dim, 1.0),
                    v: normal(seq_len * self.num_kv_heads * self.value_dim, 1.0),
                    mask: Vec::new(),
                }
            })
            .collect();
        if self.config.custom_mask {
            for (rows, &(context_len, query_len)) in rows.iter_mut().zip(&self.lens) {
                let words = query_len * (context_len + query_len).div_ceil(32);
                rows.mask = (0..words)
                    .map(|_| (0..32).fold(0, |bits, bit| bits | u32::from(rng.f32() < self.mask_density) << bit))
                    .collect();
            }
        }
        if let Some((first, others)) = rows.split_first_mut() {
            let [k, v] = self.row_lens().map(|len| self.prefix as usize * len);
            for other in others {
                other.k[..k].copy_from_slice(&first.k[..k]);
                other.v[..v].copy_from_slice(&first.v[..v]);
            }
        }
        let channels = self.channels(&rows);
        for rows in &mut rows {
            if self.config.q_rows.element == RowElement::F16 {
                rows.q = round(KvFormat::F16, &rows.q);
            }
            settle(self.k_format, &mut rows.k, self.head_dim, channels.as_deref());
            if self.latent {
                let of_keys = |key: &[f32]| key[..self.value_dim as usize].to_vec();
                rows.v = rows.k.chunks(self.head_dim as usize).flat_map(of_keys).collect();
            } else {
                settle(self.v_format, &mut rows.v, self.value_dim, None);
            }
        }
        rows
    }

    /// Scales and zero points that cover all keys, for formats that have them per channel: `[2, num_kv_heads, head_dim]`.
    pub(crate) fn channels(&self, rows: &[Rows]) -> Option<Vec<f32>> {
        if !self.k_format.has_channel_scales() {
            return None;
        }
        let row = (self.num_kv_heads * self.head_dim) as usize;
        let levels = ((1 << self.k_format.element_bits()) - 1) as f32;
        let keys = |channel| rows.iter().flat_map(move |rows| rows.k.iter().skip(channel).step_by(row).copied());
        let min: Vec<_> = (0..row).map(|channel| keys(channel).fold(f32::INFINITY, f32::min)).collect();
        let max = (0..row).map(|channel| keys(channel).fold(f32::NEG_INFINITY, f32::max));
        let scales: Vec<_> = max.zip(&min).map(|(max, min)| (max - min) / levels).collect();
        Some([scales, min].concat())
    }

    /// Elements of a token's keys, and of its values.
    fn row_lens(&self) -> [usize; 2] {
        [self.head_dim, self.value_dim].map(|dim| (self.num_kv_heads * dim) as usize)
    }

    /// Runs the case on `gpu` and compares every row with the oracle.
    #[track_caller]
    pub(crate) fn check(&self, gpu: &Gpu) {
        let rows = self.rows();
        let (out, lse) = self.run(gpu, &rows);
        self.compare(gpu, &rows, &out, lse.as_deref());
    }

    /// The oracle's view of one sequence.
    fn problem<'a>(&self, rows: &'a Rows) -> Problem<'a> {
        let config = &self.config;
        let mut options = Options::default();
        options.causal = config.causal;
        options.softmax_scale = config.softmax_scale.map(f64::from);
        options.softcap = config.softcap.map(f64::from);
        options.window = config.window;
        options.sink_tokens = config.sink_tokens;
        options.alibi_slopes.clone_from(&config.alibi_slopes);
        options.sinks.clone_from(&config.sinks);
        options.mask = config.custom_mask.then(|| rows.mask.clone());
        Problem {
            num_q_heads: config.num_q_heads as usize,
            num_kv_heads: self.num_kv_heads as usize,
            head_dim: self.head_dim as usize,
            value_dim: self.value_dim as usize,
            q: &rows.q,
            k: &rows.k,
            v: &rows.v,
            options,
        }
    }

    /// What the oracle says of each sequence, over the rows as the formats keep them.
    pub(crate) fn expected(&self, rows: &[Rows]) -> Vec<BoundedOutput> {
        self.expected_with(rows, self.channels(rows).as_deref())
    }

    /// [`expected`](Self::expected) with the scales of channels that all of a cache's rows have.
    fn expected_with(&self, rows: &[Rows], channels: Option<&[f32]>) -> Vec<BoundedOutput> {
        let mut model = ErrorModel::new(self.k_format, self.v_format).over_stored();
        if self.latent {
            model = model.with_latents();
        }
        if self.config.out_rows.element == RowElement::F16 {
            model = model.with_half_results();
        }
        if self.f16_products {
            model = model.with_f16_products();
        }
        if self.packed_dots {
            model = model.with_packed_dots();
        }
        if let Some(channels) = channels {
            model = model.with_key_scales(channels);
        }
        rows.iter().map(|rows| attention_with_bound(&self.problem(rows), &model).expect("a valid problem")).collect()
    }

    /// Compares with [`expected`](Self::expected).
    #[track_caller]
    pub(crate) fn compare(&self, gpu: &Gpu, rows: &[Rows], out: &[f32], lse: Option<&[f32]>) {
        self.compare_with(gpu, rows, self.channels(rows).as_deref(), out, lse);
    }

    /// [`compare`](Self::compare) with the scales of channels that all of a cache's rows have.
    #[track_caller]
    pub(crate) fn compare_with(
        &self,
        gpu: &Gpu,
        rows: &[Rows],
        channels: Option<&[f32]>,
        out: &[f32],
        lse: Option<&[f32]>,
    ) {
        let (mut at, mut lse_at) = (0, 0);
        for (i, expected) in self.expected_with(rows, channels).into_iter().enumerate() {
            let rows = &rows[i];
            let len = rows.q.len() / self.head_dim as usize;
            let out_len = len * self.value_dim as usize;
            self.assert_within(gpu, i, &compare::out(&expected, &out[at..at + out_len]));
            at += out_len;
            if let Some(lse) = lse {
                self.assert_within(gpu, i, &compare::lse(&expected, &lse[lse_at..lse_at + len]));
                lse_at += len;
            }
        }
        assert_eq!(at, out.len());
    }

    #[track_caller]
    fn assert_within(&self, gpu: &Gpu, sequence: usize, comparison: &Comparison) {
        assert!(comparison.is_within(), "sequence {sequence}: {comparison}\n{self:#?}\n{gpu:?}");
    }

    /// Caches and attends; returns out and, if the config asks for it, lse.
    pub(crate) fn run(&self, gpu: &Gpu, rows: &[Rows]) -> (Vec<f32>, Option<Vec<f32>>) {
        let (cache, sequences) = self.fill(gpu, rows);
        let attention = Attention::new_blocking(&cache, self.config.clone()).expect("attention");
        self.attend(&cache, &attention, &sequences, rows)
    }

    /// The final step: appends the query tokens and attends.
    pub(crate) fn attend(
        &self,
        cache: &KvCache,
        attention: &Attention,
        sequences: &[SequenceId],
        rows: &[Rows],
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let batch: Vec<_> = sequences.iter().copied().zip(self.lens.iter().map(|l| l.1)).collect();
        let step = cache.begin_step(&batch).expect("step");
        let layer = cache.config().num_layers - 1;
        let results = self.attend_step(cache.gpu(), attention, &step, layer, rows, |pass, k, v| {
            append_rows(cache, pass, &step, layer, k, v);
        });
        cache.commit(step).expect("commit");
        results
    }

    /// [`Case::attend`] for a step of any cache, which the caller commits.
    pub(crate) fn attend_step(
        &self,
        gpu: &Gpu,
        attention: &Attention,
        step: &Step,
        layer: u32,
        rows: &[Rows],
        append: impl FnOnce(&mut wgpu::ComputePass<'_>, &wgpu::Buffer, &wgpu::Buffer),
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let masks: Vec<&[u32]> = rows.iter().map(|r| &r.mask[..]).collect();
        let plan = if self.config.custom_mask { attention.plan_with_masks(step, &masks) } else { attention.plan(step) }
            .expect("plan");
        let [k_len, v_len] = self.row_lens();
        let new = |rows: &[f32], i: usize, len: usize| rows[self.lens[i].0 as usize * len..].to_vec();
        let k: Vec<f32> = rows.iter().enumerate().flat_map(|(i, r)| new(&r.k, i, k_len)).collect();
        let v: Vec<f32> = rows.iter().enumerate().flat_map(|(i, r)| new(&r.v, i, v_len)).collect();
        let q: Vec<f32> = rows.iter().flat_map(|r| r.q.clone()).collect();
        let (k, v) = (upload(gpu, &k), upload(gpu, &v));
        let num_q_heads = self.config.num_q_heads;
        let num_rows = q.len() / self.head_dim as usize;
        let q = host_rows::upload(gpu, &self.config.q_rows.resolve(num_q_heads, self.head_dim), &q);
        // Results start as NaN, so that a row that nobody writes is noticed.
        let out_rows = self.config.out_rows.resolve(num_q_heads, self.value_dim);
        let out = host_rows::upload(gpu, &out_rows, &vec![f32::NAN; num_rows * self.value_dim as usize]);
        let lse = upload(gpu, &vec![f32::NAN; num_rows]);
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            append(&mut pass, &k, &v);
            if self.config.lse {
                attention.attend_with_lse(&mut pass, &plan, layer, &q, &out, &lse).expect("attend");
            } else {
                attention.attend(&mut pass, &plan, layer, &q, &out).expect("attend");
            }
        }
        gpu.queue().submit([encoder.finish()]);
        (host_rows::read(gpu, &out_rows, &out), self.config.lse.then(|| gpu.read_blocking(&lse).expect("lse")))
    }

    /// A cache whose unused bytes are all NaN and whose free list is shuffled, with the context of every sequence in it.
    pub(crate) fn fill(&self, gpu: &Gpu, rows: &[Rows]) -> (KvCache, Vec<SequenceId>) {
        let blocks: u32 = self.lens.iter().map(|&(c, q)| (c + q).div_ceil(self.block_size)).sum();
        let mut config = KvCacheConfig::new(1, self.num_kv_heads, self.head_dim)
            .with_blocks(self.num_blocks.unwrap_or(blocks + 3), self.block_size)
            .with_formats(self.k_format, self.v_format)
            .with_value_dim(self.value_dim);
        config.latent = self.latent;
        let cache = KvCache::new_blocking(gpu, config).expect("cache");
        poison(&cache);
        if let Some(channels) = self.channels(rows) {
            cache.set_key_scales(0, &channels).expect("scales");
        }
        shuffle(&cache, self.seed);
        let sequences = self.append_context(&cache, rows);
        (cache, sequences)
    }

    /// Makes the sequences and appends their context.
    pub(crate) fn append_context(&self, cache: &KvCache, rows: &[Rows]) -> Vec<SequenceId> {
        let [k_len, v_len] = self.row_lens();
        let mut sequences = vec![cache.create_sequence()];
        if self.prefix > 0 {
            let [k, v] = [k_len, v_len].map(|len| ..self.prefix as usize * len);
            append(cache, &[(sequences[0], self.prefix)], 0, &rows[0].k[k], &rows[0].v[v]);
        }
        while sequences.len() < self.lens.len() {
            sequences.push(cache.fork(sequences[0]).expect("fork"));
        }
        // Sequences grow a few tokens at a time where that is cheap, so that their blocks interleave.
        // A step's rows must fit into a binding.
        let most =
            cache.gpu().limits().max_storage_buffer_binding_size / (4 * k_len.max(v_len) * self.lens.len()) as u64;
        let mut done = vec![self.prefix; self.lens.len()];
        loop {
            let mut batch = Vec::new();
            let (mut k, mut v) = (Vec::new(), Vec::new());
            for (i, &(context_len, _)) in self.lens.iter().enumerate() {
                let new = (context_len / 3)
                    .max(self.block_size + 1)
                    .min(u32::try_from(most).unwrap_or(u32::MAX))
                    .min(context_len - done[i]);
                if new > 0 {
                    let range = |len: usize| done[i] as usize * len..(done[i] + new) as usize * len;
                    k.extend_from_slice(&rows[i].k[range(k_len)]);
                    v.extend_from_slice(&rows[i].v[range(v_len)]);
                    batch.push((sequences[i], new));
                    done[i] += new;
                }
            }
            if batch.is_empty() {
                return sequences;
            }
            append(cache, &batch, 0, &k, &v);
        }
    }
}

/// Records the append of keys and, where the cache has room for them, values.
pub(crate) fn append_rows<'a>(
    cache: &KvCache,
    recorder: impl Into<Recorder<'a>>,
    step: &Step,
    layer: u32,
    k: &'a wgpu::Buffer,
    v: &'a wgpu::Buffer,
) {
    if cache.config().latent {
        cache.append_latent(recorder, step, layer, k, None).expect("append");
    } else {
        cache.append(recorder, step, layer, k, v, None).expect("append");
    }
}

/// Appends rows in a step of their own and submits.
pub(crate) fn append(cache: &KvCache, batch: &[(SequenceId, u32)], layer: u32, k: &[f32], v: &[f32]) {
    let gpu = cache.gpu();
    let step = cache.begin_step(batch).expect("step");
    let (k, v) = (upload(gpu, k), upload(gpu, v));
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    append_rows(cache, &mut encoder, &step, layer, &k, &v);
    gpu.queue().submit([encoder.finish()]);
    cache.commit(step).expect("commit");
}

/// Fills all of the pool with bits that are NaN in every format.
pub(crate) fn poison(cache: &KvCache) {
    for layer in 0..cache.config().num_layers {
        let (k, v) = cache.layer_buffers(layer).expect("layer");
        poison_buffers(cache.gpu(), k.iter().chain(v));
    }
}

pub(crate) fn poison_buffers<'b>(gpu: &Gpu, buffers: impl IntoIterator<Item = &'b wgpu::Buffer>) {
    for buffer in buffers {
        let nan = vec![0xff_u8; buffer.size() as usize];
        gpu.queue().write_buffer(buffer, 0, &nan);
    }
}

/// Takes all blocks and gives them back in random order: later tables are not contiguous. The last block of the pool is the first to be taken.
pub(crate) fn shuffle(cache: &KvCache, seed: u64) {
    let mut order: Vec<_> = (0..cache.config().num_blocks - 1).collect();
    Rng::with_seed(seed).shuffle(&mut order);
    order.insert(0, cache.config().num_blocks - 1);
    arrange(cache, &order);
}

/// The blocks of an empty cache will be taken in this order.
pub(crate) fn arrange(cache: &KvCache, order: &[u32]) {
    let block_size = cache.config().block_size;
    let mut holders: Vec<_> = (0..cache.config().num_blocks).map(|_| cache.create_sequence()).collect();
    for &holder in &holders {
        let step = cache.begin_step(&[(holder, block_size)]).expect("step");
        cache.commit(step).expect("commit");
    }
    let held = |&holder: &SequenceId| cache.block_table(holder).expect("table")[0].index();
    holders.sort_unstable_by_key(held);
    // What is freed last is taken first.
    for &block in order.iter().rev() {
        cache.free(holders[block as usize]).expect("free");
    }
    assert_eq!(cache.usage().free, cache.usage().total, "an order of all blocks");
}

/// Moves elements that lie within a hundredth of a scale of the middle of two codes away from it.
fn settle(format: KvFormat, rows: &mut [f32], head_dim: u32, channels: Option<&[f32]>) {
    // The smallest or largest element of a row may move too, and its scale with it.
    for _ in 0..100 {
        let kept = stored(format, rows, head_dim as usize, channels).expect("whole rows");
        let mut is_settled = true;
        for ((x, value), scale) in rows.iter_mut().zip(kept.values).zip(kept.scales) {
            let (off, scale) = (value - f64::from(*x), f64::from(scale));
            if scale > 0.0 && (off.abs() - 0.5 * scale).abs() < 0.01 * scale {
                *x += (0.05 * off) as f32;
                is_settled = false;
            }
        }
        if is_settled {
            return;
        }
    }
    panic!("rows that don't settle");
}

/// What the cache keeps of `rows` in a format without scales.
pub(crate) fn round(format: KvFormat, rows: &[f32]) -> Vec<f32> {
    match format {
        KvFormat::F16 => rows.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect(),
        _ => rows.to_vec(),
    }
}

pub(crate) fn upload(gpu: &Gpu, data: &[f32]) -> wgpu::Buffer {
    gpu.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(data),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
    })
}

/// Sets option `i` of 8, for 4 query heads: each alone, and with 7 all that go together.
pub(crate) fn option_of_four_heads(config: &mut AttentionConfig, i: usize) {
    let all = i == 7;
    config.lse = i % 2 == 1;
    config.causal = i != 0;
    config.window = (i == 1 || all).then_some(13);
    config.softcap = (i == 2 || all).then_some(30.0);
    config.alibi_slopes = (i == 3 || all).then(|| vec![0.5, 0.25, 0.125, 0.0625]);
    config.sinks = (i == 4 || all).then(|| vec![0.5, -3.0, 2.0, 0.0]);
    config.custom_mask = i == 5 || all;
    config.softmax_scale = (i == 6).then_some(-0.3);
}
