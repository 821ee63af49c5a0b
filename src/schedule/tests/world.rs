//! A model of the cache, and a world that carries out what the scheduler decides and checks what holds for each step.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;

use crate::layout::LayerGroups;

use super::super::{
    Demand, Memory, Preemption, Refusal, RequestId, ScheduledChunk, Scheduler, SchedulerConfig, StepSchedule,
};

pub(super) const TICK: Duration = Duration::from_millis(10);

/// A cache without sharing: tokens of each request that has blocks, and blocks that others hold.
#[derive(Default)]
pub(super) struct Pool {
    pub(super) num_blocks: u32,
    pub(super) block_size: u32,
    /// What between two steps and within one is left of a request: by its tokens, and those that it had when the step began.
    pub(super) groups: LayerGroups,
    pub(super) cached: BTreeMap<RequestId, u32>,
    pub(super) swapped: BTreeMap<RequestId, u32>,
    /// Requests with more than one beam: tokens of the prompt, and beams.
    pub(super) beams: BTreeMap<RequestId, (u32, u32)>,
    pub(super) held_by_others: u32,
}

impl Pool {
    /// Blocks of a request: beams share full blocks of the prompt only.
    pub(super) fn blocks(&self, request: RequestId, tokens: u32) -> u32 {
        self.blocks_since(request, tokens, tokens)
    }

    /// The same within a step that began with so many tokens, whose windows lie further back.
    fn blocks_since(&self, request: RequestId, tokens: u32, began_with: u32) -> u32 {
        let retentions = self.groups.as_slice().iter().map(|group| group.retention(self.block_size));
        let blocks = tokens.div_ceil(self.block_size);
        match self.beams.get(&request) {
            Some(&(prompt, beams)) if tokens > prompt && !self.groups.has_windows() => {
                let shared = prompt / self.block_size;
                (shared + beams * (blocks - shared)) * self.groups.count()
            }
            _ => retentions.map(|retention| blocks - retention.hidden_blocks(began_with).len() as u32).sum(),
        }
    }

    pub(super) fn used(&self) -> u32 {
        self.cached.iter().map(|(&id, &tokens)| self.blocks(id, tokens)).sum::<u32>() + self.held_by_others
    }
}

impl Memory for Pool {
    fn free_blocks(&self) -> u32 {
        self.num_blocks - self.used()
    }

    fn exclusive_blocks(&self, request: RequestId) -> u32 {
        self.cached.get(&request).map_or(0, |&tokens| self.blocks(request, tokens))
    }

    /// As many as there can be.
    fn copied_blocks(&self, request: RequestId) -> u32 {
        let of = |&(prompt, beams)| if self.cached[&request] >= prompt { beams * self.groups.count() } else { 0 };
        self.beams.get(&request).map_or(0, of)
    }

    fn beam_blocks(&self, request: RequestId) -> u32 {
        self.beams.get(&request).map_or(0, |&(prompt, _)| {
            let shared = prompt / self.block_size * self.groups.count();
            self.blocks(request, self.cached[&request]).saturating_sub(shared)
        })
    }
}

/// A scheduler, the pool that it plans for, and what its caller knows.
pub(super) struct World {
    pub(super) scheduler: Scheduler,
    pub(super) pool: Pool,
    pub(super) now: Duration,
    /// New tokens that each request will really make, and those that it has.
    pub(super) answers: BTreeMap<RequestId, (u32, u32)>,
    pub(super) finished: Vec<RequestId>,
    pub(super) expired: Vec<RequestId>,
    pub(super) max_preemptions_seen: u32,
    /// Where requests have drafts: how many, and how many are right.
    pub(super) drafts: Option<Rng>,
    pub(super) num_accepted: u32,
    /// Tokens of the longest request.
    pub(super) longest: u32,
}

impl World {
    pub(super) fn new(config: SchedulerConfig) -> Self {
        let SchedulerConfig { num_blocks, block_size, groups, .. } = config;
        let pool = Pool { num_blocks, block_size, groups, ..Pool::default() };
        Self {
            scheduler: Scheduler::new(config).expect("a valid configuration"),
            pool,
            now: Duration::ZERO,
            answers: BTreeMap::new(),
            finished: Vec::new(),
            expired: Vec::new(),
            max_preemptions_seen: 0,
            drafts: None,
            num_accepted: 0,
            longest: 0,
        }
    }

    pub(super) fn submit(&mut self, demand: Demand, new_tokens: u32) -> Result<RequestId, Refusal> {
        let id = self.scheduler.submit(self.now, demand)?;
        if demand.beams > 1 {
            self.pool.beams.insert(id, (demand.prompt_tokens, demand.beams));
        }
        self.answers.insert(id, (new_tokens.clamp(1, demand.max_new_tokens), 0));
        Ok(id)
    }

    pub(super) fn drop_request(&mut self, id: RequestId) {
        self.pool.cached.remove(&id);
        self.pool.swapped.remove(&id);
        self.answers.remove(&id);
    }

