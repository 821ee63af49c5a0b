//! The formats: what append stores is what the oracle says, and attention over it is what the oracle computes from that.

use crate::common::with;
use fastrand::Rng;
use folio::ErrorKind::Caller;
use folio::KvFormat::{self, E4M3, F16, F32, Int4, Int4PerChannel, Int8, Int8PerChannel};
use folio::reference::quantise::stored;
use folio::{KvCache, KvCacheConfig, Rope, RopeConfig, RopeLayout};

use crate::adapter::{self, ALL, CPU, CPU_NO_INT64, DEFAULT, GPU, Open};
use crate::bad_input::refused;
use crate::case::{Case, append, poison, shuffle, upload};
use crate::tokens::encoder;

/// A device of small bindings: sides are cut into segments.
const SMALL: Open = Open { max_binding_bytes: Some(1 << 20), ..CPU };

/// Every format of K and every format of V, small ones beside wide ones.
const PAIRS: [(KvFormat, KvFormat); 12] = [
    (Int8, Int8),
    (Int4, Int4),
    (E4M3, E4M3),
    (Int8PerChannel, Int8),
    (Int4PerChannel, Int4),
    (F32, Int8),
    (F16, Int4),
    (Int8, F32),
    (Int4, F16),
    (E4M3, Int8),
    (Int4PerChannel, E4M3),
    (Int8PerChannel, F16),
];

const LARGEST: f32 = 1.960_937_5 * 1.701_411_8e38;

/// Rows that formats find hard, of `head_dim` elements each.
fn hard_rows(head_dim: usize) -> Vec<Vec<f32>> {
    let mut rng = Rng::with_seed(9);
    let mut row = |of: &mut dyn FnMut(usize, f32) -> f32| -> Vec<f32> {
        (0..head_dim).map(|i| of(i, rng.f32() * 2.0 - 1.0)).collect()
    };
    vec![
        row(&mut |_, _| 0.0),
        row(&mut |_, _| -0.0),
        row(&mut |_, _| 1.5),
        row(&mut |_, _| 1.001),
        row(&mut |_, _| -123.456),
        row(&mut |_, x| x),
        row(&mut |_, x| 1000.0 + 0.01 * x),
        row(&mut |_, x| -1000.0 + 0.01 * x),
        // One huge outlier, up and down.
        row(&mut |i, x| if i == head_dim / 2 { 1e6 } else { x }),
        row(&mut |i, x| if i == 3 { -3e38 } else { x }),
        row(&mut |i, _| if i % 2 == 0 { 3e38 } else { -3e38 }),
        row(&mut |i, _| if i % 2 == 0 { LARGEST } else { -LARGEST }),
        row(&mut |i, _| if i % 2 == 0 { f32::MAX } else { f32::MIN }),
        row(&mut |_, _| f32::MAX),
        row(&mut |_, x| x * 1e-30),
        row(&mut |_, x| x * 1e-36),
        row(&mut |_, x| x * 1e-40),
        row(&mut |i, x| if i == 1 { 1.0 } else { x * 1e-41 }),
        // The ends of the codes: 255 must not become 0.
        row(&mut |i, _| [0.0, 255.0, 254.5, 254.49, 0.49, 1.0, 254.51, 128.0][i % 8]),
        row(&mut |i, _| [-7.5, 7.5, 7.4, 6.99, -7.1, 0.0, 7.01, -0.1][i % 8]),
        row(&mut |i, x| if i == 0 { 500.0 } else { 440.0 + 30.0 * x }),
        row(&mut |_, x| 0.02 * x),
        row(&mut |_, x| x.signum() * 60_000.0 * (1.0 + x.abs())),
    ]
}

