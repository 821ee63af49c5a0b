//! A file's settings as a `config.json` has them: what is said elsewhere or otherwise there, and what follows from others.

use std::io::{Read, Seek, SeekFrom};

use serde_json::{Map, Number, Value as Json, json};

use super::super::architecture::{Architecture, Positions, WindowedLayers};
use super::super::elements::{ElementType, Elements};
use super::super::{ModelError, ModelResult};
use super::known::{
    DIMENSIONS, EXPERT_GROUPS, EXPERT_SCALE, EXPERTS, FRACTION, FREQ_BASE, HEADS, KEY_LENGTH, KV_HEADS, Known,
    LATENT_VALUE_LENGTH, LONG_FACTORS, NOPE_LENGTH, QUERY_SCALAR, SHORT_FACTORS, VALUE_LENGTH, WINDOW, WINDOW_PATTERN,
    WINDOWED_FREQ_BASE,
};
use super::reader::{Header, Value, tensor_error};
use super::tokenizer::Specials;
use crate::files::Fault;
use crate::layout::MAX_HEAD_DIM;

/// Settings of which 0 means that there is none.
const OFF: [&str; 5] =
    ["attn_logit_softcapping", "final_logit_softcapping", EXPERT_SCALE, EXPERT_GROUPS[0], EXPERT_GROUPS[1]];

pub(super) struct Settings<'a> {
    pub(super) header: &'a Header,
    pub(super) known: &'a Known,
    /// By the format's names.
    pub(super) architecture: &'a Architecture,
}

