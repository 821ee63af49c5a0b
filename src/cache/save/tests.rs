//! Files of sequences: what is in them, and what is refused.

use super::*;

/// Of a cache with a window in half of its layers.
fn snapshot_of_groups(len: u32) -> SequenceSnapshot {
    let groups = LayerGroups::new(&[LayerGroup { window: Some(5), sink_tokens: 1 }, LayerGroup::ALL]).expect("two");
    let config = KvCacheConfig::new(4, 2, 8).with_formats(KvFormat::F32, KvFormat::F16).with_groups(groups);
    let config = config.with_blocks(config.with_blocks(1, 4).held_blocks(len), 4);
    let bytes = stream_bytes(&config, config.num_blocks).unwrap_or(0);
    let data = (0..bytes).map(|i| (i * 37 % 251) as u8).collect();
    SequenceSnapshot { config, len, data, key_scales: None, origin: None }
}

#[test]
fn groups_of_layers_have_blocks_of_their_own() {
    for (len, held) in [(0, [0, 0]), (3, [1, 1]), (9, [3, 3]), (40, [2, 10])] {
        let snapshot = snapshot_of_groups(len);
        let bytes = snapshot.to_bytes(&[]).expect("bytes");
        assert_eq!(SequenceSnapshot::from_bytes(&bytes).expect("sound"), (snapshot.clone(), Vec::new()));
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        for layer in 0..4 {
            let (k, v) = snapshot.layer_bytes(layer).expect("layer");
            let num_blocks = held[layer as usize / 2];
            assert_eq!((k.len(), v.len()), (256 * num_blocks, 128 * num_blocks), "layer {layer} of {len} tokens");
            assert_eq!(tensors.tensor(&format!("layers.{layer}.k")).expect("k").data(), k);
            assert_eq!(tensors.tensor(&format!("layers.{layer}.v")).expect("v").data(), v);
        }
        assert!(String::from_utf8_lossy(&bytes[8..]).contains(r#""version":"2""#));
    }
    let sound = snapshot_of_groups(40).to_bytes(&[]).expect("bytes");
    let len = u64::from_le_bytes(sound[..8].try_into().unwrap_or_default()) as usize;
    let text = String::from_utf8_lossy(&sound[8..8 + len]).into_owned();
    for to in ["all", "all,all", "5,all", "+,all", "5+1,all,all", "0+1,all", "", "5+1,all,", "5+-1,all", "6+9,all"] {
        let changed = text.replacen("5+1,all", to, 1);
        assert_ne!(changed, text);
        refused(&forged(&changed, sound.len() - 8 - len));
    }
    // One of one group has the version of one.
    refused(&forged(&text.replacen(r#""version":"2""#, r#""version":"1""#, 1), sound.len() - 8 - len));
}

fn snapshot(len: u32, key_scales: bool) -> SequenceSnapshot {
    let config = KvCacheConfig::new(2, 2, 8).with_blocks(len.div_ceil(4), 4).with_formats(KvFormat::F32, KvFormat::F16);
    let bytes = stream_bytes(&config, config.num_blocks).unwrap_or(0);
    let data = (0..bytes).map(|i| (i * 37 % 251) as u8).collect();
    let scales = |layer: u32| (0..32).map(|i| (i + 100 * layer) as f32 * 0.37).collect();
    let key_scales = key_scales.then(|| (0..2).map(scales).collect());
    SequenceSnapshot { config, len, data, key_scales, origin: None }
}

#[test]
fn what_is_saved_is_what_is_loaded() {
    for len in [0, 1, 4, 9] {
        for key_scales in [false, true] {
            let snapshot = snapshot(len, key_scales);
            for count in [0, len, len + 1] {
                let tokens: Vec<u32> = (0..count).map(|i| i * 1000).collect();
                let bytes = snapshot.to_bytes(&tokens).expect("bytes");
                assert_eq!(SequenceSnapshot::from_bytes(&bytes).expect("sound"), (snapshot.clone(), tokens.clone()));
                let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
                let (k, v) = snapshot.layer_bytes(1).expect("layer");
                assert_eq!(tensors.tensor("layers.1.k").expect("k").data(), k);
                assert_eq!(tensors.tensor("layers.1.v").expect("v").data(), v);
                assert_eq!(tensors.tensor("tokens").is_ok(), !tokens.is_empty());
            }
        }
    }
}

/// Files of version 1 exist: another header or checksum needs another version.
#[test]
fn version_1_stays_as_it_is() {
    let bytes = snapshot(1, false).to_bytes(&[7]).expect("bytes");
    let want = concat!(
        r#"{"__metadata__":{"format":"folio.sequence","version":"1","num_layers":"2","num_kv_heads":"2","head_dim":"8","#,
        r#""block_size":"4","k_format":"F32","v_format":"F16","len":"1","crc32":"5f33bae8"},"#,
        r#""layers.0.k":{"dtype":"U8","shape":[1,256],"data_offsets":[0,256]},"#,
        r#""layers.0.v":{"dtype":"U8","shape":[1,128],"data_offsets":[256,384]},"#,
        r#""layers.1.k":{"dtype":"U8","shape":[1,256],"data_offsets":[384,640]},"#,
        r#""layers.1.v":{"dtype":"U8","shape":[1,128],"data_offsets":[640,768]},"#,
        r#""tokens":{"dtype":"U32","shape":[1],"data_offsets":[768,772]}}"#,
    );
    assert_eq!(String::from_utf8_lossy(&bytes[8..8 + want.len()]), want);
}

/// Whatever happens to a file: it is refused, with the reason, and nothing panics.
fn refused(bytes: &[u8]) -> String {
    match SequenceSnapshot::from_bytes(bytes) {
        Err(Error::File { file, reason, .. }) => {
            assert_eq!(file, IN_MEMORY);
            reason
        }
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn every_flipped_bit_and_every_truncation_is_noticed() {
    let sound = snapshot(5, true).to_bytes(&[1, 2, 3, 4, 5]).expect("bytes");
    assert!(SequenceSnapshot::from_bytes(&sound).is_ok());
    for at in 0..sound.len() {
        for bit in 0..8 {
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << bit;
            refused(&bytes);
        }
        refused(&sound[..at]);
    }
    for extra in [&[0][..], &[0; 8], &sound] {
        refused(&[&sound, extra].concat());
    }
}

/// Nothing but a regular file is replaced, and nothing is left behind.
#[cfg(unix)]
#[test]
fn only_regular_files_are_replaced() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    use std::os::unix::net::UnixListener;

    let folder = tempfile::tempdir().expect("folder");
    let at = |name: &str| folder.path().join(name);
    let snapshot = snapshot(5, false);
    fs::write(at("file"), "old").expect("file");
    fs::create_dir(at("directory")).expect("directory");
    symlink("file", at("link")).expect("link");
    symlink("nowhere", at("dangling")).expect("link");
    symlink("/dev/null", at("null")).expect("link");
    let pipe = std::process::Command::new("mkfifo").arg(at("pipe")).status();
    assert!(pipe.expect("mkfifo").success());
    drop(UnixListener::bind(at("socket")).expect("socket"));
    let names = || {
        let mut names: Vec<_> = fs::read_dir(folder.path()).expect("list").flatten().map(|e| e.file_name()).collect();
        names.sort_unstable();
        names
    };
    let before = names();
    for (name, what) in [
        ("directory", "a directory"),
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("null", "a symbolic link"),
        ("pipe", "a pipe"),
        ("socket", "a socket"),
    ] {
        let metadata = fs::symlink_metadata(at(name)).expect("metadata");
        let error = snapshot.save(at(name), &[]).expect_err(name).to_string();
        assert!(error.contains(name) && error.ends_with(&format!("got {what}, need a regular file")), "{error}");
        assert_eq!(fs::symlink_metadata(at(name)).expect("as it was").file_type(), metadata.file_type());
        assert_eq!(names(), before, "{name}");
    }
    assert!(fs::symlink_metadata("/dev/null").expect("null").file_type().is_char_device());
    assert_eq!(fs::read(at("file")).expect("as it was"), b"old");
    // A device under its own name. That the check is made is seen without the right to write there.
    let error = snapshot.save("/dev/full", &[]).expect_err("a device").to_string();
    assert!(error.contains("got a device"), "{error}");

    snapshot.save(at("file"), &[]).expect("over a file");
    snapshot.save(at("new"), &[]).expect("a new one");
    assert_eq!(SequenceSnapshot::load(at("link")).expect("links are followed"), (snapshot, Vec::new()));
    assert_eq!(names().len(), before.len() + 1);
}

/// An error at once, and with the system's own behind it.
#[cfg(unix)]
#[test]
fn only_regular_files_are_loaded() {
    use std::error::Error as _;
    let folder = tempfile::tempdir().expect("folder");
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    for (path, what) in [(&*pipe, "a pipe"), (Path::new("/dev/zero"), "a device"), (folder.path(), "a directory")] {
        let (sender, receiver) = std::sync::mpsc::channel();
        let opened = path.to_owned();
        std::thread::spawn(move || drop(sender.send(SequenceSnapshot::load(opened))));
        let loaded = receiver.recv_timeout(std::time::Duration::from_secs(10)).expect("an end");
        let error = loaded.expect_err(what).to_string();
        assert!(error.ends_with(&format!("got {what}, need a regular file")), "{error}");
    }
    let missing = SequenceSnapshot::load(folder.path().join("nowhere")).expect_err("nothing");
    let cause = missing.source().and_then(|cause| cause.downcast_ref::<std::io::Error>()).expect("a cause");
    assert_eq!(cause.kind(), ErrorKind::NotFound);
}

/// A file with a valid checksum, whatever its header says.
fn forged(header: &str, tensors: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + tensors, 0);
    bytes
}

#[test]
fn absurd_and_foreign_headers_are_refused() {
    let sound = snapshot(5, false).to_bytes(&[]).expect("bytes");
    let text =
        String::from_utf8_lossy(&sound[8..8 + u64::from_le_bytes(sound[..8].try_into().unwrap_or_default()) as usize])
            .into_owned();
    let newer = forged(&text.replacen(r#""version":"1""#, r#""version":"3""#, 1), sound.len() - 8 - text.len());
    assert!(refused(&newer).contains("version \"3\""));
    // That of several groups, of which it has none.
    refused(&forged(&text.replacen(r#""version":"1""#, r#""version":"2""#, 1), sound.len() - 8 - text.len()));
    let large = u32::MAX.to_string();
    for (from, to) in [
        (r#""num_layers":"2""#, format!(r#""num_layers":"{large}""#)),
        (r#""num_layers":"2""#, r#""num_layers":"0""#.to_owned()),
        (r#""num_kv_heads":"2""#, r#""num_kv_heads":"65535""#.to_owned()),
        (r#""head_dim":"8""#, r#""head_dim":"7""#.to_owned()),
        (r#""len":"5""#, format!(r#""len":"{large}""#)),
        (r#""len":"5""#, r#""len":"2147483647""#.to_owned()),
        (r#""len":"5""#, r#""len":"6""#.to_owned()),
        (r#""len":"5""#, r#""len":"-5""#.to_owned()),
        (r#""len":"5""#, r#""len":"+5""#.to_owned()),
        (r#""k_format":"F32""#, r#""k_format":"f32""#.to_owned()),
        (r#""k_format":"F32""#, r#""k_format":"F16""#.to_owned()),
        (r#""data_offsets":[0,"#, r#""data_offsets":[18446744073709551615,"#.to_owned()),
        (r#""shape":[2,"#, r#""shape":[9223372036854775807,"#.to_owned()),
    ] {
        let changed = text.replacen(from, &to, 1);
        assert_ne!(changed, text, "{from}");
        refused(&forged(&changed, sound.len() - 8 - text.len()));
    }
    for layers in [1 << 20, u32::MAX] {
        // No tokens, so no bytes: only the number of tensors is wrong.
        let empty = snapshot(0, false).to_bytes(&[]).expect("bytes");
        let text = String::from_utf8_lossy(&empty[8..]).replacen(
            r#""num_layers":"2""#,
            &format!(r#""num_layers":"{layers}""#),
            1,
        );
        refused(&forged(&text, 0));
    }
    let model = r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    for foreign in [Vec::new(), vec![0; 7], vec![0; 8], vec![0xff; 4096], forged(model, 4), forged("{}", 0)] {
        assert!(refused(&foreign).contains("not a sequence"));
    }
    for n in [u64::MAX, 1 << 62, 99_999_999] {
        let mut bytes = sound.clone();
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        refused(&bytes);
    }
}
