//! Makes a `tokenizer.json` out of `tokenizer.ggml.*`, so that the same library, behind the same guards, runs every tokenizer.
//!
//! Two kinds are read. `gpt2` is byte-level BPE: tokens and merges are in the file, and `tokenizer.ggml.pre` names the regular expressions that split a text
//! first, which are in [`PRE_TOKENIZERS`]. `llama` is SentencePiece's BPE: tokens have scores, and the pair that forms the token with the best score
//! is merged first. [`merges_by_score`] writes that as merges in order, as the converters of Hugging Face transformers do.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use serde_json::{Value, json};

use super::super::{ModelError, ModelResult};
use super::reader::Header;

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const TYPES: &str = "tokenizer.ggml.token_type";
const PRE: &str = "tokenizer.ggml.pre";

/// What SentencePiece puts in place of a space.
const SPACE: &str = "\u{2581}";

/// The longest token that is made of others. SentencePiece's own limit is 16 characters unless a model asks for more; without one, the halves of a token of
/// a megabyte, all of which are looked up, would take hours.
const MAX_MERGED_BYTES: usize = 256;

/// Text of all merges that are made from scores: as much as the longest `tokenizer.json` that is read.
const MAX_MERGES_BYTES: usize = 128 << 20;

/// Kinds of tokens, as SentencePiece numbers them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// How a text is split before tokens are merged.
struct PreTokenizer {
    /// `tokenizer.ggml.pre`
    names: &'static [&'static str],
    /// Each splits what the ones before have left whole, matches and what lies between them apart.
    splits: &'static [&'static str],
    /// Then GPT-2's own expression splits.
    gpt2: bool,
    /// Characters are composed first (NFC). The file doesn't say it; the model's own tokenizer does it.
    composed: bool,
    /// A piece that is a token as a whole is not put together by merges.
    whole_pieces: bool,
    /// Whether a text starts with the token for it, unless the file says otherwise.
    add_start: bool,
}

/// The expressions are those of the models' published tokenizers; names and defaults, and the expressions of `default`, are those of `llama-vocab.cpp`.
const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["gpt-2", "phi-2", "olmo"],
        splits: &[],
        gpt2: true,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        splits: &[LLAMA_3],
        gpt2: false,
        composed: false,
        whole_pieces: true,
        add_start: true,
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe"],
        splits: &[LLAMA_3],
        gpt2: false,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen"],
        splits: &[QWEN_2],
        gpt2: false,
        composed: true,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["tekken"],
        splits: &[TEKKEN],
        gpt2: false,
        composed: false,
        whole_pieces: true,
        add_start: true,
    },
    PreTokenizer {
        names: &["gpt-4o", "llama4"],
        splits: &[GPT_4O],
        gpt2: false,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["deepseek-llm"],
        splits: &[r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", DEEPSEEK_SCRIPTS, r"\p{N}+"],
        gpt2: false,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["deepseek-coder"],
        splits: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_SCRIPTS, r"\p{N}"],
        gpt2: false,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["deepseek-v3"],
        splits: &[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK_V3],
        gpt2: false,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r"],
        splits: &[r"\p{N}"],
        gpt2: true,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
    PreTokenizer {
        names: &["default"],
        splits: &[
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        ],
        gpt2: false,
        composed: false,
        whole_pieces: false,
        add_start: false,
    },
];

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Llama 3's, but every digit is a piece.
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's: words also end where a capital follows.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// OpenAI's: the endings of English belong to the word before.
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek's: letters of alphabets with capitals, marks, and what has neither.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_MARKS: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";
const DEEPSEEK_SCRIPTS: &str = "[一-龥\u{800}-一가-\u{d7ff}]+";
const DEEPSEEK_V3: &str = r#"[!"\#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#;

/// Tokens of OpenAI's harmony. Where the first two end an answer, the third ends a message only.
const HARMONY: [&str; 3] = ["<|return|>", "<|call|>", "<|end|>"];

