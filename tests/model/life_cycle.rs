//! Sequences begin, branch, leave the cache and come back: whatever happens in between, the text is the one of a generation that nothing
//! interrupted, and a call that fails changes nothing.

use std::future::Future;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::task::{Context, Waker};

use folio::model::{
    Decoder, DecoderOptions, Finish, Input, LogitRows, Model, ModelError, ModelOptions, ModelResult, Prompt, Sampling,
};
use folio::{Error, ErrorKind, Gpu, GpuOptions, KvFormat, PoolUsage, SequenceId};

use crate::adapter;
use crate::common::with;
use crate::decoder::{decoder_with, fixture, generate, small, tokens};

/// Greedy, but a random model doesn't say one token for ever.
fn sampling() -> Sampling {
    with(Sampling::greedy(), |c| c.repetition_penalty = 1.5)
}

fn options(format: KvFormat) -> DecoderOptions {
    with(small(24), |c| (c.k_format, c.v_format) = (format, format))
}

/// Feeds `tokens` and returns the next `n`.
fn go_on(decoder: &mut Decoder, sequence: SequenceId, tokens: &[u32], n: usize) -> Vec<u32> {
    generate(decoder, &[Prompt { sequence, tokens, sampling: sampling() }], n).remove(0)
}

/// Tokens, and the pending one.
type Texts = Vec<(Vec<u32>, Option<u32>)>;

/// Everything that a refused or dropped call must leave alone.
fn state(decoder: &Decoder, sequences: &[SequenceId]) -> (PoolUsage, Texts) {
    let of = |&s: &SequenceId| (decoder.tokens(s).unwrap().to_vec(), decoder.pending(s).unwrap());
    (decoder.usage(), sequences.iter().map(of).collect())
}

fn kind<T: std::fmt::Debug>(result: ModelResult<T>) -> ErrorKind {
    result.expect_err("to be refused").kind()
}

fn poll_once<T>(future: impl Future<Output = T>) {
    let mut context = Context::from_waker(Waker::noop());
    assert!(std::pin::pin!(future).poll(&mut context).is_pending(), "nobody polls the device");
}

