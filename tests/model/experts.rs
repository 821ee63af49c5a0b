//! Mixtures of experts: the choice of experts, and the linear layers that each row goes to, against f64.

use std::path::Path;
use std::sync::Arc;

use folio::Gpu;
use folio::model::{
    ActivationKind, Decoder, DecoderOptions, ExpertGroups, Factor, GroupScore, Linear, LinearConfig, LinearExperts,
    LinearKernels, LogitRows, Model, ModelOptions, Router, RouterConfig, Routes, Rows, Scoring, WeightFormat,
};

use crate::adapter::{self, Open};
use crate::common::with;
use crate::linear::{FORMATS, buffer, normal, run};

/// What a router is to choose for a row: experts and their weights, in order.
fn chosen(config: &RouterConfig, logits: &[f32], correction: Option<&[f32]>) -> Vec<(u32, f64)> {
    let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
    let score = |logit: &f64| match config.scoring {
        Scoring::Softmax => (logit - most).exp() / sum,
        Scoring::Sigmoid => 1.0 / (1.0 + (-logit).exp()),
    };
    let scores: Vec<f64> = logits.iter().map(score).collect();
    let choice: Vec<f64> =
        scores.iter().enumerate().map(|(e, score)| score + correction.map_or(0.0, |c| f64::from(c[e]))).collect();
    let count = config.experts.count as usize;
    let mut allowed = vec![true; count];
    if let Some(groups) = config.groups {
        let size = count / groups.count as usize;
        let value = |group: &[f64]| {
            let mut sorted = group.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            sorted[..if groups.score == GroupScore::TopTwo { 2 } else { 1 }].iter().sum::<f64>()
        };
        let mut order: Vec<_> = choice.chunks(size).map(value).enumerate().collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for &(group, _) in &order[groups.selected as usize..] {
            allowed[group * size..][..size].fill(false);
        }
    }
    let mut order: Vec<_> = (0..count).filter(|&e| allowed[e]).collect();
    order.sort_by(|&a, &b| choice[b].total_cmp(&choice[a]).then(a.cmp(&b)));
    order.truncate(config.experts.per_row as usize);
    let total: f64 = if config.renormalise { order.iter().map(|&e| scores[e]).sum() } else { 1.0 };
    order.iter().map(|&e| (e as u32, scores[e] / total * f64::from(config.scale.get()))).collect()
}

/// The experts of each row, and their weights.
fn route(gpu: &Gpu, config: RouterConfig, logits: &[f32], correction: Option<&[f32]>) -> (Routes, Vec<u32>, Vec<f32>) {
    let rows = logits.len() as u32 / config.experts.count;
    let router = gpu.block_on(Router::new(gpu, config, 4)).unwrap();
    let correction = correction.map(|values| router.correction(values).unwrap());
    let routes = Routes::new(gpu, config.experts, rows).unwrap();
    let logits = buffer(gpu, logits);
    run(gpu, |pass| {
        let logits = Rows::new(&logits, rows, config.experts.count);
        router.record(&mut *pass, logits, correction.as_ref(), &routes, 4).unwrap();
    });
    let ids = gpu.read_blocking(routes.ids()).unwrap().into_iter().map(f32::to_bits).collect();
    let weights = gpu.read_blocking(routes.weights()).unwrap();
    (routes, ids, weights)
}

fn configs() -> Vec<RouterConfig> {
    let of = |count, per_row| RouterConfig::new(LinearExperts { count, per_row });
    let groups = |count, selected, score| Some(ExpertGroups { count, selected, score });
    let scale = Factor::new(2.5).unwrap();
    vec![
        of(8, 2),
        of(1, 1),
        RouterConfig { renormalise: false, ..of(128, 8) },
        of(512, 32),
        RouterConfig { scoring: Scoring::Sigmoid, ..of(60, 4) },
        RouterConfig { groups: groups(4, 2, GroupScore::Best), renormalise: false, scale, ..of(36, 6) },
        RouterConfig {
            groups: groups(8, 4, GroupScore::TopTwo),
            scoring: Scoring::Sigmoid,
            correction: true,
            scale,
            ..of(256, 8)
        },
        RouterConfig { groups: groups(3, 3, GroupScore::TopTwo), ..of(6, 6) },
        RouterConfig { correction: true, ..of(9, 3) },
    ]
}