/// Tokens that end an answer, where the file names no other: those that llama.cpp looks for.
const ENDS: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    HARMONY[0],
    HARMONY[1],
    HARMONY[2],
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Ids of tokens with a meaning.
#[derive(Debug, Default)]
pub(crate) struct Specials {
    /// Starts a text.
    pub(crate) bos: Option<u32>,
    /// Ends a text.
    pub(crate) eos: Option<u32>,
    /// What ends a text, a turn or a message, `eos` first.
    pub(crate) ends: Vec<u32>,
}

/// The setting that names a token.
pub(super) fn id_key(name: &str) -> String {
    format!("tokenizer.ggml.{name}_token_id")
}

impl Specials {
    pub(crate) fn read(header: &Header) -> ModelResult<Self> {
        // SentencePiece's own ids, which old files leave out.
        let sentencepiece = header.text("tokenizer.ggml.model")? == Some("llama");
        let id = |name: &str, default| Ok::<_, ModelError>(header.u32(&id_key(name))?.or(default));
        let bos = id("bos", sentencepiece.then_some(1))?;
        let eos = id("eos", sentencepiece.then_some(2))?;
        let mut ends = Vec::new();
        for end in [eos, id("eot", None)?, id("eom", None)?].into_iter().flatten() {
            if !ends.contains(&end) {
                ends.push(end);
            }
        }
        let tokens = header.texts(TOKENS)?.unwrap_or_default();
        for (i, token) in (0..).zip(tokens) {
            if ENDS.contains(&token.as_str()) && !ends.contains(&i) && kind(header, i as usize)? == Kind::Control {
                ends.push(i);
            }
        }
        let of_harmony =
            HARMONY.map(|name| ends.iter().position(|id| tokens.get(*id as usize).is_some_and(|t| t == name)));
        if let [Some(_), Some(_), Some(end)] = of_harmony {
            ends.remove(end);
        }
        Ok(Self { bos, eos, ends })
    }
}

fn kind(header: &Header, token: usize) -> ModelResult<Kind> {
    let Some(kinds) = header.numbers(TYPES)? else { return Ok(Kind::Normal) };
    match kinds.get(token) {
        Some(1.0) => Ok(Kind::Normal),
        Some(2.0) => Ok(Kind::Unknown),
        Some(3.0) => Ok(Kind::Control),
        Some(4.0) => Ok(Kind::UserDefined),
        Some(5.0) => Ok(Kind::Unused),
        Some(6.0) => Ok(Kind::Byte),
        other => {
            let got = other.map_or("nothing".to_owned(), f64::to_string);
            Err(header.error(TYPES, format!("{got} for token {token}"), "a type from 1 to 6 for each token"))
        }
    }
}

/// A `tokenizer.json`.
#[derive(Serialize)]
struct File<'a> {
    version: &'static str,
    added_tokens: Vec<Added<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct Added<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'static str,
    unk_token: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: BTreeMap<&'a str, u32>,
    merges: Vec<(&'a str, &'a str)>,
}

/// What of a tokenizer depends on its kind.
struct Parts<'a> {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    merges: Vec<(&'a str, &'a str)>,
    whole_pieces: bool,
    add_start: bool,
    /// Tokens for single bytes stand in for what there is no token for.
    byte_fallback: bool,
}

