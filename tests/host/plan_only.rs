//! `examples/plan_only.rs` read as a foreign program reads it: from its JSON alone, append and attention are acted out on the CPU.

#[path = "../../examples/plan_only.rs"]
mod example;

use std::collections::BTreeMap;

use clap::Parser;
use folio::KvCacheConfig;
use folio::plan::{AttendParams, CacheParams, NO_PARTIAL, WORK_ITEM_WORDS, WorkItem};
use serde_json::Value;

const NUM_BLOCKS: u32 = 24;
const BLOCK_SIZE: u32 = 16;
const Q_HEADS: u32 = 8;

fn describe(more: &[&str]) -> Value {
    let sizes = format!("plan_only --num-blocks {NUM_BLOCKS} --block-size {BLOCK_SIZE} --q-heads {Q_HEADS}");
    let args = sizes.split(' ').chain(more.iter().copied());
    example::describe(&example::Args::try_parse_from(args).expect("arguments")).expect("a description")
}

fn number(value: &Value) -> u32 {
    value.as_u64().and_then(|number| u32::try_from(number).ok()).expect("a number")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

/// What stands at a word of an upload.
fn read<T: bytemuck::Pod>(words: &[u32], at: u32) -> T {
    let at = at as usize;
    bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words[at..at + size_of::<T>() / 4]))
}

/// A pool whose slots hold the names of tokens, and what each sequence of the example has said so far.
struct Device {
    pool: Vec<Option<u32>>,
    sequences: Vec<Vec<u32>>,
    workgroup_sizes: BTreeMap<String, u32>,
    num_kv_heads: u32,
    head_dim: u32,
    /// Rows of a prefill tile.
    tile_q: u32,
    next_name: u32,
}

impl Device {
    fn step(&mut self, step: &Value, sequences: &[usize]) {
        let names: Vec<u32> = (self.next_name..).take(number(&step["num_tokens"]) as usize).collect();
        self.next_name += names.len() as u32;
        let mut start = 0;
        let mut ranges = Vec::new();
        for (entry, &sequence) in list(&step["sequences"]).iter().zip(sequences) {
            assert_eq!(number(&entry["context_len"]) as usize, self.sequences[sequence].len());
            let range = start..start + number(&entry["query_len"]) as usize;
            self.sequences[sequence].extend(&names[range.clone()]);
            start = range.end;
            ranges.push((sequence, range));
        }
        assert_eq!((start, ranges.len()), (names.len(), sequences.len()));
        // (token, query head of the group) -> keys.
        let mut seen: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
        for dispatch in list(&step["dispatches"]) {
            let upload = &step["uploads"][dispatch["upload"].as_str().expect("an upload")];
            let words: Vec<u32> = list(&upload["words"]).iter().map(number).collect();
            assert_eq!(number(&upload["bytes"]) as usize, words.len() * 4);
            let offset = number(&dispatch["params_offset"]);
            assert_eq!(offset % 256, 0);
            let grid: Vec<u32> = list(&dispatch["grid"]).iter().map(number).collect();
            let kernel = dispatch["kernel"].as_str().expect("a kernel");
            match kernel {
                "append" | "copy_blocks" => {
                    let params: CacheParams = read(&words, offset / 4);
                    assert_eq!((params.grid_x, params.num_blocks), (grid[0], NUM_BLOCKS));
                    let invocations = grid.iter().product::<u32>() * self.workgroup_sizes[kernel];
                    let row_elements = self.num_kv_heads * self.head_dim;
                    if kernel == "append" {
                        assert_eq!(params.num_tokens as usize, names.len());
                        assert!(invocations >= params.num_tokens * row_elements / 8);
                        self.append(&words, &params, &names, &ranges);
                    } else {
                        // Two bytes per element.
                        assert!(invocations >= params.num_copies * BLOCK_SIZE * row_elements * 2 / 16);
                        self.copy_blocks(&words, &params);
                    }
                }
                "decode" | "prefill" => {
                    let params: AttendParams = read(&words, offset / 4);
                    assert_eq!((params.grid_x, grid[1]), (grid[0], self.num_kv_heads));
                    assert!(params.num_items <= grid[0] * grid[2]);
                    let group_size = Q_HEADS / self.num_kv_heads;
                    for idx in 0..params.num_items {
                        let item: WorkItem = read(&words, params.items_offset + idx * WORK_ITEM_WORDS);
                        let tile = if kernel == "decode" { group_size } else { self.tile_q };
                        self.attend(&words, &item, tile, &ranges, &mut seen);
                    }
                }
                other => unreachable!("{other}: nothing here is long enough to be split"),
            }
        }
        // Causal: a token sees all before it and itself, once, for each head.
        for (sequence, range) in &ranges {
            let context_len = self.sequences[*sequence].len() - range.len();
            for (i, token) in range.clone().enumerate() {
                for head in 0..Q_HEADS / self.num_kv_heads {
                    let want = &self.sequences[*sequence][..=context_len + i];
                    assert_eq!(seen.get(&(token as u32, head)).map(Vec::as_slice), Some(want), "token {token}");
                }
            }
        }
    }

