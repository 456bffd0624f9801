//! Headers and checkpoints accepted and refused; sources that change.

mod changes;
mod checkpoints;
mod decode;
mod fused;
mod headers;

use std::path::Path;

use serde_json::{Value, json};

/// A safetensors file: the header, with its length in front, and the data.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A header's JSON for tensors of bytes, one after the other.
fn header_of(tensors: &[(&str, usize)]) -> String {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, len) in tensors {
        let offsets: Value = json!([at, at + len]);
        header.insert(
            (*name).to_owned(),
            json!({ "dtype": "U8", "shape": [len], "data_offsets": offsets }),
        );
        at += len;
    }
    Value::Object(header).to_string()
}

/// Writes a shard of tensors of bytes, each filled with `fill`.
fn write_shard(path: &Path, tensors: &[(&str, usize)], fill: u8) {
    let data = vec![fill; tensors.iter().map(|(_, len)| len).sum()];
    std::fs::write(path, safetensors(&header_of(tensors), &data)).expect("written");
}

/// Writes an index.
fn write_index(path: &Path, weight_map: &Value) {
    std::fs::write(path, json!({ "weight_map": weight_map }).to_string()).expect("written");
}
