//! Models with windows in some of their layers: those layers give memory back, and texts are what they are with every block kept.

use std::sync::Arc;

use folio::model::{Decoder, DecoderOptions, Input, LogitRows, Model, ModelOptions, Sampling, Streaming, WeightFormat};
use folio::{ErrorKind, KvFormat, LayerGroup, SequenceId};

use crate::adapter;
use crate::common::with;
use crate::decoder::{fixture, tokens};
use crate::windows::{decoder, go_on, model, options};

/// Models of which some layers see 12 tokens and the others all; how many groups of layers their caches have.
const MODELS: [(&str, u32); 3] = [("gemma2", 3), ("gemma3", 2), ("gpt_oss", 2)];

fn logits(decoder: &mut Decoder, sequence: SequenceId, tokens: &[u32]) -> Vec<f32> {
    let gpu = decoder.gpu().clone();
    gpu.block_on(decoder.logits(&[(sequence, tokens)], LogitRows::All)).unwrap().remove(0)
}

/// Bit for bit, in chunks and single tokens, of forks and of what was cut back, from the host, from a file and from other blocks.
#[test]
fn texts_are_the_same_in_less_memory() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for (name, num_groups) in MODELS {
        let model = model(&gpu, name);
        let (mut all, mut flat) = (decoder(&model, options(96, true)), decoder(&model, options(96, false)));
        assert_eq!((all.cache().config().groups.count(), flat.cache().config().groups.count()), (1, num_groups));
        assert_eq!(flat.usage().total, 96 * num_groups);
        let text = tokens(75, 1);
        let (a, f) = (all.create_sequence(), flat.create_sequence());
        let bits = |rows: Vec<f32>| rows.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(logits(&mut all, a, &text)), bits(logits(&mut flat, f, &text)), "{name}");
        let more = go_on(&mut all, a, &text[..3], 12);
        assert_eq!(go_on(&mut flat, f, &text[..3], 12), more, "{name}");

        // What is held of a text of 89 tokens: all of it in some groups.
        flat.release_hidden(f).unwrap();
        let config = *flat.cache().config();
        let tables = flat.cache().block_tables(f).unwrap();
        for (table, group) in tables.iter().zip(config.groups.as_slice()) {
            let held = table.iter().filter(|block| !block.is_null()).count();
            assert_eq!((table.len(), held), (23, if group.window == Some(12) { 4 } else { 23 }), "{name}: {group}");
        }
        assert_eq!(flat.usage().used, config.held_blocks(89));
        assert_eq!(all.usage().used, 23);

        // As far as the windows reach back, and from the start.
        assert!(flat.reaches_back(f, 87).unwrap() && !flat.reaches_back(f, 60).unwrap());
        assert!(flat.truncate(f, 60).unwrap_err().to_string().contains("has left the window of 12"));
        let fork = flat.fork_at(f, 88).unwrap();
        flat.truncate(f, 87).unwrap();
        all.truncate(a, 87).unwrap();
        let expected = go_on(&mut all, a, &[5, 6, 7], 9);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sequence");
        gpu.block_on(flat.save(f, &path)).unwrap();
        let loaded = gpu.block_on(flat.load(&path)).unwrap();
        gpu.block_on(flat.swap_out(f)).unwrap();
        gpu.block_on(flat.swap_in(f)).unwrap();
        gpu.block_on(flat.defragment()).unwrap();
        flat.truncate(fork, 87).unwrap();
        for sequence in [f, fork, loaded] {
            assert_eq!(go_on(&mut flat, sequence, &[5, 6, 7], 9), expected, "{name}");
        }
        assert_eq!(flat.rewind(fork, 20).unwrap(), 0);
        // A cache that keeps all has other groups.
        let refused = gpu.block_on(all.load(&path)).unwrap_err();
        assert!(refused.to_string().contains("groups of layers"), "{refused}");
    }
}

