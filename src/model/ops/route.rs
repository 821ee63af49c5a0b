//! [`Router`]: sends rows to experts, and adds up what they have computed.

use std::sync::Arc;

use minijinja::context;

use super::{ELEMENTWISE_SIZE, check_distinct, check_width, elementwise_grid, grid, upload};
use crate::gpu::{Program, Recorder};
use crate::kernel::{Access, Binding, ShaderFeatures, Source, render};
use crate::model::Rows;
use crate::model::linear_config::{Factor, LinearExperts};
use crate::plan::MAX_GRID;
use crate::{BufferRef, Error, Gpu, Profile, Result};

/// Most experts of a layer: twice those of DeepSeek-V3, and as many as any published model has (Qwen3-Next). Sorting takes 8 bytes of workgroup memory for
/// each.
pub(crate) const MAX_EXPERTS: u32 = 512;

/// Most experts of a row: three times the most of published models (Qwen3-Next's 10).
pub(crate) const MAX_SELECTED: u32 = 32;

/// Widest row: far from overflowing an index.
const MAX_WIDTH: u32 = 1 << 20;

/// Invocations of the one workgroup that sorts.
const SORT_SIZE: u32 = 256;

/// Rows of the largest tile, that of the matmul for many rows. Tiles have powers of two of them.
const MAX_TILE_ROWS: u32 = 128;

/// What makes a score of a router's logit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scoring {
    /// The softmax over all experts. Over those that are selected it is the same, [renormalised](RouterConfig::renormalise).
    Softmax,
    /// The sigmoid of each by itself: DeepSeek-V3.
    Sigmoid,
}

/// What a group of experts is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupScore {
    /// Its best expert: DeepSeek-V2.
    Best,
    /// Its best two together: DeepSeek-V3.
    TopTwo,
}

/// Experts are selected from some groups of them only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertGroups {
    /// Groups of as many experts, one after another.
    pub count: u32,
    /// Groups that are selected from.
    pub selected: u32,
    /// What they are selected by.
    pub score: GroupScore,
}

/// How rows are sent to experts: by a score of each, the highest first, of equal ones the expert with the lowest number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RouterConfig {
    /// Experts, and to how many of them a row goes.
    pub experts: LinearExperts,
    /// What a score is.
    pub scoring: Scoring,
    /// Whether each expert has a number that is added to its score where experts are selected, and only there (`e_score_correction_bias` of DeepSeek-V3).
    pub correction: bool,
    /// The groups of experts, if there are some.
    pub groups: Option<ExpertGroups>,
    /// Whether the scores of the selected experts are divided by their sum.
    pub renormalise: bool,
    /// What they are multiplied by at the end.
    pub scale: Factor,
}

