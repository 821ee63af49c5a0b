//! Workloads of thousands of requests against a model of the cache, and one test for each promise.

mod world;

use std::time::Duration;

use fastrand::Rng;

use crate::layout::{LayerGroup, LayerGroups};

use super::{Costs, Demand, Memory, Preemption, PrefixHit, Refusal, RequestId, Scheduler, SchedulerConfig};
use world::{Pool, TICK, World};

fn random_config(rng: &mut Rng) -> SchedulerConfig {
    let mut config = SchedulerConfig::new(rng.u32(4..80), [1, 4, 16][rng.usize(..3)]);
    config.max_step_tokens = rng.u32(1..100);
    config.max_running = rng.u32(1..40);
    config.max_queued = rng.u32(1..60);
    config.max_preemptions = rng.u32(0..4);
    config.ageing = TICK * rng.u32(0..50);
    config.max_swapped_blocks = rng.u32(0..40);
    config.costs = Costs { swap_block: TICK * rng.u32(1..9), compute_token: TICK };
    config
}

fn random_group(rng: &mut Rng, config: &SchedulerConfig) -> LayerGroup {
    let window = rng.u32(1..=config.num_blocks * config.block_size);
    LayerGroup { window: Some(window), sink_tokens: rng.u32(..5) * rng.u32(..10) }
}

fn random_demand(rng: &mut Rng, config: &SchedulerConfig) -> Demand {
    // With a window a text may be longer than the cache.
    let most = config.room(config.num_blocks) * if config.groups.has_windows() { 3 } else { 1 };
    let prompt = if rng.bool() { rng.u32(1..=most.min(20)) } else { rng.u32(1..=most) };
    let new = rng.u32(1..=(most + 1 - prompt).min(60));
    let demand = Demand { priority: rng.i32(-2..3), ..Demand::new(prompt, new) };
    let wide = Demand { beams: rng.u32(2..5), ..demand };
    // The model of the cache knows no beams with windows.
    let fits = !config.groups.has_windows()
        && wide.max_blocks(config) <= u64::from(config.num_blocks)
        && wide.beams <= config.max_step_tokens;
    if fits && rng.u32(..6) == 0 { wide } else { demand }
}

#[test]
fn random_workloads_finish_within_memory_and_budget() {
    let mut total = 0;
    let mut preempted = 0;
    let mut num_right = 0;
    let mut longest = 0;
    for seed in 0..2000 {
        let mut rng = Rng::with_seed(seed);
        let mut config = random_config(&mut rng);
        if seed >= 1500 {
            config.groups = LayerGroups::one(random_group(&mut rng, &config));
        }
        if seed >= 1700 {
            let groups: Vec<_> = (0..rng.u32(2..5))
                .map(|_| if rng.bool() { LayerGroup::ALL } else { random_group(&mut rng, &config) })
                .collect();
            config.groups = LayerGroups::new(&groups).expect("a few");
            config.num_blocks *= config.groups.count();
        }
        let mut world = World::new(config);
        world.drafts = rng.bool().then(|| rng.fork());
        let mut accepted = 0;
        let mut cancelled = 0;
        for _ in 0..rng.u32(1..60) {
            let demand = random_demand(&mut rng, &config);
            match world.submit(demand, rng.u32(1..60)) {
                Ok(_) => accepted += 1,
                Err(Refusal::TooLong { need, .. }) => assert!(config.groups.has_windows() && need > config.num_blocks),
                Err(refusal) => assert!(matches!(refusal, Refusal::QueueFull(waiting) if waiting >= config.max_queued)),
            }
            for _ in 0..rng.u32(0..4) {
                world.step();
            }
            if rng.u32(..10) == 0
                && let Some(&id) = world.answers.keys().next()
            {
                world.cancel(id);
                cancelled += 1;
            }
        }
        world.run();
        assert_eq!(world.finished.len() + cancelled, accepted, "seed {seed}");
        assert!(world.max_preemptions_seen <= config.max_preemptions, "seed {seed}");
        total += accepted;
        longest = longest.max(if config.groups.has_windows() { world.longest } else { 0 });
        preempted += usize::from(world.max_preemptions_seen > 0);
        num_right += world.num_accepted;
    }
    // The workloads are as hard as they are meant to be.
    assert!(total > 20_000 && preempted > 500, "{total} requests, {preempted} workloads with preemptions");
    assert!(num_right > 20_000, "{num_right} drafts were right");
    assert!(longest > 2 * 80 * 16, "{longest} tokens of a request, in caches of 80 blocks of 16 at most");
}