/// Checks a side that was gathered. `rows` are what was appended.
#[track_caller]
fn check_rows(what: &str, format: KvFormat, rows: &[f32], got: &[f32], head_dim: usize, channels: Option<&[f32]>) {
    const U: f64 = 1.0 / (1 << 24) as f64;
    assert_eq!(rows.len(), got.len(), "{what}");
    let want = stored(format, rows, head_dim, channels).expect("whole rows");
    let levels = f64::from((1_u32 << format.element_bits().min(8)) - 1);
    for (i, (row, got)) in rows.chunks(head_dim).zip(got.chunks(head_dim)).enumerate() {
        let at = i * head_dim..(i + 1) * head_dim;
        let min = row.iter().copied().fold(f32::INFINITY, f32::min);
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let values = row.iter().zip(got).zip(&want.values[at.clone()]).zip(&want.scales[at]);
        for (dim, (((&x, &got), &want), &scale)) in values.enumerate() {
            let say =
                || format!("{what}: {format} row {i} dim {dim}: {x:e} became {got:e}, want {want:e}, scale {scale:e}");
            let (x, got, scale) = (f64::from(x), f64::from(got), f64::from(scale));
            if want.is_nan() || got.is_nan() {
                assert!(want.is_nan() && got.is_nan(), "{}", say());
                continue;
            }
            // Roundings of the scale times code and of the sum. Adapters may flush subnormal numbers (of halves: below 2^-14).
            let mut rounding = 0.0;
            if scale > 0.0 {
                rounding = 4.0 * U * (want.abs() + levels * scale) + f64::from(f32::MIN_POSITIVE);
            } else if format == F16 && want.abs() < format.absolute_error() {
                rounding = format.absolute_error();
            } else if format == F32 && want.abs() < f64::from(f32::MIN_POSITIVE) {
                rounding = f64::from(f32::MIN_POSITIVE);
            }
            // Within a thousandth of a scale of a tie, the other code is right too.
            let off = (got - want).abs();
            let is_other = off <= 1.001 * scale + rounding && (got - x).abs() <= 0.501 * scale + rounding;
            assert!(off <= rounding || is_other, "{}", say());
            // The promised bound.
            let largest = f64::from(LARGEST);
            if format.has_row_scales() && x.abs() <= largest && f64::from(max.max(-min)) <= largest {
                let bound = format.row_error(min.into(), max.into());
                assert!((got - x).abs() <= bound, "{}, bound {bound:e}", say());
            }
            let (relative, largest) = (format.relative_error(), if format == E4M3 { 448.0 } else { 65504.0 });
            if relative > 0.0 && x.abs() <= largest {
                let bound = (relative * x.abs()).max(format.absolute_error());
                assert!((got - x).abs() <= bound, "{}, bound {bound:e}", say());
            }
        }
    }
}

/// A cache full of NaN, with a shuffled free list and calibrated keys.
fn cache(how: Open, config: KvCacheConfig, keys: &[f32]) -> Option<KvCache> {
    let cache = KvCache::new_blocking(&adapter::open(how)?, config).expect("cache");
    poison(&cache);
    if config.k_format.has_channel_scales() {
        cache.calibrate_keys(0, keys).expect("calibrated");
    }
    shuffle(&cache, 5);
    Some(cache)
}

#[test]
fn hard_rows_are_kept_as_the_oracle_says() {
    const SHAPES: [(u32, u32, u32); 6] = [(8, 1, 3), (24, 3, 5), (64, 2, 16), (72, 1, 1), (128, 2, 5), (256, 1, 16)];
    for (i, (k_format, v_format)) in PAIRS.into_iter().enumerate() {
        let (head_dim, num_kv_heads, block_size) = SHAPES[i % SHAPES.len()];
        let hard = hard_rows(head_dim as usize);
        let num_tokens = hard.len() as u32 * 2;
        // Every head gets every row, at another token; V in reverse.
        let token = |t: usize| (0..num_kv_heads as usize).flat_map(move |h| [t + 5 * h]).collect::<Vec<_>>();
        let k: Vec<f32> = (0..num_tokens as usize).flat_map(token).flat_map(|r| hard[r % hard.len()].clone()).collect();
        let v: Vec<f32> = (0..num_tokens as usize)
            .flat_map(token)
            .flat_map(|r| hard[hard.len() - 1 - r % hard.len()].clone())
            .collect();
        let config = KvCacheConfig::new(1, num_kv_heads, head_dim)
            .with_blocks(4 * num_tokens.div_ceil(block_size), block_size)
            .with_formats(k_format, v_format);
        for how in [DEFAULT, GPU] {
            let what = format!("{how:?} {config:?}");
            let Some(cache) = cache(how, config, &k) else { return };
            let channels = cache.key_scales(0);
            let (sequence, broken) = (cache.create_sequence(), cache.create_sequence());
            // The same rows, with NaN and infinities in some, appended in the same step.
            let (mut bad_k, mut bad_v) = (k.clone(), v.clone());
            let row = head_dim as usize;
            for (i, bad) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN].into_iter().enumerate() {
                bad_v[(2 * i + 1) * row + 7 * i % row] = bad;
                if !k_format.has_channel_scales() {
                    bad_k[2 * i * row + 5 * i % row] = bad;
                }
            }
            append(
                &cache,
                &[(sequence, num_tokens), (broken, num_tokens)],
                0,
                &[k.clone(), bad_k.clone()].concat(),
                &[v.clone(), bad_v.clone()].concat(),
            );
            let rows = cache.gather_blocking(sequence, 0).expect("rows");
            check_rows(&what, k_format, &k, &rows.k, row, channels.as_deref());
            check_rows(&what, v_format, &v, &rows.v, row, None);
            if ![F16, F32].contains(&k_format) {
                let rows = cache.gather_blocking(broken, 0).expect("rows");
                check_rows(&what, k_format, &bad_k, &rows.k, row, channels.as_deref());
            }
        }
    }
}

