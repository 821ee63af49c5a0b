//! Snapshots in files.
//!
//! A file is in the [safetensors](https://github.com/huggingface/safetensors) format, so that other tools can look into it: tensors
//! `layers.{i}.k` and, unless the cache is latent, `layers.{i}.v`, U8 `[num_blocks, block_bytes]`; `layers.{i}.key_scales`, F32 `[2, num_kv_heads, head_dim]`, for formats
//! with scales per channel of K; `tokens`, U32 `[len]` or `[len + 1]`, if they are known. With several groups of layers `num_blocks` is that of the
//! layer's group. The metadata say what it is, and hold a CRC-32 of everything else.
//!
//! There is one right header for a snapshot: the loader reads the fields, builds that header, and compares. With the checksum over header and
//! tensors, no byte of the file can change unnoticed.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use safetensors::SafeTensors;

use super::SequenceSnapshot;
use super::pack::stream_bytes;
use super::snapshot::group_blocks;
use crate::error::{Error, Result};
use crate::files::{self, Fault};
use crate::format::KvFormat;
use crate::layout::{KvCacheConfig, LayerGroup, LayerGroups};

/// What every file starts with, behind the 8 bytes of the header's length. The version is next.
const START: &str = r#"{"__metadata__":{"format":"folio.sequence","version":""#;
/// The version of sequences of one group of layers, and that of several. Readers of the first one alone refuse the second by its number.
const VERSIONS: [u32; 2] = [1, 2];
/// Bytes of the length in front of the header.
const LEN_BYTES: usize = 8;

/// What a header says about its tensors.
#[derive(Clone, Copy)]
struct Contents {
    /// `num_blocks` is the sequence's.
    config: KvCacheConfig,
    len: u32,
    has_key_scales: bool,
    /// None, `len`, or `len + 1`.
    num_tokens: u32,
}

impl Contents {
    /// Floats of the key scales of a layer.
    fn scales_len(&self) -> usize {
        2 * self.config.num_kv_heads as usize * self.config.head_dim as usize
    }

    /// Tensors in the file.
    fn num_tensors(&self) -> u64 {
        let of_layer = self.config.sides().count() as u64 + u64::from(self.has_key_scales);
        u64::from(self.config.num_layers) * of_layer + u64::from(self.num_tokens > 0)
    }

    /// Bytes of all tensors, or `None` on overflow.
    fn tensor_bytes(&self) -> Option<u64> {
        let scales = if self.has_key_scales { 4 * self.scales_len() as u64 } else { 0 };
        let tokens = 4 * u64::from(self.num_tokens);
        let scales = scales.checked_mul(self.config.num_layers.into())?;
        stream_bytes(&self.config, self.config.num_blocks)?.checked_add(scales)?.checked_add(tokens)
    }