impl RouterConfig {
    /// Softmax, renormalised: Mixtral.
    #[must_use]
    pub fn new(experts: LinearExperts) -> Self {
        let scale = Factor::ONE;
        Self { experts, scoring: Scoring::Softmax, correction: false, groups: None, renormalise: true, scale }
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the field.
    pub fn validate(&self) -> Result<()> {
        let LinearExperts { count, per_row } = self.experts;
        if count == 0 || count > MAX_EXPERTS {
            return Err(Error::argument("experts.count", count, format!("1 to {MAX_EXPERTS}")));
        }
        let max = count.min(MAX_SELECTED);
        if per_row == 0 || per_row > max {
            return Err(Error::argument("experts.per_row", per_row, format!("1 to {max}")));
        }
        let Some(groups) = self.groups else { return Ok(()) };
        if groups.count == 0 || !count.is_multiple_of(groups.count) {
            return Err(Error::argument("groups.count", groups.count, format!("a divisor of the {count} experts")));
        }
        let size = count / groups.count;
        if groups.selected == 0 || groups.selected > groups.count || groups.selected * size < per_row {
            let need = format!("at most the {} groups, and {per_row} experts of {size} in a group", groups.count);
            return Err(Error::argument("groups.selected", groups.selected, need));
        }
        if groups.score == GroupScore::TopTwo && size < 2 {
            return Err(Error::argument("groups.count", groups.count, "groups of at least two experts"));
        }
        Ok(())
    }

    /// Invocations per row, and rows per workgroup.
    const fn shape(profile: Profile) -> (u32, u32) {
        match profile {
            Profile::Gpu => (32, 2),
            // Lanes are rows there: nothing is shared, and no barrier needed.
            Profile::Cpu => (1, 8),
        }
    }

    /// The kernel that selects, for reading and for tests.
    ///
    /// # Errors
    /// Those of [`RouterConfig::validate`].
    pub fn source(&self, profile: Profile) -> Result<Source> {
        self.validate()?;
        let (lanes, rows) = Self::shape(profile);
        let group_score = self.groups.map_or("none", |groups| match groups.score {
            GroupScore::Best => "best",
            GroupScore::TopTwo => "top_two",
        });
        let num_groups = self.groups.map_or(0, |groups| groups.count);
        let values = context! {
            experts => self.experts.count,
            selected => self.experts.per_row,
            lanes,
            rows,
            grid_x => MAX_GRID,
            scoring => match self.scoring { Scoring::Softmax => "softmax", Scoring::Sigmoid => "sigmoid" },
            correction => self.correction,
            groups => num_groups,
            selected_groups => self.groups.map(|groups| groups.selected),
            group_score,
            renormalise => self.renormalise,
            scale => self.scale.literal(),
        };
        let mut bindings = vec![
            Binding::new("logits", Access::Read),
            Binding::new("ids", Access::Write),
            Binding::new("weights", Access::Write),
        ];
        bindings.extend(self.correction.then_some(Binding::new("correction", Access::Read)));
        let array = |len: u32| (len * 4).next_multiple_of(16);
        let lanes_bytes = if lanes > 1 { 3 * array(lanes * rows) } else { 0 };
        Ok(Source {
            entry_point: "select_experts",
            text: render("model/select_experts.wgsl", values)?,
            bindings,
            workgroup_size: lanes * rows,
            workgroup_bytes: lanes_bytes + 2 * array(num_groups * rows),
            features: ShaderFeatures::default(),
        })
    }

    /// The kernel that sorts, for reading and for tests.
    ///
    /// # Errors
    /// Those of [`RouterConfig::validate`].
    pub fn sort_source(&self) -> Result<Source> {
        self.validate()?;
        let experts = self.experts.count;
        let values = context! { experts, workgroup_size => SORT_SIZE };
        Ok(Source {
            entry_point: "sort_routes",
            text: render("model/sort_routes.wgsl", values)?,
            bindings: vec![
                Binding::new("ids", Access::Read),
                Binding::new("routes", Access::Write),
                Binding::new("params", Access::Uniform),
            ],
            workgroup_size: SORT_SIZE,
            workgroup_bytes: 2 * (experts * 4).next_multiple_of(16),
            features: ShaderFeatures::default(),
        })
    }

    /// The kernel that adds up rows of a width, for reading and for tests.
    ///
    /// # Errors
    /// Those of [`RouterConfig::validate`]; [`Error::Argument`] for a width that is no multiple of 4.
    pub fn add_source(&self, width: u32, accumulate: bool) -> Result<Source> {
        self.validate()?;
        check_width(width, MAX_WIDTH)?;
        let values = context! {
            vecs => width / 4,
            selected => self.experts.per_row,
            accumulate,
            grid_x => MAX_GRID,
            workgroup_size => ELEMENTWISE_SIZE,
        };
        Ok(Source {
            entry_point: "add_experts",
            text: render("model/add_experts.wgsl", values)?,
            bindings: vec![
                Binding::new("x", Access::Read),
                Binding::new("weights", Access::Read),
                Binding::new("out", Access::Write),
            ],
            workgroup_size: ELEMENTWISE_SIZE,
            workgroup_bytes: 0,
            features: ShaderFeatures::default(),
        })
    }
}

/// Which rows go to which experts: written by [`Router::record`], read by [`Linear::record_routed`](crate::model::Linear::record_routed) and
/// [`Router::record_sum`].
#[derive(Debug)]
pub struct Routes {
    config: LinearExperts,
    /// The experts of each row, u32 `[rows, per_row]`.
    ids: wgpu::Buffer,
    /// What they count, f32 `[rows, per_row]`.
    weights: wgpu::Buffer,
    /// What `sort_routes.wgsl` writes.
    list: wgpu::Buffer,
    max_rows: u32,
}

impl Routes {
    /// Room for so many rows.
    ///
    /// # Errors
    /// [`Error::Argument`] for no rows, or more than can be numbered; [`Error::Wgpu`].
    pub fn new(gpu: &Gpu, experts: LinearExperts, max_rows: u32) -> Result<Self> {
        let pairs = u64::from(max_rows) * u64::from(experts.per_row);
        if pairs == 0 || pairs > u64::from(u32::MAX / 16) {
            let need = format!("1 to {} pairs of a row and an expert", u32::MAX / 16);
            return Err(Error::argument("max_rows", format!("{max_rows}, {pairs} pairs"), need));
        }
        let buffer = |label, words: u64| {
            gpu.create_buffer(
                "creating routes",
                label,
                words * 4,
                wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
            )
        };
        Ok(Self {
            config: experts,
            ids: buffer("folio expert ids", pairs)?,
            weights: buffer("folio expert weights", pairs)?,
            // Tiles are never more than pairs.
            list: buffer("folio routes", 4 * pairs + 1)?,
            max_rows,
        })
    }

