//! Layers that keep different tokens: each group has tables of its own over one pool, and every layer sees what it should.

use fastrand::Rng;
use folio::wgpu::{CommandEncoderDescriptor, ComputePassDescriptor};
use folio::{
    Attention, AttentionConfig, BlockId, ErrorKind, Gpu, KvCache, KvCacheConfig, KvFormat, LayerGroup, LayerGroups,
    SequenceId, SequenceSnapshot, TokenTree,
};

use crate::adapter;
use crate::case::{Case, Rows, poison, upload};

const HEADS: u32 = 2;
const DIM: u32 = 8;
const WINDOW: u32 = 10;
/// Elements of a token's keys in a layer.
const ROW: usize = DIM as usize;

/// Two layers with a window and a sink token, and two that keep all.
fn config() -> KvCacheConfig {
    let groups = [LayerGroup { window: Some(WINDOW), sink_tokens: 1 }, LayerGroup::ALL];
    let config = KvCacheConfig::new(4, 1, DIM).with_blocks(90, 4).with_formats(KvFormat::F32, KvFormat::F32);
    config.with_groups(LayerGroups::new(&groups).expect("two groups"))
}

fn attention_config(group: u32) -> AttentionConfig {
    let mut config = AttentionConfig::new(HEADS);
    if group == 0 {
        (config.window, config.sink_tokens) = (Some(WINDOW), 1);
    }
    config
}

/// A sequence, and what each layer has appended to it: K and V.
#[derive(Clone)]
struct Text {
    id: SequenceId,
    rows: [[Vec<f32>; 2]; 4],
}

impl Text {
    fn len(&self) -> u32 {
        (self.rows[0][0].len() / ROW) as u32
    }

    /// The same tokens under another id, up to `len`.
    fn cut(&self, id: SequenceId, len: u32) -> Self {
        let rows = self.rows.clone().map(|layer| layer.map(|side| side[..len as usize * ROW].to_vec()));
        Self { id, rows }
    }
}

struct World {
    gpu: Gpu,
    cache: KvCache,
    attentions: [Attention; 2],
    rng: Rng,
}

impl World {
    fn new(gpu: &Gpu) -> Self {
        let cache = KvCache::new_blocking(gpu, config()).expect("cache");
        poison(&cache);
        shuffle_groups(&cache);
        let attentions =
            [0, 1].map(|group| Attention::new_blocking(&cache, attention_config(group)).expect("attention"));
        Self { gpu: gpu.clone(), cache, attentions, rng: Rng::with_seed(3) }
    }

    fn text(&self) -> Text {
        Text { id: self.cache.create_sequence(), rows: Default::default() }
    }

    fn random(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.rng.f32() * 4.0 - 2.0).collect()
    }

    /// A step of new tokens in all layers; what each of them makes of it is what the oracle says.
    #[track_caller]
    fn extend(&mut self, texts: &mut [&mut Text], count: u32) {
        let batch: Vec<_> = texts.iter().map(|text| (text.id, count)).collect();
        let lens: Vec<_> = texts.iter().map(|text| (text.len(), count)).collect();
        let step = self.cache.begin_step(&batch).expect("room");
        let plans: Vec<_> = (0..2)
            .map(|group| self.attentions[group as usize].plan(step.group(group).expect("there")).expect("plan"))
            .collect();
        for layer in 0..4 {
            let group = layer / 2;
            let mut rows = Vec::new();
            let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for text in &mut *texts {
                let new = [0, 1].map(|_| self.random(count as usize * ROW));
                k.extend_from_slice(&new[0]);
                v.extend_from_slice(&new[1]);
                let own = &mut text.rows[layer];
                own.iter_mut().zip(new).for_each(|(own, new)| own.extend(new));
                let queries = self.random(count as usize * HEADS as usize * ROW);
                q.extend_from_slice(&queries);
                rows.push(Rows { q: queries, k: own[0].clone(), v: own[1].clone(), mask: Vec::new() });
            }
            let [q, k, v] = [&q, &k, &v].map(|rows| upload(&self.gpu, rows));
            let out = upload(&self.gpu, &vec![f32::NAN; texts.len() * count as usize * HEADS as usize * ROW]);
            let mut encoder = self.gpu.device().create_command_encoder(&CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
                self.cache.append(&mut pass, &step, layer as u32, &k, &v, None).expect("append");
                self.attentions[group].attend(&mut pass, &plans[group], layer as u32, &q, &out).expect("attend");
            }
            self.gpu.queue().submit([encoder.finish()]);
            let out = self.gpu.read_blocking(&out).expect("out");
            let mut case = Case::new(&lens, HEADS, 1, DIM).block_size(4).named(format!("layer {layer}"));
            case.config = attention_config(group as u32);
            case.compare(&self.gpu, &rows, &out, None);
        }
        self.cache.commit(step).expect("open");
    }

    fn submit<T>(&self, record: impl FnOnce(&mut folio::wgpu::CommandEncoder) -> T) -> T {
        let mut encoder = self.gpu.device().create_command_encoder(&CommandEncoderDescriptor::default());
        let recorded = record(&mut encoder);
        self.gpu.queue().submit([encoder.finish()]);
        recorded
    }
}

