//! Reads a checkpoint: which tensors its safetensors files, or its GGUF file, hold, and their rows as f32.
//!
//! Files are mapped, not read: one at a time, so that a process never has more than one of them in its memory, and rows are converted
//! straight into the caller's buffer.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::architecture::{Architecture, LinearWeights, ModelWeights, Piece, TensorSource};
use super::config::{JsonFile, ModelConfig};
use super::elements::{ElementType, Elements, Mxfp4};
use super::gguf::{self, Described, Header};
use super::{ModelError, ModelResult, WeightGrid};
use crate::files::{self, Fault};

/// The longest header that the safetensors library reads, too.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// What is said of a header on a machine of 32 bits.
const TOO_LONG: &str = "the header is longer than the address space";

/// Bytes before a header: its length as a little-endian u64.
const LENGTH_BYTES: u64 = 8;

/// The longest index that is read: room for a million tensors at 128 bytes each, a name and a file. Published models have some thousands; those
/// with many experts, some ten thousands.
const MAX_INDEX_BYTES: u64 = 128 << 20;

/// f32 in each of the two buffers in which head and embedding are compared: 1 MiB.
const COMPARE_LEN: usize = 1 << 18;

/// An open checkpoint: its configuration, and where its tensors lie. The files must not change while it's open.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    /// With the names that the files use.
    architecture: Architecture,
    /// Rows of queries and keys are to be brought into Hugging Face's order.
    interleaved: bool,
    /// The file that must name every tensor: the only shard, or the index.
    names: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
    /// The shard that was read last.
    mapped: Mutex<Option<(usize, Arc<Mmap>)>>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Entry {
    shard: usize,
    kind: ElementType,
    shape: Vec<usize>,
    /// Bytes from the start of the file.
    start: usize,
    end: usize,
}

impl Checkpoint {
    /// Opens a directory with `config.json`, and `model.safetensors` or `model.safetensors.index.json` with its shards. A path to a
    /// `.safetensors` file or to an index opens that one, with the `config.json` beside it; a path to a `.gguf` file (version 2 or 3) opens that alone, and
    /// a path to the first of several, `<name>-00001-of-00003.gguf`, all of them.
    ///
    /// Reads configuration and headers, no weights.
    ///
    /// # Errors
    /// [`ModelError::File`] for a file that is missing, unreadable, truncated or broken, [`ModelError::Config`] for a setting that is
    /// missing, wrong or not supported, [`ModelError::Tensor`] for a tensor that an index names and its file lacks, or that a GGUF file describes
    /// wrongly or in a type that is not supported.
    pub fn open(path: impl AsRef<Path>) -> ModelResult<Self> {
        let path = path.as_ref();
        if gguf::is_gguf(path) {
            return Self::open_gguf(path);
        }
        let (directory, names) = find(path)?;
        let config = ModelConfig::from_dir(&directory)?;
        let architecture = *config.architecture()?;
        let mut shards = Vec::new();
        let mut tensors = HashMap::new();
        if names.extension().is_some_and(|extension| extension == "json") {
            let mut files: HashMap<&str, HashMap<String, Entry>> = HashMap::new();
            let index = JsonFile::read(names.clone(), MAX_INDEX_BYTES)?;
            let need = "an object of file names by tensor name";
            let section = index.section();
            let weight_map =
                section.object("weight_map")?.ok_or_else(|| section.error("weight_map", "nothing", need))?;
            for (tensor, file) in weight_map.strings()? {
                if !files.contains_key(file) {
                    let mut components = Path::new(file).components();
                    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
                    // A backslash separates folders on Windows only, but no shard's name has one.
                    if !plain || file.contains(['/', '\\']) {
                        return Err(weight_map.error(tensor, file, "the name of a file in the same directory"));
                    }
                    files.insert(file, open_shard(directory.join(file), &mut shards)?);
                }
                let entry = files.get_mut(file).and_then(|entries| entries.remove(tensor));
                let Some(entry) = entry else {
                    return Err(ModelError::Tensor {
                        path: directory.join(file),
                        tensor: tensor.to_owned(),
                        got: "nothing".to_owned(),
                        need: format!("what {} says is there", names.display()),
                    });
                };
                tensors.insert(tensor.to_owned(), entry);
            }
        } else {
            tensors = open_shard(names.clone(), &mut shards)?;
        }
        Ok(Self { config, architecture, interleaved: false, names, shards, tensors, mapped: Mutex::new(None) })
    }