/// Every number of the format, what lies in the middle of two, and what lies next to that.
#[test]
fn e4m3_rounds_to_nearest_even_everywhere() {
    let numbers: Vec<f32> = (0..127_u32)
        .map(|code| {
            let (exponent, mantissa) = ((code >> 3) as i32, (code & 7) as f32);
            if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7) }
        })
        .collect();
    let mut values = numbers.clone();
    for pair in numbers.windows(2) {
        let middle = (pair[0] + pair[1]) / 2.0;
        values.extend([middle, middle.next_down(), middle.next_up()]);
    }
    values.extend([448.1, 463.9, 464.0, 1e30, f32::MAX, 1e-40, 1e-30, 0.000_976, f32::MIN_POSITIVE]);
    values.extend(values.clone().iter().map(|x| -x));
    values.resize(values.len().next_multiple_of(16), 0.0);
    let config = KvCacheConfig::new(1, 1, 16).with_blocks(80, 16).with_formats(E4M3, E4M3);
    let Some(cache) = cache(DEFAULT, config, &[]) else { return };
    let sequence = cache.create_sequence();
    append(&cache, &[(sequence, values.len() as u32 / 16)], 0, &values, &values);
    let rows = cache.gather_blocking(sequence, 0).expect("rows");
    let want: Vec<f32> = stored(E4M3, &values, 16, None).expect("rows").values.iter().map(|&x| x as f32).collect();
    assert_eq!(rows.k, want);
    assert_eq!(rows.v, want);
}

/// Keys that are rotated on the way are stored as if they had been rotated before.
#[test]
fn rotated_keys_are_quantised() {
    for (i, k_format) in [Int8, Int4, E4M3, Int8PerChannel].into_iter().enumerate() {
        let layout = [RopeLayout::HalfSplit, RopeLayout::Interleaved][i % 2];
        let config = KvCacheConfig::new(1, 2, 24).with_blocks(20, 5).with_formats(F32, Int8);
        let mut rng = Rng::with_seed(4);
        let rows: Vec<f32> = (0..30 * 48).map(|_| rng.f32() * 4.0 - 2.0).collect();
        let mut rotated = Vec::new();
        for k_format in [F32, k_format] {
            let config = with(config, |c| c.k_format = k_format);
            let Some(cache) = cache(DEFAULT, config, &rotated) else { return };
            let mut rope = RopeConfig::new(20, 10_000.0);
            rope.layout = layout;
            let rope = Rope::new_blocking(&cache, rope).expect("rope");
            let sequence = cache.create_sequence();
            let step = cache.begin_step(&[(sequence, 30)]).expect("step");
            let new = upload(cache.gpu(), &rows);
            let mut encoder = encoder(&cache);
            cache.append(&mut encoder, &step, 0, &new, &new, Some(&rope)).expect("append");
            cache.gpu().queue().submit([encoder.finish()]);
            cache.commit(step).expect("commit");
            let got = cache.gather_blocking(sequence, 0).expect("rows");
            check_rows("V beside rotated K", Int8, &rows, &got.v, 24, None);
            if k_format == F32 {
                rotated = got.k;
            } else {
                check_rows("rotated K", k_format, &rotated, &got.k, 24, cache.key_scales(0).as_deref());
            }
        }
    }
}

