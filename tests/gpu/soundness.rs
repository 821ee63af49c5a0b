//! No sequence of safe calls lets a kernel run with another step's upload, whether wgpu's shader checks are in or not.

use folio::wgpu;
use folio::{Attention, AttentionConfig, AttentionPlan, Gpu, KvCache, KvCacheConfig, KvFormat, ShaderChecks, Step};

use crate::adapter::{self, CPU, GPU, Open};
use crate::case::upload;

const HEADS: u32 = 2;
const HEAD_DIM: u32 = 32;
const CONFIG: KvCacheConfig =
    KvCacheConfig::new(1, HEADS, HEAD_DIM).with_blocks(64, 16).with_formats(KvFormat::F32, KvFormat::F32);

/// What lies around a result and must stay.
const UNTOUCHED: f32 = 12345.0;

/// A step with its own rows. `out` is the middle of a buffer, with what must not be touched on both sides.
struct Recorded {
    step: Step,
    plan: AttentionPlan,
    out: wgpu::Buffer,
    tokens: u32,
    value: f32,
}

struct Fixture {
    gpu: Gpu,
    cache: KvCache,
    attention: Attention,
}

/// Elements before and after a result: a multiple of the largest storage offset alignment.
const MARGIN: usize = 1 << 14;

impl Fixture {
    fn new(how: Open) -> Option<Self> {
        let gpu = adapter::open(how)?;
        let cache = KvCache::new_blocking(&gpu, CONFIG).expect("cache");
        let attention = Attention::new_blocking(&cache, AttentionConfig::new(HEADS)).expect("attention");
        Some(Self { gpu, cache, attention })
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    /// Plans and records a step of new sequences of one token each, whose values are all `value`: so are their results.
    fn record(&self, encoder: &mut wgpu::CommandEncoder, sequences: u32, value: f32) -> Recorded {
        let batch: Vec<_> = (0..sequences).map(|_| (self.cache.create_sequence(), 1)).collect();
        let step = self.cache.begin_step(&batch).expect("step");
        let plan = self.attention.plan(&step).expect("plan");
        let len = (sequences * HEADS * HEAD_DIM) as usize;
        let rows = upload(&self.gpu, &vec![value; len]);
        let out = upload(&self.gpu, &vec![UNTOUCHED; 2 * MARGIN + len]);
        self.cache.append(&mut *encoder, &step, 0, &rows, &rows, None).expect("append");
        let middle = (4 * MARGIN as u64)..4 * (MARGIN + len) as u64;
        self.attention.attend(encoder, &plan, 0, &rows, out.slice(middle)).expect("attend");
        Recorded { step, plan, out, tokens: sequences, value }
    }

    #[track_caller]
    fn check(&self, out: &wgpu::Buffer, tokens: u32, value: f32) {
        let out = self.gpu.read_blocking(out).expect("read");
        let (before, rest) = out.split_at(MARGIN);
        let (middle, after) = rest.split_at((tokens * HEADS * HEAD_DIM) as usize);
        assert!(before.iter().chain(after).all(|&x| x == UNTOUCHED), "written outside of the step's own rows");
        let wrong = middle.iter().filter(|&&x| (x - value).abs() > 1e-6 * value.abs()).count();
        assert_eq!(wrong, 0, "of {} elements, such as {}", middle.len(), middle[0]);
    }
}

/// Each family with wgpu's checks and without.
fn fixtures() -> impl Iterator<Item = Fixture> {
    [CPU, GPU].into_iter().flat_map(|how| {
        [ShaderChecks::Full, ShaderChecks::Trusted]
            .into_iter()
            .filter_map(move |checks| Fixture::new(Open { checks, ..how }))
    })
}

/// A step of one sequence is recorded and ended before its submit; a larger one is planned meanwhile. Were the first one's upload given to the
/// second, its dispatch would run with the second's items and write 40 rows into a buffer for one.
#[test]
fn an_upload_is_not_written_again_before_its_commands_have_run() {
    for fixture in fixtures() {
        let mut encoder = fixture.encoder();
        let Recorded { step, plan, out, .. } = fixture.record(&mut encoder, 1, 3.0);
        let first = encoder.finish();
        // Every way of ending them.
        drop(plan);
        fixture.cache.commit(step).expect("commit");

        let mut encoder = fixture.encoder();
        let large = fixture.record(&mut encoder, 40, 5.0);
        let second = encoder.finish();
        fixture.gpu.queue().submit([first]);
        fixture.check(&out, 1, 3.0);
        fixture.gpu.queue().submit([second]);
        fixture.cache.commit(large.step).expect("commit");
        drop(large.plan);
        fixture.check(&large.out, large.tokens, large.value);
    }
}

/// Steps that begin in one order and are submitted in another, some after they were dropped, some twice in one encoder, some never.
#[test]
fn steps_run_with_their_own_words_in_any_order() {
    let mut rng = fastrand::Rng::with_seed(9);
    for fixture in fixtures() {
        for round in 0..12 {
            let sizes: Vec<u32> = (0..6).map(|_| rng.u32(1..8)).collect();
            let mut recorded: Vec<_> = sizes
                .iter()
                .zip(1..)
                .map(|(&sequences, value)| {
                    let mut encoder = fixture.encoder();
                    let step = fixture.record(&mut encoder, sequences, value as f32);
                    (Some(encoder.finish()), Some(step.step), Some(step.plan), step.out, step.tokens, step.value)
                })
                .collect();
            rng.shuffle(&mut recorded);
            for (commands, step, plan, ..) in &mut recorded {
                // Before or after the submit.
                if rng.bool() {
                    drop((step.take(), plan.take()));
                }
                if rng.u8(0..4) == 0 {
                    drop(commands.take());
                }
            }
            let submitted: Vec<_> = recorded.iter().map(|(commands, ..)| commands.is_some()).collect();
            fixture.gpu.queue().submit(recorded.iter_mut().filter_map(|(commands, ..)| commands.take()));
            for ((_, _, _, out, tokens, value), submitted) in recorded.iter().zip(submitted) {
                // Blocks of a step that was dropped before its submit may be another one's by now, so its result means nothing; but it
                // stays within its rows.
                let out_rows = fixture.gpu.read_blocking(out).expect("read");
                let len = (tokens * HEADS * HEAD_DIM) as usize;
                assert!(out_rows[..MARGIN].iter().chain(&out_rows[MARGIN + len..]).all(|&x| x == UNTOUCHED));
                if !submitted {
                    assert!(out_rows.iter().all(|&x| x == UNTOUCHED), "round {round}: {value}");
                }
            }
            drop(recorded);
            fixture.cache.clear();
        }
    }
}

/// A plan serves the cache whose step it was made for, and only while the step is open.
#[test]
fn plans_and_steps_of_another_cache_are_refused() {
    for fixture in fixtures() {
        let twin = KvCache::new_blocking(&fixture.gpu, CONFIG.with_blocks(1, 16)).expect("cache");
        let step = twin.begin_step(&[(twin.create_sequence(), 1)]).expect("step");
        let rows = upload(&fixture.gpu, &[0.0; (HEADS * HEAD_DIM) as usize]);
        let mut encoder = fixture.encoder();
        assert!(fixture.cache.append(&mut encoder, &step, 0, &rows, &rows, None).is_err());
        assert!(fixture.attention.plan(&step).is_err(), "a pool of another size");
        assert!(fixture.cache.commit(step).is_err());
    }
}

/// A host that destroys its own buffer makes the submit fail; nothing runs, and what was leased for it comes back.
#[test]
fn destroyed_host_buffers_fail_the_submit() {
    for fixture in fixtures() {
        let mut encoder = fixture.encoder();
        let small = fixture.record(&mut encoder, 1, 2.0);
        small.out.destroy();
        let commands = encoder.finish();
        let submit = || fixture.gpu.queue().submit([commands]);
        let error = pollster::block_on(fixture.gpu.scoped("submitting", submit)).expect_err("a destroyed buffer");
        assert!(error.to_string().contains("destroyed"), "{error}");
        drop((small.step, small.plan));
        let mut encoder = fixture.encoder();
        let next = fixture.record(&mut encoder, 3, 4.0);
        fixture.gpu.queue().submit([encoder.finish()]);
        fixture.check(&next.out, next.tokens, next.value);
    }
}