    fn append(
        &mut self,
        words: &[u32],
        params: &CacheParams,
        names: &[u32],
        ranges: &[(usize, std::ops::Range<usize>)],
    ) {
        for (token, &name) in names.iter().enumerate() {
            let slot = words[params.list_offset as usize + token] as usize;
            self.pool[slot] = Some(name);
            let position = words[params.positions_offset as usize + token] as usize;
            let (sequence, _) = ranges.iter().find(|(_, range)| range.contains(&token)).expect("a sequence");
            assert_eq!(self.sequences[*sequence][position], name, "the position of token {token}");
        }
    }

    fn copy_blocks(&mut self, words: &[u32], params: &CacheParams) {
        assert!(params.num_copies > 0);
        for copy in 0..params.num_copies as usize {
            let at = params.copies_offset as usize + 2 * copy;
            let [from, to] = [words[at], words[at + 1]].map(|block| (block * BLOCK_SIZE) as usize);
            self.pool.copy_within(from..from + BLOCK_SIZE as usize, to);
        }
    }

    /// What the rows of a work item read through their block table.
    fn attend(
        &self,
        words: &[u32],
        item: &WorkItem,
        tile: u32,
        ranges: &[(usize, std::ops::Range<usize>)],
        seen: &mut BTreeMap<(u32, u32), Vec<u32>>,
    ) {
        assert_eq!(item.part_row, NO_PARTIAL);
        assert!(ranges.iter().any(|(_, range)| range.contains(&(item.query_start as usize))));
        let group_size = Q_HEADS / self.num_kv_heads;
        let rows = item.query_len * group_size;
        let end = rows.min(item.row_start.saturating_add(tile));
        for row in item.row_start..end {
            let (token, head) = (item.query_start + row / group_size, row % group_size);
            let position = item.context_len + row / group_size;
            let keys = item.kv_begin..item.kv_end.min(position + 1);
            seen.entry((token, head)).or_default().extend(keys.map(|key| {
                let block = words[(item.table_offset + key / BLOCK_SIZE) as usize];
                self.pool[(block * BLOCK_SIZE + key % BLOCK_SIZE) as usize].expect("a slot that was written")
            }));
        }
    }
}

/// What the text of prefill says of its tiles.
fn tile_q(kernels: &[Value]) -> u32 {
    let prefill = kernels.iter().find(|kernel| kernel["entry_point"] == "prefill").expect("a kernel");
    let text = prefill["wgsl"].as_str().expect("a text");
    let (_, rest) = text.split_once("const TILE_Q: u32 = ").expect("a constant");
    rest.split_once("u;").and_then(|(number, _)| number.parse().ok()).expect("a number")
}