/// # Errors
/// [`ModelError::File`] if the file has no tokenizer, [`ModelError::Config`] for a part of it that is missing, wrong or not supported.
pub(crate) fn tokenizer_json(header: &Header) -> ModelResult<Vec<u8>> {
    let key = "tokenizer.ggml.model";
    let need = "one of gpt2, llama";
    let model = header.text(key)?.ok_or_else(|| header.error(key, "nothing", need))?;
    let tokens = header.texts(TOKENS)?.filter(|tokens| !tokens.is_empty());
    let tokens = tokens.ok_or_else(|| header.error(TOKENS, "nothing", "a list of tokens"))?;
    let mut vocab = BTreeMap::new();
    let mut added_tokens = Vec::new();
    let mut kinds = Vec::new();
    // Lists have fewer than 2^32 elements.
    for (id, token) in (0_u32..).zip(tokens) {
        if let Some(first) = vocab.insert(token.as_str(), id) {
            return Err(header.error(TOKENS, format!("{token:?} as tokens {first} and {id}"), "each token once"));
        }
        let kind = kind(header, id as usize)?;
        kinds.push(kind);
        if matches!(kind, Kind::Control | Kind::Unknown | Kind::UserDefined) {
            let (single_word, lstrip, rstrip, normalized) = (false, false, false, false);
            let special = kind != Kind::UserDefined;
            added_tokens.push(Added { id, content: token, single_word, lstrip, rstrip, normalized, special });
        }
    }
    let parts = match model {
        "gpt2" => byte_level(header)?,
        "llama" => sentencepiece(header, tokens, &kinds, &vocab)?,
        other => return Err(header.error(key, other, need)),
    };
    let special = |name: &str, id: Option<u32>| match id {
        None => Ok(None),
        Some(id) => match tokens.get(id as usize) {
            Some(text) => Ok(Some((text.as_str(), id))),
            None => Err(header.error(&id_key(name), id, format!("one of the {} tokens", tokens.len()))),
        },
    };
    let specials = Specials::read(header)?;
    let wants = |name: &str, default| {
        Ok::<_, ModelError>(header.flag(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default))
    };
    let start = if wants("bos", parts.add_start)? { special("bos", specials.bos)? } else { None };
    let end = if wants("eos", false)? { special("eos", specials.eos)? } else { None };
    let unknown = match header.u32(&id_key("unknown"))? {
        Some(id) => special("unknown", Some(id))?.map(|(text, _)| text),
        None => kinds.iter().position(|kind| *kind == Kind::Unknown).and_then(|id| tokens.get(id)).map(String::as_str),
    };
    let model = Bpe {
        r#type: "BPE",
        unk_token: unknown.filter(|_| parts.byte_fallback),
        fuse_unk: parts.byte_fallback,
        byte_fallback: parts.byte_fallback,
        ignore_merges: parts.whole_pieces,
        vocab,
        merges: parts.merges,
    };
    let Parts { normalizer, pre_tokenizer, decoder, .. } = parts;
    let post_processor = template(start, end);
    let file = File { version: "1.0", added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model };
    serde_json::to_vec(&file).map_err(|e| ModelError::file_because(&header.path, "its tokenizer can't be written", e))
}

/// What is put around a text.
fn template(start: Option<(&str, u32)>, end: Option<(&str, u32)>) -> Value {
    if start.is_none() && end.is_none() {
        return Value::Null;
    }
    let piece =
        |token: Option<(&str, u32)>| token.map(|(text, _)| json!({ "SpecialToken": { "id": text, "type_id": 0 } }));
    let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    let around = |texts: Vec<Value>| piece(start).into_iter().chain(texts).chain(piece(end)).collect::<Vec<_>>();
    let tokens = start.into_iter().chain(end);
    let tokens: serde_json::Map<_, _> =
        tokens.map(|(text, id)| (text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] }))).collect();
    json!({
        "type": "TemplateProcessing",
        "single": around(vec![text("A")]),
        "pair": around(vec![text("A"), text("B")]),
        "special_tokens": tokens,
    })
}