/// Blocks of both groups lie anywhere in the pool.
fn shuffle_groups(cache: &KvCache) {
    let block_size = cache.config().block_size;
    let mut holders: Vec<_> = (0..cache.config().num_blocks / 2).map(|_| cache.create_sequence()).collect();
    for &holder in &holders {
        let step = cache.begin_step(&[(holder, block_size)]).expect("step");
        cache.commit(step).expect("commit");
    }
    Rng::with_seed(5).shuffle(&mut holders);
    holders.into_iter().for_each(|holder| cache.free(holder).expect("idle"));
}

#[test]
fn every_layer_sees_what_its_group_keeps() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut world = World::new(&gpu);
    let mut a = world.text();
    for count in [3, 30, 1, 21, 14, 1] {
        world.extend(&mut [&mut a], count);
        let most: u32 = world.cache.config().most_blocks(a.len(), 30);
        assert!(world.cache.usage().used <= most);
    }
    // The group with the window has given its blocks back, the other one none.
    let id = a.id;
    world.cache.release_hidden(id).expect("idle");
    let tables = world.cache.block_tables(id).expect("known");
    let held = |table: &[BlockId]| table.iter().filter(|block| !block.is_null()).count();
    assert_eq!((tables.len(), held(&tables[0]), held(&tables[1])), (2, 4, 18));
    assert_eq!((tables[0].len(), world.cache.usage().used), (18, world.cache.config().held_blocks(70)));
    assert_eq!(world.cache.block_table(id).expect("known"), tables[0]);
    let report = world.cache.memory();
    assert_eq!((report.num_groups, report.sequences[0].blocks, report.sequences[0].released_blocks), (2, 22, 14));
    assert_eq!(report.allocated_bytes(), world.cache.config().pool_bytes());
    assert_eq!((report.released_tokens, report.cached_tokens), (56, 140 - 56));
    // Rows of all tokens are there in one group only.
    let rows = world.cache.gather_blocking(id, 3).expect("kept");
    assert_eq!([&rows.k, &rows.v], [&a.rows[3][0], &a.rows[3][1]]);
    let error = world.cache.gather_blocking(id, 1).expect_err("gone").to_string();
    assert!(error.contains("56 tokens have left the window"), "{error}");

    // A fork copies the partly filled block of each group, and neither sees the other's tokens.
    let mut b = a.cut(world.cache.fork(id).expect("idle"), 70);
    assert_eq!(world.cache.copied_blocks(b.id).expect("known"), 2);
    let step = world.cache.begin_step(&[(b.id, 1)]).expect("room");
    assert_eq!(step.num_copies(), 2);
    drop(step);
    world.extend(&mut [&mut a, &mut b], 5);
    world.extend(&mut [&mut b], 1);
    // Back by as much as the window has.
    assert!(world.cache.reaches_back(b.id, 73).expect("known") && !world.cache.reaches_back(b.id, 40).expect("known"));
    let error = world.cache.truncate(b.id, 40).expect_err("gone");
    assert!(error.kind() == ErrorKind::Caller && error.to_string().contains("left the window of 10"), "{error}");
    world.cache.truncate(b.id, 73).expect("reached");
    let mut b = b.cut(b.id, 73);
    world.extend(&mut [&mut b], 9);

    // To the host and back, through a file, and to other places.
    let swap = world.submit(|encoder| world.cache.swap_out(encoder, a.id).expect("idle"));
    let snapshot = gpu.block_on(swap.finish()).expect("snapshot");
    assert_eq!(snapshot.config().num_blocks, world.cache.config().held_blocks(75));
    let saved = snapshot.to_bytes(&[]).expect("bytes");
    let (loaded, _) = SequenceSnapshot::from_bytes(&saved).expect("sound");
    assert_eq!(loaded, snapshot);
    let back = world.submit(|encoder| world.cache.swap_in(encoder, &snapshot).expect("room"));
    assert_eq!(back.restore().expect("gone"), a.id);
    let twin = world.submit(|encoder| world.cache.swap_in(encoder, &loaded).expect("room")).commit().expect("open");
    let mut twin = a.cut(twin, 75);
    let moves = world.submit(|encoder| world.cache.defragment(encoder).expect("nothing is open"));
    assert!(moves.commit().expect("open") > 0);
    world.extend(&mut [&mut a, &mut b, &mut twin], 2);
    world.extend(&mut [&mut twin, &mut a], 13);
    // Other groups have no use for it.
    for (groups, part) in [
        (vec![LayerGroup::ALL], "got 2 groups of layers, need the cache's, 1"),
        (vec![LayerGroup::ALL; 2], "a window of 10 and 1 sink tokens, need what the cache keeps, all tokens"),
    ] {
        let groups = LayerGroups::new(&groups).expect("some");
        let other = KvCache::new_blocking(&gpu, config().with_groups(groups)).expect("cache");
        let refused = world.submit(|encoder| other.swap_in(encoder, &snapshot).map(drop).expect_err("refused"));
        assert!(refused.to_string().contains(part), "{refused}");
    }
}