#[test]
fn every_request_that_wants_one_token_is_in_every_step() {
    let mut config = SchedulerConfig::new(1000, 16);
    config.max_step_tokens = 64;
    let mut world = World::new(config);
    for _ in 0..32 {
        world.submit(Demand::new(1, 100), 100).expect("room");
    }
    world.step();
    for _ in 0..10 {
        world.submit(Demand::new(400, 10), 10).expect("room");
    }
    for _ in 0..50 {
        let decoding: Vec<_> = (0..32).map(RequestId).collect();
        let schedule = world.step();
        let single: Vec<_> = schedule.chunks.iter().map(|chunk| chunk.request).filter(|id| id.0 < 32).collect();
        assert_eq!(single, decoding);
        assert_eq!(schedule.chunks.iter().map(|chunk| chunk.tokens).sum::<u32>(), 64, "the rest is for prompts");
    }
}

/// Drafts take what is left of tokens and blocks, after prompts.
#[test]
fn drafts_come_last() {
    let mut config = SchedulerConfig::new(100, 4);
    config.max_step_tokens = 10;
    let mut world = World::new(config);
    let drafter = world.submit(Demand::new(3, 20), 20).expect("room");
    world.step();
    let prompt = world.submit(Demand::new(7, 1), 1).expect("room");
    let drafts_of = |world: &mut World, drafts: u32| {
        world.scheduler.set_drafts(drafter, drafts);
        let schedule = world.scheduler.clone().next_step(world.now, &world.pool);
        schedule.chunks.iter().map(|chunk| (chunk.request, chunk.tokens, chunk.drafts)).collect::<Vec<_>>()
    };
    assert_eq!(drafts_of(&mut world, 8), [(drafter, 1, 2), (prompt, 7, 0)]);
    // One block is left, too little for the prompt.
    world.pool.held_by_others = 98;
    assert_eq!(drafts_of(&mut world, 8), [(drafter, 1, 4)]);
    world.pool.held_by_others = 0;
    world.cancel(prompt);
    assert_eq!(drafts_of(&mut world, 30), [(drafter, 1, 9)]);
    assert!(world.scheduler.may_draft(drafter) && !world.scheduler.may_draft(prompt));
    // An answer of 20 tokens feeds 19: the one it has now, and 18 more.
    world.scheduler.config.max_step_tokens = 64;
    assert_eq!(drafts_of(&mut world, 30), [(drafter, 1, 18)]);
}

#[test]
fn more_decodes_than_the_budget_take_turns() {
    let mut config = SchedulerConfig::new(1000, 16);
    config.max_step_tokens = 8;
    let mut world = World::new(config);
    for _ in 0..20 {
        world.submit(Demand::new(1, 60), 60).expect("room");
    }
    for _ in 0..25 {
        world.step();
    }
    let made: Vec<_> = world.answers.values().map(|&(_, made)| made).collect();
    let (least, most) = (made.iter().min().copied(), made.iter().max().copied());
    assert_eq!(made.iter().sum::<u32>(), 200);
    assert!(least >= Some(9) && most <= Some(11), "{made:?}");
}

/// Tokens of a chunk come, however many requests want a single one.
#[test]
fn a_prompt_gets_its_turn_among_decodes_that_fill_every_step() {
    let mut config = SchedulerConfig::new(1000, 16);
    config.max_step_tokens = 8;
    let mut world = World::new(config);
    for _ in 0..20 {
        world.submit(Demand::new(1, 300), 300).expect("room");
    }
    world.step();
    let prompt = world.submit(Demand::new(6, 3), 3).expect("room");
    for _ in 0..40 {
        world.step();
    }
    assert_eq!(world.finished, [prompt]);
}