fn byte_level(header: &Header) -> ModelResult<Parts<'_>> {
    let name = header.text(PRE)?.unwrap_or("default");
    let pre = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let known: Vec<_> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect();
        header.error(PRE, name, format!("one of {}", known.join(", ")))
    })?;
    let merges = header.texts(MERGES)?.ok_or_else(|| header.error(MERGES, "nothing", "a list of pairs of tokens"))?;
    let pair = |merge: &'_ String| {
        // The first character may be a space: some vocabularies have it as a token.
        let after_first = merge.chars().next().map_or(0, char::len_utf8);
        merge.get(after_first..).and_then(|rest| rest.find(' ')).map(|at| after_first + at)
    };
    let mut pairs = Vec::new();
    for merge in merges {
        let at = pair(merge)
            .ok_or_else(|| header.error(MERGES, format!("{merge:?}"), "two tokens and a space between them"))?;
        let (left, right) = merge.split_at(at);
        pairs.push((left, &right[1..]));
    }
    let split = |regex: &&str| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    let bytes = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let steps: Vec<_> = pre.splits.iter().map(split).chain([bytes(pre.gpt2)]).collect();
    Ok(Parts {
        normalizer: if pre.composed { json!({ "type": "NFC" }) } else { Value::Null },
        pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
        decoder: bytes(true),
        merges: pairs,
        whole_pieces: pre.whole_pieces,
        add_start: pre.add_start,
        byte_fallback: false,
    })
}

fn sentencepiece<'a>(
    header: &Header,
    tokens: &'a [String],
    kinds: &[Kind],
    vocab: &BTreeMap<&'a str, u32>,
) -> ModelResult<Parts<'a>> {
    let scores = header.numbers(SCORES)?.unwrap_or_default();
    if scores.len() != tokens.len() {
        return Err(header.error(
            SCORES,
            format!("{} scores", scores.len()),
            format!("one for each of {} tokens", tokens.len()),
        ));
    }
    if let Some(at) = scores.iter().position(|score| score.is_nan()) {
        return Err(header.error(SCORES, format!("NaN for token {at}"), "a number"));
    }
    let prefix = header.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let to_mark = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let to_space = json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " });
    let (normalizers, mut decoders) = if prefix {
        (vec![json!({ "type": "Prepend", "prepend": SPACE }), to_mark], vec![to_space])
    } else {
        (vec![to_mark], vec![to_space])
    };
    decoders.extend([json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })]);
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        merges: merges_by_score(header, tokens, scores, kinds, vocab)?,
        whole_pieces: false,
        add_start: true,
        byte_fallback: true,
    })
}

/// Every pair of tokens that forms a token, that with the best score first; of equal ones, that with the longer left half, then in the order of the
/// tokens. Only normal tokens are formed, and only from such.
fn merges_by_score<'a>(
    header: &Header,
    tokens: &'a [String],
    scores: &[f64],
    kinds: &[Kind],
    vocab: &BTreeMap<&'a str, u32>,
) -> ModelResult<Vec<(&'a str, &'a str)>> {
    let is_normal = |id: &u32| kinds.get(*id as usize) == Some(&Kind::Normal);
    let normal: HashMap<&str, u32> =
        vocab.iter().filter(|(_, id)| is_normal(id)).map(|(token, id)| (*token, *id)).collect();
    let mut merges = Vec::new();
    let mut bytes = 0;
    for ((token, score), kind) in tokens.iter().zip(scores).zip(kinds) {
        if *kind != Kind::Normal {
            continue;
        }
        if token.len() > MAX_MERGED_BYTES {
            let got = format!("a token of {} bytes", token.len());
            return Err(header.error(TOKENS, got, format!("at most {MAX_MERGED_BYTES} bytes in a token with a score")));
        }
        for (chars, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if normal.contains_key(left) && normal.contains_key(right) {
                bytes += token.len();
                merges.push((*score, chars, left, right));
            }
        }
        if bytes > MAX_MERGES_BYTES {
            return Err(header.error(
                TOKENS,
                "tokens with too many halves",
                format!("at most {MAX_MERGES_BYTES} bytes of merges"),
            ));
        }
    }
    // Stable: equal ones stay in the order of the tokens.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    Ok(merges.into_iter().map(|(_, _, left, right)| (left, right)).collect())
}