/// Every pair of formats; head dims, groups, block sizes and families take their turns.
#[test]
fn attention_over_every_pair_of_formats() {
    const SHAPES: [(u32, u32, u32, u32); 6] =
        [(64, 4, 2, 16), (128, 8, 1, 5), (8, 1, 3, 1), (24, 4, 1, 16), (72, 8, 1, 5), (256, 1, 2, 16)];
    for (i, (k_format, v_format)) in PAIRS.into_iter().enumerate() {
        let (head_dim, group_size, num_kv_heads, block_size) = SHAPES[(i + i / 6) % SHAPES.len()];
        let case = Case::new(&[(0, 1), (37, 1), (100, 1), (9, 17)], group_size * num_kv_heads, num_kv_heads, head_dim)
            .block_size(block_size)
            .formats(k_format, v_format)
            .config(|config| config.lse = i % 2 == 0);
        let how = ALL[i % ALL.len()];
        check(how, &case);
    }
}

#[track_caller]
fn check(how: Open, case: &Case) {
    if let Some(gpu) = adapter::open(how) {
        case.clone().named(format!("{} {how:?}", case.name)).check(&gpu);
    }
}

/// The same pairs in the same shape, in every family.
#[test]
fn families_agree_on_row_and_channel_scales() {
    for how in ALL {
        for (k_format, v_format) in [(Int8, Int8), (Int4PerChannel, Int4)] {
            check(how, &Case::new(&[(37, 1), (9, 17)], 4, 2, 64).formats(k_format, v_format));
        }
    }
}

/// Head dims that take loads of other widths, with lanes beyond the row and rows beyond the lanes.
#[test]
fn loads_of_every_width() {
    for (i, head_dim) in [8, 24, 80, 192, 256].into_iter().enumerate() {
        for how in [CPU, CPU_NO_INT64] {
            let (k_format, v_format) = [(Int4, Int8), (Int8, Int4)][i % 2];
            check(how, &Case::new(&[(37, 1), (9, 9)], 4, 1, head_dim).block_size(3).formats(k_format, v_format));
        }
    }
}

/// Loads of CPU adapters that span the rows of several keys: ranges start and end within a span, masks and windows hide parts of it, and the
/// last case has splits and segments.
#[test]
fn loads_that_span_rows() {
    let pairs = [(128, Int4, Int8), (128, Int8PerChannel, Int4), (64, E4M3, E4M3), (64, Int8, E4M3), (128, F16, Int4)];
    for (i, (head_dim, k_format, v_format)) in pairs.into_iter().enumerate() {
        let case = Case::new(&[(37, 1), (0, 1), (2, 1), (101, 1)], 8, 2, head_dim).formats(k_format, v_format);
        check(
            CPU,
            &case.config(|config| {
                config.window = (i % 2 == 0).then_some(38);
                config.custom_mask = i > 1;
                config.lse = true;
            }),
        );
    }
    let Some(gpu) = adapter::open(SMALL) else { return };
    Case::new(&[(15_001, 1), (6, 1)], 4, 2, 128).block_size(4).formats(Int4, Int4).check(&gpu);
}

/// Rows, their scales and the table of a side that is larger than a binding. Both sequences reach over several segments.
#[test]
fn segments() {
    let Some(gpu) = adapter::open(SMALL) else { return };
    for (k_format, v_format) in [(Int8, Int4), (Int8PerChannel, Int8), (E4M3, E4M3)] {
        let case = Case::new(&[(15_000, 1), (900, 17)], 4, 2, 64).block_size(5).formats(k_format, v_format);
        let rows = case.rows();
        let (cache, _) = case.fill(&gpu, &rows);
        assert!(cache.segments()[0].count > 1, "{:?}", cache.segments());
        case.check(&gpu);
    }
}

/// Partial states carry the zero points of their keys; options see whole scores.
#[test]
fn splits_and_options() {
    let split = Case::new(&[(9000, 1), (5000, 3)], 2, 1, 32).config(|config| {
        config.deterministic = true;
        config.lse = true;
    });
    let options = Case::new(&[(200, 1), (30, 20), (0, 3)], 4, 2, 32).block_size(5).q_scale(3.0).config(|config| {
        config.alibi_slopes = Some(vec![0.5, 0.25, 0.125, 0.0625]);
        config.sinks = Some(vec![0.0, 1.0, -3.0, 5.0]);
        config.softcap = Some(20.0);
        config.window = Some(37);
        config.custom_mask = true;
        config.lse = true;
    });
    for (i, (k_format, v_format)) in [(Int8, Int4), (Int8PerChannel, Int8)].into_iter().enumerate() {
        check(ALL[0], &split.clone().formats(k_format, v_format));
        check(ALL[i], &options.clone().formats(k_format, v_format));
    }
}