#[test]
fn its_words_append_and_attend() {
    let description = describe(&[]);
    let kernels = list(&description["kernels"]);
    let sizes = kernels
        .iter()
        .map(|kernel| (kernel["entry_point"].as_str().expect("a name").to_owned(), number(&kernel["workgroup_size"])));
    let mut device = Device {
        pool: vec![None; (NUM_BLOCKS * BLOCK_SIZE) as usize],
        sequences: vec![Vec::new()],
        workgroup_sizes: sizes.collect(),
        num_kv_heads: 2,
        head_dim: 64,
        tile_q: tile_q(kernels),
        next_name: 0,
    };
    let steps = list(&description["steps"]);
    device.step(&steps[0], &[0]);
    let copies = |step: &Value| list(&step["dispatches"]).iter().any(|dispatch| dispatch["kernel"] == "copy_blocks");
    assert_eq!(steps.iter().map(copies).collect::<Vec<_>>(), [false, true, false]);
    let fork = device.sequences[0].clone();
    device.sequences.extend([fork, Vec::new()]);
    device.step(&steps[1], &[0, 1, 2]);
    device.step(&steps[2], &[0, 1, 2]);
    assert_eq!(steps.len(), 3);
    assert_ne!(device.sequences[0][37..], device.sequences[1][37..]);
}

#[test]
fn its_binding_tables_are_those_of_its_shaders() {
    for more in [&[][..], &["--k-format", "int8-channel", "--v-format", "int4", "--max-binding-bytes", "20000"]] {
        let description = describe(more);
        for kernel in list(&description["kernels"]) {
            let text = kernel["wgsl"].as_str().expect("a text");
            let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|error| unreachable!("{error}\n{text}"));
            let entry = &module.entry_points[0];
            assert_eq!((kernel["entry_point"].as_str(), module.entry_points.len()), (Some(entry.name.as_str()), 1));
            assert_eq!(number(&kernel["workgroup_size"]), entry.workgroup_size[0]);
            let mut globals: Vec<_> = module
                .global_variables
                .iter()
                .filter_map(|(_, global)| Some((global.binding?.binding, global.name.clone()?, global.space)))
                .collect();
            globals.sort_by_key(|(binding, ..)| *binding);
            let bindings = list(&kernel["bindings"]);
            assert_eq!(globals.len(), bindings.len());
            for ((number_, name, space), binding) in globals.iter().zip(bindings) {
                assert_eq!((*number_, Some(name.as_str())), (number(&binding["binding"]), binding["name"].as_str()));
                let access = match space {
                    naga::AddressSpace::Uniform => "uniform",
                    naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => {
                        "storage, read_write"
                    }
                    _ => "storage, read",
                };
                assert_eq!(binding["access"], access, "{name}");
            }
        }
    }
}

#[test]
fn its_buffers_hold_the_pool_and_fit_bindings() {
    for (formats, max) in [(["f16", "f16"], 1 << 20), (["int8-channel", "int4"], 20_000), (["f32", "f16"], 100_000)] {
        let [k, v] = formats;
        let description = describe(&["--k-format", k, "--v-format", v, "--max-binding-bytes", &max.to_string()]);
        let cache = &description["cache"];
        let bytes: Vec<u32> = list(&cache["buffers_of_a_layer"]).iter().map(|b| number(&b["bytes"])).collect();
        assert!(bytes.iter().all(|&bytes| (1..=max).contains(&bytes)), "{bytes:?}");
        let config = KvCacheConfig::new(number(&cache["num_layers"]), 2, 64)
            .with_blocks(NUM_BLOCKS, BLOCK_SIZE)
            .with_formats(k.parse().expect("a format"), v.parse().expect("a format"));
        let all: u64 = bytes.iter().map(|&bytes| u64::from(bytes)).sum();
        assert_eq!(all * u64::from(config.num_layers), config.pool_bytes());
        assert_eq!(bytes.len() > 2, max < 1 << 20, "{bytes:?}");
    }
}

#[test]
fn it_refuses_what_does_not_fit() {
    for (args, argument) in [
        (["--q-heads", "7"], "num_q_heads"),
        (["--head-dim", "60"], "head_dim"),
        (["--max-binding-bytes", "64"], "max_binding_bytes"),
        (["--num-blocks", "3"], "blocks"),
    ] {
        let args = example::Args::try_parse_from(["plan_only"].into_iter().chain(args)).expect("arguments");
        let error = example::describe(&args).expect_err("refused").to_string();
        assert!(error.starts_with(argument), "{error}");
    }
}
