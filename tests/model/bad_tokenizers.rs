//! Damaged tokenizers: whatever a `tokenizer.json` holds, it is refused or it works, and nothing panics.

use std::path::Path;

use folio::Error;
use folio::model::{ModelError, Tokenizer};
use serde_json::{Value, json};

const TEXTS: [&str; 5] =
    ["", "a", "Once upon a time, there was a héllo 日本 🎉", "  b\n<|end|> [MASK] aab", "HHHH ▁▁ \u{fffd}"];

/// Loads a tokenizer and does everything with it that folio does.
fn exercise(path: &Path) -> Result<(), ModelError> {
    let tokenizer = Tokenizer::from_file(path)?;
    let size = tokenizer.vocab_size();
    tokenizer.check_vocab_size(size)?;
    let _ = tokenizer.token_to_id("a");
    let mut worst = Ok(());
    for text in TEXTS {
        for special in [false, true] {
            match tokenizer.encode(text, special) {
                Ok(ids) => worst = worst.and(tokenizer.decode(&ids, special).map(drop)),
                Err(error) => worst = Err(error),
            }
        }
    }
    let ids: Vec<u32> = (0..size.min(300)).chain([u32::MAX]).collect();
    for ids in [&ids[..], &[]] {
        worst = worst.and(tokenizer.decode(ids, true).map(drop)).and(tokenizer.decode(ids, false).map(drop));
    }
    let mut stream = tokenizer.stream(true);
    for &id in &ids[..ids.len().min(40)] {
        worst = worst.and(stream.push(id).map(drop));
    }
    worst.and(stream.finish().map(drop))
}

fn special(id: u32, content: &str) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": true, "normalized": false,
        "special": true })
}

fn tokenizer(
    model: &Value,
    normalizer: &Value,
    pre_tokenizer: &Value,
    post_processor: &Value,
    decoder: &Value,
) -> Value {
    json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0 },
        "padding": { "strategy": { "Fixed": 4 }, "direction": "Right", "pad_to_multiple_of": 2, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "[PAD]" },
        "added_tokens": [special(0, "<s>"), special(40, "<|end|>"), special(41, "[MASK]")],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
        "decoder": decoder, "model": model,
    })
}

/// Sound ones, which together have every kind of part.
fn sound() -> Vec<Value> {
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories/tokenizer.json");
    let stories = serde_json::from_slice(&std::fs::read(stories).unwrap()).unwrap();
    let template = json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } } });
    let bpe = tokenizer(
        &json!({ "type": "BPE", "dropout": 0.1, "unk_token": "<s>", "continuing_subword_prefix": "##",
            "end_of_word_suffix": "</w>", "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": { "<s>": 0, "a": 1, "##a": 2, "##b": 3, "aa": 4, "aab": 5, "b": 6, "b</w>": 7, "<0xC3>": 8 },
            "merges": ["a ##a", "aa ##b"] }),
        &json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            { "type": "Replace", "pattern": { "Regex": "a{2,3}" }, "content": "aa" },
            { "type": "NFC" }, { "type": "NFKD" }, { "type": "Lowercase" }, { "type": "Nmt" }, { "type": "StripAccents" },
            { "type": "Strip", "strip_left": true, "strip_right": true },
            { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
              "lowercase": true }] }),
        &json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": "\\s+|(?=b)" }, "behavior": "Isolated", "invert": false },
            { "type": "Split", "pattern": { "String": "b" }, "behavior": "MergedWithNext", "invert": true },
            { "type": "Digits", "individual_digits": true }, { "type": "Punctuation", "behavior": "Isolated" },
            { "type": "CharDelimiterSplit", "delimiter": "," }, { "type": "FixedLength", "length": 3 },
            { "type": "UnicodeScripts" }] }),
        &template,
        &json!({ "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" },
            { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            { "type": "BPEDecoder", "suffix": "</w>" }] }),
    );
    let merges = tokenizer(
        &json!({ "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "##",
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": { "<s>": 0, "a": 1, "##a": 2, "##b": 3, "aa": 4, "aab": 5, "é": 6 },
            "merges": [["a", "##a"], ["aa", "##b"]] }),
        &Value::Null,
        &json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        &json!({ "type": "Sequence", "processors": [
            { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }, template] }),
        &json!({ "type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": true }),
    );
    let word_piece = tokenizer(
        &json!({ "type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": { "<s>": 0, "a": 1, "##a": 2, "##b": 3, "once": 4 } }),
        &json!({ "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true }),
        &json!({ "type": "BertPreTokenizer" }),
        &json!({ "type": "BertProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0] }),
        &json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
    );
    let unigram = tokenizer(
        &json!({ "type": "Unigram", "unk_id": 0, "byte_fallback": true,
            "vocab": [["<s>", 0.0], ["▁", -2.0], ["a", -1.5], ["▁a", -1.0], ["b", -3.0], ["<0xE6>", -9.0]] }),
        // In base64 the length of a trie of 256 units, the trie, which has no entry, and a text.
        &json!({ "type": "Precompiled", "precompiled_charsmap": format!("AAQA{}AABhAA==", "AAAA".repeat(341)) }),
        &json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true }),
        &json!({ "type": "RobertaProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0], "trim_offsets": true,
            "add_prefix_space": true }),
        &json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true }),
    );
    let word_level = tokenizer(
        &json!({ "type": "WordLevel", "unk_token": "<s>", "vocab": { "<s>": 0, "a": 1, "Once": 2 } }),
        &json!({ "type": "ByteLevel" }),
        &json!({ "type": "WhitespaceSplit" }),
        &Value::Null,
        &json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
    );
    vec![stories, bpe, merges, word_piece, unigram, word_level]
}

