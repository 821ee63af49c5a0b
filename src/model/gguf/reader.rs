//! Reads the header of a GGUF file: settings, and where tensors lie.
//!
//! A number in the file says how much follows. None is believed: what is read is bounded by the bytes that the file has and by [`MAX_HEADER_BYTES`], and
//! memory is taken for what was read, not for what is announced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::super::elements::ElementType;
use super::super::{ModelError, ModelResult};
use super::blocks::BlockType;
use super::parts;
use crate::files::{self, Fault};

/// The longest header that is read. Those with the largest vocabularies, 262 144 tokens with merges, have some 20 MB.
const MAX_HEADER_BYTES: u64 = 128 << 20;

/// Elements of all lists of a header. The largest vocabularies have some 1.4 million: tokens, scores, types, merges.
const MAX_ELEMENTS: u64 = 1 << 22;

/// Settings, and tensors, that a file may have. Published ones have some dozens, and some thousands.
const MAX_ENTRIES: u64 = 1 << 16;

/// The longest name of a setting or a tensor: what the format allows for settings.
const MAX_NAME_BYTES: u64 = (1 << 16) - 1;

/// Where tensors start if the file doesn't say it: at multiples of this.
const DEFAULT_ALIGNMENT: u64 = 32;

/// GGML's numbers of the types that are read.
const TYPES: [(u32, ElementType); 16] = [
    (0, ElementType::Plain(Dtype::F32)),
    (1, ElementType::Plain(Dtype::F16)),
    (30, ElementType::Plain(Dtype::BF16)),
    (2, ElementType::Blocks(BlockType::Q4_0)),
    (3, ElementType::Blocks(BlockType::Q4_1)),
    (6, ElementType::Blocks(BlockType::Q5_0)),
    (7, ElementType::Blocks(BlockType::Q5_1)),
    (8, ElementType::Blocks(BlockType::Q8_0)),
    (10, ElementType::Blocks(BlockType::Q2K)),
    (11, ElementType::Blocks(BlockType::Q3K)),
    (12, ElementType::Blocks(BlockType::Q4K)),
    (13, ElementType::Blocks(BlockType::Q5K)),
    (14, ElementType::Blocks(BlockType::Q6K)),
    (20, ElementType::Blocks(BlockType::Iq4Nl)),
    (23, ElementType::Blocks(BlockType::Iq4Xs)),
    (39, ElementType::Blocks(BlockType::Mxfp4)),
];

/// Those that are not, for the message.
const OTHER_TYPES: [(u32, &str); 19] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];

/// A setting.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    /// Whole numbers up to 2^53 are exact: types and scores of tokens, sizes of layers.
    Numbers(Vec<f64>),
}

impl Value {
    /// What it is, for errors.
    pub(super) fn brief(&self) -> String {
        const MAX_CHARS: usize = 60;
        match self {
            Self::Unsigned(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::Float(n) => n.to_string(),
            Self::Bool(b) => b.to_string(),
            Self::Text(text) if text.chars().nth(MAX_CHARS).is_some() => {
                format!("{:?}...", text.chars().take(MAX_CHARS).collect::<String>())
            }
            Self::Text(text) => format!("{text:?}"),
            Self::Texts(texts) => format!("a list of {} texts", texts.len()),
            Self::Numbers(numbers) => format!("a list of {} numbers", numbers.len()),
        }
    }
}

/// A tensor as the file describes it, checked to lie within the file.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) kind: ElementType,
    /// The dimension whose elements lie side by side comes last, as in safetensors and unlike the file.
    pub(crate) shape: Vec<usize>,
    /// The file: see [`Header::parts`].
    pub(crate) part: usize,
    /// Bytes from the start of the file.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// An open file.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Length of the file.
    pub(crate) bytes: u64,
}

