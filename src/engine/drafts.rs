//! [`DraftTree`]: guesses at how a text goes on.

/// Guesses at what comes after a text: a line of tokens, or several continuations that share their beginnings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DraftTree {
    tokens: Vec<u32>,
    /// Earlier drafts.
    parents: Vec<Option<u32>>,
}

impl From<Vec<u32>> for DraftTree {
    /// A line: each token follows the one before it.
    fn from(tokens: Vec<u32>) -> Self {
        let parents = (0..tokens.len() as u32).map(|i| i.checked_sub(1)).collect();
        Self { tokens, parents }
    }
}

impl DraftTree {
    /// The drafts. None stands before the one that it follows.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// For each draft the one that it follows, by its number; `None` if it follows the text.
    #[must_use]
    pub fn parents(&self) -> &[Option<u32>] {
        &self.parents
    }

    /// Drafts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Whether there are no branches.
    #[must_use]
    pub fn is_line(&self) -> bool {
        (0..).zip(&self.parents).all(|(i, parent): (u32, _)| *parent == i.checked_sub(1))
    }

    /// Adds a token behind a draft, or behind the text, unless it is there already. Returns its number; `None` if there is no draft of the number
    /// `parent`.
    pub fn add(&mut self, parent: Option<u32>, token: u32) -> Option<u32> {
        if parent.is_some_and(|parent| parent as usize >= self.len()) {
            return None;
        }
        let known = self.parents.iter().zip(&self.tokens).position(|(&p, &t)| (p, t) == (parent, token));
        if known.is_none() {
            self.tokens.push(token);
            self.parents.push(parent);
        }
        Some(known.unwrap_or(self.len() - 1) as u32)
    }

    /// Adds a continuation of the text, as far as there are no more than `most` drafts then. Returns how many were added.
    pub fn add_path(&mut self, path: &[u32], most: usize) -> usize {
        let (before, mut last) = (self.len(), None);
        for &token in path {
            let is_known = self.parents.iter().zip(&self.tokens).any(|(&p, &t)| (p, t) == (last, token));
            if !is_known && self.len() >= most {
                break;
            }
            last = self.add(last, token);
        }
        self.len() - before
    }

    /// The tokens from behind the text to a draft, that one included.
    pub(super) fn path_to(&self, draft: u32) -> Vec<u32> {
        let parent = |&draft: &u32| self.parents.get(draft as usize).copied().flatten();
        let path = std::iter::successors(Some(draft), parent);
        let mut path: Vec<u32> = path.filter_map(|draft| self.tokens.get(draft as usize).copied()).collect();
        path.reverse();
        path
    }

    /// How many drafts stand before each on its path, and itself.
    fn depths(&self) -> Vec<u32> {
        let mut depths: Vec<u32> = Vec::with_capacity(self.len());
        for parent in &self.parents {
            let before = parent.and_then(|parent| depths.get(parent as usize).copied());
            depths.push(before.unwrap_or(0) + 1);
        }
        depths
    }

    /// Tokens of the longest path among the first `count` drafts.
    pub(super) fn depth(&self, count: u32) -> u32 {
        self.depths().into_iter().take(count as usize).max().unwrap_or(0)
    }

    /// The tree without drafts that `keep` doesn't want, which is asked about their paths, without what follows those, and without paths of more than
    /// `depth` tokens; no more than `most` drafts, the first ones.
    pub(super) fn pruned(&self, most: u32, depth: u32, mut keep: impl FnMut(&[u32]) -> bool) -> Self {
        let mut kept = Self::default();
        // What each draft is in the new tree.
        let mut numbers: Vec<Option<u32>> = Vec::with_capacity(self.len());
        for ((i, (&token, parent)), of_path) in (0..).zip(self.tokens.iter().zip(&self.parents)).zip(self.depths()) {
            let new_parent = parent.map(|parent| numbers.get(parent as usize).copied().flatten());
            let is_cut = new_parent == Some(None) || of_path > depth || kept.len() >= most as usize;
            let number = if is_cut || !keep(&self.path_to(i)) { None } else { kept.add(new_parent.flatten(), token) };
            numbers.push(number);
        }
        kept
    }

    /// The path of the first drafts.
    pub(super) fn first_line(&self) -> Self {
        let mut line = Self::default();
        let mut last = None;
        while let Some(child) = self.parents.iter().position(|&parent| parent == last) {
            line.add(line.len().checked_sub(1).map(|i| i as u32), self.tokens[child]);
            last = Some(child as u32);
        }
        line
    }

