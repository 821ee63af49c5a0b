//! [`TokenTree`]: new tokens of a sequence that branch.

use crate::error::{Error, Result};

/// New tokens of a sequence that branch: guesses at how it goes on, to be verified in one step (token trees of SpecInfer, Miao et al. 2023,
/// arXiv 2305.09781; tree attention of Medusa, Cai et al. 2024, arXiv 2401.10774).
///
/// A token follows either what is cached, and is a root then, or an earlier token of the tree, its parent. The tokens from a root to a token are
/// its path. Its *depth* is the number of tokens before it on the path, and its *position* is `context_len + depth`, which is where
/// it would stand if its path were all that was new. It sees what is cached, the tokens of its path and itself.
///
/// The tokens of a tree take consecutive slots of the cache, in the order of the tree, whatever their positions. An accepted path moves to the
/// front of them: `KvCache::accept`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenTree {
    parents: Vec<Option<u32>>,
    depths: Vec<u32>,
}

impl TokenTree {
    /// Most tokens of a tree. Published ones have 25 to 64; a bit for each pair of this many takes 128 KiB of an upload.
    pub const MAX_LEN: usize = 1024;

    /// A tree by the parent of each token; `None` for a root.
    ///
    /// # Errors
    /// [`Error::Argument`] for no tokens, more than [`MAX_LEN`](Self::MAX_LEN), or a parent that doesn't stand before its child.
    pub fn new(parents: &[Option<u32>]) -> Result<Self> {
        if parents.is_empty() || parents.len() > Self::MAX_LEN {
            let got = format!("{} tokens", parents.len());
            return Err(Error::argument("parents", got, format!("1 to {}", Self::MAX_LEN)));
        }
        let mut depths: Vec<u32> = Vec::with_capacity(parents.len());
        for (token, parent) in parents.iter().enumerate() {
            // Only those before the token have a depth yet.
            let depth = match parent {
                None => Some(0),
                Some(parent) => depths.get(*parent as usize).map(|depth| depth + 1),
            };
            let Some(depth) = depth else {
                let got = format!("{} for token {token}", parent.map_or_else(String::new, |parent| parent.to_string()));
                return Err(Error::argument("parents", got, "none, or a token before its child"));
            };
            depths.push(depth);
        }
        Ok(Self { parents: parents.to_vec(), depths })
    }

    /// Tokens.
    #[must_use]
    pub fn len(&self) -> u32 {
        // At most MAX_LEN.
        self.parents.len() as u32
    }

