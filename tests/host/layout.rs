//! Sizes and offsets of the cache against numbers worked out by hand, and the rules of its configuration.

use crate::common::with;
use folio::sequence::Manager;
use folio::{
    Error, ErrorKind, KvCacheConfig, KvFormat, KvLayout, LayerGroup, LayerGroups, MAX_HEAD_DIM, MAX_POOL_BYTES,
    Segments,
};
use proptest::prelude::*;

/// 2 layers of 3 heads of 40 elements; K in f32 (160 bytes a row), V in f16 (80).
const CONFIG: KvCacheConfig = KvCacheConfig::new(2, 3, 40).with_blocks(7, 5).with_formats(KvFormat::F32, KvFormat::F16);

/// The text of the error, which must be an argument error.
fn refusal(config: KvCacheConfig) -> String {
    let error = config.validate().expect_err("the rule is broken");
    assert!(matches!(error, Error::Argument { .. }), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Caller);
    error.to_string()
}

#[test]
fn valid_shapes_are_accepted() {
    for head_dim in (8..=MAX_HEAD_DIM).step_by(8) {
        assert!(with(CONFIG, |c| c.head_dim = head_dim).validate().is_ok(), "{head_dim}");
    }
    for block_size in 1..=256 {
        assert!(with(CONFIG, |c| c.block_size = block_size).validate().is_ok(), "{block_size}");
    }
    for (num_layers, num_kv_heads, num_blocks) in [(1, 1, 1), (1000, 65_535, 1), (1, 1, u32::MAX / 5)] {
        assert!(
            with(CONFIG, |c| {
                c.num_layers = num_layers;
                c.num_kv_heads = num_kv_heads;
                c.num_blocks = num_blocks;
            })
            .validate()
            .is_ok()
        );
    }
}

#[test]
fn zero_layers_are_refused() {
    assert_eq!(refusal(with(CONFIG, |c| c.num_layers = 0)), "num_layers: got 0, need 1 to 65536");
}

#[test]
fn head_counts_beyond_the_grid_are_refused() {
    for num_kv_heads in [0, 65_536, u32::MAX] {
        let want = format!("num_kv_heads: got {num_kv_heads}, need 1 to 65535");
        assert_eq!(refusal(with(CONFIG, |c| c.num_kv_heads = num_kv_heads)), want);
    }
}

#[test]
fn head_dims_without_kernels_are_refused() {
    for head_dim in [0, 1, 4, 12, 59, 255, 257, 580, 584, u32::MAX] {
        let want = format!("head_dim: got {head_dim}, need a multiple of 8 from 8 to 576");
        assert_eq!(refusal(with(CONFIG, |c| c.head_dim = head_dim)), want);
    }
}

#[test]
fn block_sizes_out_of_range_are_refused() {
    for block_size in [0, 257, u32::MAX] {
        let want = format!("block_size: got {block_size}, need 1 to 256 tokens");
        assert_eq!(refusal(with(CONFIG, |c| c.block_size = block_size)), want);
    }
}

#[test]
fn an_empty_pool_is_refused() {
    assert_eq!(refusal(with(CONFIG, |c| c.num_blocks = 0)), "num_blocks: got 0, need at least 1");
}

#[test]
fn pools_whose_slots_overflow_u32_are_refused() {
    let largest = with(CONFIG, |c| {
        c.num_kv_heads = 1;
        c.block_size = 256;
        c.num_blocks = (1 << 24) - 1;
    });
    assert!(largest.validate().is_ok());
    assert_eq!(
        refusal(with(largest, |c| c.num_blocks = 1 << 24)),
        "num_blocks: got 16777216 (4294967296 slots), need num_blocks * block_size * num_kv_heads below 2^32"
    );
    let most = refusal(with(largest, |c| c.num_blocks = u32::MAX));
    assert!(most.contains("4294967295 (1099511627520 slots)"), "{most}");
}

#[test]
fn sizes_are_those_worked_out_by_hand() {
    let (k, v) = (CONFIG.k_layout(), CONFIG.v_layout());
    assert_eq!((k.format, v.format), (KvFormat::F32, KvFormat::F16));
    // A row: 40 elements. A block: 3 heads of 5 rows.
    assert_eq!((k.row_bytes(), v.row_bytes()), (160, 80));
    assert_eq!((k.block_bytes(), v.block_bytes()), (2400, 1200));
    assert_eq!((k.side_bytes(7), v.side_bytes(7)), (Some(16_800), Some(8400)));
    // Two layers of three heads, K and V.
    assert_eq!(CONFIG.token_bytes(), 1440);
    assert_eq!(CONFIG.block_bytes(), 7200);
    assert_eq!(CONFIG.pool_bytes(), 50_400);
}

