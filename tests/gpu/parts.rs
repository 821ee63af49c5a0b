//! Long prefills in several dispatches, and these over several submits: the same bits as in one.

use folio::KvFormat::{F16, F32, Int8};
use folio::{Attention, AttentionConfig, AttentionPlan, BufferRef, Gpu, KvCache, KvCacheConfig, Step, wgpu};

use crate::adapter::{self, CPU, GPU};
use crate::case::{Case, upload};

/// Prompts, a chunk, single tokens, and keys enough to be split.
const LENS: [(u32, u32); 5] = [(0, 70), (1500, 30), (2100, 1), (3, 1), (64, 9)];

fn case() -> Case {
    Case::new(&LENS, 4, 2, 32).formats(F16, Int8).config(|config| config.lse = true)
}

/// Results do not depend on the budget, and small budgets make more dispatches.
#[test]
fn budgets_change_no_bit() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = case().named(format!("{how:?}"));
        let rows = case.rows();
        let mut whole = None;
        for budget in [None, Some(u64::MAX), Some(3_000_000), Some(0)] {
            let case = case.clone().config(|config| config.max_dispatch_work = budget);
            let results = case.run(&gpu, &rows);
            case.compare(&gpu, &rows, &results.0, results.1.as_deref());
            let bits = |(out, lse): (Vec<f32>, Option<Vec<f32>>)| {
                let lse = lse.into_iter().flatten();
                out.into_iter().chain(lse).map(f32::to_bits).collect::<Vec<_>>()
            };
            let results = bits(results);
            assert!(*whole.get_or_insert_with(|| results.clone()) == results, "{budget:?} {how:?}");
        }
    }
}

fn submit(gpu: &Gpu, record: impl FnOnce(&mut wgpu::CommandEncoder)) {
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    record(&mut encoder);
    gpu.queue().submit([encoder.finish()]);
}

fn begin(
    cache: &KvCache,
    attention: &Attention,
    lens: &[u32],
    values: f32,
) -> (Step, AttentionPlan, [wgpu::Buffer; 3]) {
    let gpu = cache.gpu();
    let batch: Vec<_> = lens.iter().map(|&len| (cache.create_sequence(), len)).collect();
    let step = cache.begin_step(&batch).expect("step");
    let plan = attention.plan(&step).expect("plan");
    let rows = |width: u32| -> Vec<f32> {
        (0..lens.iter().sum::<u32>() * width).map(|i| ((i * 37 % 101) as f32 - 50.0) * values).collect()
    };
    let [q, kv, out] = [64, 16, 64].map(|width| upload(gpu, &rows(width)));
    submit(gpu, |encoder| cache.append(encoder, &step, 0, &kv, &kv, None).expect("append"));
    (step, plan, [q, kv, out])
}

/// Parts of two steps' plans take turns, each in a submit of its own, and split states of neither are overwritten.
#[test]
fn parts_of_two_steps_take_turns() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let cache = KvCacheConfig::new(1, 1, 16).with_blocks(200, 16).with_formats(F32, F32);
        let cache = KvCache::new_blocking(&gpu, cache).expect("cache");
        let mut config = AttentionConfig::new(4);
        // Ranges of a fixed length, so that there are states to merge.
        (config.deterministic, config.max_dispatch_work) = (true, Some(100_000));
        let attention = Attention::new_blocking(&cache, config).expect("attention");
        let steps = [(900, 0.01), (1100, 0.02)].map(|(len, values)| {
            let (step, plan, [q, _, out]) = begin(&cache, &attention, &[len], values);
            (step, plan, q, out)
        });
        let want = steps.each_ref().map(|(_, plan, q, out)| {
            submit(&gpu, |encoder| attention.attend(encoder, plan, 0, q, out).expect("attend"));
            gpu.read_blocking(out).expect("out")
        });
        let plans = steps.each_ref().map(|(step, ..)| {
            let plan = attention.plan(step).expect("plan");
            attention.in_parts(plan).expect("a workspace")
        });
        let outs = want.each_ref().map(|want| upload(&gpu, &vec![f32::NAN; want.len()]));
        let most = plans.each_ref().map(AttentionPlan::num_parts).into_iter().max().expect("two plans");
        assert!(most > 10, "{most} parts");
        for part in 0..most {
            for (i, plan) in plans.iter().enumerate().filter(|(_, plan)| part < plan.num_parts()) {
                submit(&gpu, |encoder| {
                    attention.attend_part(encoder, plan, 0, part, &steps[i].2, &outs[i], None).expect("a part");
                });
            }
        }
        for (out, want) in outs.iter().zip(want) {
            assert!(gpu.read_blocking(out).expect("out") == want, "{how:?}");
        }
    }
}

/// A hundred thousand keys behind sixteen queries.
#[test]
fn long_contexts_in_parts() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(99_984, 16)], 2, 1, 8).formats(F16, F16).block_size(64).named(format!("{how:?}"));
        case.config(|config| config.max_dispatch_work = Some(1 << 24)).check(&gpu);
    }
}

#[test]
fn bad_parts() {
    let Some(gpu) = adapter::open(CPU) else { return };
    let cache = KvCacheConfig::new(1, 1, 16).with_blocks(20, 16).with_formats(F32, F32);
    let cache = KvCache::new_blocking(&gpu, cache).expect("cache");
    let attention = Attention::new_blocking(&cache, AttentionConfig::new(4)).expect("attention");
    let other = Attention::new_blocking(&cache, AttentionConfig::new(4)).expect("attention");
    let (step, plan, [q, kv, out]) = begin(&cache, &attention, &[5], 1.0);
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let refused = |result: folio::Result<()>| result.expect_err("refused").to_string();
    let error = refused(attention.attend_part(&mut encoder, &plan, 0, 0, &q, &out, None));
    assert!(error.contains("need one from Attention::in_parts"), "{error}");
    let error = other.in_parts(attention.plan(&step).expect("plan")).expect_err("another's").to_string();
    assert!(error.contains("a plan that this attention made"), "{error}");
    let plan = attention.in_parts(plan).expect("a workspace");
    let error = refused(attention.attend_part(&mut encoder, &plan, 0, 1, &q, &out, None));
    assert!(error.contains("part: got 1, need below num_parts, 1"), "{error}");
    let lse = BufferRef::from(&kv);
    let error = refused(attention.attend_part(&mut encoder, &plan, 0, 0, &q, &out, Some(lse)));
    assert!(error.contains("lse: got a range, need none"), "{error}");
    attention.attend_part(&mut encoder, &plan, 0, 0, &q, &out, None).expect("the only part");
    cache.commit(step).expect("commit");
    let error = refused(attention.attend_part(&mut encoder, &plan, 0, 0, &q, &out, None));
    assert!(error.contains("step"), "{error}");
}