#[test]
fn routers_choose_as_f64_does() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let mut rng = fastrand::Rng::with_seed(3);
        for config in configs() {
            let LinearExperts { count, per_row } = config.experts;
            for rows in [1, 7, 70] {
                let logits = normal(&mut rng, count * rows, 3.0);
                let correction = config.correction.then(|| normal(&mut rng, count, 0.3));
                let (_, ids, weights) = route(&gpu, config, &logits, correction.as_deref());
                for (row, logits) in logits.chunks(count as usize).enumerate() {
                    let want = chosen(&config, logits, correction.as_deref());
                    let at = row * per_row as usize..(row + 1) * per_row as usize;
                    let got: Vec<_> = ids[at.clone()].to_vec();
                    assert_eq!(got, want.iter().map(|(id, _)| *id).collect::<Vec<_>>(), "{how:?} {config:?} {row}");
                    for (got, (_, want)) in weights[at].iter().zip(want) {
                        assert!((f64::from(*got) - want).abs() <= 1e-5 * want, "{how:?} {config:?}: {got}, {want}");
                    }
                }
            }
        }
    }
}

/// Whatever the logits are, a row goes to different experts that there are; of equal ones to the first.
#[test]
fn strange_logits_choose_experts_too() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        for config in configs() {
            let LinearExperts { count, per_row } = config.experts;
            let mixed = [f32::NAN, 1.0, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY, -0.0, 1e-40, f32::MAX];
            let rows = [vec![f32::NAN], vec![0.0], vec![f32::NEG_INFINITY], vec![f32::INFINITY], mixed.to_vec()];
            let logits: Vec<f32> =
                rows.iter().flat_map(|row| row.iter().cycle().take(count as usize)).copied().collect();
            let correction = config.correction.then(|| vec![0.0; count as usize]);
            let (_, ids, _) = route(&gpu, config, &logits, correction.as_deref());
            for (row, ids) in ids.chunks(per_row as usize).enumerate() {
                let mut sorted = ids.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                assert_eq!(sorted.len(), ids.len(), "{how:?} {config:?} {row}: {ids:?}");
                assert!(ids.iter().all(|&id| id < count), "{how:?} {config:?} {row}: {ids:?}");
                if row < 4 && !config.correction && config.scoring == Scoring::Softmax {
                    assert_eq!(ids, (0..per_row).collect::<Vec<_>>(), "{how:?} {config:?} {row}");
                }
            }
        }
    }
}

/// A layer of experts, with its weights as they are stored.
struct Layer {
    linear: Linear,
    weights: Vec<f32>,
    bias: Option<Vec<f32>>,
}

fn layer(gpu: &Gpu, config: LinearConfig, rng: &mut fastrand::Rng) -> Layer {
    let rows = config.experts.unwrap().count * config.out_features * if config.gated { 2 } else { 1 };
    let n = config.in_features as usize;
    let weights = normal(rng, rows * config.in_features, 0.5);
    let bias = config.bias.then(|| normal(rng, rows, 1.0));
    let mut fill = |first: u32, out: &mut [f32]| {
        out.copy_from_slice(&weights[first as usize * n..][..out.len()]);
        Ok(())
    };
    let kernels = LinearKernels::new();
    let linear = gpu.block_on(Linear::new(gpu, &kernels, config, &mut fill, bias.as_deref(), None)).unwrap();
    let weights = weights.chunks(n).flat_map(|row| config.format.round_trip(row).unwrap()).collect();
    Layer { linear, weights, bias }
}