/// The header of an open file, or what those of several files together say.
#[derive(Debug)]
pub(crate) struct Header {
    /// The file with the settings.
    pub(crate) path: PathBuf,
    /// Where tensors lie. The first is that with the settings.
    pub(crate) parts: Vec<Part>,
    pub(crate) settings: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Header {
    /// The header of a model's file, or of the first of several.
    ///
    /// # Errors
    /// [`ModelError::File`] for a file that is missing, no regular one, truncated, or no GGUF of version 2 or 3 in little-endian order;
    /// [`ModelError::Config`] for a setting that is there twice or can't be read; [`ModelError::Tensor`] for a tensor that is there twice, has a type or
    /// shape that can't be read, or doesn't lie within the file, aligned and apart from the others.
    pub(crate) fn read(path: &Path) -> ModelResult<Self> {
        let header = Self::read_part(path)?;
        if let Some(number) = header.u32(parts::NUMBER)?.filter(|number| *number > 0) {
            return Err(header.error(parts::NUMBER, number, "0: the first of the files, which has the settings"));
        }
        Ok(header)
    }

    /// The header of any of a model's files.
    pub(super) fn read_part(path: &Path) -> ModelResult<Self> {
        let (file, bytes) = files::open(path).map_err(|fault| ModelError::fault(path, fault))?;
        let mut source = Source { path, reader: BufReader::new(file), position: 0, bytes, elements: 0 };
        let magic = source.array::<4>("the file's first word")?;
        if &magic == b"vers" {
            let reason = "got a Git LFS pointer, need the file itself: `git lfs pull` fetches it";
            return Err(ModelError::file(path, reason));
        }
        if &magic != b"GGUF" {
            return Err(ModelError::file(
                path,
                format!("starts with {magic:?}, need a GGUF file, which starts with \"GGUF\""),
            ));
        }
        let version = source.u32("the version")?;
        if ![2, 3].contains(&version) {
            let order = if [2, 3].contains(&version.swap_bytes()) { ", a big-endian file" } else { "" };
            return Err(ModelError::file(
                path,
                format!("got version {version}{order}, need GGUF version 2 or 3, little-endian"),
            ));
        }
        let num_tensors = source.count("the number of tensors", MAX_ENTRIES)?;
        let num_settings = source.count("the number of settings", MAX_ENTRIES)?;
        let mut settings = BTreeMap::new();
        for i in 0..num_settings {
            let key = source.name(&format!("the name of setting {i} of {num_settings}"))?;
            let value = source.value(&key)?;
            if settings.contains_key(&key) {
                return Err(source.setting(&key, "it twice", "it once"));
            }
            settings.insert(key, value);
        }
        let mut described = Vec::new();
        let mut names = BTreeSet::new();
        for i in 0..num_tensors {
            let name = source.name(&format!("the name of tensor {i} of {num_tensors}"))?;
            let tensor = source.tensor(&name)?;
            if !names.insert(name.clone()) {
                return Err(tensor_error(path, &name, "it twice", "it once"));
            }
            described.push((name, tensor));
        }
        let alignment = match settings.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(&Value::Unsigned(n)) if n.is_power_of_two() && n <= 1 << 20 => n,
            Some(other) => {
                return Err(source.setting("general.alignment", other.brief(), "a power of two up to 1048576"));
            }
        };
        // At most MAX_HEADER_BYTES so far.
        let data = source.position.next_multiple_of(alignment);
        let tensors = place(path, described, data, alignment, bytes)?;
        let path = path.to_owned();
        let part = Part { path: path.clone(), file: source.reader.into_inner(), bytes };
        Ok(Self { path, parts: vec![part], settings, tensors })
    }

    /// The error of a setting.
    pub(crate) fn error(&self, key: &str, got: impl ToString, need: impl ToString) -> ModelError {
        ModelError::Config {
            path: self.path.clone(),
            key: key.to_owned(),
            got: got.to_string(),
            need: need.to_string(),
        }
    }

    fn optional<'a, T>(
        &'a self,
        key: &str,
        need: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> ModelResult<Option<T>> {
        let read = |value: &'a Value| read(value).ok_or_else(|| self.error(key, value.brief(), need));
        self.settings.get(key).map(read).transpose()
    }

