//! The tuner of linear layers, and a model with what it chose.

use std::path::Path;
use std::time::Duration;

use folio::model::{LinearConfig, LinearKernel, LinearKernels, LinearTuneEvent, Model, ModelOptions, WeightFormat};
use folio::{Error, Gpu};

use crate::adapter;
use crate::linear_fused::{Case, random};

#[test]
fn a_tuned_layer_uses_what_won() {
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let gated = LinearConfig { gated: true, norm: true, ..LinearConfig::new(64, 40, WeightFormat::F16) };
        let layers = [gated, LinearConfig { bias: true, ..gated }];
        let (mut races, mut timed, mut chosen, mut thresholds) = (Vec::new(), 0, Vec::new(), 0);
        let tuning = gpu
            .tune_linear(&layers, Duration::from_secs(3), |event| match event {
                LinearTuneEvent::Race { kernel, num_candidates, .. } => {
                    assert!(num_candidates > 1, "{kernel}");
                    races.push(kernel.to_owned());
                }
                LinearTuneEvent::Timed { micros, .. } => timed += usize::from(micros > 0.0 && micros.is_finite()),
                LinearTuneEvent::Dropped { sizes, reason } => panic!("{how:?} {sizes}: {reason}"),
                LinearTuneEvent::Chosen(kernel) => chosen.push(kernel.clone()),
                LinearTuneEvent::Thresholds(_) => thresholds += 1,
                _ => {}
            })
            .unwrap();
        // Of layers that differ in nothing that matters one is timed.
        assert_eq!((tuning.linear.len(), races.len(), chosen.len(), thresholds), (1, 5, 5, 1), "{how:?}: {races:?}");
        assert!(timed >= 5);
        assert_eq!(tuning.linear[0].kernels, chosen);
        for kernel in &chosen {
            assert!(kernel.nanos > 0 && kernel.nanos <= kernel.default_nanos, "{kernel:?}");
        }
        // A file keeps everything; one without the section is read, too.
        let text = serde_json::to_string(&tuning).unwrap();
        assert_eq!(serde_json::from_str::<folio::kernel::tuning::Tuning>(&text).unwrap(), tuning);
        let mut older = serde_json::to_value(&tuning).unwrap();
        older.as_object_mut().unwrap().remove("linear").unwrap();
        let older: folio::kernel::tuning::Tuning = serde_json::from_value(older).unwrap();
        assert!(older.linear.is_empty() && older.tuned_for == tuning.tuned_for);
        let mut merged = older;
        merged.merge(tuning.clone()).unwrap();
        merged.merge(tuning.clone()).unwrap();
        assert_eq!(merged, tuning);

        let tuned = gpu.with_tuning(tuning).unwrap();
        let case = Case::new(layers[1], &mut fastrand::Rng::with_seed(51));
        let linear = case.build(&tuned, &LinearKernels::new());
        for variant in linear.variants() {
            if let Some(kernel) = chosen.iter().find(|kernel| kernel.kernel == variant.tuned_name()) {
                assert_eq!(kernel.sizes, variant.sizes);
            } else {
                assert!(matches!(variant.kernel, LinearKernel::Gather | LinearKernel::Stage), "{variant:?}");
            }
        }
    }
}

#[test]
fn layers_that_no_tuner_can_time_are_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let layer = LinearConfig::new(64, 40, WeightFormat::F16);
    for (argument, layer) in [
        ("in_features", LinearConfig { in_features: 0, ..layer }),
        ("out_features", LinearConfig { out_features: 0, ..layer }),
        ("out_features", LinearConfig { out_features: u32::MAX, ..layer }),
        ("group_size", LinearConfig { format: WeightFormat::Int4 { group_size: 5 }, ..layer }),
    ] {
        let error = gpu.tune_linear(&[layer], Duration::from_secs(1), |_| {}).unwrap_err();
        assert!(error.to_string().contains(argument), "{argument}: {error}");
    }
    assert!(gpu.tune_linear(&[], Duration::ZERO, |_| {}).unwrap().linear.is_empty());
}

#[test]
fn a_lost_device_tunes_no_layers() {
    if adapter::open(adapter::DEFAULT).is_none() {
        return;
    }
    // One of its own: the others' stays.
    let gpu = Gpu::open_blocking(adapter::options(adapter::DEFAULT)).unwrap();
    gpu.device().destroy();
    let layer = LinearConfig::new(64, 40, WeightFormat::F16);
    let error = gpu.tune_linear(&[layer], Duration::from_secs(1), |_| {}).unwrap_err();
    assert!(matches!(error, folio::model::ModelError::Folio(Error::DeviceLost { .. })), "{error}");
}

/// A model's layers, each once, and each found again in a tuning.
#[test]
fn a_model_has_the_layers_that_are_tuned() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama");
    let model = Model::load_blocking(&gpu, folder, ModelOptions::new(WeightFormat::F16), |_| {}).unwrap();
    let (config, layers) = (model.config(), model.linear_configs());
    let qkv = config.q_width() + 2 * config.kv_width();
    let widths: Vec<_> = layers.iter().map(|layer| (layer.in_features, layer.out_features)).collect();
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let want = [(hidden, qkv as u32), (config.q_width() as u32, hidden), (hidden, inner), (inner, hidden)];
    assert_eq!(widths[..4], want);
    assert_eq!(widths[4..], [(hidden, config.vocab_size)]);
    let values = random(&mut fastrand::Rng::with_seed(52), 3 * hidden);
    let case =
        Case::new(LinearConfig { activation: None, gated: false, ..layers[2] }, &mut fastrand::Rng::with_seed(53));
    case.check(&gpu, &case.build(&gpu, &LinearKernels::new()), &values, "a model's layer");
}