impl Layer {
    /// `x W^T + bias` of an expert and a row of its weights.
    fn sum(&self, x: &[f32], expert: u32, row: u32) -> f64 {
        let config = self.linear.config();
        let expert_rows = self.weights.len() as u32 / config.in_features / config.experts.unwrap().count;
        let row = (expert * expert_rows + row) as usize;
        let weights = &self.weights[row * x.len()..][..x.len()];
        let sum: f64 = x.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        sum + self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[row]))
    }

    /// Runs rows of x, each through its experts.
    fn run(&self, gpu: &Gpu, x: &[f32], logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let config = self.linear.config();
        let experts = config.experts.unwrap();
        let rows = x.len() as u32 / config.in_features;
        let router = gpu.block_on(Router::new(gpu, RouterConfig::new(experts), 4)).unwrap();
        let routes = Routes::new(gpu, experts, rows).unwrap();
        let (x, logits) = (buffer(gpu, x), buffer(gpu, logits));
        let pairs = rows * experts.per_row;
        // What is overwritten must not matter.
        let y = buffer(gpu, &vec![f32::NAN; (pairs * config.out_features) as usize]);
        run(gpu, |pass| {
            let tile_rows = self.linear.tile_rows(pairs).unwrap();
            router.record(&mut *pass, Rows::new(&logits, rows, experts.count), None, &routes, tile_rows).unwrap();
            let (x, y) = (Rows::new(&x, rows, config.in_features), Rows::new(&y, pairs, config.out_features));
            self.linear.record_routed(&mut *pass, x, y, &routes).unwrap();
        });
        let ids = gpu.read_blocking(routes.ids()).unwrap().into_iter().map(f32::to_bits).collect();
        (ids, gpu.read_blocking(&y).unwrap())
    }

    /// Compares with f64, some columns of each row.
    fn check(&self, x: &[f32], ids: &[u32], y: &[f32], what: &str) {
        let config = self.linear.config();
        let (n, out) = (config.in_features as usize, config.out_features);
        let per_row = config.experts.unwrap().per_row as usize;
        for (pair, (y, &expert)) in y.chunks(out as usize).zip(ids).enumerate() {
            let x = &x[pair / per_row * n..][..n];
            for col in (0..out).step_by(1 + pair % 5) {
                let mut want = self.sum(x, expert, col);
                let swish = |x: f64, alpha: f64| x / (1.0 + (-alpha * x).exp());
                match config.activation {
                    Some(ActivationKind::ClampedSwiglu { alpha, limit }) => {
                        let (alpha, limit) = (f64::from(alpha.get()), f64::from(limit.get()));
                        let up = self.sum(x, expert, out + col).clamp(-limit, limit);
                        want = swish(want.min(limit), alpha) * (up + 1.0);
                    }
                    Some(_) => want = swish(want, 1.0) * self.sum(x, expert, out + col),
                    None => {}
                }
                let got = f64::from(y[col as usize]);
                let bound = 2e-5 * (1.0 + want.abs());
                assert!((got - want).abs() <= bound, "{what}: pair {pair} of expert {expert}, {col}: {got}, {want}");
            }
        }
    }
}

/// Layers of every kind: plain, and with everything that experts may have.
fn shapes(format: WeightFormat) -> [LinearConfig; 3] {
    let plain =
        LinearConfig { experts: Some(LinearExperts { count: 5, per_row: 1 }), ..LinearConfig::new(64, 20, format) };
    let experts = Some(LinearExperts { count: 4, per_row: 3 });
    let activation = Some(ActivationKind::Silu);
    let all = LinearConfig { experts, activation, gated: true, bias: true, ..LinearConfig::new(63, 18, format) };
    let [alpha, limit] = [1.702, 1.5].map(|value| Factor::new(value).unwrap());
    [plain, all, LinearConfig { activation: Some(ActivationKind::ClampedSwiglu { alpha, limit }), ..all }]
}

/// Each kernel that is compiled takes a CPU adapter a good part of a second: not every format is tested with everything.
fn check_families(families: &[Open], formats: &[WeightFormat], rows: &[u32]) {
    for &how in families {
        let Some(gpu) = adapter::open(how) else { return };
        let mut rng = fastrand::Rng::with_seed(11);
        for &format in formats {
            for (i, config) in shapes(format).into_iter().enumerate() {
                if i != 1 && format != WeightFormat::F16 {
                    continue;
                }
                let layer = layer(&gpu, config, &mut rng);
                for &rows in rows {
                    let x = normal(&mut rng, rows * config.in_features, 1.0);
                    let logits = normal(&mut rng, rows * config.experts.unwrap().count, 3.0);
                    let (ids, y) = layer.run(&gpu, &x, &logits);
                    layer.check(&x, &ids, &y, &format!("{how:?} {config:?} {rows}"));
                }
            }
        }
    }
}