    /// A text, if the setting is there.
    pub(crate) fn text(&self, key: &str) -> ModelResult<Option<&str>> {
        self.optional(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of texts, if the setting is there.
    pub(crate) fn texts(&self, key: &str) -> ModelResult<Option<&[String]>> {
        self.optional(key, "a list of texts", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            // A list of nothing has the type of whatever its writer took.
            Value::Numbers(numbers) if numbers.is_empty() => Some(&[][..]),
            _ => None,
        })
    }

    /// A list of numbers, if the setting is there.
    pub(crate) fn numbers(&self, key: &str) -> ModelResult<Option<&[f64]>> {
        self.optional(key, "a list of numbers", |value| match value {
            Value::Numbers(numbers) => Some(numbers.as_slice()),
            Value::Texts(texts) if texts.is_empty() => Some(&[][..]),
            _ => None,
        })
    }

    /// A yes or no, if the setting is there.
    pub(crate) fn flag(&self, key: &str) -> ModelResult<Option<bool>> {
        self.optional(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A number of 32 bits, if the setting is there.
    pub(crate) fn u32(&self, key: &str) -> ModelResult<Option<u32>> {
        self.optional(key, "an integer from 0 to 4294967295", |value| match *value {
            Value::Unsigned(n) => n.try_into().ok(),
            Value::Signed(n) => n.try_into().ok(),
            _ => None,
        })
    }

    /// A finite number, if the setting is there.
    pub(crate) fn number(&self, key: &str) -> ModelResult<Option<f64>> {
        self.optional(key, "a finite number", |value| match *value {
            Value::Float(n) if n.is_finite() => Some(n),
            // Sizes and factors; whole numbers beyond 2^53 are not among them.
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            _ => None,
        })
    }
}

pub(super) fn tensor_error(path: &Path, tensor: &str, got: impl ToString, need: impl ToString) -> ModelError {
    ModelError::Tensor {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        got: got.to_string(),
        need: need.to_string(),
    }
}

/// A tensor whose place is not known yet.
struct Described {
    kind: ElementType,
    shape: Vec<usize>,
    offset: u64,
    bytes: u64,
}

/// Checks that all tensors lie within the file, aligned and apart.
fn place(
    path: &Path,
    described: Vec<(String, Described)>,
    data: u64,
    alignment: u64,
    bytes: u64,
) -> ModelResult<BTreeMap<String, Tensor>> {
    let mut ranges = Vec::new();
    let mut tensors = BTreeMap::new();
    for (name, Described { kind, shape, offset, bytes: size }) in described {
        if !offset.is_multiple_of(alignment) {
            let need = format!("a multiple of the alignment, {alignment}");
            return Err(tensor_error(path, &name, format!("offset {offset}"), need));
        }
        let start = data.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(size)).filter(|end| *end <= bytes);
        // The file's length fits the address space, or mapping it fails; a length beyond that is refused here.
        let place =
            (start.and_then(|start| usize::try_from(start).ok()), end.and_then(|end| usize::try_from(end).ok()));
        let (Some(start), Some(end)) = place else {
            let got = format!("{size} bytes from {offset} on, behind a header of {data}");
            return Err(tensor_error(
                path,
                &name,
                got,
                format!("them within the file's {bytes}; the file is truncated or damaged"),
            ));
        };
        ranges.push((start, end, name.clone()));
        tensors.insert(name, Tensor { kind, shape, part: 0, start, end });
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if let [(_, end, first), (start, _, second)] = pair
            && end > start
        {
            return Err(tensor_error(path, second, format!("bytes that {first} has, too"), "bytes of its own"));
        }
    }
    Ok(tensors)
}

/// The header's bytes, in order.
struct Source<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    position: u64,
    /// Length of the file.
    bytes: u64,
    /// Elements of lists so far.
    elements: u64,
}

impl Source<'_> {
    fn setting(&self, key: &str, got: impl ToString, need: impl ToString) -> ModelError {
        ModelError::Config {
            path: self.path.to_owned(),
            key: key.to_owned(),
            got: got.to_string(),
            need: need.to_string(),
        }
    }

    /// Checks that the next `len` bytes are there and may be read.
    fn advance(&mut self, len: u64, what: &str) -> ModelResult<()> {
        let end = self.position.checked_add(len).filter(|end| *end <= self.bytes);
        let Some(end) = end else {
            let reason = format!(
                "got {} bytes, need more: {what} takes {len} from {} on; the file is truncated or damaged",
                self.bytes, self.position
            );
            return Err(ModelError::file(self.path, reason));
        };
        if end > MAX_HEADER_BYTES {
            let reason =
                format!("got a header that goes on behind {MAX_HEADER_BYTES} bytes, in {what}, need at most as many");
            return Err(ModelError::file(self.path, reason));
        }
        self.position = end;
        Ok(())
    }

    fn fill(&mut self, out: &mut [u8]) -> ModelResult<()> {
        self.reader.read_exact(out).map_err(|e| ModelError::fault(self.path, Fault::io("can't be read", e)))
    }