#[test]
fn a_block_takes_what_its_tokens_take() {
    for block_size in [1, 5, 16, 256] {
        let config = with(CONFIG, |c| c.block_size = block_size);
        assert_eq!(config.block_bytes(), config.token_bytes() * u64::from(block_size));
    }
}

/// Of four layers in two groups a block has two, and a token all.
#[test]
fn groups_of_layers_share_a_pool() {
    let groups = LayerGroups::new(&[LayerGroup { window: Some(12), sink_tokens: 2 }, LayerGroup::ALL]).expect("two");
    let config = with(CONFIG, |c| c.num_layers = 4).with_groups(groups);
    config.validate().expect("two layers each");
    assert_eq!((config.layers_per_group(), [0, 1, 2, 3].map(|layer| config.group_of(layer))), (2, [0, 0, 1, 1]));
    assert_eq!((config.token_bytes(), config.block_bytes(), config.pool_bytes()), (2880, 7200, 50_400));
    // Of 9 blocks a token at 43 sees the first, for its sinks, and those from 32 on: 6 to 8. On the way a window, a chunk and a block more.
    assert_eq!((config.retention(0).hidden_blocks(43), config.retention(1).hidden_blocks(43)), (1..6, 0..0));
    assert_eq!((config.blocks_for(43), config.held_blocks(43), config.most_blocks(43, 5)), (18, 4 + 9, 6 + 9));
    assert_eq!((config.sink_position(5), config.sink_position(40)), (5, 13));
    // What holds for all groups.
    let all = config.with_window(7).with_sink_tokens(0);
    assert_eq!(all.groups.as_slice(), [LayerGroup::windowed(7); 2]);
    assert_eq!((groups.count(), groups.get(1), groups.get(2)), (2, LayerGroup::ALL, LayerGroup::ALL));
    assert_eq!(format!("{groups:?}").matches("LayerGroup ").count(), 2);
    assert!(refusal(with(config, |c| c.num_layers = 3)).contains("num_layers: got 3, need a multiple of the 2 groups"));
    let contiguous = with(KvCacheConfig::contiguous(2, 1, 8, 2, 64), |c| c.groups = all.groups);
    assert!(refusal(contiguous).contains("window: got some in a contiguous cache"));
    let contiguous = with(contiguous, |c| c.groups = LayerGroups::new(&[LayerGroup::ALL; 2]).expect("two"));
    assert!(refusal(contiguous).contains("groups: got 2, need 1 in a contiguous cache"));
}

#[test]
fn rows_of_a_head_are_adjacent_within_a_block() {
    let k = CONFIG.k_layout();
    assert_eq!(k.row_offset(0, 0, 0), 0);
    assert_eq!(k.row_offset(0, 0, 1), 160);
    assert_eq!(k.row_offset(0, 1, 0), 5 * 160);
    assert_eq!(k.row_offset(1, 0, 0), 3 * 5 * 160);
    // ((6 * 3 + 2) * 5 + 4) * 160: the last row of the pool, which ends where the side ends.
    assert_eq!(k.row_offset(6, 2, 4), 16_640);
    assert_eq!(Some(k.row_offset(6, 2, 4) + k.row_bytes()), k.side_bytes(7));
    assert_eq!(CONFIG.v_layout().row_offset(6, 2, 4), 8320);
}

#[test]
fn offsets_of_large_caches_do_not_wrap() {
    let layout = KvLayout { num_kv_heads: 65_535, row_dim: 256, block_size: 256, format: KvFormat::F32 };
    // 65535 heads * 256 rows * 1024 bytes.
    assert_eq!(layout.block_bytes(), 17_179_607_040);
    assert_eq!(layout.row_offset(1 << 24, 0, 0), layout.block_bytes() << 24);
    assert_eq!(layout.side_bytes(1 << 24), Some(layout.block_bytes() << 24));
    assert_eq!(layout.side_bytes(u32::MAX), None);
    let config = with(CONFIG, |c| {
        c.num_layers = 1000;
        c.num_kv_heads = 65_535;
        c.head_dim = 256;
        c.block_size = 256;
    });
    assert_eq!(with(config, |c| c.num_blocks = u32::MAX).pool_bytes(), u64::MAX);
}