#[test]
fn experts_agree_with_f64() {
    let few = [WeightFormat::F16, WeightFormat::INT4];
    check_families(&[adapter::CPU], &FORMATS, &[1, 3, 9, 40]);
    check_families(&[adapter::CPU_PLAIN], &few, &[1, 3, 9, 40]);
    check_families(&[adapter::GPU], &FORMATS, &[1, 9, 70]);
    check_families(&[adapter::GPU_PLAIN], &few, &[1, 9, 70]);
}

/// Weights that take more than one binding: several experts in each, or parts of one.
#[test]
fn experts_are_cut_to_bindings() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(Open { max_binding_bytes: Some(1 << 20), ..how }) else { return };
        let mut rng = fastrand::Rng::with_seed(5);
        for (in_features, out_features, format) in
            [(512, 200, WeightFormat::F32), (1024, 400, WeightFormat::F32), (1024, 1000, WeightFormat::INT8)]
        {
            let experts = Some(LinearExperts { count: 5, per_row: 2 });
            let config = LinearConfig { experts, bias: true, ..LinearConfig::new(in_features, out_features, format) };
            assert!(format.bytes(5 * out_features, in_features) > 1 << 20);
            let layer = layer(&gpu, config, &mut rng);
            for rows in [1, 30] {
                let x = normal(&mut rng, rows * in_features, 0.3);
                let logits = normal(&mut rng, rows * 5, 3.0);
                let (ids, y) = layer.run(&gpu, &x, &logits);
                layer.check(&x, &ids, &y, &format!("{how:?} {config:?} {rows}"));
            }
        }
    }
}

/// In exact layers a row has the same bits whatever rows are beside it.
#[test]
fn exact_experts_don_t_see_other_rows() {
    for how in [adapter::CPU, adapter::CPU_PLAIN, adapter::GPU, adapter::GPU_PLAIN] {
        let Some(gpu) = adapter::open(how) else { return };
        let mut rng = fastrand::Rng::with_seed(23);
        for format in [WeightFormat::F32, WeightFormat::INT4] {
            let config = LinearConfig { exact: true, ..shapes(format)[1] };
            let layer = layer(&gpu, config, &mut rng);
            let pair_len = (config.out_features * 3) as usize;
            let x = normal(&mut rng, 200 * config.in_features, 1.0);
            let logits = normal(&mut rng, 200 * 4, 3.0);
            let first = |rows: usize| layer.run(&gpu, &x[..rows * config.in_features as usize], &logits[..rows * 4]).1;
            let alone = first(1);
            for rows in [2, 5, 17, 60, 200] {
                let bits = |y: &[f32]| y[..pair_len].iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&first(rows)), bits(&alone), "{how:?} {format}: {rows} rows");
            }
        }
    }
}

fn exact_model(how: Open, name: &str) -> Option<Decoder> {
    let gpu = adapter::open(how)?;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name);
    let options = ModelOptions::new(WeightFormat::F16).with_exact(true);
    let model = Model::load_blocking(&gpu, path, options, |_| {}).unwrap();
    let options = with(DecoderOptions::default(), |o| (o.num_blocks, o.block_size) = (200, 8));
    Some(Decoder::new_blocking(Arc::new(model), options).unwrap())
}