/// Victims that share blocks with each other only: their true number counts in the next step, and the best rank waits for it.
#[test]
fn shared_blocks_of_victims_are_no_reason_to_preempt_the_best_rank() {
    struct Pair {
        free: u32,
    }
    impl Memory for Pair {
        fn free_blocks(&self) -> u32 {
            self.free
        }
        fn exclusive_blocks(&self, request: RequestId) -> u32 {
            u32::from(request == RequestId(0))
        }
    }
    let mut config = SchedulerConfig::new(8, 1);
    config.max_step_tokens = 64;
    let mut scheduler = Scheduler::new(config).expect("valid");
    let ids = [0; 3].map(|_| scheduler.submit(Duration::ZERO, Demand::new(1, 7)).expect("room"));
    scheduler.next_step(TICK, &Pair { free: 8 });
    for id in ids {
        scheduler.set_cached(id, 1);
        scheduler.push_token(id);
    }
    let schedule = scheduler.next_step(TICK, &Pair { free: 0 });
    assert_eq!(schedule.preempted.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [ids[2], ids[1]]);
    assert_eq!(scheduler.preemptions(ids[0]), Some(0));
    let schedule = scheduler.next_step(TICK, &Pair { free: 2 });
    assert_eq!(schedule.chunks[0].request, ids[0]);
}

#[test]
fn a_short_prompt_does_not_wait_for_all_of_a_long_one() {
    let mut config = SchedulerConfig::new(10_000, 16);
    config.max_step_tokens = 128;
    let mut world = World::new(config);
    world.submit(Demand::new(20_000, 4), 4).expect("room");
    world.step();
    let short = world.submit(Demand::new(100, 1), 1).expect("room");
    world.step();
    world.step();
    assert_eq!(world.finished, [short]);
}

#[test]
fn a_higher_priority_comes_first_and_a_lower_one_is_not_starved() {
    let mut config = SchedulerConfig::new(100, 16);
    config.max_running = 1;
    config.ageing = TICK * 100;
    let mut world = World::new(config);
    world.submit(Demand::new(16, 10), 10).expect("room");
    world.step();
    let low = world.submit(Demand::new(16, 10), 10).expect("room");
    let high = world.submit(Demand { priority: 1, ..Demand::new(16, 10) }, 10).expect("room");
    // A flood that is always a level higher: it overtakes `low` only as long as it comes at most 100 steps later.
    for _ in 0..400 {
        if world.scheduler.num_waiting() < 5 {
            world.submit(Demand { priority: 1, ..Demand::new(16, 10) }, 10).expect("room");
        }
        world.step();
    }
    assert_eq!(world.finished[1], high);
    let place = world.finished.iter().position(|&id| id == low).expect("it has finished");
    // 100 steps are ten requests; those that waited then come before, too.
    assert!((9..=16).contains(&place), "low priority finished at place {place}");
}

#[test]
fn a_request_far_ahead_in_rank_preempts_and_one_just_ahead_waits() {
    for (priority, preempts) in [(1, true), (0, false)] {
        let mut config = SchedulerConfig::new(10, 16);
        config.ageing = TICK * 10;
        let mut world = World::new(config);
        let first = world.submit(Demand::new(100, 60), 60).expect("room");
        world.step();
        // A level of head start is 10 steps, and it comes 2 steps later: so it takes two levels.
        let second = world.submit(Demand { priority: priority * 2, ..Demand::new(100, 2) }, 2).expect("room");
        world.step();
        let schedule = world.step();
        let starts = schedule.admitted.iter().any(|&(id, _)| id == second);
        assert_eq!(starts, preempts);
        assert_eq!(world.scheduler.preemptions(first), Some(u32::from(preempts)));
        world.run();
        assert_eq!(world.finished.len(), 2);
    }
}

