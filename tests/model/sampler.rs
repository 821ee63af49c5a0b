//! The sampler against a host implementation of the same definition, and against statistics.

use crate::common::with;
use folio::model::{Rows, Sampled, Sampler, Sampling, SamplingRequest};
use folio::{Error, Gpu};

use crate::adapter;
use crate::buffers::{block_on, empty, floats, read, run};

/// A row's logits with what is asked of it.
#[derive(Clone, Debug)]
struct Case {
    logits: Vec<f32>,
    sampling: Sampling,
    draw_index: u32,
    history: Vec<u32>,
    /// The set of tokens that may be drawn, a bit each.
    allowed: Option<Vec<u32>>,
}

fn case(logits: Vec<f32>, sampling: Sampling) -> Case {
    Case { logits, sampling, draw_index: 0, history: Vec::new(), allowed: None }
}

fn sample(gpu: &Gpu, sampler: &Sampler, cases: &[Case]) -> Vec<Sampled> {
    let requests: Vec<_> = cases
        .iter()
        .map(|case| SamplingRequest {
            sampling: case.sampling,
            draw_index: case.draw_index,
            history: &case.history,
            logprob: true,
            allowed: case.allowed.as_deref(),
        })
        .collect();
    let logits = floats(gpu, &cases.iter().flat_map(|case| case.logits.iter().copied()).collect::<Vec<_>>());
    let out = empty(gpu, cases.len() * 4);
    run(gpu, |pass| {
        let rows = Rows::new(&logits, cases.len() as u32, sampler.vocab());
        sampler.record(&mut *pass, rows, &requests, &out).unwrap();
    });
    let words: Vec<u32> = read(gpu, &out).into_iter().map(f32::to_bits).collect();
    Sampler::read_output(&words)
}

/// Philox 4x32-10, with the products in 64 bits.
fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (a, b) = (0xd251_1f53_u64 * u64::from(c[0]), 0xcd9e_8d57_u64 * u64::from(c[2]));
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    c
}

/// The known answers that come with the authors' implementation (Random123, `kat_vectors`).
#[test]
fn philox_of_the_host_gives_the_known_answers() {
    assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
}

