//! Attention against the oracle: every kernel family, over the union of the grids that peers test.
//!
//! A driver on a CPU adapter compiles for seconds what it then runs in milliseconds, so tests share variants where they can, and axes that
//! don't touch each other are varied together rather than multiplied.

use folio::KvFormat::{self, F16, F32};
use folio::reference::{ErrorModel, attention_with_bound, compare};

use crate::adapter::{self, ALL, CPU, CPU_NO_INT64, CPU_PLAIN, GPU, GPU_PLAIN, Open};
use crate::case::Case;

#[track_caller]
fn check(how: Open, case: &Case) {
    if let Some(gpu) = adapter::open(how) {
        case.clone().named(format!("{} {how:?}", case.name)).check(&gpu);
    }
}

#[track_caller]
fn check_all(case: &Case) {
    for how in ALL {
        check(how, case);
    }
}

/// One CPU and one GPU family, in turn.
fn families(i: usize) -> [Open; 2] {
    [[CPU, CPU_PLAIN, CPU_NO_INT64][i % 3], [GPU, GPU_PLAIN][i % 2]]
}

#[test]
fn decode_of_a_ragged_batch() {
    check_all(&Case::new(&[(0, 1), (15, 1), (16, 1), (17, 1), (100, 1)], 8, 2, 64));
}

#[test]
fn prefill_of_a_ragged_batch() {
    check_all(&Case::new(&[(0, 33), (7, 16), (40, 5)], 8, 2, 64));
}

#[test]
fn decode_and_prefill_in_one_batch_with_mixed_formats() {
    let case = Case::new(&[(50, 1), (7, 16), (40, 5), (0, 1)], 8, 2, 64);
    check_all(&case.clone().formats(F16, F32));
    check_all(&case.formats(F32, F16));
}

/// Every head_dim of the grid, each with another group, block size and format; lengths at block_size - 1, itself and + 1.
#[test]
fn head_dims_groups_and_block_sizes() {
    const SHAPES: [(u32, u32, u32, u32, KvFormat, KvFormat); 14] = [
        (8, 1, 3, 1, F32, F32),
        (24, 4, 1, 5, F16, F16),
        (32, 8, 1, 8, F32, F16),
        (40, 7, 2, 16, F16, F32),
        (64, 1, 2, 32, F16, F16),
        (72, 4, 1, 64, F16, F16),
        (80, 8, 1, 256, F32, F32),
        (96, 1, 2, 1, F16, F16),
        (112, 7, 1, 5, F32, F32),
        (128, 4, 2, 16, F16, F16),
        (128, 8, 1, 32, F32, F32),
        (192, 1, 1, 8, F16, F16),
        (192, 4, 1, 64, F32, F32),
        (256, 4, 1, 16, F16, F32),
    ];
    for (i, (head_dim, group_size, num_kv_heads, block_size, k_format, v_format)) in SHAPES.into_iter().enumerate() {
        let around = [block_size.max(2) - 2, block_size - 1, block_size, 2 * block_size + 1];
        let decode = around.map(|context_len| (context_len, 1));
        let lens = [&decode[..], &[(block_size + 1, 9), (0, block_size.min(40) + 1)]].concat();
        let case = Case::new(&lens, group_size * num_kv_heads, num_kv_heads, head_dim)
            .block_size(block_size)
            .formats(k_format, v_format)
            .config(|config| config.lse = i % 2 == 0);
        for how in families(i) {
            check(how, &case);
        }
    }
}

#[test]
fn groups_too_large_for_decode() {
    for (i, group_size) in [16, 32].into_iter().enumerate() {
        let case = Case::new(&[(33, 1), (0, 1), (5, 3)], group_size, 1, 64).formats(F16, F16);
        for how in families(i) {
            check(how, &case);
        }
    }
}