/// One text of 24 tokens, and the same one in pieces, for cache formats with and without scales per row.
#[test]
fn a_text_in_pieces_is_the_text_of_one_generation() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sequence");
    for format in [KvFormat::F16, KvFormat::Int8] {
        let mut decoder = decoder_with(&gpu, options(format));
        let (prompt, more) = (tokens(21, 1), tokens(5, 4));
        let whole = decoder.create_sequence();
        let text = go_on(&mut decoder, whole, &prompt, 24);
        assert!((0..24).any(|i| text[i] != text[0]), "a text, not one token: {text:?}");
        // A second turn: what was said last belongs to what it continues.
        let answer = go_on(&mut decoder, whole, &more, 8);
        let all = [&prompt[..], &text, &more, &answer[..7]].concat();
        assert_eq!(decoder.tokens(whole).unwrap(), all);
        decoder.free(whole).unwrap();

        let s = decoder.create_sequence();
        let mut said = go_on(&mut decoder, s, &prompt, 3);
        said.extend(go_on(&mut decoder, s, &[], 1));
        assert_eq!((decoder.pending(s).unwrap(), decoder.tokens(s).unwrap().len()), (said.last().copied(), 24));
        // Single steps after a generation, and a generation after them.
        for _ in 0..2 {
            let sampling = sampling();
            let input = Input::new(s, &[]).with_sampling(&sampling);
            said.push(gpu.block_on(decoder.step(&[input])).unwrap()[0].unwrap());
        }
        assert_eq!(said, text[..6]);

        // A fork has the pending token too, and both go on from it.
        let fork = decoder.fork(s).unwrap();
        assert_eq!(decoder.pending(fork).unwrap(), Some(text[5]));
        assert_eq!(go_on(&mut decoder, fork, &[], 5), text[6..11]);
        // Cut to the whole text nothing changes; cut to the tokens in the cache, the pending one is gone.
        decoder.truncate(s, 27).unwrap();
        let at = decoder.fork_at(s, 27).unwrap();
        assert_eq!(state(&decoder, &[at]).1, state(&decoder, &[s]).1);
        let before = decoder.fork_at(s, 26).unwrap();
        assert_eq!((decoder.pending(before).unwrap(), decoder.tokens(before).unwrap().len()), (None, 26));
        assert_eq!(go_on(&mut decoder, before, &text[5..6], 3), text[6..9]);
        // In the middle of the text as well.
        decoder.truncate(fork, 23).unwrap();
        assert_eq!(decoder.pending(fork).unwrap(), None);
        assert_eq!(go_on(&mut decoder, fork, &text[2..3], 4), text[3..7]);

        // To the host and back, under the same id.
        let seen = state(&decoder, &[s]).1;
        let free = decoder.usage().free;
        for sequence in [fork, at, before] {
            decoder.free(sequence).unwrap();
        }
        let bytes = gpu.block_on(decoder.swap_out(s)).unwrap();
        assert_eq!((bytes, decoder.swapped_bytes()), (2 * decoder.bytes_per_block(), bytes));
        assert!(decoder.is_swapped_out(s).unwrap() && decoder.usage().used == 0 && decoder.usage().free > free);
        assert_eq!(state(&decoder, &[s]).1, seen);
        // A file of what is on the host, and one of what is in the cache.
        gpu.block_on(decoder.save(s, &path)).unwrap();
        gpu.block_on(decoder.swap_in(s)).unwrap();
        assert_eq!((state(&decoder, &[s]).1, decoder.swapped_bytes()), (seen.clone(), 0));
        let swapped = std::fs::read(&path).unwrap();
        gpu.block_on(decoder.save(s, &path)).unwrap();
        assert!(std::fs::read(&path).unwrap() == swapped, "the same bytes");
        assert_eq!(go_on(&mut decoder, s, &[], 6), text[6..12]);

        // Another decoder takes the file up, and goes on to the end.
        let mut other = decoder_with(&gpu, with(options(format), |c| c.num_blocks = 12));
        let loaded = gpu.block_on(other.load(&path)).unwrap();
        assert_eq!(state(&other, &[loaded]).1, seen);
        assert_eq!(go_on(&mut other, loaded, &[], 18), text[6..]);
        assert_eq!(go_on(&mut other, loaded, &more, 8), answer);

        // Holes are closed, and nobody notices.
        let (a, b) = (decoder.create_sequence(), decoder.create_sequence());
        let first = go_on(&mut decoder, a, &tokens(40, 7), 2);
        go_on(&mut decoder, b, &tokens(40, 8), 2);
        decoder.free(s).unwrap();
        let seen = state(&decoder, &[b]);
        assert!(gpu.block_on(decoder.defragment()).unwrap() > 0);
        assert_eq!(state(&decoder, &[b]), seen);
        assert_eq!(decoder.memory().sequences.len(), 2);
        let alone = decoder.create_sequence();
        let want = go_on(&mut decoder, alone, &tokens(40, 7), 8);
        assert_eq!([first, go_on(&mut decoder, a, &[], 6)].concat(), want);
    }
}