impl Settings<'_> {
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.known.name)
    }

    fn error(&self, name: &str, got: impl ToString, need: impl ToString) -> ModelError {
        self.header.error(&self.key(name), got, need)
    }

    fn size(&self, name: &str) -> ModelResult<Option<u32>> {
        self.header.u32(&self.key(name))
    }

    fn number(&self, name: &str) -> ModelResult<Option<f64>> {
        self.header.number(&self.key(name))
    }

    fn needed(&self, name: &str) -> ModelResult<u32> {
        self.size(name)?.ok_or_else(|| self.error(name, "nothing", "an integer"))
    }

    /// The settings of the architecture, without its name before each.
    pub(super) fn map(&self) -> ModelResult<Map<String, Json>> {
        let header = self.header;
        let mut map = Map::new();
        for (key, value) in &header.settings {
            if let Some(key) = key.strip_prefix(self.known.name).and_then(|key| key.strip_prefix('.')) {
                map.insert(key.to_owned(), as_json(value));
            }
        }
        let embedding = "token_embd.weight";
        let rows = header.tensors.get(embedding).and_then(|tensor| tensor.shape.first().copied());
        let rows =
            rows.ok_or_else(|| tensor_error(&header.path, embedding, "nothing", "the embedding of the tokens"))?;
        map.entry("vocab_size").or_insert_with(|| rows.into());
        for key in OFF {
            if map.get(key).and_then(Json::as_f64) == Some(0.0) {
                map.insert(key.to_owned(), Json::Null);
            }
        }
        // Without experts in any layer it may be missing, too.
        let has_experts = self.architecture.experts.is_some() && map.contains_key(EXPERTS);
        if let Some(key) = self.known.expert_length.filter(|_| has_experts) {
            self.needed(key)?;
        }
        self.windows(&mut map)?;
        if self.architecture.latent.is_some() {
            self.latents(&mut map)?;
        } else if let Some(key_length) = self.heads(&mut map)? {
            self.rotated_part(key_length, &mut map)?;
        }
        if let Positions::Rope(_) = self.architecture.positions {
            self.scaling(&mut map)?;
        }
        let specials = Specials::read(header)?;
        map.insert("bos_token_id".to_owned(), json!(specials.bos));
        map.insert("eos_token_id".to_owned(), json!(specials.ends));
        Ok(map)
    }

    fn windows(&self, map: &mut Map<String, Json>) -> ModelResult<()> {
        let window = map.get(WINDOW);
        // 0 is no window, and neither is none, unless the architecture has one of its own then.
        let is_off = window.is_some_and(|window| window.as_u64() == Some(0));
        if is_off || (window.is_none() && self.known.window.is_none()) {
            map.insert(WINDOW.to_owned(), Json::Null);
            // Every layer is one without, and has the rotary embedding of those.
            map.insert(WINDOW_PATTERN.to_owned(), json!(1));
            return Ok(());
        }
        if !self.known.may_have_windows {
            let need = format!("0 or nothing; windows are not supported for {}", self.known.name);
            return Err(self.error(WINDOW, window.map_or_else(String::new, Json::to_string), need));
        }
        let pattern = self.header.settings.get(&self.key(WINDOW_PATTERN));
        match (pattern, self.architecture.window.map(|window| window.layers)) {
            (None, _) => {}
            (Some(pattern), Some(WindowedLayers::AllBut(..))) => {
                if let Value::Numbers(layers) = pattern {
                    let count = self.needed("block_count")?;
                    if layers.len() != count as usize || layers.iter().any(|flag| *flag != 0.0 && *flag != 1.0) {
                        let need = format!("a number, or true or false for each of {count} layers");
                        return Err(self.error(WINDOW_PATTERN, pattern.brief(), need));
                    }
                    let kind = |flag: &f64| if *flag == 0.0 { "full_attention" } else { "sliding_attention" };
                    map.insert("layer_types".to_owned(), layers.iter().map(kind).collect());
                    map.remove(WINDOW_PATTERN);
                }
            }
            (Some(pattern), _) => {
                let need = format!("nothing; {} has a window in all layers or in none", self.known.name);
                return Err(self.error(WINDOW_PATTERN, pattern.brief(), need));
            }
        }
        if let Positions::Rope(rope) = self.architecture.positions
            && rope.windowed_theta.is_none()
            && let Some(base) = self.number(WINDOWED_FREQ_BASE)?
            && base != self.number(FREQ_BASE)?.unwrap_or(rope.default_theta)
        {
            let need = format!("that of {FREQ_BASE}; a base of its own is not supported for {}", self.known.name);
            return Err(self.error(WINDOWED_FREQ_BASE, base, need));
        }
        Ok(())
    }

    /// The width of a head's query and key. `None` if it can't be told, which is said where the sizes are read that it follows from.
    fn heads(&self, map: &mut Map<String, Json>) -> ModelResult<Option<u32>> {
        let (hidden, heads) = (self.size("embedding_length")?, self.size(HEADS)?);
        let share = |(hidden, heads): (u32, u32)| hidden.checked_div(heads);
        let whole = |(hidden, heads): &(u32, u32)| hidden.is_multiple_of(*heads);
        let key_length = match self.size(KEY_LENGTH)? {
            Some(length) => Some(length),
            None => hidden.zip(heads).filter(whole).and_then(share),
        };
        let Some(key_length) = key_length.filter(|length| *length > 0) else { return Ok(None) };
        if let Some(length) = self.size(VALUE_LENGTH)?.filter(|length| *length != key_length) {
            return Err(self.error(VALUE_LENGTH, length, format!("{key_length}, as keys have")));
        }
        if self.architecture.query_scalar.is_some() {
            let wide = self.known.wide_queries.is_some() && self.size("block_count")? == self.known.wide_queries;
            let scalar = hidden.zip(heads).filter(|_| wide).and_then(share).unwrap_or(key_length);
            map.insert(QUERY_SCALAR.to_owned(), scalar.into());
        }
        Ok(Some(key_length))
    }

    /// Sizes of latents. Old files have keys and values as they are made from latents for `attention.key_length`; newer ones what is cached.
    fn latents(&self, map: &mut Map<String, Json>) -> ModelResult<()> {
        let is_old = self.header.tensors.contains_key("blk.0.attn_kv_b.weight");
        let (key, value) =
            if is_old { (KEY_LENGTH, VALUE_LENGTH) } else { ("attention.key_length_mla", LATENT_VALUE_LENGTH) };
        let (key_length, rotated) = (self.needed(key)?, self.needed(DIMENSIONS)?);
        let Some(rest) = key_length.checked_sub(rotated).filter(|rest| *rest > 0) else {
            return Err(self.error(key, key_length, format!("more than {DIMENSIONS}, which is {rotated}")));
        };
        map.insert(NOPE_LENGTH.to_owned(), rest.into());
        map.insert(LATENT_VALUE_LENGTH.to_owned(), self.needed(value)?.into());
        // One head is cached. The projections have as many as queries.
        map.insert(KV_HEADS.to_owned(), json!(self.size(HEADS)?));
        Ok(())
    }

    fn rotated_part(&self, key_length: u32, map: &mut Map<String, Json>) -> ModelResult<()> {
        let (Positions::Rope(_), Some(dimensions)) = (self.architecture.positions, self.size(DIMENSIONS)?) else {
            return Ok(());
        };
        if dimensions != key_length {
            if dimensions == 0 || !dimensions.is_multiple_of(2) || dimensions > key_length {
                return Err(self.error(DIMENSIONS, dimensions, format!("an even number from 2 to {key_length}")));
            }
            // A fraction of the head that comes to as many dimensions when the product is rounded down.
            let fraction = (f64::from(dimensions) + 0.5) / f64::from(key_length);
            map.insert(FRACTION.to_owned(), json!(fraction));
        }
        Ok(())
    }

    /// Scaling of the rotary embedding.
    fn scaling(&self, map: &mut Map<String, Json>) -> ModelResult<()> {
        let header = self.header;
        let name = |name: &str| format!("rope.scaling.{name}");
        let factor = match self.number(&name("factor"))? {
            Some(factor) => Some(factor),
            // Old files have this alone.
            None => self.number("rope.scale_linear")?,
        };
        let has_factors = [SHORT_FACTORS, LONG_FACTORS].map(|name| header.tensors.contains_key(name));
        let kind = match header.text(&self.key(&name("type")))? {
            // Phi-3's converter writes no type.
            None | Some("longrope") if has_factors[0] || has_factors[1] => "longrope",
            Some(kind) => kind,
            None if factor.is_some_and(|factor| factor != 1.0) => "linear",
            None => "none",
        };
        // 0 is the same as nothing.
        let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
        if factor < 1.0 {
            return Err(self.error(&name("factor"), factor, "a number of at least 1"));
        }
        let section = match kind {
            "none" => return Ok(()),
            "linear" => json!({ "rope_type": "linear", "factor": factor }),
            "yarn" => self.yarn(factor)?,
            "longrope" => {
                let head = self.size(DIMENSIONS)?.or(self.heads(map)?).unwrap_or(0);
                let factors = |tensor| divisors(header, tensor, head as usize / 2);
                let original = self.size(&name("original_context_length"))?.or(self.size("context_length")?);
                json!({
                    "rope_type": "longrope",
                    "short_factor": factors(SHORT_FACTORS)?,
                    "long_factor": factors(LONG_FACTORS)?,
                    "attention_factor": self.number(&name("attn_factor"))?,
                    "original_max_position_embeddings": original,
                })
            }
            other => return Err(self.error(&name("type"), other, "one of none, linear, yarn, longrope")),
        };
        map.insert("rope_scaling".to_owned(), section);
        Ok(())
    }

    fn yarn(&self, factor: f64) -> ModelResult<Json> {
        let name = |name: &str| format!("rope.scaling.{name}");
        // The paper's own values may be changed by these; what is negative is not set.
        for (name, value) in [
            (name("yarn_ext_factor"), 1.0),
            (name("yarn_attn_factor"), 1.0),
            (name("attn_factor"), 1.0),
            (name("yarn_log_multiplier"), 0.0),
        ] {
            // Files with latents have a multiplier, see below.
            let may_differ = self.architecture.latent.is_some() && value == 0.0;
            if let Some(other) = self.number(&name)?.filter(|n| *n != value && *n >= 0.0 && !may_differ) {
                return Err(self.error(&name, other, format!("{value}; anything else is not supported")));
            }
        }
        let mut section = Map::new();
        let mut set = |key: &str, value: Json| section.insert(key.to_owned(), value);
        set("rope_type", json!("yarn"));
        set("factor", json!(factor));
        set("original_max_position_embeddings", json!(self.size(&name("original_context_length"))?));
        set("beta_fast", json!(self.number(&name("yarn_beta_fast"))?));
        set("beta_slow", json!(self.number(&name("yarn_beta_slow"))?));
        if !self.known.rounded_yarn {
            set("truncate", json!(false));
        }
        if self.architecture.latent.is_some()
            && let Some(multiplier) = self.number(&name("yarn_log_multiplier"))?
        {
            // The converter of these multiplies by 0.1, the factor that the formula has anyway. Of the two numbers whose quotient scales the rotated
            // elements files have one; in all published models they are equal.
            let all_dims = multiplier / 0.1;
            set("mscale", json!(all_dims));
            set("mscale_all_dim", json!(all_dims));
        }
        Ok(section.into())
    }
}

