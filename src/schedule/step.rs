//! [`Scheduler::next_step`]: the decisions of one step.

use std::time::Duration;

use super::scheduler::{Phase, Request};
use super::{Memory, RequestId, ScheduledChunk, Scheduler, StepSchedule};

/// A request that takes part.
struct Running {
    id: RequestId,
    /// Tokens whose blocks have been taken out of the free ones.
    reserved: u32,
}

/// Free blocks while a step is planned, and what was decided so far.
struct Planner<'a, M: Memory> {
    scheduler: &'a mut Scheduler,
    memory: &'a M,
    free: u32,
    schedule: StepSchedule,
}

impl Scheduler {
    /// Decides what happens next, and counts on it being carried out: requests change their place here. Only [`set_cached`](Self::set_cached)
    /// and [`push_token`](Self::push_token) say what a step has done. Takes time in proportion to the number of requests, a little more for
    /// their order, and what `memory` takes.
    pub fn next_step(&mut self, now: Duration, memory: &impl Memory) -> StepSchedule {
        let free = memory.free_blocks();
        let mut planner = Planner { scheduler: self, memory, free, schedule: StepSchedule::default() };
        planner.expire(now);
        let mut running = planner.keep_running();
        // Who was preempted a moment ago would take back what was taken from it.
        if planner.schedule.preempted.is_empty() {
            planner.admit(&mut running);
        }
        planner.share_tokens(&running);
        let schedule = planner.schedule;
        self.requests.values_mut().for_each(|request| request.drafts = 0);
        schedule
    }

    /// Requests in a phase, best rank first.
    fn ranked(&self, is_in: impl Fn(Phase) -> bool) -> Vec<RequestId> {
        let mut ranks: Vec<_> =
            self.requests.values().filter(|request| is_in(request.phase)).map(|request| request.rank).collect();
        ranks.sort_unstable();
        ranks.into_iter().map(|(_, id)| id).collect()
    }

    /// Blocks that a request is sure to take until all that it is sure to have is in the cache, if it has so many tokens there now.
    fn blocks_soon(&self, request: &Request, cached: u32) -> u32 {
        let grown = self.config.blocks(request.soon()) - self.config.blocks(cached);
        // With a window it gives blocks back on the way.
        let most = self.config.most_blocks(request.soon());
        grown.min(most.saturating_sub(self.config.held_blocks(cached)))
    }

    /// Blocks that a request needs beside its own to have `to` tokens in the cache.
    fn growth(&self, request: &Request, to: u32, memory: &impl Memory) -> u32 {
        let cached = request.cached;
        if to <= cached {
            return 0;
        }
        let grows = !cached.is_multiple_of(self.config.block_size);
        let copies = if grows { memory.copied_blocks(request.rank.1) } else { 0 };
        let need = (self.config.blocks(to) - self.config.blocks(cached)).saturating_mul(request.num_texts());
        let need = need.saturating_add(copies);
        if request.num_texts() == 1 {
            return need;
        }
        // Beams that end make room for copies: they never have more than this together.
        let own = self.config.blocks(to) - self.config.full_blocks(request.demand.prompt_tokens);
        let most = own.saturating_mul(request.demand.beams).saturating_add(self.config.groups.count());
        need.min(most.saturating_sub(memory.beam_blocks(request.rank.1)))
    }
}

