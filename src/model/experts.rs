//! Mixtures of experts: what they hold, and how a step runs through them.

use super::config::ModelConfig;
use super::linear::Linear;
use super::ops::{Router, Routes};
use super::rows::Rows;
use crate::{Error, Gpu, Result};

/// The mixture of experts of a layer ([Shazeer et al. 2017](https://arxiv.org/abs/1701.06538)): each token goes to a few of many MLPs.
#[derive(Debug)]
pub(super) struct ExpertLayer {
    /// Logits of the experts, with the norm before the MLP.
    pub(super) router: Linear,
    /// Of all experts.
    pub(super) up: Linear,
    pub(super) down: Linear,
    /// What is added to scores where experts are selected.
    pub(super) correction: Option<wgpu::Buffer>,
    /// Both projections of the expert that every token goes to. The second adds to what is there.
    pub(super) shared: Option<[Linear; 2]>,
}

/// The activations of one step.
#[derive(Debug)]
pub(super) struct ExpertScratch {
    logits: wgpu::Buffer,
    routes: Routes,
    /// What each expert of a token yields.
    added: wgpu::Buffer,
    /// Between the projections of the expert that every token goes to.
    shared: Option<wgpu::Buffer>,
}

impl ExpertScratch {
    /// f32 values per token of the widest buffer.
    pub(super) fn widest_row(config: &ModelConfig) -> u64 {
        let Some(experts) = &config.experts else { return 0 };
        let of_pair = u64::from(experts.intermediate_size.max(config.hidden_size));
        // The list of routes has up to four words for each of them, which is never more.
        let own = of_pair.max(4) * u64::from(experts.router.experts.per_row);
        own.max(experts.shared_size.unwrap_or(0).into())
    }

    /// Room for `rows` tokens, if the model has experts.
    pub(super) fn new(gpu: &Gpu, config: &ModelConfig, rows: u32) -> Result<Option<Self>> {
        let Some(experts) = &config.experts else { return Ok(None) };
        let sent = experts.router.experts;
        let buffer = |label, width: u64| {
            let bytes = u64::from(rows) * width * 4;
            gpu.create_buffer("creating the activations", label, bytes, wgpu::BufferUsages::STORAGE)
        };
        Ok(Some(Self {
            logits: buffer("folio expert logits", sent.count.into())?,
            routes: Routes::new(gpu, sent, rows)?,
            shared: experts.shared_size.map(|size| buffer("folio shared expert", size.into())).transpose()?,
            added: buffer("folio experts", u64::from(sent.per_row) * u64::from(config.hidden_size))?,
        }))
    }
}

impl ExpertLayer {
    /// Bytes of weights that a token reads: the router's, and those of the experts that it goes to.
    pub(super) fn bytes_of_token(&self) -> u64 {
        let sent = self.up.config().experts.map_or(1, |experts| u64::from(experts.per_row));
        let count = u64::from(self.up.config().num_experts());
        let shared: u64 = self.shared.iter().flatten().map(Linear::bytes).sum();
        self.router.bytes() + shared + (self.up.bytes() + self.down.bytes()) / count * sent
    }

    /// Records the choice of experts for the rows of x, and their first projection, to `inner`, which has a row for each pair of a token and an expert.
    pub(super) fn record_up(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        router: &Router,
        scratch: &ExpertScratch,
        x: Rows<'_>,
        inner: Rows<'_>,
    ) -> Result<()> {
        let tile_rows = self.up.tile_rows(inner.rows)?;
        // Both projections compute by the same list of tiles.
        let other = self.down.tile_rows(inner.rows)?;
        if other != tile_rows {
            return Err(Error::argument(
                "experts",
                format!("tiles of {tile_rows} and of {other} rows"),
                "tiles of a size",
            ));
        }
        let logits = Rows::new(&scratch.logits, x.rows, router.config().experts.count);
        self.router.record(&mut *pass, x, logits)?;
        router.record(&mut *pass, logits, self.correction.as_ref(), &scratch.routes, tile_rows)?;
        self.up.record_routed(&mut *pass, x, inner, &scratch.routes)?;
        match (&self.shared, &scratch.shared) {
            (Some([up, _]), Some(buffer)) => up.record(pass, x, Rows::new(buffer, x.rows, up.config().out_features)),
            _ => Ok(()),
        }
    }

    /// Every linear layer.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.router, &self.up, &self.down].into_iter().chain(self.shared.iter().flatten())
    }

    /// Records the second projection of what [`ExpertLayer::record_up`] has left in `inner`, and the sum over the experts of a token: to `out`, or added to
    /// it.
    pub(super) fn record_down(
        &self,
        pass: &mut wgpu::ComputePass<'_>,
        router: &Router,
        scratch: &ExpertScratch,
        inner: Rows<'_>,
        out: Rows<'_>,
        accumulate: bool,
    ) -> Result<()> {
        let added = Rows::new(&scratch.added, inner.rows, out.width);
        self.down.record_routed(&mut *pass, inner, added, &scratch.routes)?;
        router.record_sum(&mut *pass, &scratch.routes, added, out, accumulate)?;
        match (&self.shared, &scratch.shared) {
            (Some([_, down]), Some(buffer)) => {
                down.record(pass, Rows::new(buffer, out.rows, down.config().in_features), out)
            }
            _ => Ok(()),
        }
    }
}