#[test]
fn max_blocks_is_the_most_that_fits() {
    let v = CONFIG.v_layout();
    assert_eq!((v.max_blocks(0), v.max_blocks(1199), v.max_blocks(1200), v.max_blocks(128 << 20)), (0, 0, 1, 111_848));
}

#[test]
fn a_side_is_cut_into_equal_segments() {
    // Blocks of 2400 bytes.
    let k = CONFIG.k_layout();
    let cut = |num_blocks, max_bytes| k.segments(num_blocks, max_bytes);
    assert_eq!(cut(7, 7 * 2400), Some(Segments::ONE));
    assert_eq!(cut(7, u64::MAX), Some(Segments::ONE));
    assert_eq!(cut(7, 7 * 2400 - 1), Some(Segments { count: 2, blocks: 4 }));
    assert_eq!(cut(7, 3 * 2400), Some(Segments { count: 3, blocks: 3 }));
    // Not 5 and 5 and 1.
    assert_eq!(cut(11, 5 * 2400), Some(Segments { count: 3, blocks: 4 }));
    assert_eq!(cut(7, 2400), Some(Segments { count: 7, blocks: 1 }));
    assert_eq!(cut(7, 2399), None);
    assert_eq!(cut(0, 2400), None);
    let three = Segments { count: 3, blocks: 4 };
    assert_eq!([0, 3, 4, 8, 10].map(|block| three.locate(block)), [(0, 0), (0, 3), (1, 0), (2, 0), (2, 2)]);
    assert_eq!([0, 1, 2, 3, u32::MAX].map(|segment| three.blocks_of(segment, 11)), [4, 4, 3, 0, 0]);
    assert_eq!((Segments::ONE.locate(u32::MAX), Segments::ONE.blocks_of(0, 7)), ((0, u32::MAX), 7));
}

#[test]
fn the_table_of_channel_scales_has_room_in_the_first_segment() {
    let layout = KvLayout { format: KvFormat::Int8PerChannel, ..CONFIG.k_layout() };
    // Rows of 40 bytes, 15 of them in a block, in whole 16 bytes; two f32 for each of 3 * 40 channels.
    assert_eq!((layout.block_bytes(), layout.channel_table_bytes()), (608, 960));
    assert_eq!(layout.segments(7, 7 * 608 + 960), Some(Segments::ONE));
    assert_eq!(layout.segments(7, 7 * 608 + 959), Some(Segments { count: 2, blocks: 4 }));
    assert_eq!(layout.segments(7, 607 + 960), None);
}

proptest! {
    /// Every block is in one segment, inside its buffer; no buffer is larger than allowed; none is empty; fewer would not do.
    #[test]
    fn segments_hold_every_block_once(
        format in prop::sample::select(&KvFormat::ALL[..]),
        num_kv_heads in 1_u32..20,
        eighths in 1_u32..=32,
        block_size in 1_u32..=256,
        num_blocks in 1_u32..3000,
        // In blocks, as that is where cuts change, and some bytes besides.
        max_blocks in 0_u64..3500,
        bytes in 0_u64..20_000,
    ) {
        let layout = KvLayout { num_kv_heads, row_dim: 8 * eighths, block_size, format };
        let table = layout.channel_table_bytes();
        let max_bytes = layout.block_bytes() * max_blocks + bytes;
        let Some(segments) = layout.segments(num_blocks, max_bytes) else {
            prop_assert!(max_bytes < layout.block_bytes() + table);
            return Ok(());
        };
        let blocks: Vec<u32> = (0..segments.count).map(|s| segments.blocks_of(s, num_blocks)).collect();
        prop_assert_eq!(blocks.iter().map(|&n| u64::from(n)).sum::<u64>(), u64::from(num_blocks));
        prop_assert!(blocks.iter().all(|&n| n > 0 && u64::from(n) * layout.block_bytes() + table <= max_bytes));
        prop_assert!(blocks.windows(2).all(|pair| pair[0] >= pair[1]), "{blocks:?}");
        prop_assert!(blocks.iter().rev().skip(1).all(|&n| n == blocks[0]), "{blocks:?}");
        prop_assert_eq!(segments.blocks_of(segments.count, num_blocks), if segments.count == 1 { num_blocks } else { 0 });
        // One buffer less would need to be larger than allowed.
        let fewer = u64::from(segments.count) - 1;
        let fit = (max_bytes - table) / layout.block_bytes();
        prop_assert!(fewer * fit < u64::from(num_blocks));
        let mut next = vec![0; blocks.len()];
        for block in 0..num_blocks {
            let (segment, within) = segments.locate(block);
            // In order, without a gap, and before the end of the buffer.
            prop_assert_eq!(within, next[segment as usize]);
            prop_assert!(within < blocks[segment as usize]);
            next[segment as usize] += 1;
        }
        prop_assert_eq!(next, blocks);
    }
}