    /// The experts of each row, u32 `[rows, per_row]`.
    #[must_use]
    pub fn ids(&self) -> &wgpu::Buffer {
        &self.ids
    }

    /// What they count, f32 `[rows, per_row]`.
    #[must_use]
    pub fn weights(&self) -> &wgpu::Buffer {
        &self.weights
    }

    /// The pairs of a row and an expert.
    fn pairs(&self, rows: u32) -> Result<u32> {
        if rows == 0 || rows > self.max_rows {
            return Err(Error::argument("routes", format!("{rows} rows"), format!("1 to {}", self.max_rows)));
        }
        Ok(rows * self.config.per_row)
    }

    fn range<'a>(&self, buffer: &'a wgpu::Buffer, rows: u32) -> Result<BufferRef<'a>> {
        Ok(BufferRef::new(buffer, 0, u64::from(self.pairs(rows)?) * 4))
    }

    /// The sorted list of that many rows in tiles of `tile_rows`, and how many tiles there are at most: each expert that has rows has one that is not
    /// full.
    pub(crate) fn list(&self, gpu: &Gpu, rows: u32, tile_rows: u32) -> Result<(BufferRef<'_>, u32)> {
        let pairs = self.pairs(rows)?;
        let tiles = most_tiles(pairs, tile_rows, self.config.count);
        let words = u64::from(pairs) + 1 + 3 * u64::from(tiles);
        Ok((BufferRef::new(&self.list, 0, words * 4).check(gpu, "routes", words, true)?, tiles))
    }

    /// The experts that rows are sent to.
    pub(crate) fn experts(&self) -> LinearExperts {
        self.config
    }
}

/// The most tiles that so many rows make, whatever experts they go to. `n` rows of an expert make `(n + tile - 1) / tile` tiles.
fn most_tiles(rows: u32, tile_rows: u32, experts: u32) -> u32 {
    let tile = u64::from(tile_rows.max(1));
    let tiles = (u64::from(rows) + u64::from(experts.min(rows)) * (tile - 1)) / tile;
    u32::try_from(tiles).unwrap_or(u32::MAX)
}

/// The compiled kernels of mixtures with the same [`RouterConfig`].
#[derive(Debug)]
pub struct Router {
    gpu: Gpu,
    config: RouterConfig,
    width: u32,
    select: Arc<Program>,
    sort: Arc<Program>,
    add: Arc<Program>,
    write: Arc<Program>,
    /// Of 1, 2, 4 and so on.
    tile_rows: Vec<wgpu::Buffer>,
}

impl Router {
    /// Compiles the kernels, for experts that yield rows of a width, a multiple of 4.
    ///
    /// # Errors
    /// Those of [`RouterConfig::validate`] and [`RouterConfig::add_source`]; [`Error::Wgpu`].
    pub async fn new(gpu: &Gpu, config: RouterConfig, width: u32) -> Result<Self> {
        let params = |tile_rows: u32| {
            let usage = wgpu::BufferUsages::UNIFORM;
            gpu.create_buffer_with("creating a router", "folio tile rows", bytemuck::bytes_of(&tile_rows), usage)
        };
        let sizes = std::iter::successors(Some(1), |size| Some(size * 2)).take_while(|size| *size <= MAX_TILE_ROWS);
        Ok(Self {
            gpu: gpu.clone(),
            config,
            width,
            select: Program::get(gpu, config.source(gpu.profile())?).await?,
            sort: Program::get(gpu, config.sort_source()?).await?,
            add: Program::get(gpu, config.add_source(width, true)?).await?,
            write: Program::get(gpu, config.add_source(width, false)?).await?,
            tile_rows: sizes.map(params).collect::<Result<_>>()?,
        })
    }