/// Known beginnings end where every layer has what the next token sees; what follows is the same.
#[test]
fn known_prompts_are_found() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    for (name, _) in MODELS {
        let model = model(&gpu, name);
        let mut decoder = decoder(&model, with(options(64, false), |o| o.prefix_cache = true));
        let prompt = tokens(61, 6);
        let first = decoder.create_sequence();
        let text = go_on(&mut decoder, first, &prompt, 12);
        let config = *decoder.cache().config();
        for (len, found) in [(61, 60), (41, 40), (9, 8)] {
            let hit = decoder.match_prefix(&prompt[..len]);
            assert_eq!(hit.len, found, "{name}");
            let blocks = decoder.memory().sequences.last().unwrap().blocks;
            assert_eq!(blocks, config.held_blocks(found), "{name}");
            let rest = &prompt[found as usize..];
            assert_eq!(go_on(&mut decoder, hit.sequence, rest, 12), text, "{name}: {found} tokens were known");
            decoder.free(hit.sequence).unwrap();
        }
        decoder.free(first).unwrap();
        let again = decoder.create_sequence();
        assert_eq!((go_on(&mut decoder, again, &prompt, 12), decoder.prefix_len(again).unwrap()), (text, 60));
    }
}

/// In the memory in which 80 tokens fit if all are kept, 128 do: the model's positions.
#[test]
fn longer_texts_fit() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "gemma3");
    let text = tokens(127, 2);
    let mut all = decoder(&model, options(20, true));
    let s = all.create_sequence();
    let error = gpu.block_on(all.step(&[Input::new(s, &text)])).unwrap_err();
    assert_eq!((error.kind(), all.tokens(s).unwrap().len()), (ErrorKind::Retry, 0));
    let mut flat = decoder(&model, options(20, false));
    assert_eq!(flat.cache().config().pool_bytes(), all.cache().config().pool_bytes());
    let s = flat.create_sequence();
    let token = gpu.block_on(flat.step(&[Input::new(s, &text).with_sampling(&Sampling::greedy())])).unwrap();
    let mut roomy = decoder(&model, options(32, true));
    let r = roomy.create_sequence();
    let expected = gpu.block_on(roomy.step(&[Input::new(r, &text).with_sampling(&Sampling::greedy())])).unwrap();
    assert_eq!(token, expected);
    // A call that finds no room for its last steps changes nothing.
    let other = flat.create_sequence();
    assert_eq!(gpu.block_on(flat.step(&[Input::new(other, &text)])).unwrap_err().kind(), ErrorKind::Retry);
    assert_eq!((flat.tokens(s).unwrap().len(), flat.cache().seq_len(other).unwrap()), (127, 0));
}

/// Of a text of 3000 tokens layers with a window hold as much as of one of 300.
#[test]
fn windowed_layers_take_flat_memory() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixture("gemma3").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["max_position_embeddings"] = 4096.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(fixture("gemma3").join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let model = Model::load_blocking(&gpu, folder.path(), ModelOptions::new(WeightFormat::F32), |_| {}).unwrap();
    let model = Arc::new(model);
    let vocab = model.config().vocab_size;
    let text: Vec<u32> = (0..3000_u32).map(|i| (i * i * 7 + i * 3 + 1) % vocab).collect();
    let step = |o: &mut DecoderOptions| (o.block_size, o.max_step_tokens) = (16, 128);
    let mut flat = decoder(&model, with(options(110, false), step));
    let mut all = decoder(&model, with(options(190, true), step));
    let (f, a) = (flat.create_sequence(), all.create_sequence());
    let groups = flat.cache().config().groups;
    let windowed = groups.as_slice().iter().position(|group| group.window.is_some()).unwrap();
    let mut sizes = Vec::new();
    for chunk in text.chunks(300) {
        gpu.block_on(flat.step(&[Input::new(f, chunk)])).unwrap();
        gpu.block_on(all.step(&[Input::new(a, chunk)])).unwrap();
        flat.release_hidden(f).unwrap();
        let table = flat.cache().block_tables(f).unwrap().swap_remove(windowed);
        sizes.push(table.iter().filter(|block| !block.is_null()).count());
    }
    assert!(sizes.iter().all(|&size| size <= sizes[0].max(2)), "{sizes:?}");
    let rows = [(&mut flat, f), (&mut all, a)].map(|(decoder, sequence)| logits(decoder, sequence, &[1, 2]));
    assert_eq!(rows[0], rows[1]);
}