/// NaN and infinities in the rows of one sequence, in blocks between those of the other.
#[test]
fn broken_rows_stay_in_their_sequence() {
    for how in ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let case = Case::new(&[(60, 1), (50, 1)], 4, 2, 64).block_size(5).formats(Int8, Int8);
        let mut rows = case.rows();
        for x in rows[0].k.iter_mut().step_by(97) {
            *x = f32::NAN;
        }
        for x in rows[0].v.iter_mut().step_by(61) {
            *x = f32::INFINITY;
        }
        let (out, _) = case.run(&gpu, &rows);
        let (broken, whole) = out.split_at(rows[0].q.len());
        assert!(broken.iter().all(|x| x.is_nan()), "NaN keys are seen");
        let mut alone = case.clone();
        alone.lens.remove(0);
        alone.compare(&gpu, &rows[1..], whole, None);
    }
}

#[test]
fn calibration_is_asked_for_and_checked() {
    let config = KvCacheConfig::new(2, 2, 8).with_blocks(8, 4).with_formats(Int8PerChannel, F32);
    let Some(gpu) = adapter::open(DEFAULT) else { return };
    let cache = KvCache::new_blocking(&gpu, config).expect("cache");
    let keys: Vec<f32> = (0..48).map(|i| i as f32).collect();
    refused(cache.calibrate_keys(0, &[]), Caller, &["keys", "got 0 elements", "16 elements, at least one"]);
    refused(cache.calibrate_keys(0, &keys[..17]), Caller, &["keys", "got 17 elements"]);
    refused(cache.calibrate_keys(0, &[[1.0; 15].as_slice(), &[f32::NAN]].concat()), Caller, &["keys", "NaN at 15"]);
    refused(cache.calibrate_keys(0, &[f32::INFINITY; 16]), Caller, &["keys", "inf at 0"]);
    refused(cache.calibrate_keys(2, &keys), Caller, &["layer", "got 2"]);
    refused(cache.set_key_scales(0, &keys[..31]), Caller, &["table", "got 31 elements"]);
    refused(cache.set_key_scales(0, &[-1.0; 32]), Caller, &["table", "scale -1"]);
    assert!((0..3).all(|layer| cache.key_scales(layer).is_none()));

    // An append before is refused, and the step goes on.
    let sequence = cache.create_sequence();
    let step = cache.begin_step(&[(sequence, 1)]).expect("step");
    let row = upload(&gpu, &keys[16..32]);
    refused(
        cache.append(&mut encoder(&cache), &step, 0, &row, &row, None),
        Caller,
        &["layer", "got 0", "calibrate_keys"],
    );
    refused(cache.calibrate_keys(0, &keys), Caller, &["layer", "got 0, with keys of the old scales", "an empty cache"]);
    drop(step);
    cache.calibrate_keys(0, &keys).expect("calibrated");
    let table = cache.key_scales(0).expect("scales");
    assert!(table[..16].iter().all(|scale| (scale - 32.0 / 255.0).abs() < 1e-7), "{table:?}");
    assert_eq!(table[16..], keys[..16]);
    assert!(cache.key_scales(1).is_none());
    append(&cache, &[(sequence, 3)], 0, &keys, &keys);
    refused(cache.set_key_scales(0, &table), Caller, &["an empty cache"]);
    let got = cache.gather_blocking(sequence, 0).expect("rows").k;
    check_rows("calibrated", Int8PerChannel, &keys, &got, 8, Some(&table));
    // The ends of the range are codes.
    assert!(got.iter().zip(&keys).all(|(got, key)| (got - key).abs() < 0.07), "{got:?}");
    cache.clear();
    assert!(cache.key_scales(0).is_some());

    let plain = KvCache::new_blocking(&gpu, with(config, |c| c.k_format = Int8)).expect("cache");
    refused(plain.calibrate_keys(0, &keys), Caller, &["k_format", "Int8", "scales per channel"]);
    assert!(plain.key_scales(0).is_none());
}