    /// The header with its length, padded to 8 bytes. The caller has checked that sizes don't overflow.
    ///
    /// Written here and not by the safetensors crate, because that one wants all tensors in memory a second time and shuffles the metadata.
    fn header(&self, crc: u32) -> Vec<u8> {
        let KvCacheConfig { num_layers, num_kv_heads, head_dim, block_size, k_format, v_format, groups, .. } =
            self.config;
        let version = VERSIONS[usize::from(self.config.groups.count() > 1)];
        let mut text = format!(
            r#"{START}{version}","num_layers":"{num_layers}","num_kv_heads":"{num_kv_heads}","head_dim":"{head_dim}","#
        );
        // Writing into a String can't fail.
        if let Some(value_dim) = self.config.value_dim {
            let _ = write!(text, r#""value_dim":"{value_dim}","#);
        }
        if self.config.latent {
            text.push_str(r#""latent":"true","#);
        }
        match groups.as_slice() {
            [LayerGroup { window: Some(window), sink_tokens }] => {
                let _ = write!(text, r#""window":"{window}","sink_tokens":"{sink_tokens}","#);
            }
            [_] => {}
            groups => {
                let groups: Vec<_> = groups.iter().map(group_text).collect();
                let _ = write!(text, r#""groups":"{}","#, groups.join(","));
            }
        }
        let _ = write!(
            text,
            r#""block_size":"{block_size}","k_format":"{k_format}","v_format":"{v_format}","len":"{}","crc32":"{crc:08x}"}}"#,
            self.len
        );
        let mut at = 0;
        let mut tensor = |name: String, dtype: &str, shape: String, bytes: u64| {
            let end = at + bytes;
            let _ = write!(text, r#","{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{at},{end}]}}"#);
            at = end;
        };
        let counts = group_blocks(&self.config, self.len);
        for layer in 0..num_layers {
            let num_blocks = counts[self.config.group_of(layer) as usize];
            for (side, layout) in ["k", "v"].into_iter().zip(self.config.sides()) {
                let block = layout.block_bytes();
                let (name, shape) = (format!("layers.{layer}.{side}"), format!("{num_blocks},{block}"));
                tensor(name, "U8", shape, block * u64::from(num_blocks));
            }
        }
        if self.has_key_scales {
            for layer in 0..num_layers {
                let (name, shape) = (format!("layers.{layer}.key_scales"), format!("2,{num_kv_heads},{head_dim}"));
                tensor(name, "F32", shape, 4 * self.scales_len() as u64);
            }
        }
        if self.num_tokens > 0 {
            tensor("tokens".to_owned(), "U32", self.num_tokens.to_string(), 4 * u64::from(self.num_tokens));
        }
        text.push('}');
        let padded = text.len().next_multiple_of(LEN_BYTES);
        let mut header = (padded as u64).to_le_bytes().to_vec();
        header.extend_from_slice(text.as_bytes());
        header.resize(LEN_BYTES + padded, b' ');
        header
    }

    /// What a file's header says, before its checksum is known to be right. Also returns that checksum.
    fn parse(bytes: &[u8]) -> Result<(Self, u32), String> {
        if !starts_as_saved(bytes) {
            return Err("not a sequence that folio saved".to_owned());
        }
        // The longest version has 10 digits.
        let version: Vec<u8> =
            bytes[LEN_BYTES + START.len()..].iter().copied().take_while(|&b| b != b'"').take(10).collect();
        let version = String::from_utf8_lossy(&version);
        let [one_group, several] = VERSIONS;
        if version != one_group.to_string() && version != several.to_string() {
            let need = format!("versions {one_group} and {several}");
            return Err(format!("version {version:?} of the format; this folio reads {need}"));
        }
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| format!("truncated or damaged: {e}"))?;
        let fields = header.metadata().as_ref().ok_or("damaged: no metadata")?;
        let shape = ["num_layers", "num_kv_heads", "head_dim", "block_size"].map(|name| number(fields, name));
        let [num_layers, num_kv_heads, head_dim, block_size] = shape;
        let mut config = KvCacheConfig::new(num_layers?, num_kv_heads?, head_dim?)
            .with_blocks(1, block_size?)
            .with_formats(format_of(fields, "k_format")?, format_of(fields, "v_format")?);
        // Files of caches with values as long as keys, and with a V side, don't say so.
        if fields.contains_key("value_dim") {
            config.value_dim = Some(number(fields, "value_dim")?);
        }
        // Nor do files of caches that keep all tokens.
        if fields.contains_key("window") {
            config = config.with_window(number(fields, "window")?).with_sink_tokens(number(fields, "sink_tokens")?);
        }
        if fields.contains_key("groups") {
            config.groups = groups_of(field(fields, "groups")?)?;
        }
        config.latent = fields.get("latent").is_some_and(|latent| latent == "true");
        // Blocks of any size that a cache can have, paged or contiguous. A snapshot says nothing about which it was.
        // A window goes with paged blocks only.
        config.contiguous = config.groups == LayerGroups::default();
        config.validate().map_err(|e| format!("damaged: {e}"))?;
        config.contiguous = false;
        let len = number(fields, "len")?;
        // As in a cache, lengths are below 2^31.
        if len > i32::MAX as u32 {
            return Err(format!("damaged: {len} tokens"));
        }
        let crc = field(fields, "crc32")?;
        let crc = u32::from_str_radix(crc, 16).map_err(|_| format!("damaged: crc32 is {crc:?}"))?;
        let shape = header.info("tokens").map(|tensor| &tensor.shape[..]);
        let num_tokens = match shape {
            None => 0,
            Some(&[count]) if [len as usize, len as usize + 1].contains(&count) => count as u32,
            Some(other) => return Err(format!("damaged: tokens {other:?} of a sequence of {len}")),
        };
        let contents = Self {
            config: {
                let mut config = config;
                config.num_blocks = config.held_blocks(len);
                config
            },
            len,
            has_key_scales: header.info("layers.0.key_scales").is_some(),
            num_tokens,
        };
        // Both before a header of that many layers is built.
        let same_size = contents.tensor_bytes() == Some(header.data_len() as u64);
        if !same_size || contents.num_tensors() != header.offset_keys().len() as u64 {
            return Err("damaged: other tensors than its metadata say".to_owned());
        }
        Ok((contents, crc))
    }
}

/// Whether a file (or its first bytes) can be a saved sequence of any version.
fn starts_as_saved(bytes: &[u8]) -> bool {
    bytes.get(LEN_BYTES..).is_some_and(|header| header.starts_with(START.as_bytes()))
}

fn field<'f>(fields: &'f HashMap<String, String>, name: &str) -> Result<&'f str, String> {
    fields.get(name).map(String::as_str).ok_or_else(|| format!("damaged: no {name}"))
}

fn number(fields: &HashMap<String, String>, name: &str) -> Result<u32, String> {
    let text = field(fields, name)?;
    text.parse().map_err(|_| format!("damaged: {name} is {text:?}"))
}

fn format_of(fields: &HashMap<String, String>, name: &str) -> Result<KvFormat, String> {
    let text = field(fields, name)?;
    text.parse().map_err(|_| format!("damaged: {name} is {text:?}"))
}

/// A group in a header: the sizes of its window and sinks, or that it has no window.
fn group_text(group: &LayerGroup) -> String {
    group.window.map_or_else(|| "all".to_owned(), |window| format!("{window}+{}", group.sink_tokens))
}

fn groups_of(text: &str) -> Result<LayerGroups, String> {
    let group = |text: &str| {
        if text == "all" {
            return Some(LayerGroup::ALL);
        }
        let (window, sinks) = text.split_once('+')?;
        Some(LayerGroup { window: Some(window.parse().ok()?), sink_tokens: sinks.parse().ok()? })
    };
    let groups: Option<Vec<_>> = text.split(',').map(group).collect();
    let groups = groups.and_then(|groups| LayerGroups::new(&groups).ok());
    groups.ok_or_else(|| format!("damaged: groups is {text:?}"))
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// What stands for the path in errors about bytes in memory.
const IN_MEMORY: &str = "saved sequence";

impl SequenceSnapshot {
    /// Header and small tensors at the end of the file; the blocks lie between them.
    fn file_parts(&self, tokens: &[u32]) -> Result<(Vec<u8>, Vec<u8>)> {
        let len = self.len as usize;
        if !tokens.is_empty() && tokens.len() != len && tokens.len() != len + 1 {
            let need = format!("none, or one per token of the sequence, {len}, or one more");
            return Err(Error::argument("tokens", tokens.len(), need));
        }
        let contents = Contents {
            config: self.config,
            len: self.len,
            has_key_scales: self.key_scales.is_some(),
            num_tokens: tokens.len() as u32,
        };
        let scales = self.key_scales.iter().flatten().flatten().map(|x| x.to_bits());
        let tail: Vec<u8> = scales.chain(tokens.iter().copied()).flat_map(u32::to_le_bytes).collect();
        let crc = checksum(&contents, &[&self.data, &tail]);
        Ok((contents.header(crc), tail))
    }

    /// The contents of a file, as [`SequenceSnapshot::save`] writes it. Equal snapshots and tokens give equal bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of tokens than [`SequenceSnapshot::save`] takes.
    pub fn to_bytes(&self, tokens: &[u32]) -> Result<Vec<u8>> {
        let (header, tail) = self.file_parts(tokens)?;
        Ok([&header[..], &self.data, &tail].concat())
    }

    /// Writes the sequence into a file in the safetensors format, with version, geometry, formats and a checksum.
    ///
    /// `tokens` are the ids of the sequence's tokens, so that a later run can see which prompt this is: exactly [`len`](Self::len) of them,
    /// or one more if the next one is known already, or none if the caller keeps them elsewhere.
    ///
    /// The bytes go to a temporary file in the same folder, which then takes the path's name: a crash leaves the old file or the new one,
    /// never half of one, and an error leaves no temporary file. Blocks the thread.
    ///
    /// Only a regular file is replaced. A symbolic link is refused, not followed: replacing it would leave the file that it points to as it was,
    /// and following it would write into a folder that the path doesn't name.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of tokens; [`Error::File`] if the path is a directory, a link, a pipe, a
    /// socket or a device, or if the file can't be written.
    pub fn save(&self, path: impl AsRef<Path>, tokens: &[u32]) -> Result<()> {
        let path = path.as_ref();
        let (header, tail) = self.file_parts(tokens)?;
        if path.file_name().is_none() {
            return Err(file_error(path, Fault::new("not the path of a file")));
        }
        let check = || files::check_target(path);
        check().map_err(|fault| file_error(path, fault))?;
        // std's random keys, so that two saves at a time don't write into one file.
        let temporary = path.with_file_name(format!(".folio-{:016x}.part", RandomState::new().build_hasher().finish()));
        let write = || {
            let mut file = File::options().write(true).create_new(true).open(&temporary)?;
            file.write_all(&header)?;
            file.write_all(&self.data)?;
            file.write_all(&tail)?;
            // The name must not be there before the bytes are.
            file.sync_all()
        };
        let failed = |e: std::io::Error| Fault::io("can't be written", e);
        // Writing takes a while: what stands at the path may have changed.
        let written =
            write().map_err(failed).and_then(|()| check()).and_then(|()| fs::rename(&temporary, path).map_err(failed));
        written.map_err(|fault| {
            // It may not exist; the first error is the one to report.
            let _ = fs::remove_file(&temporary);
            file_error(path, fault)
        })
    }

    /// Reads a file that [`SequenceSnapshot::save`] wrote: the snapshot and the tokens, which are empty if none were given. Blocks the
    /// thread.
    ///
    /// # Errors
    /// [`Error::File`] if it is not a regular file, can't be read, is truncated, altered in any byte, no saved sequence or one of another version.
    pub fn load(path: impl AsRef<Path>) -> Result<(Self, Vec<u32>)> {
        let path = path.as_ref();
        let failed = |e: std::io::Error| file_error(path, Fault::io("can't be read", e));
        let (file, len) = files::open(path).map_err(|fault| file_error(path, fault))?;
        // No more than it has now, however it grows.
        let mut file = file.take(len);
        let mut bytes = Vec::new();
        // A foreign file may be huge: look before it is read.
        let start = (LEN_BYTES + START.len()) as u64;
        (&mut file).take(start).read_to_end(&mut bytes).map_err(failed)?;
        if starts_as_saved(&bytes) {
            // An error where there is no memory for it, instead of the end of the process.
            let rest = usize::try_from(len).unwrap_or(usize::MAX);
            let no_memory =
                |e| file_error(path, Fault::io("can't be read", std::io::Error::new(ErrorKind::OutOfMemory, e)));
            bytes.try_reserve_exact(rest.saturating_sub(bytes.len())).map_err(no_memory)?;
            file.read_to_end(&mut bytes).map_err(failed)?;
        }
        Self::parse(bytes).map_err(|reason| file_error(path, Fault::new(reason)))
    }

    /// [`SequenceSnapshot::load`] of bytes in memory.
    ///
    /// # Errors
    /// Those of [`SequenceSnapshot::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<(Self, Vec<u32>)> {
        let parsed = if starts_as_saved(bytes) { Self::parse(bytes.to_vec()) } else { Self::parse(Vec::new()) };
        parsed.map_err(|reason| Error::File { file: IN_MEMORY.to_owned(), reason, source: None })
    }

    fn parse(mut bytes: Vec<u8>) -> Result<(Self, Vec<u32>), String> {
        let (contents, crc) = Contents::parse(&bytes)?;
        let header = contents.header(crc);
        if !bytes.starts_with(&header) {
            return Err("damaged: its header is not the one of its contents".to_owned());
        }
        let found = checksum(&contents, &[&bytes[header.len()..]]);
        if found != crc {
            return Err(format!("damaged: its CRC-32 is {found:08x}, and should be {crc:08x}"));
        }
        // The tensors are the rest of the file, so the blocks fit a usize.
        let data_end = header.len() + stream_bytes(&contents.config, contents.config.num_blocks).unwrap_or(0) as usize;
        let scales_len = contents.scales_len();
        let num_scales = if contents.has_key_scales { scales_len * contents.config.num_layers as usize } else { 0 };
        let tail: Vec<u32> = words(&bytes[data_end..]).collect();
        let (scales, tokens) = tail.split_at(num_scales);
        let scales: Vec<f32> = scales.iter().map(|&bits| f32::from_bits(bits)).collect();
        let key_scales =
            contents.has_key_scales.then(|| scales.chunks_exact(scales_len).map(<[f32]>::to_vec).collect());
        let tokens = tokens.to_vec();
        bytes.truncate(data_end);
        bytes.drain(..header.len());
        Ok((Self { config: contents.config, len: contents.len, data: bytes, key_scales, origin: None }, tokens))
    }
}

/// Of the header without a checksum, and of the tensors.
fn checksum(contents: &Contents, tensors: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&contents.header(0));
    for bytes in tensors {
        hasher.update(bytes);
    }
    hasher.finalize()
}

fn file_error(path: &Path, fault: Fault) -> Error {
    Error::File { file: path.display().to_string(), reason: fault.reason, source: fault.source.map(Into::into) }
}

#[cfg(test)]
mod tests;