/// (query_len, seq_len) of the peers' tests.
#[test]
fn query_and_key_lengths() {
    const PAIRS: [(u32, u32); 9] =
        [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (5, 18), (129, 463), (577, 577)];
    let lens: Vec<_> = PAIRS.iter().map(|&(query_len, seq_len)| (seq_len - query_len, query_len)).collect();
    let case = Case::new(&lens, 2, 1, 32).formats(F16, F16);
    for how in [CPU, GPU, GPU_PLAIN] {
        check(how, &case);
    }
}

#[test]
fn a_chunk_behind_20000_keys() {
    for how in [CPU, GPU] {
        check(how, &Case::new(&[(19_984, 16)], 1, 1, 64).block_size(32).formats(F16, F16));
    }
}

/// llvmpipe counts no more than 65 535 loop iterations of an invocation: plans must split before that.
#[test]
fn decode_behind_131072_keys() {
    for (i, how) in ALL.into_iter().enumerate() {
        let block_size = [1, 16][i % 2];
        check(how, &Case::new(&[(131_071, 1)], 1, 1, 32).block_size(block_size).formats(F16, F16));
    }
}

#[test]
fn prefill_behind_131072_keys() {
    for how in [CPU, CPU_PLAIN, GPU] {
        check(how, &Case::new(&[(131_069, 3)], 1, 1, 32).formats(F16, F16));
    }
}

#[test]
fn full_attention() {
    let lens = [(20, 1), (0, 35), (13, 4)];
    for how in [CPU, GPU] {
        check(how, &Case::new(&lens, 4, 2, 32).config(|config| config.causal = false));
    }
}

#[test]
fn sliding_windows() {
    for window in [1, 3, 13, 37, 128] {
        let lens = [(200, 1), (30, 20), (0, 50), (127, 1), (128, 1), (129, 2)];
        let case = Case::new(&lens, 4, 2, 32).block_size(8).config(|config| config.window = Some(window));
        for how in [CPU, GPU, GPU_PLAIN] {
            check(how, &case);
        }
    }
}

#[test]
fn windows_without_a_causal_mask() {
    let case = Case::new(&[(200, 1), (30, 20), (0, 50)], 4, 2, 32).config(|config| {
        config.window = Some(13);
        config.causal = false;
    });
    for how in [CPU, GPU] {
        check(how, &case);
    }
}

#[test]
fn soft_caps() {
    for softcap in [1.0, 30.0, 50.0] {
        let case = Case::new(&[(40, 1), (9, 20)], 4, 2, 32).q_scale(20.0).config(|config| {
            config.softcap = Some(softcap);
            config.lse = true;
        });
        for how in [CPU, GPU] {
            check(how, &case);
        }
    }
}

#[test]
fn alibi_sinks_scale_and_lse_together() {
    let case = Case::new(&[(40, 1), (9, 20), (0, 1)], 4, 2, 32).config(|config| {
        config.alibi_slopes = Some(vec![0.5, 0.25, 0.125, 0.0625]);
        config.sinks = Some(vec![0.0, 1.0, -3.0, 5.0]);
        config.softmax_scale = Some(0.3);
        config.lse = true;
    });
    check_all(&case);
}

/// A mask with few bits leaves rows without a visible key: they are 0, and their lse is -infinity.
#[test]
fn custom_masks_and_empty_rows() {
    for density in [0.5, 0.02] {
        let mut case = Case::new(&[(40, 1), (9, 20), (0, 3), (300, 2)], 4, 2, 32).config(|config| {
            config.custom_mask = true;
            config.lse = true;
        });
        case.mask_density = density;
        check_all(&case);
    }
}

/// Sinks are added once, also where keys are split and where a row sees none of them.
#[test]
fn sinks_of_split_and_empty_rows() {
    let mut case = Case::new(&[(3000, 1), (2500, 5)], 2, 1, 32).config(|config| {
        config.custom_mask = true;
        config.sinks = Some(vec![1.0, -2.0]);
        config.lse = true;
        config.deterministic = true;
    });
    case.mask_density = 0.0005;
    for how in [CPU, GPU] {
        check(how, &case);
    }
}

#[test]
fn huge_logits() {
    for q_scale in [200.0, 20_000.0] {
        let case = Case::new(&[(100, 1), (9, 40)], 8, 2, 64).q_scale(q_scale);
        check_all(&case);
    }
}

