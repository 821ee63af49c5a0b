//! Accepting a path of a tree of new tokens: its rows move to the front, and the rest of the tree is taken back.

use super::step::GroupWork;
use super::{KvCache, Step};
use crate::error::{Error, Result};
use crate::gpu::{Recorder, Upload, params_binding};
use crate::ids::SequenceId;
use crate::plan::{CacheParams, move_words, path_moves};

impl KvCache {
    /// Accepts a path of each tree of a step that [`begin_step_with_trees`](Self::begin_step_with_trees) began: records the moves of its rows, in every
    /// layer, to the slots that they would have if they alone had been appended. [`commit`](Self::commit) then makes the path the sequence's new tokens;
    /// the rest of the tree is gone, and blocks that are no longer needed return to the pool.
    ///
    /// `paths`: for each sequence of the step that has a tree, tokens of the tree (numbered from 0, in its order) from a root on, each the parent
    /// of the next. None at all is a path, too. Sequences without a tree keep all of their new tokens.
    ///
    /// Rows move as bytes: a key was rotated by its token's position, which stays the same. A path that stands in place already, like the beginning of a
    /// line, records nothing. Record this behind the step's appends and attention, in the same or a later encoder; with the results of
    /// the step at hand that is a later one. As for a step, submit it before the commands of later steps.
    ///
    /// Afterwards nothing but committing and dropping is left to do with the step. Dropping it leaves the sequences as they were before.
    ///
    /// # Errors
    /// [`Error::Argument`] for a path that isn't one, a sequence that is not in the step, has no tree, occurs twice or is missing;
    /// [`Error::Stale`]; [`Error::Unsupported`] if the list of moves doesn't fit into a binding; [`Error::Wgpu`]; [`Error::DeviceLost`]. Nothing has
    /// been recorded then, and another path may be accepted.
    pub fn accept<'a>(
        &self,
        recorder: impl Into<Recorder<'a>>,
        step: &mut Step,
        paths: &[(SequenceId, &[u32])],
    ) -> Result<()> {
        step.check_usable(&self.state)?;
        let gpu = &self.gpu;
        gpu.check_alive("accepting paths")?;
        let mut lists = Vec::new();
        for (i, &(sequence, path)) in paths.iter().enumerate() {
            if paths.iter().take(i).any(|&(other, _)| other == sequence) {
                return Err(Error::argument("paths", format!("{sequence} twice"), "each sequence once"));
            }
            let place = step.sequences.iter().position(|&known| known == sequence);
            let Some((place, tree)) = place.and_then(|i| Some((i, step.trees.get(i)?.as_ref()?))) else {
                return Err(Error::argument("paths", sequence, "sequences of the step that have a tree"));
            };
            tree.check_path(path)?;
            // Every buffer holds rows of a layer of each group.
            for GroupWork { batch, .. } in &step.groups {
                let moves = path_moves(batch, &batch.entries[place], self.config.block_size, path);
                lists.extend((!moves.is_empty()).then_some(moves));
            }
        }
        let mut with_trees = step.sequences.iter().zip(&step.trees).filter(|(_, tree)| tree.is_some());
        if let Some((missing, _)) = with_trees.find(|(id, _)| paths.iter().all(|(other, _)| other != *id)) {
            return Err(Error::argument("paths", format!("none for {missing}"), "one for each tree of the step"));
        }
        if !lists.is_empty() {
            let kernel = &self.kernels.move_rows;
            let (x, y) = kernel.variant.move_grid("paths", lists.len() as u32)?;
            let (words, lease) = Upload::new(gpu, "paths", move_words(self.config.num_blocks, &lists, x))?.buffer()?;
            let dispatches: Vec<_> = self
                .layers
                .iter()
                .map(|storage| {
                    let mut resources: Vec<_> = storage.written().collect();
                    resources.extend([words.as_entire_binding(), params_binding::<CacheParams>(&words, 0)]);
                    kernel.dispatch(resources, [x, y, 1])
                })
                .collect();
            recorder.into().record(gpu, "folio accept", &dispatches, &[lease])?;
        }
        step.set_accepted(paths);
        Ok(())
    }
}