/// Any bits where a count belongs, the extremes often.
fn any_count() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(1), Just(u32::MAX), 0_u32..300, any::<u32>()]
}

proptest! {
    /// Nobody has to validate a shape before asking it something: results are those of integers without end where they fit, and the
    /// documented ones where they don't.
    #[test]
    fn layouts_of_any_numbers_are_total(
        format in prop::sample::select(&KvFormat::ALL[..]),
        [num_kv_heads, head_dim, block_size] in [any_count(), any_count(), any_count()],
        [block, kv_head, slot, num_blocks] in [any_count(), any_count(), any_count(), any_count()],
        max_bytes in prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), 0_u64..1 << 40],
    ) {
        let layout = KvLayout { num_kv_heads, row_dim: head_dim, block_size, format };
        let [heads, rows_per_head, dim] = [num_kv_heads, block_size, head_dim].map(u128::from);
        let clip = |wide: u128| u64::try_from(wide).unwrap_or(u64::MAX);

        let row = dim * u128::from(format.element_bits()) / 8;
        let scale = if format.has_row_scales() { 4 } else { 0 };
        let rows = rows_per_head * heads;
        let block_bytes = ((row + scale) * rows).next_multiple_of(16);
        let table = if format.has_channel_scales() { 8 * heads * dim } else { 0 };
        prop_assert_eq!(u128::from(layout.row_bytes()), row);
        prop_assert_eq!(u128::from(layout.row_scale_bytes()), scale);
        prop_assert_eq!(u128::from(layout.token_row_bytes()), row + scale);
        prop_assert_eq!(u128::from(layout.block_rows()), rows);
        prop_assert_eq!(layout.block_bytes(), clip(block_bytes));
        prop_assert_eq!(layout.channel_table_bytes(), clip(table));
        let side = u64::try_from(block_bytes).ok().and_then(|_| u64::try_from(block_bytes * u128::from(num_blocks) + table).ok());
        prop_assert_eq!(layout.side_bytes(num_blocks), side);

        let left = u128::from(max_bytes).saturating_sub(table);
        let most = left.checked_div(block_bytes).unwrap_or(0);
        prop_assert_eq!(u128::from(layout.max_blocks(max_bytes)), most);
        let segments = layout.segments(num_blocks, max_bytes);
        prop_assert_eq!(segments.is_some(), most > 0 && num_blocks > 0);
        for segments in segments.into_iter().chain([Segments { count: block, blocks: slot }]) {
            let (segment, within) = segments.locate(block);
            prop_assert!(segment <= block && within <= block);
            prop_assert!(segments.blocks_of(segment, num_blocks) <= num_blocks);
        }

        let index = u128::from(kv_head) * rows_per_head + u128::from(slot);
        // Up to 2^131: what does not even fit into u128 is clipped, too.
        let at = u128::from(block).saturating_mul(block_bytes);
        prop_assert_eq!(layout.row_offset(block, kv_head, slot), clip(at.saturating_add(index * row)));
        let scales = format.has_row_scales().then(|| clip(at.saturating_add(rows * row + index * scale)));
        prop_assert_eq!(layout.row_scale_offset(block, kv_head, slot), scales);
    }

    /// The same for whole configurations, which may or may not be valid.
    #[test]
    fn configurations_of_any_numbers_are_total(
        k_format in prop::sample::select(&KvFormat::ALL[..]),
        v_format in prop::sample::select(&KvFormat::ALL[..]),
        [num_layers, num_kv_heads, head_dim] in [any_count(), any_count(), any_count()],
        [block_size, num_blocks, seq_len] in [any_count(), any_count(), any_count()],
    ) {
        let config = KvCacheConfig::new(num_layers, num_kv_heads, head_dim).with_blocks(num_blocks, block_size).with_formats(k_format, v_format);
        let sides = [config.k_layout(), config.v_layout()];
        let layers = u128::from(num_layers);
        let clip = |wide: u128| u64::try_from(wide).unwrap_or(u64::MAX);
        // Of numbers that fit themselves.
        let sum = |of: fn(&KvLayout) -> u64| sides.iter().map(|side| u128::from(of(side))).sum::<u128>();
        prop_assert_eq!(config.token_bytes(), clip(layers * u128::from(num_kv_heads) * sum(KvLayout::token_row_bytes)));
        let block = layers * sum(KvLayout::block_bytes);
        prop_assert_eq!(config.block_bytes(), clip(block));
        // Tables of K alone: V has none in a valid configuration.
        let tables = layers * u128::from(config.k_layout().channel_table_bytes());
        if block <= u128::from(u64::MAX) {
            prop_assert_eq!(config.pool_bytes(), clip(block * u128::from(num_blocks) + tables));
        }
        prop_assert_eq!(config.blocks_for(seq_len), seq_len.div_ceil(block_size.max(1)));
        if config.validate().is_ok() {
            prop_assert!(config.pool_bytes() <= MAX_POOL_BYTES);
        }
    }
}