    fn open_gguf(path: &Path) -> ModelResult<Self> {
        let header = Header::read_model(path)?;
        let Described { config, architecture, interleaved } = gguf::describe(&header)?;
        let Header { parts, tensors, .. } = header;
        let entry = |tensor: gguf::Tensor| {
            let gguf::Tensor { kind, shape, part, start, end } = tensor;
            Entry { shard: part, kind, shape, start, end }
        };
        let tensors = tensors.into_iter().map(|(name, tensor)| (name, entry(tensor))).collect();
        let names = path.to_owned();
        let shard = |gguf::Part { path, file, bytes }| Shard { path, file, bytes };
        let shards = parts.into_iter().map(shard).collect();
        let checkpoint = Self { config, architecture, interleaved, names, shards, tensors, mapped: Mutex::new(None) };
        // No setting tells of parts that an architecture doesn't have: a tensor that nothing uses does.
        let weights = checkpoint.weights()?;
        if let Some(tensor) = checkpoint.unused(&weights).first() {
            let need = format!("only tensors that {} has", checkpoint.config.model_type);
            let got = "a tensor that is not known".to_owned();
            let entry = checkpoint.tensors.get(*tensor);
            let path = entry.map_or(path, |entry| &checkpoint.shards[entry.shard].path);
            return Err(ModelError::Tensor { path: path.to_owned(), tensor: (*tensor).to_owned(), got, need });
        }
        Ok(checkpoint)
    }

    /// The model's shape and settings.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Names of all tensors, in no order.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Where each of the model's parameters lies. All of them are checked: whatever comes from here can be read.
    ///
    /// Reads weights only if the head should be tied and the checkpoint has one nevertheless: as in transformers it's tied then if both are
    /// the same, otherwise the checkpoint's own head is used.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] for the first tensor that is missing or has another shape or type than the configuration asks for.
    pub fn weights(&self) -> ModelResult<ModelWeights> {
        let mut weights = self.architecture.resolve(
            &self.config,
            |name| self.tensors.contains_key(name),
            |s| self.check_source(s),
        )?;
        if weights.head.is_none() {
            weights.head = self.untied_head(&weights.embedding)?;
        }
        if self.interleaved {
            gguf::undo_interleaving(&mut weights, self.config.head_dim as usize);
        }
        Ok(weights)
    }

    /// Checks that every tensor is there and has the right shape and a type that can be read: f32, f16 or bf16.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] for the first that is not.
    pub fn check(&self, weights: &ModelWeights) -> ModelResult<()> {
        weights.sources().try_for_each(|source| self.check_source(source))
    }

    /// Names of the tensors that `weights` leaves out, sorted, without those that are known to hold no parameters (masks, frequencies, a
    /// tied head). A checkpoint of the architecture as folio knows it has none.
    #[must_use]
    pub fn unused(&self, weights: &ModelWeights) -> Vec<&str> {
        let pieces = weights.sources().flat_map(|source| &source.pieces);
        let names = pieces.flat_map(|piece| std::iter::once(&piece.tensor).chain(&piece.scales));
        let mut used: std::collections::HashSet<_> = names.map(String::as_str).collect();
        let head = self.architecture.head(&self.config);
        if weights.head.is_none() {
            used.extend(head.weight.pieces.iter().map(|piece| piece.tensor.as_str()));
        }
        let mut unused: Vec<_> =
            self.tensors().filter(|name| !used.contains(name) && !self.architecture.ignores(name)).collect();
        unused.sort_unstable();
        unused
    }

    /// Bytes that a source's rows take in the files.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] as for [`Checkpoint::check`].
    pub fn bytes(&self, source: &TensorSource) -> ModelResult<u64> {
        let mut bytes = 0;
        for piece in &source.pieces {
            let entry = self.entry(piece)?;
            let elements = piece.rows as u64 * source.columns as u64;
            bytes += match piece.scales {
                None => entry.kind.bytes(elements),
                Some(_) => elements / 2 + elements / Mxfp4::GROUP as u64,
            };
        }
        Ok(bytes)
    }