/// Every node of a document, as its path. Vocabularies are large and all alike: some of their entries stand for all.
fn nodes(value: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_owned());
    match value {
        Value::Object(object) => {
            for (key, value) in object.iter().take(14) {
                nodes(value, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), out);
            }
        }
        Value::Array(list) => {
            for (i, value) in list.iter().enumerate().take(14) {
                nodes(value, &format!("{at}/{i}"), out);
            }
        }
        _ => {}
    }
}

fn odd_value(random: &mut fastrand::Rng, old: &Value, others: &[Value]) -> Value {
    let odd = [
        Value::Null,
        json!(true),
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(7),
        json!(-1),
        json!(u64::MAX),
        json!(u32::MAX),
        json!(1_u64 << 40),
        json!(0.5),
        json!(1e308),
        json!(-1e308),
        json!(""),
        json!("a"),
        json!("é"),
        json!("▁"),
        json!("日本語のテキスト"),
        json!("<s>"),
        json!("AAAA"),
        json!("CAAAAP////8AAAAAYQA="),
        json!("/////w=="),
        json!("(a*)*"),
        json!("(?!)"),
        json!("\\b|x*"),
        json!([]),
        json!({}),
        json!(["", ""]),
        json!([["", 0.0]]),
        json!({ "": 0 }),
        json!({ "Regex": "" }),
        json!({ "Regex": "(?=a)|(?<=b)" }),
        json!({ "type": "Strip", "content": "H", "start": 3, "stop": 3 }),
        json!({ "type": "Fuse" }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "ByteLevel" }),
        json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" }),
        json!({ "type": "Split" }),
    ];
    match random.u32(0..10) {
        // A part of another tokenizer.
        0..4 => {
            let other = random.choice(others).unwrap();
            let mut all = Vec::new();
            nodes(other, "", &mut all);
            other.pointer(random.choice(&all).unwrap()).unwrap().clone()
        }
        4 => match old {
            Value::Array(list) if !list.is_empty() => {
                let mut list = list.clone();
                list.remove(random.usize(..list.len()));
                Value::Array(list)
            }
            Value::Object(object) if !object.is_empty() => {
                let mut object = object.clone();
                let key = object.keys().nth(random.usize(..object.len())).unwrap().clone();
                object.remove(&key);
                Value::Object(object)
            }
            _ => Value::Null,
        },
        _ => random.choice(&odd).unwrap().clone(),
    }
}

/// A tokenizer with one to three changes: of nodes, or of bytes.
fn mutated(random: &mut fastrand::Rng, sound: &[Value]) -> Vec<u8> {
    let mut document = random.choice(sound).unwrap().clone();
    for _ in 0..random.usize(1..4) {
        let mut all = Vec::new();
        nodes(&document, "", &mut all);
        let at = random.choice(&all[1.min(all.len() - 1)..]).unwrap();
        let node = document.pointer_mut(at).unwrap();
        *node = odd_value(random, node, sound);
    }
    let mut bytes = document.to_string().into_bytes();
    if random.u32(0..4) == 0 {
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len());
            bytes[at] = *random.choice(b"0123456789[]{},:\"a\\\x80 ").unwrap();
        }
    }
    bytes
}

#[test]
fn sound_ones_work() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    for (i, document) in sound().iter().enumerate() {
        std::fs::write(&path, document.to_string()).unwrap();
        exercise(&path).unwrap_or_else(|error| panic!("{i}: {error}"));
    }
}

/// Loads, with the error that there must be.
fn refused(document: &Value, parts: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), document.to_string()).unwrap();
    file_error(exercise(directory.path()).expect_err("damaged"), parts);
}

fn file_error(error: ModelError, parts: &[&str]) {
    assert!(matches!(&error, ModelError::File { path, .. } if path.ends_with("tokenizer.json")), "{error:?}");
    for part in parts {
        assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
    }
}