    /// What `sets` says of the text and of each path, for the text and each draft, among the first `count`. `sets`: for the tokens of a path as many and
    /// one more.
    pub(super) fn along_paths<S: Clone + Default, E>(
        &self,
        count: usize,
        mut sets: impl FnMut(&[u32]) -> Result<Vec<S>, E>,
    ) -> Result<Vec<S>, E> {
        let count = count.min(self.len());
        let mut found: Vec<Option<S>> = vec![None; count + 1];
        // From the last one on, so that a path is asked about once, to its end.
        for draft in (0..=count).rev() {
            if found.get(draft).is_some_and(Option::is_some) {
                continue;
            }
            // 0 stands for the text, and the others for the draft before.
            let mut places = vec![draft];
            let mut path = Vec::new();
            while let Some(before) = places.last().and_then(|last| last.checked_sub(1)) {
                path.extend(self.tokens.get(before));
                places.push(self.parents.get(before).copied().flatten().map_or(0, |parent| parent as usize + 1));
            }
            path.reverse();
            for (place, set) in places.into_iter().rev().zip(sets(&path)?) {
                if let Some(slot) = found.get_mut(place) {
                    *slot = Some(set);
                }
            }
        }
        Ok(found.into_iter().map(Option::unwrap_or_default).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[&[u32]], most: usize) -> DraftTree {
        let mut tree = DraftTree::default();
        for path in paths {
            tree.add_path(path, most);
        }
        tree
    }

    #[test]
    fn paths_share_their_beginnings() {
        let both = tree(&[&[1, 2, 3], &[1, 2, 4, 5], &[6], &[1, 2]], 9);
        assert_eq!(both.tokens(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(both.parents(), [None, Some(0), Some(1), Some(1), Some(3), None]);
        assert_eq!((both.path_to(4), both.depth(6), both.depth(3)), (vec![1, 2, 4, 5], 4, 3));
        assert!(!both.is_line() && tree(&[&[1, 2, 3]], 9).is_line());
        assert_eq!(tree(&[&[1, 2, 3]], 9), vec![1, 2, 3].into());
        assert_eq!(tree(&[&[1, 2, 3], &[1, 7, 8]], 4).tokens(), [1, 2, 3, 7]);
        assert_eq!(DraftTree::default().add(Some(0), 1), None);
        assert_eq!(both.first_line(), vec![1, 2, 3].into());
        assert_eq!(tree(&[&[6], &[1, 2], &[6, 4]], 9).first_line(), vec![6, 4].into());
    }

    #[test]
    fn what_is_pruned_takes_what_follows_along() {
        let both = tree(&[&[1, 2, 3], &[1, 2, 4, 5], &[6, 2]], 9);
        let pruned = both.pruned(9, 9, |path| path != [1, 2]);
        assert_eq!(pruned, tree(&[&[1], &[6, 2]], 9));
        assert_eq!(both.pruned(9, 2, |_| true), tree(&[&[1, 2], &[6, 2]], 9));
        assert_eq!(both.pruned(4, 9, |_| true), tree(&[&[1, 2, 3], &[1, 2, 4]], 9));
        assert!(both.pruned(9, 9, |_| false).is_empty());
    }

    /// What is said of each path is the path itself.
    #[test]
    fn each_path_is_asked_about_once() {
        let both = tree(&[&[1, 2, 3], &[1, 2, 4, 5], &[6, 2]], 9);
        let mut asked = 0;
        let sets = both.along_paths(both.len(), |path| {
            asked += 1;
            Ok::<_, ()>((0..=path.len()).map(|len| path[..len].to_vec()).collect())
        });
        let want: Vec<Vec<u32>> = (0..7).map(|draft| both.path_to(draft)).collect();
        assert_eq!(sets, Ok([vec![vec![]], want].concat()));
        assert_eq!(asked, 3, "as often as there are leaves");
        let some = both.along_paths(2, |path| Ok::<_, ()>(vec![path.len(); path.len() + 1]));
        assert_eq!(some, Ok(vec![2, 2, 2]));
        assert_eq!(both.along_paths(1, |_| Err::<Vec<u32>, _>(7)), Err(7));
    }
}
