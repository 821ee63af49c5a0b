//! Models in several files, as `llama-gguf-split` and the converters of large models write them: `<name>-00001-of-00003.gguf` has the settings, and
//! each file has some of the tensors.

use std::path::Path;

use super::super::ModelResult;
use super::reader::{Header, tensor_error};

/// How many files there are, and the number of this one, counted from 0.
pub(super) const COUNT: &str = "split.count";
pub(super) const NUMBER: &str = "split.no";

/// Tensors of all files.
const TENSORS: &str = "split.tensors.count";

impl Header {
    /// The header of a model, with the tensors of all its files. The others are looked for beside the first.
    ///
    /// # Errors
    /// Those of [`Header::read`], for every file; [`ModelError::Config`](super::super::ModelError::Config) for a first file that is not named as one,
    /// and for files that don't belong together; [`ModelError::Tensor`](super::super::ModelError::Tensor) for a tensor that two of them have.
    pub(crate) fn read_model(path: &Path) -> ModelResult<Self> {
        let mut all = Self::read(path)?;
        let count = all.u32(COUNT)?.unwrap_or(1);
        if count <= 1 {
            return Ok(all);
        }
        let end = |number: u32| format!("-{number:05}-of-{count:05}.gguf");
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(stem) = name.strip_suffix(&end(1)) else {
            let need = format!("a name that ends with {}, which tells where the others are", end(1));
            return Err(all.error(COUNT, format!("{count}, in a file named {name}"), need));
        };
        // A number that is too large ends at the first file that is missing.
        for number in 1..count {
            let path = path.with_file_name(format!("{stem}{}", end(number + 1)));
            let part = Self::read_part(&path)?;
            for (key, need) in [(COUNT, count), (NUMBER, number)] {
                let got = part.u32(key)?;
                if got != Some(need) {
                    let got = got.map_or("nothing".to_owned(), |got| got.to_string());
                    return Err(part.error(key, got, format!("{need}, by the file's name")));
                }
            }
            let at = all.parts.len();
            for (name, mut tensor) in part.tensors {
                tensor.part = at;
                if all.tensors.contains_key(&name) {
                    return Err(tensor_error(&path, &name, "what a file before has, too", "it once"));
                }
                all.tensors.insert(name, tensor);
            }
            all.parts.extend(part.parts);
        }
        if let Some(need) = all.u32(TENSORS)?.filter(|need| *need as usize != all.tensors.len()) {
            return Err(all.error(TENSORS, need, format!("{}, as many as the files have", all.tensors.len())));
        }
        Ok(all)
    }
}