impl<M: Memory> Planner<'_, M> {
    fn request(&self, id: RequestId) -> &Request {
        &self.scheduler.requests[&id]
    }

    /// Gives up what is late. The caller frees its blocks before it does anything else.
    fn expire(&mut self, now: Duration) {
        let is_late = |request: &Request| request.demand.deadline.is_some_and(|deadline| deadline <= now);
        let requests = &self.scheduler.requests;
        let late: Vec<_> = requests.iter().filter(|(_, request)| is_late(request)).map(|(&id, _)| id).collect();
        for id in late {
            if self.request(id).phase == Phase::Running {
                self.free = self.free.saturating_add(self.memory.exclusive_blocks(id));
            }
            self.scheduler.requests.remove(&id);
            self.schedule.expired.push(id);
        }
    }

    fn preempt(&mut self, id: RequestId) {
        self.free = self.free.saturating_add(self.memory.exclusive_blocks(id));
        if let Some(how) = self.scheduler.preempt(id) {
            self.schedule.preempted.push((id, how));
        }
    }

    /// Takes the blocks for a token of every running request, best rank first and pinned ones before all, and preempts the worst ranks where
    /// there are too few.
    ///
    /// A pinned request always finds room: the pinned ones' whole lengths fit into the cache together, and all others may be preempted.
    fn keep_running(&mut self) -> Vec<Running> {
        let ranked = self.scheduler.ranked(|phase| phase == Phase::Running);
        let (pinned, mut others): (Vec<_>, Vec<_>) =
            ranked.into_iter().partition(|&id| self.scheduler.is_pinned(self.request(id)));
        others.reverse();
        let mut running = Vec::with_capacity(pinned.len() + others.len());
        for id in pinned {
            self.keep(id, &mut others, &mut running);
        }
        // The best rank is last.
        while let Some(id) = others.pop() {
            self.keep(id, &mut others, &mut running);
        }
        running
    }

    /// Keeps one request running, at the cost of `others`, the worst rank first.
    fn keep(&mut self, id: RequestId, others: &mut Vec<RequestId>, running: &mut Vec<Running>) {
        let request = self.request(id);
        let reserved = request.remaining().min(1);
        let need = self.scheduler.growth(request, request.cached + reserved, self.memory);
        let is_pinned = self.scheduler.is_pinned(request);
        let has_blocks = request.cached > 0;
        let num_preempted = self.schedule.preempted.len();
        while self.free < need && !others.is_empty() {
            let worst = others.remove(0);
            self.preempt(worst);
        }
        if self.free >= need {
            self.free -= need;
            running.push(Running { id, reserved });
        } else if running.is_empty() && self.schedule.preempted.is_empty() {
            // Nothing is left to take from.
            self.schedule.blocked = Some(id);
        } else if !is_pinned && has_blocks && self.schedule.preempted.len() == num_preempted {
            self.preempt(id);
        }
        // Where others were preempted for it, blocks that these shared with each other count only in the next step: it waits for that.
    }

    /// Lets waiting requests start, and swapped ones come back, strictly by rank: where the first one finds no room, nobody behind it gets it.
    fn admit(&mut self, running: &mut Vec<Running>) {
        let waiting = self.scheduler.ranked(|phase| phase != Phase::Running);
        // What running requests are sure to take soon, and a block more for each and each group, so that an admission is no reason for a preemption.
        let spare = self.scheduler.config.groups.count();
        let promised = |running: &[Running], this: &Self| -> u32 {
            let soon = |kept: &Running| {
                let request = this.request(kept.id);
                let now = this.scheduler.growth(request, request.cached + kept.reserved, this.memory);
                let soon = this.scheduler.growth(request, request.soon(), this.memory);
                let most = u32::try_from(request.demand.max_blocks(&this.scheduler.config)).unwrap_or(u32::MAX);
                soon.saturating_sub(now).min(most) + spare
            };
            running.iter().map(soon).fold(0, u32::saturating_add)
        };
        let mut promised_blocks = promised(running, self);
        // Some may have blocks and no turn.
        let mut num_running = self.scheduler.num_running();
        for id in waiting {
            if num_running >= self.scheduler.config.max_running {
                return;
            }
            let request = self.request(id);
            let hit = if request.phase == Phase::Waiting {
                if self.memory.waits_for_prefix(id) {
                    continue;
                }
                self.memory.prefix(id)
            } else {
                Default::default()
            };
            if self.scheduler.is_pinned(request) && !self.can_reserve(request, running) {
                return;
            }
            let hit_tokens = hit.tokens.min(request.known - 1);
            // What is in the host's memory comes back, and what the index has is held again.
            let (there, back) = match request.phase {
                Phase::Swapped => (request.cached, self.scheduler.config.held_blocks(request.cached)),
                _ => (hit_tokens, hit.free_blocks),
            };
            let need = self.scheduler.blocks_soon(request, there).saturating_add(back);
            // With nothing else running there is nothing to be careful of.
            let careful_need = if running.is_empty() { need } else { need.saturating_add(promised_blocks) };
            if self.free < careful_need {
                if running.is_empty() {
                    self.schedule.blocked = Some(id);
                }
                self.preempt_for(id, careful_need, running);
                return;
            }
            let reserved = self.start(id, hit_tokens, hit.free_blocks);
            let request = self.request(id);
            let rest = self.scheduler.blocks_soon(request, request.cached + reserved);
            promised_blocks = promised_blocks.saturating_add(rest + spare);
            running.push(Running { id, reserved });
            num_running += 1;
        }
    }

    /// Moves a request to the running ones. Returns the tokens whose blocks it has taken, beyond those that it has cached.
    fn start(&mut self, id: RequestId, hit_tokens: u32, hit_blocks: u32) -> u32 {
        let config = self.scheduler.config;
        let Some(request) = self.scheduler.requests.get_mut(&id) else { return 0 };
        let was = std::mem::replace(&mut request.phase, Phase::Running);
        if was == Phase::Swapped {
            self.free -= config.held_blocks(request.cached);
            self.schedule.resumed.push(id);
        } else {
            self.free -= hit_blocks;
            request.cached = hit_tokens;
            self.schedule.admitted.push((id, hit_tokens));
        }
        let reserved = request.remaining().min(1);
        self.free -= config.blocks(request.cached + reserved) - config.blocks(request.cached);
        reserved
    }

    /// Whether the cache holds this request and the pinned ones that run, each at its longest.
    fn can_reserve(&self, request: &Request, running: &[Running]) -> bool {
        let config = &self.scheduler.config;
        let most = |request: &Request| request.demand.max_blocks(config);
        let pinned = running.iter().map(|kept| self.request(kept.id)).filter(|other| self.scheduler.is_pinned(other));
        pinned.map(most).sum::<u64>() + most(request) <= u64::from(config.num_blocks)
    }

    /// Preempts running requests that are a whole level behind one that waits, the worst rank first, if that makes room for it. It starts in
    /// the next step, when their blocks are there.
    fn preempt_for(&mut self, id: RequestId, need: u32, running: &mut Vec<Running>) {
        let level = self.scheduler.config.ageing.as_nanos() as i128;
        let rank = self.request(id).rank;
        let mut behind: Vec<_> = running
            .iter()
            .map(|kept| self.request(kept.id))
            // Those that were admitted a moment ago are ahead.
            .filter(|other| other.rank > rank && other.rank.0 - rank.0 >= level && !self.scheduler.is_pinned(other))
            .map(|other| other.rank)
            .collect();
        behind.sort_unstable();
        let mut victims = Vec::new();
        let mut free = self.free;
        while free < need {
            let Some((_, victim)) = behind.pop() else { return };
            free = free.saturating_add(self.memory.exclusive_blocks(victim));
            victims.push(victim);
        }
        for victim in victims {
            running.retain(|kept| kept.id != victim);
            self.preempt(victim);
        }
    }

    /// Shares the step's tokens out: one each to those that want one, then chunks, best rank first, then drafts.
    fn share_tokens(&mut self, running: &[Running]) {
        let mut left = self.scheduler.config.max_step_tokens;
        self.share_among(running, &mut left);
        let mut chunks = std::mem::take(&mut self.schedule.chunks);
        for chunk in chunks.iter_mut().filter(|chunk| chunk.samples && chunk.tokens == 1) {
            let request = self.request(chunk.request);
            let config = &self.scheduler.config;
            let end = request.cached + 1;
            let blocks = config.blocks(end);
            let room = config.room(blocks.saturating_add(self.free)).saturating_sub(end);
            chunk.drafts = request.drafts.min(left).min(room);
            self.free -= config.blocks(end + chunk.drafts) - blocks;
            left -= chunk.drafts;
        }
        self.schedule.chunks = chunks;
    }

    fn share_among(&mut self, running: &[Running], left: &mut u32) {
        let (mut single, mut many): (Vec<_>, Vec<_>) =
            running.iter().filter(|kept| kept.reserved > 0).partition(|kept| self.request(kept.id).remaining() == 1);
        // Where they fill the step alone, a chunk must not wait for ever: the one that has waited longest takes its turn among them, by a token.
        if single.iter().map(|kept| self.request(kept.id).num_texts()).sum::<u32>() >= *left {
            let turn = |kept: &&Running| (self.request(kept.id).last_turn, self.request(kept.id).rank);
            if let Some(at) = (0..many.len()).min_by_key(|&at| turn(&many[at])) {
                single.push(many.remove(at));
            }
        }
        // If there are more than a step holds, they take turns.
        single.sort_by_key(|kept| (self.request(kept.id).last_turn, self.request(kept.id).rank));
        many.sort_by_key(|kept| self.request(kept.id).rank);
        for kept in single {
            if *left == 0 {
                return;
            }
            // Beams go through the model together, in a step that has room for all.
            let num_texts = self.request(kept.id).num_texts();
            if *left >= num_texts {
                *left -= num_texts;
                self.push_chunk(kept.id, 1);
            }
        }
        let num_chunks = many.len();
        for (i, kept) in many.into_iter().enumerate() {
            if *left == 0 {
                return;
            }
            // Half of what is left for each but the last, so that a short prompt doesn't wait for all of a long one.
            let share = if i + 1 < num_chunks { left.div_ceil(2) } else { *left };
            let tokens = self.fill(kept, share);
            *left -= tokens;
            self.push_chunk(kept.id, tokens);
        }
    }

    /// Takes blocks for a chunk of up to `share` tokens. Returns how many tokens it gets.
    fn fill(&mut self, kept: &Running, share: u32) -> u32 {
        let request = self.request(kept.id);
        let config = &self.scheduler.config;
        let reserved_blocks = config.blocks(request.cached + kept.reserved);
        let room = config.room(reserved_blocks.saturating_add(self.free)) - request.cached;
        let tokens = request.remaining().min(share).min(room).max(kept.reserved);
        self.free -= config.blocks(request.cached + tokens) - reserved_blocks;
        tokens
    }

    fn push_chunk(&mut self, id: RequestId, tokens: u32) {
        self.scheduler.num_turns += 1;
        let num_turns = self.scheduler.num_turns;
        if let Some(request) = self.scheduler.requests.get_mut(&id) {
            request.last_turn = num_turns;
            let samples = tokens == request.remaining();
            self.schedule.chunks.push(ScheduledChunk { request: id, tokens, samples, drafts: 0 });
        }
    }
}