    /// What it does.
    #[must_use]
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// Uploads the corrections of a layer, one for each expert, exactly if the configuration has them.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of them; [`Error::Wgpu`].
    pub fn correction(&self, values: &[f32]) -> Result<wgpu::Buffer> {
        let count = self.config.experts.count as usize;
        if !self.config.correction || values.len() != count {
            let need = if self.config.correction { format!("{count} values") } else { "none".to_owned() };
            return Err(Error::argument("correction", format!("{} values", values.len()), need));
        }
        upload(&self.gpu, "correction", values)
    }

    /// Records the choice of experts: two dispatches. `logits` is `[rows, experts]`; `tile_rows` the number of rows, a power of two up to 128, in whose
    /// tiles the linear layers compute.
    ///
    /// # Errors
    /// [`Error::Argument`] for rows, routes or corrections that don't fit; [`Error::Wgpu`].
    pub fn record<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        logits: Rows<'_>,
        correction: Option<&wgpu::Buffer>,
        routes: &Routes,
        tile_rows: u32,
    ) -> Result<()> {
        let (gpu, mut recorder) = (&self.gpu, recorder.into());
        let experts = self.config.experts;
        logits.check(gpu, "logits", logits.rows, experts.count)?;
        self.check_routes(routes)?;
        if correction.map(wgpu::Buffer::size) != self.config.correction.then_some(u64::from(experts.count) * 4) {
            return Err(Error::argument("correction", "those of another configuration", "those of this router"));
        }
        let at = if tile_rows.is_power_of_two() { tile_rows.trailing_zeros() as usize } else { usize::MAX };
        let need = || format!("a power of two up to {MAX_TILE_ROWS}");
        let params = self.tile_rows.get(at).ok_or_else(|| Error::argument("tile_rows", tile_rows, need()))?;
        let ids = routes.range(&routes.ids, logits.rows)?;
        let weights = routes.range(&routes.weights, logits.rows)?;
        let (list, _) = routes.list(gpu, logits.rows, tile_rows)?;
        let mut resources = vec![logits.binding(), ids.binding(), weights.binding()];
        resources.extend(correction.map(wgpu::Buffer::as_entire_binding));
        let (_, rows) = RouterConfig::shape(gpu.profile());
        self.select.record(gpu, recorder.reborrow(), resources, grid("logits", logits.rows.div_ceil(rows).into())?)?;
        let resources = vec![ids.binding(), list.binding(), params.as_entire_binding()];
        self.sort.record(gpu, recorder, resources, [1, 1, 1])
    }

    /// Records `out = sum of weight * x`, or `out +=` that, over the experts of each row. `x` is `[rows * per_row, width]`, `out` `[rows, width]` in another
    /// buffer.
    ///
    /// # Errors
    /// [`Error::Argument`] for rows or routes that don't fit; [`Error::Wgpu`].
    pub fn record_sum<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        routes: &Routes,
        x: Rows<'_>,
        out: Rows<'_>,
        accumulate: bool,
    ) -> Result<()> {
        let gpu = &self.gpu;
        out.check(gpu, "out", out.rows, self.width)?;
        self.check_routes(routes)?;
        x.check(gpu, "x", routes.pairs(out.rows)?, self.width)?;
        check_distinct("out", out.buffer, &[x.buffer])?;
        let weights = routes.range(&routes.weights, out.rows)?;
        let program = if accumulate { &self.add } else { &self.write };
        let resources = vec![x.binding(), weights.binding(), out.binding()];
        program.record(gpu, recorder.into(), resources, elementwise_grid("out", &out, 4)?)
    }

    fn check_routes(&self, routes: &Routes) -> Result<()> {
        if routes.config == self.config.experts {
            return Ok(());
        }
        Err(Error::argument("routes", format!("{:?}", routes.config), format!("{:?}", self.config.experts)))
    }
}

#[cfg(test)]
mod tests {
    use super::most_tiles;

    #[test]
    fn tiles_are_enough_for_the_worst_case() {
        // All experts but one have a single row.
        assert_eq!(most_tiles(8, 1, 128), 8);
        assert_eq!(most_tiles(1, 16, 128), 1);
        assert_eq!(most_tiles(20, 4, 3), 7);
        for (rows, tile, experts) in [(20, 4, 3), (7, 2, 4), (100, 16, 8), (5, 8, 2)] {
            // The worst case by hand: each expert but the last takes one row more than whole tiles.
            let (mut left, mut tiles) = (rows, 0);
            for _ in 1..experts {
                if left > 0 {
                    left -= 1;
                    tiles += 1;
                }
            }
            tiles += u32::div_ceil(left, tile);
            assert!(tiles <= most_tiles(rows, tile, experts) && most_tiles(rows, tile, experts) <= rows);
        }
    }
}