/// Prefixes are found where both groups have what the next token sees, and an accepted path moves in both.
#[test]
fn prefixes_and_paths_are_those_of_both_groups() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let mut world = World::new(&gpu);
    let mut a = world.text();
    let ids: Vec<u32> = (0..60).collect();
    world.extend(&mut [&mut a], 22);
    world.cache.publish_prefix(a.id, &ids[..22], 0).expect("its tokens");
    for count in [18, 20] {
        world.extend(&mut [&mut a], count);
    }
    world.cache.publish_prefix(a.id, &ids, 0).expect("its tokens");
    // In between, the blocks of the group with the window had left it before anybody published them.
    for (query, found) in [(60, 60), (59, 56), (50, 48), (38, 20), (22, 20), (19, 16), (3, 0)] {
        assert_eq!(world.cache.probe_prefix(&ids[..query], 0).len, found, "{query} tokens");
        let hit = world.cache.match_prefix(&ids[..query], 0);
        assert_eq!(hit.len, found);
        let mut text = a.cut(hit.sequence, found);
        world.extend(&mut [&mut text], 6);
        world.cache.free(text.id).expect("idle");
    }
    world.cache.free(a.id).expect("idle");
    let hit = world.cache.match_prefix(&ids[..60], 0);
    let mut b = a.cut(hit.sequence, hit.len);
    assert_eq!(b.len(), 60);

    // A tree of six tokens of which the path 0, 2, 5 stays.
    world.extend(&mut [&mut b], 1);
    let tree = TokenTree::new(&[None, Some(0), Some(0), Some(1), Some(2), Some(2)]).expect("a tree");
    let mut step = world.cache.begin_step_with_trees(&[(b.id, 6)], &[Some(tree)]).expect("room");
    for layer in 0..4 {
        let new = [0, 1].map(|_| world.random(6 * ROW));
        let [k, v] = [0, 1].map(|side| upload(&gpu, &new[side]));
        world.submit(|encoder| world.cache.append(encoder, &step, layer, &k, &v, None).expect("append"));
        for (own, new) in b.rows[layer as usize].iter_mut().zip(new) {
            [0, 2, 5].iter().for_each(|&token| own.extend_from_slice(&new[token * ROW..(token + 1) * ROW]));
        }
    }
    world.submit(|encoder| world.cache.accept(encoder, &mut step, &[(b.id, &[0, 2, 5])]).expect("a path"));
    world.cache.commit(step).expect("open");
    assert_eq!(world.cache.seq_len(b.id).expect("known"), 64);
    world.extend(&mut [&mut b], 2);
}

#[test]
fn layers_of_another_group_are_refused() {
    let Some(gpu) = adapter::open(adapter::DEFAULT) else { return };
    let world = World::new(&gpu);
    let id = world.cache.create_sequence();
    let step = world.cache.begin_step(&[(id, 1)]).expect("room");
    let refused = |result: folio::Result<()>, part: &str| {
        let error = result.expect_err(part);
        assert!(error.kind() == ErrorKind::Caller && error.to_string().contains(part), "{error}");
    };
    refused(step.group(2).map(drop), "group: got 2, need below the number of groups of layers, 2");
    // One that sees all needs layers that keep all.
    let full = &world.attentions[1];
    refused(full.plan(&step).map(drop), "window: got None, need at most what the cache keeps, 10");
    let plan = full.plan(step.group(1).expect("there")).expect("plan");
    let [q, out] = [0, 1].map(|_| upload(&gpu, &[0.0; HEADS as usize * ROW]));
    world.submit(|encoder| {
        refused(full.attend(&mut *encoder, &plan, 1, &q, &out), "layer: got 1, of group 0, need a layer of the group");
        refused(full.attend(&mut *encoder, &plan, 4, &q, &out), "layer: got 4, need below num_layers, 4");
        full.attend(encoder, &plan, 2, &q, &out).expect("of group 1");
    });
    let mut attention = AttentionConfig::new(HEADS);
    (attention.window, attention.sink_tokens) = (Some(WINDOW + 1), 0);
    let wide = Attention::new_blocking(&world.cache, attention).expect("one group keeps all");
    refused(wide.plan(&step).map(drop), "window: got 11, need at most what the cache keeps, 10");

    let new = |change: &dyn Fn(&mut KvCacheConfig)| {
        let mut config = config();
        change(&mut config);
        KvCache::new_blocking(&gpu, config).map(drop)
    };
    refused(new(&|c| c.num_layers = 5), "num_layers: got 5, need a multiple of the 2 groups");
    refused(
        new(&|c| c.k_format = KvFormat::Int8PerChannel),
        "k_format: got Int8-channel, need a format without scales",
    );
    refused(new(&|c| *c = c.with_window(0)), "window: got 0");
    refused(LayerGroups::new(&[]).map(drop), "groups: got 0, need 1 to 16");
    refused(LayerGroups::new(&[LayerGroup::ALL; 17]).map(drop), "groups: got 17, need 1 to 16");
}
