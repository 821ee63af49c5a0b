//! One pool, many sequences: a prefix found again, a fork in the middle of a block, rejected tokens taken back, a sequence that leaves for
//! host memory and a file and comes back to other blocks. After each act the memory table says where the bytes are, and every claim is
//! checked: the rows that the cache holds are read back and compared.
//!
//! `cargo run --release --example sharing`
#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use anyhow::{Result, ensure};
use folio::wgpu::util::{BufferInitDescriptor, DeviceExt};
use folio::{Gpu, GpuOptions, KvCache, KvCacheConfig, KvFormat, SequenceId, SequenceSnapshot, wgpu};

const CONFIG: KvCacheConfig =
    KvCacheConfig::new(2, 2, 32).with_blocks(32, 16).with_formats(KvFormat::F16, KvFormat::F16);

/// Parts what must not mix although its tokens are equal: here, two tenants.
const TENANT: u64 = 1;
const OTHER_TENANT: u64 = 2;

/// A conversation: its sequence, and the tokens that it should hold.
struct Conversation {
    sequence: SequenceId,
    tokens: Vec<u32>,
}

struct Host {
    gpu: Gpu,
    cache: KvCache,
}

impl Host {
    /// In place of a model: rows that follow from token, position and layer, and that F16 holds exactly.
    fn rows(layer: u32, first: usize, tokens: &[u32]) -> [Vec<f32>; 2] {
        let elements = CONFIG.num_kv_heads * CONFIG.head_dim;
        let side = |factor: u32| {
            let row = |(i, &token): (usize, &u32)| {
                let seed = (token * factor + (first + i) as u32 * 31 + layer * 7) % 1000;
                (0..elements).map(move |element| ((seed + element) % 1024) as f32 / 8.0)
            };
            tokens.iter().enumerate().flat_map(row).collect()
        };
        [side(17), side(29)]
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    fn submit(&self, encoder: wgpu::CommandEncoder) {
        self.gpu.queue().submit([encoder.finish()]);
    }

    /// Appends tokens to a conversation; returns how many blocks had to be copied for it.
    fn append(&self, conversation: &mut Conversation, tokens: &[u32]) -> Result<u32> {
        let upload = |values: &[f32]| {
            self.gpu.device().create_buffer_init(&BufferInitDescriptor {
                label: None,
                contents: bytemuck::cast_slice(values),
                usage: wgpu::BufferUsages::STORAGE,
            })
        };
        let step = self.cache.begin_step(&[(conversation.sequence, tokens.len() as u32)])?;
        let copies = step.num_copies();
        let mut encoder = self.encoder();
        for layer in 0..CONFIG.num_layers {
            let [k, v] = Self::rows(layer, conversation.tokens.len(), tokens).map(|rows| upload(&rows));
            self.cache.append(&mut encoder, &step, layer, &k, &v, None)?;
        }
        self.submit(encoder);
        self.cache.commit(step)?;
        conversation.tokens.extend_from_slice(tokens);
        Ok(copies)
    }

    fn start(&self, tokens: &[u32]) -> Result<Conversation> {
        let mut conversation = Conversation { sequence: self.cache.create_sequence(), tokens: Vec::new() };
        self.append(&mut conversation, tokens)?;
        Ok(conversation)
    }

    /// The cache holds what the conversation says, in every layer.
    fn check(&self, conversation: &Conversation) -> Result<()> {
        for layer in 0..CONFIG.num_layers {
            let got = self.cache.gather_blocking(conversation.sequence, layer)?;
            let [k, v] = Self::rows(layer, 0, &conversation.tokens);
            ensure!(got.k == k && got.v == v, "{}: other rows in layer {layer}", conversation.sequence);
        }
        Ok(())
    }

    fn blocks(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        Ok(self.cache.block_table(conversation.sequence)?.iter().map(|block| block.index()).collect())
    }

    /// Ends an act: everything is still there, and this is where it lies.
    fn end_act(&self, conversations: &[&Conversation]) -> Result<()> {
        conversations.iter().try_for_each(|conversation| self.check(conversation))?;
        println!("\n{}", self.cache.memory());
        Ok(())
    }

    fn act(number: u32, title: &str) {
        println!("\n== {number}. {title} ==\n");
    }

    /// The first request of a system prompt computes it; the index keeps its full blocks.
    fn publish(&self, prompt: &[u32]) -> Result<Conversation> {
        Self::act(1, "A prompt is cached and published");
        let first = self.start(prompt)?;
        let blocks = self.cache.publish_prefix(first.sequence, &first.tokens, TENANT)?;
        println!("{}: {} tokens, {blocks} full blocks in the index", first.sequence, prompt.len());
        ensure!(blocks == prompt.len() as u32 / CONFIG.block_size);
        self.end_act(&[&first])?;
        Ok(first)
    }

    /// A second request begins with the same prompt: only what differs is computed.
    fn find_again(&self, prompt: &[u32], first: &Conversation) -> Result<Conversation> {
        Self::act(2, "Another request begins with the same prompt");
        let question: Vec<u32> = (900..945).collect();
        let tokens = [prompt, &question].concat();
        let used = self.cache.usage().used;
        let found = self.cache.match_prefix(&tokens, TENANT);
        ensure!(found.len == prompt.len() as u32 / CONFIG.block_size * CONFIG.block_size);
        ensure!(self.cache.usage().used == used, "a match takes no block");
        let mut second = Conversation { sequence: found.sequence, tokens: tokens[..found.len as usize].to_vec() };
        self.append(&mut second, &tokens[found.len as usize..])?;
        println!("{}: {} of {} tokens found, the others computed", second.sequence, found.len, tokens.len());

        let stranger = self.cache.match_prefix(&tokens, OTHER_TENANT);
        ensure!(stranger.len == 0, "another salt finds nothing");
        self.cache.free(stranger.sequence)?;
        let stats = self.cache.prefix_stats();
        println!("another tenant: 0 tokens found; hit rate {:.0} %", 100.0 * stats.hit_rate());
        self.end_act(&[first, &second])?;
        Ok(second)
    }

    /// A branch begins in the middle of a block. Nothing is copied until one of the two writes there, and then one block.
    fn fork(&self, first: &Conversation, second: &Conversation) -> Result<Conversation> {
        Self::act(3, "A fork in the middle of a block");
        let len = 57;
        let used = self.cache.usage().used;
        let sequence = self.cache.fork_at(second.sequence, len)?;
        ensure!(self.cache.usage().used == used, "a fork takes no block");
        let mut branch = Conversation { sequence, tokens: second.tokens[..len as usize].to_vec() };
        let copies = self.append(&mut branch, &[700, 701, 702])?;
        ensure!(copies == 1, "the block in which the branch begins");
        println!("{}: {len} tokens of {}, then its own; {copies} block copied", branch.sequence, second.sequence);
        self.end_act(&[first, second, &branch])?;
        Ok(branch)
    }

    /// Five tokens were drafted, the model agreed with two.
    fn roll_back(&self, branch: &mut Conversation, others: &[&Conversation]) -> Result<()> {
        Self::act(4, "Rejected tokens are taken back");
        let accepted = branch.tokens.len() + 2;
        self.append(branch, &[710, 711, 712, 713, 714])?;
        self.cache.truncate(branch.sequence, accepted as u32)?;
        branch.tokens.truncate(accepted);
        self.append(branch, &[720])?;
        println!("{}: 5 tokens drafted, 2 kept, 1 of the model's own", branch.sequence);
        self.end_act(&[others, &[branch]].concat())
    }

    /// A conversation pauses: its blocks are free for others, in host memory and in a file it keeps its rows, and it comes back to other blocks.
    fn swap(&self, mut paused: Conversation, other: &mut Conversation) -> Result<Conversation> {
        Self::act(5, "A conversation is swapped out, saved, loaded, and swapped in");
        let before = self.blocks(&paused)?;
        let free = self.cache.usage().free;
        let mut encoder = self.encoder();
        let leaving = self.cache.swap_out(&mut encoder, paused.sequence)?;
        self.submit(encoder);
        // Others go on while the copy is under way.
        self.append(other, &[800])?;
        let snapshot = self.gpu.block_on(leaving.finish())?;
        println!("{}: {} tokens, {} bytes on the host", paused.sequence, snapshot.len(), snapshot.num_bytes());
        println!("free blocks: {free} before, {} after; those that others share stay", self.cache.usage().free);
        ensure!(self.cache.seq_len(paused.sequence).is_err(), "the old id is gone");

        let path = std::env::temp_dir().join(format!("folio-sharing-{}.safetensors", std::process::id()));
        snapshot.save(&path, &paused.tokens)?;
        let loaded = SequenceSnapshot::load(&path);
        std::fs::remove_file(&path)?;
        let (loaded, tokens) = loaded?;
        ensure!(tokens == paused.tokens && loaded == snapshot, "the file is the snapshot");

        // Somebody else has taken the blocks in the meantime.
        let newcomer = self.start(&[600; 40])?;
        let mut encoder = self.encoder();
        let arriving = self.cache.swap_in(&mut encoder, &loaded)?;
        self.submit(encoder);
        paused.sequence = arriving.commit()?;
        let after = self.blocks(&paused)?;
        println!("{}: blocks {before:?} before, {after:?} now", paused.sequence);
        ensure!(before != after);
        self.check(&newcomer)?;
        self.cache.free(newcomer.sequence)?;
        self.end_act(&[&paused, other])?;
        Ok(paused)
    }

    /// Blocks move, shared and indexed ones, too; nobody's rows change.
    fn defragment(&self, conversations: &[&Conversation]) -> Result<()> {
        Self::act(6, "The used blocks move to the front of the pool");
        let last = conversations[conversations.len() - 1];
        self.cache.publish_prefix(last.sequence, &last.tokens, OTHER_TENANT)?;
        let mut encoder = self.encoder();
        let moving = self.cache.defragment(&mut encoder)?;
        self.submit(encoder);
        let moved = moving.commit()?;
        println!("{moved} blocks moved");
        ensure!(moved > 0, "there was a gap");
        let used = self.cache.usage().used;
        for conversation in conversations {
            ensure!(self.blocks(conversation)?.iter().all(|&block| block < used));
        }
        let found = self.cache.match_prefix(&last.tokens, OTHER_TENANT);
        ensure!(found.len == last.tokens.len() as u32 / CONFIG.block_size * CONFIG.block_size);
        let found = Conversation { sequence: found.sequence, tokens: last.tokens[..found.len as usize].to_vec() };
        self.check(&found)?;
        self.cache.free(found.sequence)?;
        self.end_act(conversations)
    }
}

fn main() -> Result<()> {
    let gpu = Gpu::open_blocking(GpuOptions::default())?;
    println!("adapter: {}", gpu.adapter_info().name);
    let host = Host { cache: KvCache::new_blocking(&gpu, CONFIG)?, gpu };
    let prompt: Vec<u32> = (0..100).collect();

    let first = host.publish(&prompt)?;
    let second = host.find_again(&prompt, &first)?;
    let mut branch = host.fork(&first, &second)?;
    host.roll_back(&mut branch, &[&first, &second])?;
    let second = host.swap(second, &mut branch)?;
    host.defragment(&[&first, &branch, &second])?;

    Host::act(7, "All conversations end; the index still knows the prompt");
    for conversation in [first, second, branch] {
        host.cache.free(conversation.sequence)?;
    }
    let stats = host.cache.prefix_stats();
    ensure!(host.cache.usage().used == stats.indexed_blocks && stats.reclaimable_blocks == stats.indexed_blocks);
    println!("{} blocks are kept for the next request, until somebody needs them", stats.reclaimable_blocks);
    host.end_act(&[])
}