#[test]
fn the_best_rank_is_never_preempted_for_memory() {
    for seed in 0..200 {
        let mut rng = Rng::with_seed(seed);
        let mut config = SchedulerConfig::new(rng.u32(8..30), 4);
        config.max_step_tokens = 16;
        config.ageing = Duration::from_secs(1000);
        let mut world = World::new(config);
        let most = config.num_blocks * 4;
        let first = world.submit(Demand::new(most / 2, most / 2), most / 2).expect("room");
        for _ in 0..20 {
            world.submit(Demand::new(rng.u32(1..10), rng.u32(1..20)), 20).expect("room");
        }
        while world.answers.contains_key(&first) {
            world.step();
            assert!(world.scheduler.preemptions(first).is_none_or(|count| count == 0), "seed {seed}");
        }
    }
}

#[test]
fn preemption_takes_the_cheaper_way_and_respects_the_hosts_memory() {
    let preemption = |swap_ms: u64, max_swapped: u32| {
        let mut config = SchedulerConfig::new(16, 4);
        config.costs = Costs { swap_block: Duration::from_millis(swap_ms), compute_token: Duration::from_millis(1) };
        config.max_swapped_blocks = max_swapped;
        let mut world = World::new(config);
        world.submit(Demand::new(20, 40), 40).expect("room");
        world.submit(Demand::new(20, 40), 40).expect("room");
        loop {
            let schedule = world.step();
            if let Some(&(id, how)) = schedule.preempted.first() {
                assert_eq!(id, RequestId(1));
                world.run();
                return how;
            }
        }
    };
    // 4 tokens of 1 ms against a block twice.
    assert_eq!(preemption(1, 16), Preemption::Swap);
    assert_eq!(preemption(3, 16), Preemption::Recompute);
    assert_eq!(preemption(1, 2), Preemption::Recompute);
}

#[test]
fn deadlines_end_requests_wherever_they_are() {
    let mut config = SchedulerConfig::new(16, 4);
    config.max_running = 1;
    let mut world = World::new(config);
    let demand = Demand { deadline: Some(TICK * 5), ..Demand::new(8, 30) };
    let running = world.submit(demand, 30).expect("room");
    let waiting = world.submit(demand, 30).expect("room");
    let later = world.submit(Demand::new(8, 3), 3).expect("room");
    world.run();
    assert_eq!((world.expired, world.finished), (vec![running, waiting], vec![later]));
    assert_eq!(world.scheduler.submit(TICK * 9, demand), Err(Refusal::DeadlinePassed));
}

#[test]
fn what_can_never_run_is_refused() {
    let mut scheduler = Scheduler::new(SchedulerConfig::new(4, 16)).expect("valid");
    let zero = Duration::ZERO;
    assert!(scheduler.submit(zero, Demand::new(60, 5)).is_ok());
    assert_eq!(scheduler.submit(zero, Demand::new(60, 6)), Err(Refusal::TooLong { need: 5, have: 4 }));
    assert!(matches!(scheduler.submit(zero, Demand::new(u32::MAX, u32::MAX)), Err(Refusal::TooLong { .. })));
    let mut huge = Scheduler::new(SchedulerConfig::new(1 << 28, 16)).expect("valid");
    assert!(matches!(huge.submit(zero, Demand::new(u32::MAX, 1)), Err(Refusal::TooLong { .. })));
    assert!(huge.submit(zero, Demand::new(u32::MAX - 1, 1)).is_ok());
    let full = Pool { num_blocks: 1 << 28, block_size: 16, ..Pool::default() };
    assert_eq!(huge.next_step(zero, &full).chunks.len(), 1);
    assert_eq!(scheduler.submit(zero, Demand::new(0, 5)), Err(Refusal::Empty("prompt_tokens")));
    assert_eq!(scheduler.submit(zero, Demand::new(5, 0)), Err(Refusal::Empty("max_new_tokens")));
    assert!(!scheduler.remove(RequestId(7)));
    assert!(scheduler.remove(RequestId(0)) && !scheduler.remove(RequestId(0)));
    for argument in ["num_blocks", "block_size", "max_step_tokens", "max_running", "max_queued"] {
        let mut config = SchedulerConfig::new(4, 16);
        *match argument {
            "num_blocks" => &mut config.num_blocks,
            "block_size" => &mut config.block_size,
            "max_step_tokens" => &mut config.max_step_tokens,
            "max_running" => &mut config.max_running,
            _ => &mut config.max_queued,
        } = 0;
        let error = Scheduler::new(config).expect_err("refused").to_string();
        assert!(error.starts_with(argument), "{error}");
    }
}