#[test]
fn more_layers_than_any_model_has_are_refused() {
    let at_most = with(CONFIG, |c| c.num_layers = 65_536);
    assert!(at_most.validate().is_ok());
    for num_layers in [65_537, u32::MAX] {
        let want = format!("num_layers: got {num_layers}, need 1 to 65536");
        assert_eq!(refusal(with(CONFIG, |c| c.num_layers = num_layers)), want);
    }
}

#[test]
fn pools_that_no_machine_can_hold_are_refused() {
    // 2^31 slots of 16 KiB over all layers: 2^47 bytes with 2 layers.
    let largest = KvCacheConfig::new(64, 1, 256).with_blocks(1 << 22, 256).with_formats(KvFormat::F32, KvFormat::F32);
    assert_eq!((largest.pool_bytes(), largest.validate().is_ok()), (1 << 47, true));
    let more = with(largest, |c| c.num_blocks = (1 << 22) + 1);
    assert_eq!(
        refusal(more),
        "num_blocks: got 4194305 (140737521909760 bytes over 64 layers), need a pool of at most 2^47 bytes"
    );
    let most = with(largest, |c| {
        c.num_layers = 65_536;
        c.num_kv_heads = 65_535;
        c.num_blocks = 256;
    });
    assert!(refusal(most).contains("2^47 bytes"), "{most:?}");
}

#[test]
fn sequences_take_whole_blocks() {
    let blocks = [0, 1, 4, 5, 6, 10, 11].map(|seq_len| CONFIG.blocks_for(seq_len));
    assert_eq!(blocks, [0, 1, 1, 1, 2, 2, 3]);
    assert_eq!(CONFIG.blocks_for(u32::MAX), u32::MAX / 5);
}

#[test]
fn formats_state_their_size_and_error() {
    assert_eq!((KvFormat::F32.element_bits(), KvFormat::F16.element_bits()), (32, 16));
    assert_eq!((KvFormat::F32.relative_error(), KvFormat::F32.absolute_error()), (0.0, 0.0));
    // The error of the worst value in the normal range, halfway between 1 and the next half.
    let halfway = 1.0 + 1.0 / 2048.0;
    let stored = f64::from(half::f16::from_f64(halfway));
    assert!((stored - halfway).abs() <= KvFormat::F16.relative_error() * halfway);
    assert!((stored - halfway).abs() > KvFormat::F16.relative_error() * halfway * 0.99);
    assert_eq!(KvFormat::F16.absolute_error(), f64::from(half::f16::MIN_POSITIVE));
    assert_eq!(format!("{:>4}/{:<4}", KvFormat::F32, KvFormat::F16), " F32/F16 ");
}

/// What the docs of the formats promise of rows of 128 elements, scales included.
#[test]
fn formats_take_the_bytes_that_they_state() {
    let bytes = |format| KvLayout { num_kv_heads: 8, row_dim: 128, block_size: 16, format }.token_row_bytes();
    assert_eq!(KvFormat::ALL.map(bytes), [512, 256, 128, 132, 68, 128, 64]);
    let ratio = |format| bytes(format) as f64 / bytes(KvFormat::F16) as f64;
    assert!(ratio(KvFormat::Int8) <= 0.52 && ratio(KvFormat::Int4) <= 0.29);
}