    /// Reads rows of a source as f32, from `row_start` on, as many as fit `out`: `[rows, columns]`, row by row.
    ///
    /// Takes no memory but `out` and the file's pages, which the system may drop at any time. A stack of sources from several files, and
    /// neighbouring calls for sources from different files, map each file anew.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) if `out` holds no whole rows or the source ends before it; [`ModelError::Tensor`] as for
    /// [`Checkpoint::check`]; [`ModelError::File`] if the file was cut short or can't be mapped.
    pub fn rows(&self, source: &TensorSource, row_start: usize, out: &mut [f32]) -> ModelResult<()> {
        let columns = source.columns;
        self.each_run(source, row_start, columns, out, |piece, data, first, out| {
            if piece.transposed {
                // The file has `[columns, all rows]`, perhaps of several matrices.
                let stride = piece.shape.last().copied().unwrap_or(1);
                data.transposed(piece.matrix * columns * stride + first, stride, columns, out);
            } else {
                data.read(first * columns, out);
            }
        })
    }

    /// Fills in the grids on which rows of a source lie, from `row_start` on, one for each group of 32 columns: those of GGUF's Q4_0, Q4_1 and Q4_K.
    /// The others stay as they are.
    ///
    /// # Errors
    /// Those of [`Checkpoint::rows`].
    pub fn grids(&self, source: &TensorSource, row_start: usize, out: &mut [Option<WeightGrid>]) -> ModelResult<()> {
        let groups = source.columns.div_ceil(WeightGrid::GROUP_SIZE as usize);
        self.each_run(source, row_start, groups, out, |piece, data, first, out| match data.kind {
            // Rows of such a type are whole blocks, unless they are columns.
            ElementType::Blocks(kind) if !piece.transposed && source.columns > 1 => {
                kind.grids(data.bytes, first * groups, out);
            }
            _ => {}
        })
    }