#[test]
fn a_stop_token_is_fed_or_discarded() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut decoder = decoder_with(&gpu, options(KvFormat::F32));
    let prompt = tokens(10, 3);
    let whole = decoder.create_sequence();
    let text = go_on(&mut decoder, whole, &prompt, 10);
    let at = (1..8).find(|&i| !text[..i].contains(&text[i])).unwrap();
    let stopped = |decoder: &mut Decoder| {
        let sequence = decoder.create_sequence();
        let prompt = Prompt { sequence, tokens: &prompt, sampling: sampling() };
        let result = decoder.generate_blocking(&[prompt], 10, &text[at..=at], |_, _| ControlFlow::Continue(()));
        assert_eq!(result.unwrap()[0].finish, Finish::Stop);
        assert_eq!(decoder.pending(sequence).unwrap(), Some(text[at]));
        sequence
    };
    let fed = stopped(&mut decoder);
    assert_eq!(go_on(&mut decoder, fed, &[], 3), text[at + 1..][..3]);
    let dropped = stopped(&mut decoder);
    assert_eq!(decoder.discard_pending(dropped).unwrap(), Some(text[at]));
    assert_eq!(decoder.discard_pending(dropped).unwrap(), None);
    let error = gpu.block_on(decoder.step(&[Input::new(dropped, &[])])).unwrap_err();
    assert!(error.to_string().contains("at least one, as none is pending"), "{error}");
    // As if it had never been sampled.
    let without = decoder.create_sequence();
    let same = [&prompt[..], &text[..at], &[5]].concat();
    assert_eq!(go_on(&mut decoder, dropped, &[5], 4), go_on(&mut decoder, without, &same, 4));
    // Logits feed the pending token, too, and leave none.
    let rows = gpu.block_on(decoder.logits(&[(fed, &[7])], LogitRows::All)).unwrap();
    assert_eq!(rows[0].len(), 2 * decoder.model().config().vocab_size as usize);
    assert_eq!(decoder.pending(fed).unwrap(), None);
}