/// Half of the scale of the widened range, by hand.
#[test]
fn row_errors_by_hand() {
    let near = |got: f64, want: f64| (got - want).abs() <= 1e-3 * want;
    assert!(near(KvFormat::Int8.row_error(0.0, 255.0), 0.5 * (1.0 + 1.0 / 128.0)));
    assert!(near(KvFormat::Int4.row_error(-128.0, 21.0), 0.5 * 10.0 * (1.0 + 1.0 / 128.0)));
    assert_eq!(KvFormat::F16.row_error(0.0, 1.0), 0.0);
    // Scales end at 2^-118.
    assert!(near(KvFormat::Int8.row_error(0.0, 0.0), 0.5_f64.powi(119) + 0.5_f64.powi(126)));
}

#[test]
fn formats_are_read_by_their_names() {
    for format in KvFormat::ALL {
        assert_eq!(format.to_string().parse::<KvFormat>().ok(), Some(format));
        assert_eq!(format.to_string().to_lowercase().parse::<KvFormat>().ok(), Some(format));
    }
    let error = "f8".parse::<KvFormat>().err().map(|error| error.to_string());
    assert_eq!(
        error.as_deref(),
        Some("format: got \"f8\", need one of f32, f16, e4m3, int8, int4, int8-channel, int4-channel")
    );
}

/// A contiguous cache of 4 rows of 100 tokens that `change` spoils.
fn contiguous_refusal(change: impl FnOnce(&mut KvCacheConfig)) -> String {
    let mut config = KvCacheConfig::contiguous(1, 2, 64, 4, 100);
    assert!(config.validate().is_ok());
    change(&mut config);
    config.validate().expect_err("a refusal").to_string()
}

#[test]
fn contiguous_configurations_are_checked() {
    assert_eq!(contiguous_refusal(|c| c.block_size = 0), "block_size: got 0, need 1 to 2147483647 tokens");
    assert_eq!(
        contiguous_refusal(|c| c.block_size = 1 << 31),
        "block_size: got 2147483648, need 1 to 2147483647 tokens"
    );
    let want = "num_blocks: got 4 (4294967296 slots), need num_blocks * block_size * num_kv_heads below 2^32";
    assert_eq!(contiguous_refusal(|c| c.block_size = 1 << 30), want);
    assert_eq!(contiguous_refusal(|c| c.num_blocks = 0), "num_blocks: got 0, need at least 1");
    assert_eq!(KvCacheConfig::contiguous(1, 2, 64, 4, 1000).max_seq_len(), Some(1000));
    assert_eq!(KvCacheConfig::new(1, 2, 64).max_seq_len(), None);
}

/// The longest sequence that has room grows through the manager, token by token and in chunks, and one token more has none.
#[test]
fn the_longest_sequence_that_has_room() {
    let base = KvCacheConfig::new(2, 1, 8).with_blocks(20, 4);
    let groups = |all: &[LayerGroup]| base.with_groups(LayerGroups::new(all).expect("groups"));
    assert_eq!(base.longest_sequence(7), 80);
    assert_eq!(base.with_blocks(0, 4).longest_sequence(7), 0);
    assert_eq!(KvCacheConfig::contiguous(2, 1, 8, 2, 64).longest_sequence(5), 64);
    // A window of 9 tokens beside chunks of 7 takes 5 blocks, of whatever length the text is.
    assert_eq!(base.with_window(9).longest_sequence(7), i32::MAX as u32);
    let mixed = groups(&[LayerGroup::ALL, LayerGroup::windowed(9)]);
    assert_eq!(mixed.longest_sequence(7), (20 - 5) * 4);
    for (config, chunk) in
        [(base, 7), (mixed, 7), (mixed, 1), (groups(&[LayerGroup::windowed(30), LayerGroup::ALL]), 3)]
    {
        let longest = config.longest_sequence(chunk);
        let mut manager = Manager::new(config).expect("a manager");
        let id = manager.create();
        for done in (0..longest).step_by(chunk as usize) {
            let step = manager.reserve(&[(id, chunk.min(longest - done))]).expect("room");
            assert!(manager.commit(step.pending));
        }
    }
}