/// Whole models: the logits of a text don't depend on its company, nor on the chunks in which it is fed.
#[test]
fn exact_mixtures_have_the_same_bits_in_any_batch() {
    for how in [adapter::DEFAULT, adapter::GPU] {
        for name in ["mixtral", "gpt_oss", "dots1"] {
            let Some(mut decoder) = exact_model(how, name) else { return };
            let gpu = decoder.gpu().clone();
            let text: Vec<u32> = (0..25).map(|i| (i * 37 + 5) % 97).collect();
            let mut logits = |company: usize, chunk: usize| {
                let sequences: Vec<_> = (0..=company).map(|_| decoder.create_sequence()).collect();
                let mut last = Vec::new();
                for tokens in text.chunks(chunk) {
                    // The company has other tokens.
                    let other: Vec<_> = tokens.iter().map(|token| (token + 11) % 97).collect();
                    let of = |i: usize| if i == 0 { tokens } else { &other[..] };
                    let batch: Vec<_> = sequences.iter().enumerate().map(|(i, &sequence)| (sequence, of(i))).collect();
                    last = gpu.block_on(decoder.logits(&batch, LogitRows::Last)).unwrap().swap_remove(0);
                }
                for sequence in sequences {
                    decoder.free(sequence).unwrap();
                }
                last.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let alone = logits(0, 25);
            // (gpt-oss has a window of 12 tokens.)
            for (company, chunk) in [(1, 25), (6, 25), (0, 5), (3, 5)] {
                assert_eq!(logits(company, chunk), alone, "{how:?} {name}: {company} beside it, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn what_doesn_t_fit_is_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let of = |count, per_row| RouterConfig::new(LinearExperts { count, per_row });
    let groups = |count, selected, score| Some(ExpertGroups { count, selected, score });
    for (config, argument) in [
        (of(0, 0), "experts.count"),
        (of(513, 1), "experts.count"),
        (of(8, 0), "experts.per_row"),
        (of(8, 9), "experts.per_row"),
        (of(64, 33), "experts.per_row"),
        (RouterConfig { groups: groups(3, 1, GroupScore::Best), ..of(8, 1) }, "groups.count"),
        (RouterConfig { groups: groups(0, 1, GroupScore::Best), ..of(8, 1) }, "groups.count"),
        (RouterConfig { groups: groups(4, 5, GroupScore::Best), ..of(8, 1) }, "groups.selected"),
        (RouterConfig { groups: groups(4, 1, GroupScore::Best), ..of(8, 3) }, "groups.selected"),
        (RouterConfig { groups: groups(8, 4, GroupScore::TopTwo), ..of(8, 3) }, "groups.count"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(argument), "{config:?}: {error}");
    }
    let experts = LinearExperts { count: 4, per_row: 2 };
    assert!(Routes::new(&gpu, experts, 0).is_err() && Routes::new(&gpu, experts, u32::MAX).is_err());
    let mut rng = fastrand::Rng::with_seed(1);
    let config = LinearConfig { experts: Some(experts), ..LinearConfig::new(8, 8, WeightFormat::F32) };
    let layer = layer(&gpu, config, &mut rng);
    let router = gpu.block_on(Router::new(&gpu, RouterConfig::new(experts), 8)).unwrap();
    let (routes, others) = (Routes::new(&gpu, experts, 3), Routes::new(&gpu, LinearExperts { count: 5, ..experts }, 3));
    let (routes, others) = (routes.unwrap(), others.unwrap());
    let (x, y) = (buffer(&gpu, &[0.0; 64]), buffer(&gpu, &[0.0; 64]));
    run(&gpu, |pass| {
        let rows = |buffer, rows| Rows::new(buffer, rows, 8);
        let refused = |result: folio::Result<()>, argument: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(argument), "{error}");
        };
        refused(layer.linear.record(&mut *pass, rows(&x, 2), rows(&y, 2)), "experts");
        refused(layer.linear.record_routed(&mut *pass, rows(&x, 2), rows(&y, 2), &routes), "y: ");
        refused(layer.linear.record_routed(&mut *pass, rows(&x, 2), rows(&y, 4), &others), "routes");
        refused(layer.linear.record_routed(&mut *pass, rows(&x, 4), rows(&y, 8), &routes), "routes");
        refused(layer.linear.record_routed(&mut *pass, rows(&x, 2), rows(&x, 4), &routes), "y: ");
        let logits = Rows::new(&x, 2, 4);
        refused(router.record(&mut *pass, logits, None, &routes, 3), "tile_rows");
        refused(router.record(&mut *pass, logits, None, &routes, 256), "tile_rows");
        refused(router.record(&mut *pass, logits, Some(&y), &routes, 4), "correction");
        refused(router.record(&mut *pass, logits, None, &others, 4), "routes");
        refused(router.record(&mut *pass, Rows::new(&x, 4, 4), None, &routes, 4), "routes");
        refused(router.record_sum(&mut *pass, &routes, rows(&x, 2), rows(&y, 2), true), "x: ");
        refused(router.record_sum(&mut *pass, &routes, rows(&x, 4), rows(&x, 2), true), "out: ");
    });
    assert!(router.correction(&[0.0; 4]).is_err());
}