/// Each of these makes the library panic when it loads the file or encodes a text. It doesn't come to that.
#[test]
fn what_the_library_panics_at_is_refused_before() {
    let [stories, bpe, merges, _, unigram, _] = &sound()[..] else { panic!() };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    let text = stories.to_string();
    let decoder = text.find("\"decoder\":{").unwrap();
    for cut in [decoder + 12, decoder + 20, decoder + 40, text.len() - 1] {
        std::fs::write(&path, &text[..cut]).unwrap();
        file_error(exercise(&path).expect_err("cut short"), &["not a tokenizer", "damaged at line 1, column"]);
    }
    let with = |document: &Value, at: &str, value: Value| {
        let mut document = document.clone();
        *document.pointer_mut(at).unwrap() = value;
        document
    };
    for wrong in [json!("A[AA"), json!("AAAA"), json!(7), json!(null), json!("/////w==")] {
        refused(&with(unigram, "/normalizer/precompiled_charsmap", wrong), &["not a tokenizer", "normalizer"]);
    }
    for wrong in [json!([["a", "a"]]), json!(["##a a"]), json!([["aa", "é"]])] {
        let document = with(merges, "/model/continuing_subword_prefix", json!("###"));
        refused(&with(&document, "/model/merges", wrong), &["not a tokenizer", "model", "merges", "\"###\""]);
    }
    let unknown = with(bpe, "/post_processor/single/0/SpecialToken/id", json!("</s>"));
    refused(&unknown, &["not a tokenizer", "post_processor", "\"</s>\"", "special_tokens"]);
    // Neither padding nor truncation is done, so nothing pads to the end of memory.
    let mut endless = stories.clone();
    endless["padding"] = bpe["padding"].clone();
    endless["padding"]["strategy"]["Fixed"] = u64::MAX.into();
    endless["truncation"] = bpe["truncation"].clone();
    endless["truncation"]["stride"] = u64::MAX.into();
    std::fs::write(&path, endless.to_string()).unwrap();
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    let ids = tokenizer.encode(&"story ".repeat(100), true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "story ".repeat(100));
}

/// The rest is found when the library panics.
#[test]
fn what_the_library_panics_at_later_is_an_error() {
    let [_, bpe, _, _, unigram, _] = &sound()[..] else { panic!() };
    let mut trie = unigram.clone();
    trie["normalizer"]["precompiled_charsmap"] = "CAAAAAAAAAAAAAAAYQA=".into();
    refused(&trie, &["damaged", "panicked in encoding a text", "index out of bounds"]);
    let mut strip = bpe.clone();
    strip["decoder"] = json!({ "type": "Strip", "content": "a", "start": 9, "stop": 9 });
    refused(&strip, &["damaged", "panicked in decoding tokens"]);
}

#[test]
fn tokens_without_text_decode_to_nothing() {
    let [_, bpe, ..] = &sound()[..] else { panic!() };
    let mut document = bpe.clone();
    document["decoder"] = json!({ "type": "BPEDecoder", "suffix": "</w>" });
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), document.to_string()).unwrap();
    let tokenizer = Tokenizer::from_file(directory.path()).unwrap();
    for (ids, skip_special, want) in
        [(&[][..], true, ""), (&[0, 9999], true, ""), (&[0], false, "<s>"), (&[1], true, "a")]
    {
        assert_eq!(tokenizer.decode(ids, skip_special).unwrap(), want, "{ids:?}");
    }
}

#[test]
fn mutated_ones_are_refused_or_work() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    let sound = sound();
    let (mut work, mut guarded) = (0, 0);
    for seed in 0..2000 {
        let bytes = mutated(&mut fastrand::Rng::with_seed(seed), &sound);
        std::fs::write(&path, &bytes).unwrap();
        match exercise(&path) {
            Ok(()) => work += 1,
            Err(ModelError::File { reason, .. }) => guarded += usize::from(reason.contains("panicked")),
            Err(ModelError::Folio(Error::Argument { .. })) => {}
            Err(other) => panic!("{seed}: {other:?}"),
        }
    }
    // Otherwise it would be a test of the JSON parser.
    assert!(work > 40, "{work}");
    println!("{work} work, {guarded} were found by a panic");
}

#[test]
fn deep_ones_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    let [stories, ..] = &sound()[..] else { panic!() };
    for (part, list) in [("normalizer", "normalizers"), ("decoder", "decoders"), ("pre_tokenizer", "pretokenizers")] {
        for depth in [20, 60, 10_000] {
            for typed in ["\"type\":\"Sequence\",", ""] {
                let open = format!("{{{typed}\"{list}\":[").repeat(depth);
                let nested = format!("\"{part}\":{open}{}", "]}".repeat(depth));
                let mut document = stories.clone();
                document.as_object_mut().unwrap().remove(part);
                let text = document.to_string();
                std::fs::write(&path, format!("{{{nested},{}", &text[1..])).unwrap();
                let _ = exercise(&path);
            }
        }
    }
}