/// Where the keys and values of a layer are.
#[test]
fn layers_have_places_in_the_cache() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "gemma2");
    let places = |decoder: &Decoder| (0..3).map(|layer| decoder.cache_layer(layer).unwrap()).collect::<Vec<_>>();
    let (mut flat, mut all) = (decoder(&model, options(40, false)), decoder(&model, options(40, true)));
    assert_eq!((places(&flat), places(&all)), (vec![0, 2, 1], vec![0, 1, 2]));
    assert!(flat.cache_layer(3).unwrap_err().to_string().contains("layer: got 3, need below the model's number, 3"));
    let rows = [&mut flat, &mut all].map(|decoder| {
        let sequence = decoder.create_sequence();
        logits(decoder, sequence, &tokens(10, 3));
        let gather = |layer| decoder.cache().gather_blocking(sequence, decoder.cache_layer(layer).unwrap()).unwrap();
        (0..3).map(gather).collect::<Vec<_>>()
    });
    assert_eq!(rows[0], rows[1]);
    // As many layers as no cache has.
    let mut config = model.config().clone();
    config.num_layers = u32::MAX;
    let absurd = options(40, false).cache_config(&config);
    assert_eq!((absurd.num_layers, absurd.groups.as_slice()), (u32::MAX, &[LayerGroup::ALL][..]));
    // Groups where they are of use, and where layers can have scales of their own.
    let groups = |name: &str, change: fn(&mut DecoderOptions)| {
        let config = self::model(&gpu, name).config().clone();
        with(options(40, false), change).cache_config(&config).groups.as_slice().to_vec()
    };
    assert_eq!(groups("llama", |_| ()), [LayerGroup::ALL]);
    assert_eq!(groups("mistral", |_| ()), [LayerGroup::windowed(16)]);
    assert_eq!(groups("gemma2", |o| o.k_format = KvFormat::Int8PerChannel), [LayerGroup::ALL]);
    assert_eq!(groups("gemma3", |_| ()), [LayerGroup::windowed(12), LayerGroup::ALL]);
    let streaming = |o: &mut DecoderOptions| o.streaming = Some(Streaming { window: 40, sink_tokens: 4 });
    let streamed = LayerGroup { window: Some(40), sink_tokens: 4 };
    assert_eq!(groups("gemma3", streaming), [LayerGroup::windowed(12), streamed]);
}

/// A text without end in flat memory, where some layers have windows of their own; the same in other steps.
#[test]
fn streaming_has_no_end() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let model = model(&gpu, "gemma3");
    let options = |step: u32| {
        let streaming = Streaming { window: 40, sink_tokens: 4 };
        let options = with(options(1, false), |o| (o.streaming, o.max_step_tokens) = (Some(streaming), step));
        let cache = options.cache_config(model.config());
        // A call of several steps keeps its way back: a window more.
        let num_blocks = 2 * cache.most_blocks(u32::MAX, step).div_ceil(cache.groups.count());
        with(options, |o| o.num_blocks = num_blocks)
    };
    let texts = [8, 33].map(|step| {
        let mut decoder = decoder(&model, options(step));
        let s = decoder.create_sequence();
        let mut text = go_on(&mut decoder, s, &tokens(100, 8), 150);
        gpu.block_on(decoder.swap_out(s)).unwrap();
        gpu.block_on(decoder.swap_in(s)).unwrap();
        text.extend(go_on(&mut decoder, s, &tokens(70, 9), 50));
        text
    });
    assert_eq!(texts[0], texts[1]);
}