    pub(super) fn cancel(&mut self, id: RequestId) {
        assert!(self.scheduler.remove(id));
        self.drop_request(id);
    }

    /// One step, carried out as documented; every promise that holds for a single step is checked.
    pub(super) fn step(&mut self) -> StepSchedule {
        self.now += TICK;
        let config = *self.scheduler.config();
        let pinned_before: Vec<_> = self
            .answers
            .keys()
            .copied()
            .filter(|&id| self.scheduler.preemptions(id) == Some(config.max_preemptions))
            .collect();
        let mut offered = BTreeMap::new();
        if let Some(rng) = &mut self.drafts {
            for &id in self.answers.keys() {
                if self.scheduler.may_draft(id) && rng.bool() {
                    let drafts = rng.u32(0..9);
                    self.scheduler.set_drafts(id, drafts);
                    offered.insert(id, drafts);
                }
            }
        }
        let schedule = self.scheduler.next_step(self.now, &self.pool);
        for &id in &schedule.expired {
            self.drop_request(id);
            self.expired.push(id);
        }
        for &(id, how) in &schedule.preempted {
            assert!(!self.pool.beams.contains_key(&id), "{id} has beams, which are never preempted");
            assert!(!pinned_before.contains(&id), "{id} was preempted once too often");
            let tokens = self.pool.cached.remove(&id).unwrap_or(0);
            if how == Preemption::Swap {
                assert!(tokens > 0);
                self.pool.swapped.insert(id, tokens);
            }
            let preemptions = self.scheduler.preemptions(id).expect("it is still there");
            self.max_preemptions_seen = self.max_preemptions_seen.max(preemptions);
        }
        for &id in &schedule.resumed {
            let tokens = self.pool.swapped.remove(&id).expect("it was swapped out");
            self.pool.cached.insert(id, tokens);
        }
        for &(id, hit) in &schedule.admitted {
            assert_eq!(hit, 0);
            assert_eq!(self.pool.cached.insert(id, 0), None, "{id} was running already");
        }
        let mut tokens = 0;
        let began_with = self.pool.cached.clone();
        for &ScheduledChunk { request, tokens: count, samples, drafts } in &schedule.chunks {
            assert!(count > 0);
            assert!(drafts <= offered.get(&request).copied().unwrap_or(0) && (drafts == 0 || samples));
            let (known, cached) = self.scheduler.progress(request).expect("it is there");
            let num_texts = match self.pool.beams.get(&request) {
                Some(&(prompt, beams)) if known > prompt => beams,
                _ => 1,
            };
            tokens += count * num_texts + drafts;
            assert_eq!(samples, cached + count == known);
            assert_eq!(self.pool.cached[&request], cached);
            *self.pool.cached.get_mut(&request).expect("it has blocks") += count + drafts;
            self.longest = self.longest.max(cached + count);
        }
        assert!(tokens <= config.max_step_tokens, "{tokens} tokens");
        let blocks = self.pool.cached.iter().map(|(&id, &tokens)| self.pool.blocks_since(id, tokens, began_with[&id]));
        let used = blocks.sum::<u32>() + self.pool.held_by_others;
        assert!(used <= config.num_blocks, "{used} of {} blocks", config.num_blocks);
        assert!(self.pool.cached.len() as u32 <= config.max_running);
        let swapped: u32 = self.pool.swapped.iter().map(|(&id, &tokens)| self.pool.blocks(id, tokens)).sum();
        assert!(swapped <= config.max_swapped_blocks && swapped == self.scheduler.num_swapped_blocks());
        self.finish(&schedule);
        schedule
    }

    /// Says what the step has done; ends what is complete.
    pub(super) fn finish(&mut self, schedule: &StepSchedule) {
        for chunk in &schedule.chunks {
            let accepted = self.drafts.as_mut().map_or(0, |rng| rng.u32(0..=chunk.drafts));
            self.num_accepted += accepted;
            let cached = self.pool.cached.get_mut(&chunk.request).expect("it has blocks");
            *cached -= chunk.drafts - accepted;
            let (want, have) = self.answers.get_mut(&chunk.request).expect("it is there");
            if chunk.samples {
                // What is right beyond the answer's end counts for nothing.
                let made = (accepted + 1).min(*want - *have);
                *have += made;
                (0..made).for_each(|_| self.scheduler.push_token(chunk.request));
            }
            self.scheduler.set_cached(chunk.request, *cached);
            if have == want {
                assert!(self.scheduler.remove(chunk.request));
                self.drop_request(chunk.request);
                self.finished.push(chunk.request);
            }
        }
    }

    /// Steps until nothing is left. Every step must bring something on.
    pub(super) fn run(&mut self) -> u32 {
        let mut num_steps = 0;
        while !self.scheduler.is_empty() {
            let schedule = self.step();
            let moves = !(schedule.chunks.is_empty() && schedule.preempted.is_empty() && schedule.expired.is_empty());
            assert!(moves, "a step in which nothing happens: {schedule:?}");
            num_steps += 1;
        }
        assert_eq!(self.pool.used(), 0);
        num_steps
    }
}