fn as_json(value: &Value) -> Json {
    match value {
        Value::Unsigned(n) => (*n).into(),
        Value::Signed(n) => (*n).into(),
        // JSON has neither NaN nor infinities; as texts they are no numbers either, and are shown.
        Value::Float(n) => Number::from_f64(*n).map_or_else(|| n.to_string().into(), Json::Number),
        Value::Bool(flag) => (*flag).into(),
        Value::Text(text) => text.as_str().into(),
        // But for windows, no setting of a model that folio runs is a list.
        Value::Texts(_) | Value::Numbers(_) => value.brief().into(),
    }
}

/// A tensor of divisors of rotary frequencies, as many as there are pairs.
///
/// # Errors
/// [`ModelError::Tensor`] for one that is missing or has another shape or type or wrong values, [`ModelError::File`] if it can't be read.
pub(super) fn divisors(header: &Header, name: &str, pairs: usize) -> ModelResult<Vec<f32>> {
    let need = || format!("F32 of shape [{pairs}], a divisor for each pair of the rotary embedding");
    let wrong = |got: String, need: String| tensor_error(&header.path, name, got, need);
    let tensor = header.tensors.get(name).ok_or_else(|| wrong("nothing".to_owned(), need()))?;
    let is_plain = matches!(tensor.kind, ElementType::Plain(_)) && tensor.kind.is_readable();
    // No head is wider.
    if tensor.shape != [pairs] || pairs > MAX_HEAD_DIM as usize / 2 || !is_plain {
        return Err(wrong(format!("{} of shape {:?}", tensor.kind, tensor.shape), need()));
    }
    let part = &header.parts[tensor.part];
    let failed = |e| ModelError::fault(&part.path, Fault::io("can't be read", e));
    let mut file = &part.file;
    let mut bytes = vec![0; tensor.end - tensor.start];
    file.seek(SeekFrom::Start(tensor.start as u64)).map_err(failed)?;
    file.read_exact(&mut bytes).map_err(failed)?;
    let mut divisors = vec![0.0; pairs];
    Elements { bytes: &bytes, kind: tensor.kind, scales: None }.read(0, &mut divisors);
    if let Some(divisor) = divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
        return Err(wrong(divisor.to_string(), "finite divisors above 0".to_owned()));
    }
    Ok(divisors)
}