    fn array<const N: usize>(&mut self, what: &str) -> ModelResult<[u8; N]> {
        self.advance(N as u64, what)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> ModelResult<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> ModelResult<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, max: u64) -> ModelResult<u64> {
        let count = self.u64(what)?;
        if count > max {
            return Err(ModelError::file(self.path, format!("{what}: got {count}, need at most {max}")));
        }
        Ok(count)
    }

    fn text(&mut self, what: &str, max: u64) -> ModelResult<String> {
        let len = self.u64(what)?;
        if len > max {
            return Err(ModelError::file(self.path, format!("{what}: got {len} bytes, need at most {max}")));
        }
        self.advance(len, what)?;
        // Within MAX_HEADER_BYTES by now.
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|e| ModelError::file_because(self.path, format!("{what}: not UTF-8"), e))
    }

    fn name(&mut self, what: &str) -> ModelResult<String> {
        self.text(what, MAX_NAME_BYTES)
    }

    fn value(&mut self, key: &str) -> ModelResult<Value> {
        const LIST: u32 = 9;
        match self.u32(key)? {
            LIST => self.list(key),
            kind => self.scalar(key, kind),
        }
    }

    fn scalar(&mut self, key: &str, kind: u32) -> ModelResult<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.setting(key, format!("the byte {other}"), "0 or 1, for true or false")),
            },
            8 => Value::Text(self.text(key, MAX_HEADER_BYTES)?),
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            kind => {
                return Err(self.setting(
                    key,
                    format!("a value of type {kind}"),
                    "a type from 0 to 12, and no list of lists",
                ));
            }
        })
    }

    fn list(&mut self, key: &str) -> ModelResult<Value> {
        const TEXT: u32 = 8;
        let kind = self.u32(key)?;
        let len = self.u64(key)?;
        self.elements = self.elements.saturating_add(len);
        if self.elements > MAX_ELEMENTS {
            let got = format!("a list of {len}, {} elements with the lists before", self.elements);
            return Err(self.setting(key, got, format!("at most {MAX_ELEMENTS} in all lists")));
        }
        if kind == TEXT {
            let mut texts = Vec::new();
            for _ in 0..len {
                texts.push(self.text(key, MAX_HEADER_BYTES)?);
            }
            return Ok(Value::Texts(texts));
        }
        let mut numbers = Vec::new();
        for _ in 0..len {
            numbers.push(match self.scalar(key, kind)? {
                Value::Unsigned(n) => n as f64,
                Value::Signed(n) => n as f64,
                Value::Float(n) => n,
                Value::Bool(flag) => flag.into(),
                // Lists of them were read above.
                Value::Text(_) | Value::Texts(_) | Value::Numbers(_) => f64::NAN,
            });
        }
        Ok(Value::Numbers(numbers))
    }

    fn tensor(&mut self, name: &str) -> ModelResult<Described> {
        const MAX_DIMENSIONS: u32 = 4;
        let what = format!("tensor {name}");
        let dimensions = self.u32(&what)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(tensor_error(self.path, name, format!("{dimensions} dimensions"), "1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(&what)?);
        }
        let number = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let Some(&(_, kind)) = TYPES.iter().find(|(n, _)| *n == number) else {
            let got = OTHER_TYPES.iter().find(|(n, _)| *n == number).map_or("an unknown type", |(_, name)| name);
            let known: Vec<_> = TYPES.iter().map(|(_, kind)| kind.to_string()).collect();
            return Err(tensor_error(
                self.path,
                name,
                format!("{got}, number {number}"),
                format!("one of {}", known.join(", ")),
            ));
        };
        let elements = shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size));
        // What has fewer elements than 2^60 has fewer than 2^63 bytes.
        let elements = elements.filter(|elements| (1..1 << 60).contains(elements));
        let row = shape.first().copied().unwrap_or(0);
        let sizes: Option<Vec<usize>> = shape.iter().rev().map(|size| usize::try_from(*size).ok()).collect();
        let (Some(elements), Some(sizes)) = (elements, sizes) else {
            return Err(tensor_error(
                self.path,
                name,
                format!("dimensions {shape:?}"),
                "each at least 1, fewer than 2^60 elements",
            ));
        };
        if let ElementType::Blocks(kind) = kind
            && !row.is_multiple_of(kind.len() as u64)
        {
            let got = format!("rows of {row} in {kind}");
            return Err(tensor_error(self.path, name, got, format!("a multiple of {}", kind.len())));
        }
        Ok(Described { kind, shape: sizes, offset, bytes: kind.bytes(elements) })
    }
}