/// A call that is refused leaves the pending token where it is.
#[test]
fn what_is_refused_changes_nothing() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sequence");
    let mut decoder = decoder_with(&gpu, with(options(KvFormat::F16), |c| c.num_blocks = 4));
    let (a, b) = (decoder.create_sequence(), decoder.create_sequence());
    let mut said = go_on(&mut decoder, a, &tokens(20, 1), 3);
    go_on(&mut decoder, b, &tokens(20, 2), 3);
    gpu.block_on(decoder.save(a, &path)).unwrap();
    let before = state(&decoder, &[a, b]);
    let unknown = {
        let c = decoder.create_sequence();
        decoder.free(c).unwrap();
        c
    };
    // The pool has 4 blocks, and all are used.
    assert_eq!(kind(gpu.block_on(decoder.step(&[Input::new(a, &[1; 20])]))), ErrorKind::Retry);
    assert_eq!(kind(gpu.block_on(decoder.load(&path))), ErrorKind::Retry);
    for sequence in [unknown, b] {
        let wanted = if sequence == b { ErrorKind::Caller } else { kind(decoder.tokens(sequence).map(|_| ())) };
        assert_eq!(kind(gpu.block_on(decoder.swap_in(sequence))), wanted);
    }
    assert_eq!(kind(decoder.fork(unknown)), ErrorKind::Caller);
    assert_eq!(kind(decoder.discard_pending(unknown)), ErrorKind::Caller);
    assert_eq!(kind(gpu.block_on(decoder.swap_out(unknown))), ErrorKind::Caller);
    assert_eq!(kind(gpu.block_on(decoder.save(unknown, &path))), ErrorKind::Caller);
    assert_eq!(kind(gpu.block_on(decoder.save(a, folder.path()))), ErrorKind::File);
    assert_eq!(kind(decoder.truncate(a, 24)), ErrorKind::Caller);
    assert_eq!(kind(decoder.fork_at(a, 24)), ErrorKind::Caller);
    assert_eq!(state(&decoder, &[a, b]), before);

    // Futures that are dropped half-way.
    poll_once(decoder.step(&[Input::new(a, &[]).with_sampling(&sampling())]));
    poll_once(decoder.generate(&[Prompt { sequence: a, tokens: &[], sampling: sampling() }], 2, &[], |_, _| {
        ControlFlow::Continue(())
    }));
    poll_once(decoder.swap_out(a));
    poll_once(decoder.save(a, &path));
    assert_eq!(state(&decoder, &[a, b]), before);

    // Swapped out, it is on the host until there is room.
    gpu.block_on(decoder.swap_out(a)).unwrap();
    let usage = decoder.usage();
    poll_once(decoder.warm_up());
    assert_eq!(decoder.usage(), usage, "nor does a warm-up leave anything");
    let error = gpu.block_on(decoder.step(&[Input::new(a, &[])])).unwrap_err();
    assert!(matches!(error, ModelError::Folio(Error::UnknownSequence(id)) if id == a), "{error}");
    assert_eq!(kind(gpu.block_on(decoder.swap_out(a))), ErrorKind::Caller);
    assert_eq!(kind(decoder.fork(a)), ErrorKind::Caller);
    let other = decoder.create_sequence();
    go_on(&mut decoder, other, &tokens(20, 9), 1);
    assert_eq!(kind(gpu.block_on(decoder.swap_in(a))), ErrorKind::Retry);
    decoder.free(other).unwrap();
    gpu.block_on(decoder.swap_in(a)).unwrap();
    assert_eq!(state(&decoder, &[a, b]).1, before.1);

    // When the pool is full half-way, what was said stays; with room for more it goes on.
    let result =
        decoder.generate_blocking(&[Prompt { sequence: a, tokens: &[], sampling: sampling() }], 20, &[], |_, token| {
            said.push(token);
            ControlFlow::Continue(())
        });
    assert_eq!(kind(result), ErrorKind::Retry);
    assert_eq!(said.len(), 13, "32 tokens are cached, and one is pending");
    assert_eq!((decoder.tokens(a).unwrap().len(), decoder.pending(a).unwrap()), (32, said.last().copied()));
    decoder.free(b).unwrap();
    said.extend(go_on(&mut decoder, a, &[], 5));
    decoder.free(a).unwrap();
    let whole = decoder.create_sequence();
    assert_eq!(go_on(&mut decoder, whole, &tokens(20, 1), 18), said);

    // Who changes a sequence behind the decoder's back is told.
    decoder.cache().truncate(whole, 5).unwrap();
    let error = gpu.block_on(decoder.step(&[Input::new(whole, &[1])])).unwrap_err();
    assert!(error.to_string().contains("with 5 tokens in the cache, need the decoder's own 37"), "{error}");
    // A swapped-out sequence can end.
    let c = decoder.create_sequence();
    go_on(&mut decoder, c, &[1, 2], 2);
    gpu.block_on(decoder.swap_out(c)).unwrap();
    decoder.free(c).unwrap();
    assert_eq!((decoder.swapped_bytes(), kind(decoder.tokens(c).map(|_| ()))), (0, ErrorKind::Caller));
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sequence");
    let format = KvFormat::Int8PerChannel;
    let channels = with(small(12), |c| (c.k_format, c.v_format) = (format, KvFormat::Int8));
    let mut decoder = decoder_with(&gpu, channels);
    gpu.block_on(decoder.calibrate_keys(&[&tokens(60, 3)])).unwrap();
    let s = decoder.create_sequence();
    let said = go_on(&mut decoder, s, &tokens(20, 1), 3);
    gpu.block_on(decoder.save(s, &path)).unwrap();
    let rest = go_on(&mut decoder, s, &[], 5);
    // A decoder without scales takes those of the file, but not if it has no room for the sequence.
    let mut tiny = decoder_with(&gpu, with(channels, |c| c.num_blocks = 1));
    assert!(gpu.block_on(tiny.load(&path)).is_err());
    assert!(tiny.cache().key_scales(0).is_none());
    let mut other = decoder_with(&gpu, channels);
    let loaded = gpu.block_on(other.load(&path)).unwrap();
    assert_eq!(other.pending(loaded).unwrap(), said.last().copied());
    assert_eq!(go_on(&mut other, loaded, &[], 5), rest);
    // Not one with other scales, or of another format.
    let mut third = decoder_with(&gpu, channels);
    gpu.block_on(third.calibrate_keys(&[&tokens(50, 9)])).unwrap();
    assert_eq!(kind(gpu.block_on(third.load(&path))), ErrorKind::Caller);
    let mut plain = decoder_with(&gpu, options(KvFormat::F16));
    assert_eq!(kind(gpu.block_on(plain.load(&path))), ErrorKind::Caller);

    // Files with no tokens, or such as the model doesn't have.
    let s = plain.create_sequence();
    go_on(&mut plain, s, &[1, 2, 3], 2);
    let cache = plain.cache();
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let copies = cache.record_snapshot(&mut encoder, s).unwrap();
    gpu.queue().submit([encoder.finish()]);
    let snapshot = gpu.block_on(copies.read()).unwrap();
    let usage = plain.usage();
    for (tokens, need) in
        [(vec![], "need those of its 4 keys"), (vec![1, 2, 3, 4, 101], "id 101, need ids below vocab_size, 101")]
    {
        snapshot.save(&path, &tokens).unwrap();
        let error = gpu.block_on(plain.load(&path)).unwrap_err();
        assert!(error.kind() == ErrorKind::File && error.to_string().contains(need), "{error}");
        assert!(error.to_string().contains("sequence"), "{error}");
    }
    assert_eq!(plain.usage(), usage);
}