fn gumbel(seed: u64, draw_index: u32, token: u32) -> f64 {
    let block = philox([token / 4, draw_index, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let v = (f64::from(block[token as usize % 4]) + 0.5) / 2f64.powi(32);
    -(-(-v).ln_1p()).ln()
}

/// What the host says about a row.
struct Expected {
    /// Logits of allowed tokens, after the penalty.
    logits: Vec<f32>,
    /// Kept tokens if the mass that top-p asks for is a little more and a little less.
    kept: Vec<u32>,
    fewest: usize,
    most: usize,
    /// Perturbed scores of kept tokens.
    scores: Vec<(u32, f64)>,
    /// Natural logarithm of the sum of the weights, around the largest logit.
    max: f64,
    log_sum: f64,
}

fn penalised(case: &Case) -> Vec<f32> {
    let penalty = case.sampling.repetition_penalty;
    let mut logits = case.logits.clone();
    for (token, logit) in logits.iter_mut().enumerate() {
        if case.allowed.as_ref().is_some_and(|set| set[token / 32] >> (token % 32) & 1 == 0) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if penalty != 1.0 {
        let mut history = case.history.clone();
        history.sort_unstable();
        history.dedup();
        for token in history {
            let x = &mut logits[token as usize];
            if x.is_finite() {
                *x = if *x > 0.0 { *x * (1.0 / penalty) } else { *x * penalty };
            }
        }
    }
    logits
}

fn kept_tokens(case: &Case, logits: &[f32], max: f32, mass_factor: f64) -> Vec<u32> {
    let sampling = &case.sampling;
    let inverse_temperature = 1.0 / sampling.temperature;
    let z = |token: u32| (logits[token as usize] - max) * inverse_temperature;
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&t| logits[t as usize].is_finite()).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    let through_ties = |order: &mut Vec<u32>, n: usize| {
        if let Some(last) = order.get(n - 1).map(|&t| logits[t as usize]) {
            order.retain(|&t| logits[t as usize] >= last);
        }
    };
    if let Some(k) = sampling.top_k {
        through_ties(&mut order, k as usize);
    }
    if let Some(p) = sampling.top_p.filter(|&p| p < 1.0) {
        let total: f64 = order.iter().map(|&t| f64::from(z(t)).exp()).sum();
        let mut mass = 0.0;
        let n = order.iter().take_while(|&&t| {
            let needed = mass < f64::from(p) * mass_factor * total;
            mass += f64::from(z(t)).exp();
            needed
        });
        let n = n.count().max(1);
        through_ties(&mut order, n);
    }
    if let Some(p) = sampling.min_p.filter(|&p| p > 0.0) {
        order.retain(|&t| z(t) >= p.ln());
    }
    order
}

fn expected(case: &Case) -> Expected {
    let logits = penalised(case);
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let log_sum = logits.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum::<f64>().ln();
    let (kept, fewest, most) = if case.sampling.temperature == 0.0 {
        (vec![logits.iter().position(|&x| x == max).unwrap() as u32], 1, 1)
    } else {
        // Masses are summed in f32.
        let kept = |factor| kept_tokens(case, &logits, max, factor);
        (kept(1.0), kept(1.0 - 2e-5).len(), kept(1.0 + 2e-5).len())
    };
    let inverse_temperature = 1.0 / case.sampling.temperature;
    let scores = kept
        .iter()
        .map(|&t| {
            let z =
                if case.sampling.temperature == 0.0 { 0.0 } else { (logits[t as usize] - max) * inverse_temperature };
            (t, f64::from(z) + gumbel(case.sampling.seed, case.draw_index, t))
        })
        .collect();
    Expected { logits, kept, fewest, most, scores, max: f64::from(max), log_sum }
}

/// Checks a result; returns whether the draw was clear, so that every device must agree.
fn check(case: &Case, got: &Sampled, what: &str) -> bool {
    let want = expected(case);
    let what = format!("{what} {:?} draw {}, vocab {}", case.sampling, case.draw_index, case.logits.len());
    let token = got.token.unwrap_or_else(|| panic!("{what}: no token"));
    let num_kept = got.num_kept as usize;
    assert!((want.fewest..=want.most).contains(&num_kept), "{what}: kept {num_kept}, want {}", want.kept.len());
    let best = want.scores.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let clear = want.fewest == want.most && want.scores.iter().all(|s| s.0 == best.0 || s.1 < best.1 - 1e-4);
    if clear {
        assert_eq!(token, best.0, "{what}: token");
    } else if want.fewest == want.most {
        let score = want.scores.iter().find(|s| s.0 == token).unwrap_or_else(|| panic!("{what}: {token} isn't kept"));
        assert!(score.1 >= best.1 - 1e-4, "{what}: token {token} at {}, best {best:?}", score.1);
    }
    let logprob = f64::from(want.logits[token as usize]) - want.max - want.log_sum;
    let got_logprob = f64::from(got.logprob.unwrap());
    assert!((got_logprob - logprob).abs() <= 2e-5 * logprob.abs().max(1.0), "{what}: {got_logprob}, want {logprob}");
    clear
}

fn normal(rng: &mut fastrand::Rng) -> f32 {
    (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0
}

fn samplings() -> Vec<Sampling> {
    let base = with(Sampling::default(), |c| c.seed = 0x0123_4567_89ab_cdef);
    vec![
        base,
        Sampling::greedy(),
        with(base, |c| c.temperature = 0.7),
        with(base, |c| c.top_k = Some(1)),
        with(base, |c| {
            c.top_k = Some(50);
            c.temperature = 1.3;
            c.seed = 5;
        }),
        with(base, |c| c.top_k = Some(u32::MAX)),
        with(base, |c| c.top_p = Some(0.9)),
        with(base, |c| c.top_p = Some(1e-6)),
        with(base, |c| {
            c.top_p = Some(0.999);
            c.temperature = 2.0;
            c.seed = u64::MAX;
        }),
        with(base, |c| c.min_p = Some(0.05)),
        with(base, |c| c.min_p = Some(1.0)),
        with(base, |c| {
            c.top_k = Some(40);
            c.top_p = Some(0.8);
            c.min_p = Some(0.02);
            c.temperature = 0.9;
        }),
        with(base, |c| c.repetition_penalty = 1.3),
        with(base, |c| {
            c.repetition_penalty = 0.5;
            c.top_p = Some(0.5);
        }),
        with(Sampling::greedy(), |c| c.repetition_penalty = 5.0),
        with(base, |c| c.temperature = 1e-6),
        with(base, |c| c.temperature = 1e4),
    ]
}

fn cases_of_vocab(vocab: usize, rng: &mut fastrand::Rng) -> Vec<Case> {
    let row = |rng: &mut fastrand::Rng, kind: usize| -> Vec<f32> {
        (0..vocab)
            .map(|i| match kind {
                0 => 3.0 * normal(rng),
                1 => -60.0 + 2.0 * normal(rng),   // as GPT-2 has them
                2 => (2.0 * normal(rng)).round(), // many ties
                3 => {
                    if rng.u8(0..4) == 0 {
                        f32::NEG_INFINITY
                    } else {
                        normal(rng)
                    }
                }
                4 => [1e30, -1e30, 0.0, -0.0][i % 4],
                _ => 0.5,
            })
            .collect()
    };
    let samplings = samplings();
    // Thresholds within ties: the searches make all their rounds.
    let all_filters = with(Sampling::default(), |c| {
        c.top_k = Some(40);
        c.top_p = Some(0.8);
        c.min_p = Some(0.02);
    });
    let ties = [1, 2, 3].map(|_| case(row(rng, 2), all_filters));
    // And over the whole row, as there are too many candidates: two values far apart, and both are needed.
    let flat = with(all_filters, |c| {
        c.temperature = 1e4;
        c.top_k = Some((vocab as u32 * 2 / 3).max(1));
        c.top_p = Some(0.9);
    });
    let two_values = case((0..vocab).map(|i| if i % 2 == 0 { 5.0 } else { -5.0 }).collect(), flat);
    (0..samplings.len().max(6))
        .map(|i| {
            let mut logits = row(rng, i % 6);
            if i % 6 == 3 {
                logits[vocab / 2] = 1.0;
            }
            let history = (0..20).map(|_| rng.u32(0..vocab as u32)).collect();
            let allowed = (i % 3 == 1).then(|| {
                let mut set: Vec<u32> = (0..vocab.div_ceil(32)).map(|_| rng.u32(..) & rng.u32(..)).collect();
                set[vocab / 2 / 32] |= 1 << (vocab / 2 % 32);
                if logits[vocab / 2] == f32::NEG_INFINITY {
                    logits[vocab / 2] = -3.0;
                }
                set
            });
            Case { logits, sampling: samplings[i % samplings.len()], draw_index: i as u32 * 7, history, allowed }
        })
        .chain(ties)
        .chain([two_values])
        .collect()
}

#[test]
fn tokens_kept_sets_and_log_probabilities_match_the_host() {
    // 60 416: as many iterations as an invocation ever makes.
    for vocab in [1, 7, 768, 50_257, 60_416, 151_936] {
        let mut rng = fastrand::Rng::with_seed(21 + vocab as u64);
        let mut cases = cases_of_vocab(vocab, &mut rng);
        if vocab <= 768 {
            for _ in 0..5 {
                let more = cases_of_vocab(vocab, &mut rng);
                cases.extend(more);
            }
            // Every way of sampling meets every kind of row.
            let samplings = samplings();
            let num = cases.len();
            for i in 0..num {
                let sampling = samplings[(i / 6) % samplings.len()];
                cases.push(Case { sampling, ..cases[i].clone() });
            }
        }
        let mut all: Vec<Vec<Sampled>> = Vec::new();
        for how in adapter::ALL {
            let Some(gpu) = adapter::open(how) else { return };
            let sampler = block_on(Sampler::new(&gpu, vocab as u32)).unwrap();
            let got = sample(&gpu, &sampler, &cases);
            let clear = cases.iter().zip(&got).filter(|(case, got)| check(case, got, &format!("{how:?}"))).count();
            // Near ties of the reference's scores are rare; rows of equal logits at a high temperature have some.
            assert!(clear * 10 >= cases.len() * 9, "only {clear} of {} draws are clear", cases.len());
            all.push(got);
        }
        for family in &all[1..] {
            for (i, (a, b)) in all[0].iter().zip(family).enumerate() {
                if check(&cases[i], a, "first family") {
                    assert_eq!(a.token, b.token, "row {i} of vocab {vocab} depends on the family");
                }
            }
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_equal_tokens_and_batches_may_be_mixed() {
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let vocab = 5003;
        let sampler = block_on(Sampler::new(&gpu, vocab)).unwrap();
        let mut rng = fastrand::Rng::with_seed(22);
        let mut cases = Vec::new();
        for i in 0..40 {
            let mut logits: Vec<f32> = (0..vocab).map(|_| normal(&mut rng)).collect();
            for _ in 0..=i % 5 {
                logits[rng.usize(0..vocab as usize)] = 100.0;
            }
            cases.push(case(logits, Sampling::greedy()));
        }
        let zeros = (0..vocab).map(|i| if i % 2 == 0 { -0.0 } else { 0.0 }).collect();
        cases.push(case(zeros, Sampling::greedy()));
        let all_greedy = sample(&gpu, &sampler, &cases);
        for (case, got) in cases.iter().zip(&all_greedy) {
            check(case, got, &format!("{how:?}"));
        }
        assert_eq!(all_greedy.last().unwrap().token, Some(0));
        // The same rows among others, by the other kernel.
        cases.push(case(cases[0].logits.clone(), Sampling::default()));
        let mixed = sample(&gpu, &sampler, &cases);
        assert_eq!(
            mixed[..41].iter().map(|s| s.token).collect::<Vec<_>>(),
            all_greedy.iter().map(|s| s.token).collect::<Vec<_>>()
        );
    }
}

#[test]
fn bad_rows_have_no_token_and_disturb_no_other() {
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        for vocab in [1_usize, 50, 3001] {
            let sampler = block_on(Sampler::new(&gpu, vocab as u32)).unwrap();
            let good = vec![0.25; vocab];
            let row_with = |at: usize, value: f32| {
                let mut row = good.clone();
                row[at] = value;
                row
            };
            let minus_infinity = f32::NEG_INFINITY;
            let mut only_one = vec![minus_infinity; vocab];
            only_one[vocab / 2] = -3.0;
            for sampling in [Sampling::greedy(), with(Sampling::default(), |c| c.top_p = Some(0.9))] {
                let rows = [
                    (row_with(vocab - 1, f32::NAN), false),
                    (good.clone(), true),
                    (row_with(0, -f32::NAN), false),
                    (row_with(vocab / 2, f32::INFINITY), false),
                    (vec![minus_infinity; vocab], false),
                    (only_one.clone(), true),
                    (vec![f32::NAN; vocab], false),
                    (row_with(0, f32::MAX), true),
                    (row_with(0, f32::MIN), true),
                ];
                let cases: Vec<_> = rows.iter().map(|(row, _)| case(row.clone(), sampling)).collect();
                let got = sample(&gpu, &sampler, &cases);
                for (i, (got, (_, good))) in got.iter().zip(&rows).enumerate() {
                    assert_eq!(got.token.is_some(), *good, "{how:?} vocab {vocab} row {i} {sampling:?}");
                    assert_eq!(got.logprob.is_some(), *good);
                }
                assert_eq!(got[5].token, Some(vocab as u32 / 2));
                assert_eq!(got[7].token, Some(0));
            }
        }
    }
}

#[test]
fn draws_repeat_and_depend_on_seed_and_index_only() {
    let mut first: Option<Vec<Option<u32>>> = None;
    for how in adapter::ALL {
        let Some(gpu) = adapter::open(how) else { return };
        let vocab = 1000;
        let sampler = block_on(Sampler::new(&gpu, vocab)).unwrap();
        let mut rng = fastrand::Rng::with_seed(23);
        let logits: Vec<f32> = (0..vocab).map(|_| normal(&mut rng)).collect();
        let draw = |seed, draw_index| Case {
            draw_index,
            ..case(logits.clone(), with(Sampling::default(), |c| c.seed = seed))
        };
        let cases: Vec<_> = (0..50).map(|i| draw(7, i)).collect();
        let tokens = |cases: &[Case]| sample(&gpu, &sampler, cases).iter().map(|s| s.token).collect::<Vec<_>>();
        let a = tokens(&cases);
        // In another order, among other rows.
        let mut shuffled: Vec<_> = cases.iter().rev().cloned().collect();
        shuffled.insert(3, draw(8, 0));
        let mut b = tokens(&shuffled);
        b.remove(3);
        b.reverse();
        assert_eq!(a, b, "{how:?}");
        let others: Vec<_> = (0..50).map(|i| draw(8, i)).collect();
        let high_word: Vec<_> = (0..50).map(|i| draw(7 + (1 << 32), i)).collect();
        for others in [others, high_word] {
            let same = tokens(&others).iter().zip(&a).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} of 50 draws are the same with another seed");
        }
        let distinct: std::collections::BTreeSet<_> = a.iter().collect();
        assert!(distinct.len() > 30, "{} distinct tokens in 50 draws", distinct.len());
        assert_eq!(first.get_or_insert_with(|| a.clone()), &a, "{how:?}");
    }
}

/// Each recorded call has its own upload until its commands have run.
#[test]
fn calls_before_one_submit_do_not_share_requests() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let vocab = 1000;
    let sampler = block_on(Sampler::new(&gpu, vocab)).unwrap();
    let mut rng = fastrand::Rng::with_seed(24);
    let logits: Vec<f32> = (0..vocab).map(|_| normal(&mut rng)).collect();
    let buffer = floats(&gpu, &logits);
    let outs: Vec<_> = (0..5).map(|_| empty(&gpu, 4)).collect();
    for round in 0..3 {
        let draw = |i: u32| round * 100 + i;
        run(&gpu, |pass| {
            let record = |(i, out)| {
                let request = SamplingRequest {
                    sampling: Sampling::default(),
                    draw_index: draw(i),
                    history: &[],
                    logprob: false,
                    allowed: None,
                };
                sampler.record(&mut *pass, Rows::new(&buffer, 1, vocab), &[request], out).unwrap();
            };
            (0..).zip(&outs).for_each(record);
        });
        for (i, out) in (0..).zip(&outs) {
            let words: Vec<u32> = read(&gpu, out).into_iter().map(f32::to_bits).collect();
            let alone = Case { draw_index: draw(i), ..case(logits.clone(), Sampling::default()) };
            let alone = Sampled { logprob: None, ..sample(&gpu, &sampler, &[alone])[0] };
            assert_eq!(Sampler::read_output(&words), [alone], "draw {}", draw(i));
        }
    }
}

#[test]
fn frequencies_follow_the_distribution() {
    const DRAWS: u32 = 20_000;
    const ROWS: u32 = 2000;
    for how in [adapter::CPU, adapter::GPU] {
        let Some(gpu) = adapter::open(how) else { return };
        let logits: Vec<f32> = (0..23).map(|i| (i as f32 * 1.7).sin() * 2.0).collect();
        let sampler = block_on(Sampler::new(&gpu, logits.len() as u32)).unwrap();
        let samplings = [
            with(Sampling::default(), |c| c.seed = 1),
            with(Sampling::default(), |c| {
                c.seed = 2;
                c.temperature = 0.6;
                c.top_p = Some(0.9);
            }),
            with(Sampling::default(), |c| {
                c.seed = 3;
                c.temperature = 1.5;
                c.top_k = Some(10);
                c.min_p = Some(0.1);
            }),
        ];
        // The noise is the same in every family: the others' draws are compared one by one above.
        let samplings = if how == adapter::CPU { &samplings[..] } else { &samplings[..1] };
        for &sampling in samplings {
            let mut counts = vec![0_u32; logits.len()];
            for first in (0..DRAWS).step_by(ROWS as usize) {
                let cases: Vec<_> = (first..first + ROWS)
                    .map(|draw_index| Case { draw_index, ..case(logits.clone(), sampling) })
                    .collect();
                for sampled in sample(&gpu, &sampler, &cases) {
                    counts[sampled.token.unwrap() as usize] += 1;
                }
            }
            let want = expected(&case(logits.clone(), sampling));
            let weight = |t: u32| (f64::from(want.logits[t as usize]) / f64::from(sampling.temperature)).exp();
            let total: f64 = want.kept.iter().map(|&t| weight(t)).sum();
            let chi_square: f64 = want
                .kept
                .iter()
                .map(|&t| {
                    let n = f64::from(DRAWS) * weight(t) / total;
                    (f64::from(counts[t as usize]) - n).powi(2) / n
                })
                .sum();
            assert_eq!(
                want.kept.iter().map(|&t| counts[t as usize]).sum::<u32>(),
                DRAWS,
                "{sampling:?}: outside the kept set"
            );
            // Mean and variance of chi-square are n - 1 and 2 (n - 1); four deviations above is less than one in a thousand.
            let degrees = want.kept.len() as f64 - 1.0;
            assert!(
                chi_square < degrees + 4.0 * (2.0 * degrees).sqrt(),
                "{how:?} {sampling:?}: {chi_square}, {degrees} degrees"
            );
        }
    }
}

#[test]
fn bad_arguments_are_named() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let gpu = &gpu;
    let good = Sampling::default();
    for (sampling, field) in [
        (with(good, |c| c.temperature = -0.1), "temperature"),
        (with(good, |c| c.temperature = f32::NAN), "temperature"),
        (with(good, |c| c.temperature = f32::INFINITY), "temperature"),
        (with(good, |c| c.top_k = Some(0)), "top_k"),
        (with(good, |c| c.top_p = Some(0.0)), "top_p"),
        (with(good, |c| c.top_p = Some(1.1)), "top_p"),
        (with(good, |c| c.top_p = Some(f32::NAN)), "top_p"),
        (with(good, |c| c.min_p = Some(-0.1)), "min_p"),
        (with(good, |c| c.min_p = Some(f32::NAN)), "min_p"),
        (with(good, |c| c.repetition_penalty = 0.0), "repetition_penalty"),
        (with(good, |c| c.repetition_penalty = f32::NAN), "repetition_penalty"),
    ] {
        let Err(Error::Argument { argument, .. }) = sampling.validate() else { panic!("{sampling:?} is accepted") };
        assert_eq!(argument, field);
    }
    for sampling in samplings() {
        sampling.validate().unwrap();
    }
    let sampler = block_on(Sampler::new(gpu, 8)).unwrap();
    let (logits, out) = (floats(gpu, &[0.0; 128]), empty(gpu, 128));
    let request = SamplingRequest { sampling: good, draw_index: 0, history: &[8], logprob: false, allowed: None };
    let penalty = SamplingRequest { sampling: with(good, |c| c.repetition_penalty = 2.0), ..request };
    let cold = SamplingRequest { sampling: with(good, |c| c.temperature = -1.0), ..request };
    run(gpu, |pass| {
        let mut named = |rows: Rows<'_>,
                         requests: &[SamplingRequest<'_>],
                         out: folio::BufferRef<'_>,
                         argument: &str| match sampler.record(&mut *pass, rows, requests, out) {
            Err(Error::Argument { argument: name, .. }) => assert_eq!(name, argument),
            other => panic!("{argument}: {other:?}"),
        };
        let whole = folio::BufferRef::from(&out);
        named(Rows::new(&logits, 1, 8), &[], whole, "requests");
        named(Rows::new(&logits, 1, 8), &[request, request], whole, "logits");
        named(Rows::new(&logits, 1, 7), &[request], whole, "logits");
        named(Rows::new(&logits, 1, 8), &[request], folio::BufferRef::new(&out, 0, 12), "output");
        named(Rows::new(&logits, 1, 8), &[request], (&logits).into(), "output");
        named(Rows::new(&logits, 1, 8), &[penalty], whole, "history");
        named(Rows::new(&logits, 1, 8), &[cold], whole, "temperature");
        named(Rows::new(&logits, 1, 8), &[SamplingRequest { allowed: Some(&[1, 1]), ..request }], whole, "allowed");
        // Without a penalty nobody looks at the history.
        sampler.record(&mut *pass, Rows::new(&logits, 1, 8), &[request], &out).unwrap();
    });
    assert!(block_on(Sampler::new(gpu, 0)).is_err());
}