#[test]
fn blocks_that_others_hold_are_reported_and_waited_for() {
    let mut world = World::new(SchedulerConfig::new(10, 16));
    world.pool.held_by_others = 8;
    let id = world.submit(Demand::new(100, 5), 5).expect("it fits an empty cache");
    let schedule = world.step();
    assert_eq!((schedule.blocked, schedule.chunks.len()), (Some(id), 0));
    world.pool.held_by_others = 0;
    world.run();
    assert_eq!(world.finished, [id]);
}

/// Requests whose prompts the index knows, or somebody is computing.
struct Shared {
    free: u32,
    hit: PrefixHit,
    waits: Option<RequestId>,
}

impl Memory for Shared {
    fn free_blocks(&self) -> u32 {
        self.free
    }

    fn exclusive_blocks(&self, _request: RequestId) -> u32 {
        0
    }

    fn prefix(&self, _request: RequestId) -> PrefixHit {
        self.hit
    }

    fn waits_for_prefix(&self, request: RequestId) -> bool {
        self.waits == Some(request)
    }
}

#[test]
fn a_known_prefix_is_not_computed_and_one_that_is_being_computed_is_waited_for() {
    let mut scheduler = Scheduler::new(SchedulerConfig::new(100, 16)).expect("valid");
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(scheduler.submit(Duration::ZERO, Demand::new(100, 10)).expect("room"));
    }
    let hit = PrefixHit { tokens: 96, free_blocks: 6 };
    let memory = Shared { free: 100, hit, waits: Some(ids[1]) };
    let schedule = scheduler.next_step(TICK, &memory);
    assert_eq!(schedule.admitted, [(ids[0], 96), (ids[2], 96)]);
    assert!(schedule.chunks.iter().all(|chunk| chunk.tokens == 4 && chunk.samples));
    // The blocks of a hit that only the index holds are no longer free.
    let mut scheduler = Scheduler::new(SchedulerConfig::new(8, 16)).expect("valid");
    scheduler.submit(Duration::ZERO, Demand::new(100, 10)).expect("room");
    let blocked = scheduler.next_step(TICK, &Shared { free: 6, hit, waits: None });
    assert!(blocked.chunks.is_empty() && blocked.blocked == Some(RequestId(0)));
}

#[test]
fn a_step_of_256_requests_is_planned_in_under_a_millisecond() {
    let mut config = SchedulerConfig::new(100_000, 16);
    config.max_step_tokens = 2048;
    let mut world = World::new(config);
    let mut rng = Rng::with_seed(1);
    for _ in 0..256 {
        world.submit(Demand::new(rng.u32(1..200), 1000), 1000).expect("room");
    }
    for _ in 0..20 {
        world.step();
    }
    let mut times: Vec<_> = (0..50)
        .map(|_| {
            let start = std::time::Instant::now();
            let schedule = world.scheduler.next_step(world.now, &world.pool);
            let time = start.elapsed();
            assert_eq!(schedule.chunks.len(), 256);
            time
        })
        .collect();
    times.sort();
    // A debug build takes some ten times as long.
    let bar = Duration::from_millis(if cfg!(debug_assertions) { 10 } else { 1 });
    assert!(times[25] < bar, "{:?}", times[25]);
}