/// With the option, a new sequence starts with what was computed before, and says the same.
#[test]
fn known_beginnings_are_found() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let prompt = tokens(40, 1);
    let vocab = 101;
    let longer = [&prompt[..], &tokens(9, 5)].concat();
    for format in [KvFormat::F16, KvFormat::Int8] {
        let mut plain = decoder_with(&gpu, options(format));
        let s = plain.create_sequence();
        let want = go_on(&mut plain, s, &longer, 12);
        assert_eq!((plain.prefix_len(s).unwrap(), plain.prefix_stats().indexed_blocks), (0, 0));

        let mut decoder = decoder_with(&gpu, with(options(format), |c| (c.prefix_cache, c.num_blocks) = (true, 8)));
        gpu.block_on(decoder.warm_up()).unwrap();
        assert_eq!(decoder.prefix_stats().indexed_blocks, 0, "nothing of the warm-up stays");
        let generated = |decoder: &mut Decoder, tokens: &[u32]| {
            let sequence = decoder.create_sequence();
            let prompt = Prompt { sequence, tokens, sampling: sampling() };
            let mut results = decoder.generate_blocking(&[prompt], 12, &[], |_, _| ControlFlow::Continue(())).unwrap();
            (sequence, results.remove(0))
        };
        let (first, result) = generated(&mut decoder, &prompt);
        assert_eq!(result.cached_tokens, 0);
        decoder.free(first).unwrap();
        // 40 tokens are 2 full blocks of 16; the answer's 11 of 12 fed tokens made it 3, with other tokens than this prompt has.
        let (second, result) = generated(&mut decoder, &longer);
        assert_eq!((result.cached_tokens, decoder.prefix_len(second).unwrap()), (32, 32));
        assert_eq!(result.tokens, want);
        assert_eq!(decoder.tokens(second).unwrap(), [&longer[..], &want[..11]].concat());
        // The conversation goes on: nothing is looked for any more.
        let next = Prompt { sequence: second, tokens: &prompt[..3], sampling: sampling() };
        let result = decoder.generate_blocking(&[next], 2, &[], |_, _| ControlFlow::Continue(())).unwrap().remove(0);
        assert_eq!(result.cached_tokens, 0);

        // Of a prompt that is known in full, the last token is computed, and a future that is dropped takes nothing along.
        let (whole_blocks, sequence) = (&longer[..48], decoder.create_sequence());
        let before = state(&decoder, &[sequence]).1;
        poll_once(decoder.step(&[Input::new(sequence, whole_blocks).with_sampling(&sampling())]));
        assert_eq!((state(&decoder, &[sequence]).1, decoder.prefix_len(sequence).unwrap()), (before, 0));
        let fed = [(sequence, whole_blocks)];
        let logits = gpu.block_on(decoder.logits(&fed, LogitRows::Last)).unwrap();
        assert_eq!((decoder.prefix_len(sequence).unwrap(), logits[0].len()), (32, vocab));
        // Rows of all tokens have to be computed.
        decoder.truncate(sequence, 0).unwrap();
        assert_eq!(gpu.block_on(decoder.logits(&fed, LogitRows::All)).unwrap()[0].len(), 48 * vocab);
        assert_eq!(decoder.prefix_len(sequence).unwrap(), 0);
        decoder.free(sequence).unwrap();
        // The index gives way where the room is needed.
        decoder.free(second).unwrap();
        let (_, result) = generated(&mut decoder, &tokens(110, 6));
        assert_eq!((result.cached_tokens, result.tokens.len()), (0, 12));

        // By hand, in a decoder that doesn't do it by itself.
        assert_eq!(plain.publish_prefix(s).unwrap(), 3);
        let found = plain.match_prefix(&longer);
        assert_eq!((found.len, plain.tokens(found.sequence).unwrap()), (48, &longer[..48]));
        assert_eq!(go_on(&mut plain, found.sequence, &longer[48..], 12), want);
        assert_eq!(plain.match_prefix(&longer[..48]).len, 32, "the last token is left to be fed");
        assert_eq!((plain.forget_prefixes(), plain.forget_prefixes()), (3, 0));
        assert!(plain.match_prefix(&[]).len == 0 && plain.match_prefix(&longer).len == 0);
    }
}