    /// Calls `read` for each run of rows that lie side by side in a tensor: the piece and its bytes, the first row's number in the tensor, and the part
    /// of `out`, which has `per_row` elements for each row, from `row_start` on.
    fn each_run<T>(
        &self,
        source: &TensorSource,
        row_start: usize,
        per_row: usize,
        out: &mut [T],
        mut read: impl FnMut(&Piece, &Elements<'_>, usize, &mut [T]),
    ) -> ModelResult<()> {
        let [rows, _] = source.shape();
        if !out.len().is_multiple_of(per_row) {
            let need = format!("a multiple of {per_row}, as many as for a row");
            return Err(ModelError::argument("out", format!("{} elements", out.len()), need));
        }
        let row_end = row_start.checked_add(out.len() / per_row).filter(|end| *end <= rows);
        let Some(row_end) = row_end else {
            let got = format!("{} rows from row {row_start} on", out.len() / per_row);
            return Err(ModelError::argument("row_start", got, format!("within the {rows} rows")));
        };
        let mut piece_start = 0;
        for piece in &source.pieces {
            let piece_end = piece_start + piece.rows;
            let (from, to) = (row_start.max(piece_start), row_end.min(piece_end));
            if from < to {
                let entry = self.entry(piece)?;
                let map = self.map(entry.shard)?;
                let scales = piece.scales.as_ref().and_then(|name| self.tensors.get(name));
                let scale_map = scales.map(|scales| self.map(scales.shard)).transpose()?;
                let scale_bytes = scales.zip(scale_map.as_ref()).map(|(scales, map)| &map[scales.start..scales.end]);
                let data = Elements { bytes: &map[entry.start..entry.end], kind: entry.kind, scales: scale_bytes };
                let mut row = from - piece_start;
                let mut rest = &mut out[(from - row_start) * per_row..(to - row_start) * per_row];
                while !rest.is_empty() {
                    let (first, run) = piece.locate(row);
                    let run = run.min(rest.len() / per_row);
                    let (now, later) = rest.split_at_mut(run * per_row);
                    read(piece, &data, first, now);
                    (rest, row) = (later, row + run);
                }
            }
            piece_start = piece_end;
        }
        Ok(())
    }

    fn check_source(&self, source: &TensorSource) -> ModelResult<()> {
        source.pieces.iter().try_for_each(|piece| self.entry(piece).map(drop))
    }

    /// Where a piece's tensor lies, if it is what the piece needs.
    fn entry(&self, piece: &Piece) -> ModelResult<&Entry> {
        let wrong = |path: &Path, got: String, need: String| ModelError::Tensor {
            path: path.to_owned(),
            tensor: piece.tensor.clone(),
            got,
            need,
        };
        let Some(entry) = self.tensors.get(&piece.tensor) else {
            return Err(wrong(&self.names, "nothing".to_owned(), format!("shape {:?}", piece.shape)));
        };
        let path = &self.shards[entry.shard].path;
        if entry.shape != piece.shape {
            return Err(wrong(path, format!("shape {:?}", entry.shape), format!("shape {:?}", piece.shape)));
        }
        if let Some(name) = &piece.scales {
            let need = || format!("U8 of shape {:?}", &piece.shape[..3.min(piece.shape.len())]);
            let found = self.tensors.get(name);
            let path = found.map_or(&self.names, |scales| &self.shards[scales.shard].path);
            let got = match found {
                Some(scales)
                    if scales.kind != ElementType::Plain(Dtype::U8)
                        || !piece.shape.starts_with(&scales.shape)
                        || scales.shape.len() != 3 =>
                {
                    format!("{} of shape {:?}", scales.kind, scales.shape)
                }
                Some(_) if entry.kind == ElementType::Plain(Dtype::U8) => return Ok(entry),
                Some(_) => {
                    return Err(wrong(
                        &self.shards[entry.shard].path,
                        format!("type {}", entry.kind),
                        "type U8".to_owned(),
                    ));
                }
                None => "nothing".to_owned(),
            };
            return Err(ModelError::Tensor { path: path.clone(), tensor: name.clone(), got, need: need() });
        }
        if !entry.kind.is_readable() {
            return Err(wrong(path, format!("type {}", entry.kind), "type F32, F16 or BF16".to_owned()));
        }
        Ok(entry)
    }

    /// The checkpoint's own head, if it has one that differs from the embedding.
    fn untied_head(&self, embedding: &TensorSource) -> ModelResult<Option<LinearWeights>> {
        let head = self.architecture.head(&self.config);
        if !head.weight.pieces.iter().all(|piece| self.tensors.contains_key(&piece.tensor)) {
            return Ok(None);
        }
        self.check_source(&head.weight)?;
        let [rows, columns] = embedding.shape();
        let block = (COMPARE_LEN / columns).clamp(1, rows);
        let (mut ours, mut theirs) = (vec![0.0; block * columns], vec![0.0; block * columns]);
        for start in (0..rows).step_by(block) {
            let len = block.min(rows - start) * columns;
            self.rows(embedding, start, &mut ours[..len])?;
            self.rows(&head.weight, start, &mut theirs[..len])?;
            // By bits, so that NaN equals itself.
            if ours[..len].iter().zip(&theirs[..len]).any(|(a, b)| a.to_bits() != b.to_bits()) {
                return Ok(Some(head));
            }
        }
        Ok(None)
    }

    /// The bytes of a shard. Mapping another one drops the last, so that only one counts to the memory of the process.
    fn map(&self, index: usize) -> ModelResult<Arc<Mmap>> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, map)) = mapped.as_ref().filter(|(at, _)| *at == index) {
            return Ok(map.clone());
        }
        *mapped = None;
        let shard = &self.shards[index];
        let io = |what, error| ModelError::fault(&shard.path, Fault::io(what, error));
        let changed = |bytes: u64| {
            let reason = format!("got {bytes} bytes, need the {} of when it was opened", shard.bytes);
            ModelError::file(&shard.path, reason)
        };
        let bytes = shard.file.metadata().map_err(|e| io("can't be read", e))?.len();
        if bytes != shard.bytes {
            return Err(changed(bytes));
        }
        let map = Arc::new(map_file(&shard.file).map_err(|e| io("can't be mapped", e))?);
        if map.len() as u64 != shard.bytes {
            return Err(changed(map.len() as u64));
        }
        *mapped = Some((index, map.clone()));
        Ok(map)
    }
}