/// Partial states beyond the workspace are computed and merged in rounds.
#[test]
fn a_small_workspace_works_in_rounds() {
    for how in [CPU, GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(14_000, 40), (13_000, 1), (5, 1)], 2, 1, 32).formats(F16, F16).config(|config| {
            config.deterministic = true;
            config.max_workspace_bytes = 5000;
        });
        let rows = case.rows();
        let (cache, sequences) = case.fill(&gpu, &rows);
        let attention = folio::Attention::new_blocking(&cache, case.config.clone()).expect("attention");
        let batch: Vec<_> = sequences.iter().copied().zip([40, 1, 1]).collect();
        let step = cache.begin_step(&batch).expect("step");
        let rounds = attention.plan(&step).expect("plan").step_plan().lists.rounds.len();
        assert!(rounds > 1, "{rounds} rounds");
        drop(step);
        let (out, _) = case.attend(&cache, &attention, &sequences, &rows);
        case.compare(&gpu, &rows, &out, None);
    }
}

/// In deterministic mode the bits of a sequence's results don't depend on the rest of the batch.
#[test]
fn deterministic_results_do_not_depend_on_the_batch() {
    for how in [CPU, GPU, GPU_PLAIN] {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(2500, 1), (1500, 7)], 4, 2, 32).config(|config| config.deterministic = true);
        let rows = case.rows();
        let (alone, _) = case.run(&gpu, &rows);
        let mut crowd = case.clone();
        crowd.lens.extend((0..24).map(|i| (i * 40, 1 + i % 3)));
        let mut crowd_rows = crowd.rows();
        for (theirs, ours) in crowd_rows.iter_mut().zip(rows) {
            *theirs = ours;
        }
        let (together, _) = crowd.run(&gpu, &crowd_rows);
        assert_eq!(alone[..], together[..alone.len()], "{how:?}");
    }
}

#[test]
fn wgpus_own_checks_change_nothing() {
    for how in [CPU, CPU_NO_INT64, GPU] {
        let how = Open { checks: folio::ShaderChecks::Full, ..how };
        check(how, &Case::new(&[(50, 1), (7, 16), (40, 5), (0, 1)], 8, 2, 64).formats(F16, F32));
    }
}

/// What PyTorch computed, through a cache of F32.
#[test]
fn pytorchs_results() {
    for fixture in crate::common::fixtures::load() {
        for how in [CPU, GPU] {
            let Some(gpu) = adapter::open(how) else { return };
            let (query_len, seq_len) = (fixture.query_len as u32, fixture.seq_len as u32);
            let (heads, kv_heads) = (fixture.num_q_heads as u32, fixture.num_kv_heads as u32);
            let options = fixture.options.clone();
            let case = Case::new(&[(seq_len - query_len, query_len)], heads, kv_heads, fixture.head_dim as u32)
                .named(&fixture.name)
                .config(|config| {
                    config.causal = options.causal;
                    config.softmax_scale = options.softmax_scale.map(|x| x as f32);
                    config.softcap = options.softcap.map(|x| x as f32);
                    config.window = options.window;
                    config.alibi_slopes = options.alibi_slopes;
                    config.sinks = options.sinks;
                    config.custom_mask = options.mask.is_some();
                    config.lse = true;
                });
            let (q, k, v) = (fixture.q.clone(), fixture.k.clone(), fixture.v.clone());
            let rows = vec![crate::case::Rows { q, k, v, mask: options.mask.unwrap_or_default() }];
            let (out, lse) = case.run(&gpu, &rows);
            // The oracle's bounds, around PyTorch's numbers.
            let mut expected = attention_with_bound(&fixture.problem(), &ErrorModel::F32).expect("a valid problem");
            expected.output.out.clone_from(&fixture.out);
            expected.output.lse.clone_from(&fixture.lse);
            compare::out(&expected, &out).assert_within();
            compare::lse(&expected, &lse.expect("lse")).assert_within();
        }
    }
}