/// Under wgpu's default handler, which panics.
#[test]
fn a_lost_device_is_an_error_of_its_own() {
    let Some(_) = adapter::open(adapter::DEFAULT) else { return };
    let open = with(GpuOptions::default(), |c| c.adapter_name = std::env::var("FOLIO_ADAPTER").ok());
    let gpu = Gpu::open_blocking(open).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sequence");
    let mut decoder = decoder_with(&gpu, with(small(24), |c| c.prefix_cache = true));
    let (a, out) = (decoder.create_sequence(), decoder.create_sequence());
    go_on(&mut decoder, a, &tokens(20, 1), 3);
    go_on(&mut decoder, out, &tokens(20, 2), 3);
    gpu.block_on(decoder.save(a, &path)).unwrap();
    gpu.block_on(decoder.swap_out(out)).unwrap();
    let before = state(&decoder, &[a, out]);

    gpu.device().destroy();
    let lost = |what: &str, result: ModelResult<()>| match result {
        Ok(()) => panic!("{what} succeeded on a lost device"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::DeviceLost, "{what}: {error}"),
    };
    let sampled = sampling();
    for sampling in [None, Some(&sampled)] {
        let mut input = Input::new(a, &[1, 2]);
        input.sampling = sampling;
        lost("step", gpu.block_on(decoder.step(&[input])).map(drop));
    }
    let prompt = Prompt { sequence: a, tokens: &[], sampling: sampled };
    lost("generate", decoder.generate_blocking(&[prompt], 3, &[], |_, _| ControlFlow::Continue(())).map(drop));
    for rows in [LogitRows::Last, LogitRows::All] {
        lost("logits", gpu.block_on(decoder.logits(&[(a, &[1])], rows)).map(drop));
    }
    lost("warm_up", gpu.block_on(decoder.warm_up()));
    lost("swap_out", gpu.block_on(decoder.swap_out(a)).map(drop));
    lost("swap_in", gpu.block_on(decoder.swap_in(out)));
    lost("save", gpu.block_on(decoder.save(a, folder.path().join("other"))));
    lost("load", gpu.block_on(decoder.load(&path)).map(drop));
    lost("defragment", gpu.block_on(decoder.defragment()).map(drop));
    lost("Decoder::new", Decoder::new_blocking(Arc::clone(decoder.model()), small(24)).map(drop));
    lost("Model::load", Model::load_blocking(&gpu, fixture("llama"), ModelOptions::default(), |_| {}).map(drop));
    assert_eq!(state(&decoder, &[a, out]), before);
    assert!(decoder.is_swapped_out(out).unwrap());
    // What is on the host can still be saved.
    gpu.block_on(decoder.save(out, &path)).unwrap();
    decoder.free(a).unwrap();
}