#[allow(unsafe_code, reason = "mapping a file; see the SAFETY comment")]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: The mapping is read-only, and every access is within its length. What mapping can't exclude is that someone changes the file
    // meanwhile; `Checkpoint` tells its users not to. Any bytes are valid f32, f16 and bf16, and no reference to typed data is made, so that
    // changed bytes are wrong weights; a file that is cut short while mapped ends the process with a signal, as with every mapped file.
    unsafe { Mmap::map(file) }
}

/// The directory, and the file or index that names the tensors.
fn find(path: &Path) -> ModelResult<(PathBuf, PathBuf)> {
    let need =
        "need a directory with config.json and model.safetensors or model.safetensors.index.json, or a .gguf file";
    let metadata = std::fs::metadata(path)
        .map_err(|e| ModelError::file_because(path, format!("can't be read: {}; {need}", e.kind()), e))?;
    if !metadata.is_dir() {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.ends_with(".safetensors") && !name.ends_with(".safetensors.index.json") {
            return Err(ModelError::file(path, format!("not a .safetensors file; {need}")));
        }
        let directory = path.parent().unwrap_or(Path::new("")).to_owned();
        return Ok((directory, path.to_owned()));
    }
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        let file = path.join(name);
        if file.exists() {
            return Ok((path.to_owned(), file));
        }
    }
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| path.join(name).exists());
    let hint = if pickled { "; convert the pytorch_model.bin that is there to safetensors" } else { "" };
    Err(ModelError::file(path, format!("no weights; {need}{hint}")))
}

/// Opens a safetensors file and reads its header.
fn open_shard(path: PathBuf, shards: &mut Vec<Shard>) -> ModelResult<HashMap<String, Entry>> {
    let failed = |reason: String| ModelError::file(&path, reason);
    let io = |e: std::io::Error| ModelError::fault(&path, Fault::io("can't be read", e));
    let (mut file, bytes) = files::open(&path).map_err(|fault| ModelError::fault(&path, fault))?;
    if bytes < LENGTH_BYTES {
        return Err(failed(format!("got {bytes} bytes, need a safetensors file, which starts with 8 bytes of length")));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length).map_err(io)?;
    if &length == b"version " {
        return Err(failed("got a Git LFS pointer, need the file itself: `git lfs pull` fetches it".to_owned()));
    }
    let length = u64::from_le_bytes(length);
    let data = LENGTH_BYTES.saturating_add(length);
    if length > MAX_HEADER_BYTES || data > bytes {
        return Err(failed(format!(
            "got {bytes} bytes that start with a header of {length} bytes, need a header within the file and at most \
             {MAX_HEADER_BYTES} bytes; the file is truncated or not a safetensors file"
        )));
    }
    let mut header = vec![0; usize::try_from(length).map_err(|_| failed(format!("{TOO_LONG}, {length} bytes")))?];
    file.read_exact(&mut header).map_err(io)?;
    // Parsed apart from the data: `SafeTensors::read_metadata` adds sizes without looking for an overflow.
    let header: Metadata = serde_json::from_slice(&header)
        .map_err(|e| ModelError::file_because(&path, "not a valid safetensors header", e))?;
    let end = data.checked_add(header.data_len() as u64);
    if end != Some(bytes) {
        let need = end.map_or("more than any file has".to_owned(), |end| end.to_string());
        let truncated = if end.is_none_or(|end| end > bytes) { "; the file is truncated" } else { "" };
        return Err(failed(format!("got {bytes} bytes, need {need} by its header{truncated}")));
    }
    // Within the file by now, and its length fits the address space or mapping fails.
    let data = usize::try_from(data).map_err(|_| failed(format!("{TOO_LONG}, {data} bytes")))?;
    let shard = shards.len();
    let entry = |name: String, info: &safetensors::tensor::TensorInfo| {
        let (start, end) = info.data_offsets;
        let (start, end) = (data + start, data + end);
        (name, Entry { shard, kind: ElementType::Plain(info.dtype), shape: info.shape.clone(), start, end })
    };
    let entries = header.tensors().into_iter().map(|(name, info)| entry(name, info)).collect();
    shards.push(Shard { path, file, bytes });
    Ok(entries)
}