    /// Never: a tree has a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parents.is_empty()
    }

    /// The parent of each token; `None` for a root.
    #[must_use]
    pub fn parents(&self) -> &[Option<u32>] {
        &self.parents
    }

    /// The depth of each token: 0 for a root, and one more than its parent's for the others.
    #[must_use]
    pub fn depths(&self) -> &[u32] {
        &self.depths
    }

    /// Whether each token follows the one before it: then the tree is what a sequence without branches appends.
    #[must_use]
    pub fn is_line(&self) -> bool {
        (0..).zip(&self.depths).all(|(i, &depth): (u32, &u32)| i == depth)
    }

    /// The tokens from a root to `token`, both included; empty if the tree has no such token.
    #[must_use]
    pub fn path_to(&self, token: u32) -> Vec<u32> {
        let known = Some(token).filter(|&token| token < self.len());
        let parent = |&token: &u32| self.parents.get(token as usize).copied().flatten();
        let mut path: Vec<u32> = std::iter::successors(known, parent).collect();
        path.reverse();
        path
    }

    /// Fails unless `path` is empty or leads from a root from parent to child.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the token which doesn't follow.
    pub fn check_path(&self, path: &[u32]) -> Result<()> {
        let mut before = None;
        for &token in path {
            let Some(&parent) = self.parents.get(token as usize) else {
                let got = format!("token {token} of a tree of {}", self.len());
                return Err(Error::argument("path", got, "tokens of the tree"));
            };
            if parent != before {
                let of = |token: Option<u32>| token.map_or_else(|| "what is cached".to_string(), |i| i.to_string());
                let got = format!("{token} behind {}, but it follows {}", of(before), of(parent));
                return Err(Error::argument("path", got, "tokens from a root on, each the parent of the next"));
            }
            before = Some(token);
        }
        Ok(())
    }

    /// Words of a row of [`TokenTree::mask`].
    #[must_use]
    pub fn mask_stride(&self, has_window: bool) -> u32 {
        self.len().div_ceil(32) + u32::from(has_window)
    }

    /// What each token sees of the tree: `[len, mask_stride]` words. Bit `i % 32` (lowest first) of word `i / 32` says whether it sees token `i`: one
    /// of its path, itself included, that the window shows by its *position*. With a window each row ends with a word more, the
    /// first key that the token sees of the `context_len` that are cached.
    #[must_use]
    pub fn mask(&self, context_len: u32, window: Option<u32>) -> Vec<u32> {
        let stride = self.mask_stride(window.is_some()) as usize;
        let mut words = vec![0; self.parents.len() * stride];
        let is_near = |depth: u32, of: u32| window.is_none_or(|window| depth.saturating_add(window) > of);
        for ((row, token), &depth) in words.chunks_exact_mut(stride).zip(0..).zip(&self.depths) {
            for seen in self.path_to(token) {
                let near = self.depths.get(seen as usize).is_some_and(|&other| is_near(other, depth));
                if let (true, Some(word)) = (near, row.get_mut(seen as usize / 32)) {
                    *word |= 1 << (seen % 32);
                }
            }
            if let (Some(window), Some(last)) = (window, row.last_mut()) {
                *last = context_len.saturating_add(depth).saturating_add(1).saturating_sub(window);
            }
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::TokenTree;

    fn random(rng: &mut Rng, len: u32) -> Vec<Option<u32>> {
        (0..len).map(|i| (i > 0 && rng.u32(..8) > 0).then(|| rng.u32(..i.max(1)))).collect()
    }

    /// Masks as their definition says, one pair at a time.
    #[test]
    fn a_token_sees_its_path_as_far_as_the_window_reaches() {
        let mut rng = Rng::with_seed(3);
        for len in (1..100).chain([1024]) {
            let parents = random(&mut rng, len);
            let tree = TokenTree::new(&parents).expect("a tree");
            let context_len = rng.u32(..50);
            let window = rng.bool().then(|| rng.u32(1..60));
            let (mask, stride) = (tree.mask(context_len, window), tree.mask_stride(window.is_some()));
            assert_eq!(mask.len() as u32, len * stride);
            for query in 0..len {
                let mut path = vec![query];
                while let Some(parent) = parents[path[path.len() - 1] as usize] {
                    path.push(parent);
                }
                assert_eq!(tree.depths()[query as usize] as usize, path.len() - 1);
                let reach = window.unwrap_or(u32::MAX) as usize;
                for key in 0..len {
                    let distance = path.iter().position(|&token| token == key);
                    let want = distance.is_some_and(|distance| distance < reach);
                    let bit = mask[(query * stride + key / 32) as usize] >> (key % 32) & 1;
                    assert_eq!(bit == 1, want, "{query} sees {key}: {tree:?}");
                }
                if let Some(window) = window {
                    let position = context_len + path.len() as u32 - 1;
                    assert_eq!(mask[((query + 1) * stride - 1) as usize], (position + 1).saturating_sub(window));
                }
                path.reverse();
                assert_eq!(tree.path_to(query), path);
                tree.check_path(&path).expect("a path");
                tree.check_path(&path[..path.len() - 1]).expect("its beginning");
            }
            let is_line = (0..len).all(|i| parents[i as usize] == i.checked_sub(1));
            assert_eq!(tree.is_line(), is_line);
        }
    }

    #[test]
    fn what_is_no_tree_or_no_path_is_refused() {
        for parents in [&[][..], &[Some(0)], &[None, Some(1)], &[None, Some(2), None], &[Some(u32::MAX)], &[None; 1025]]
        {
            let error = TokenTree::new(parents).expect_err("refused").to_string();
            assert!(error.starts_with("parents: got"), "{error}");
        }
        let tree = TokenTree::new(&[None, Some(0), Some(0), Some(1), None]).expect("a tree");
        for path in [&[1][..], &[0, 3], &[0, 1, 2], &[0, 0], &[4, 1], &[5], &[0, u32::MAX], &[0, 1, 3, 3]] {
            let error = tree.check_path(path).expect_err("refused").to_string();
            assert!(error.starts_with("path: got"), "{error}");
        }
        assert!(tree.path_to(5).is_empty());
    }
}
