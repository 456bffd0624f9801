//! Quantized checkpoints: operands that don't fit, and values by each dialect's definition.

use std::num::NonZeroUsize;
use std::path::Path;

use serde_json::{Value, json};

use super::safetensors as file_of;
use crate::dtype::{Dtype, byte_len};
use crate::error::{ErrorKind, Result};
use crate::isa::Isa;
use crate::source::{Checkpoint, SourceFiles, Window};

/// A stored tensor: its name, element type, shape and bytes; zeros where there are none.
type Stored<'a> = (&'a str, &'a str, &'a [u64], &'a [u8]);

/// Writes one shard.
fn write(path: &Path, tensors: &[Stored<'_>]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        let parsed: Dtype = serde_json::from_value(json!(dtype)).expect("a type");
        let len = byte_len(parsed, shape).expect("whole bytes") as usize;
        assert!(bytes.is_empty() || bytes.len() == len, "{name}: {len} bytes");
        data.extend_from_slice(bytes);
        data.resize(start + len, 0);
        let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), info);
    }
    std::fs::write(path, file_of(&Value::Object(header).to_string(), &data)).expect("written");
}

fn open(tensors: &[Stored<'_>], config: &Value) -> (tempfile::TempDir, Result<Checkpoint>) {
    let dir = tempfile::tempdir().expect("a directory");
    write(&dir.path().join("model.safetensors"), tensors);
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let opened = Checkpoint::open(dir.path());
    let known = opened.and_then(|opened| opened.refuse_unknown_codes().map(|()| opened));
    (dir, known)
}

/// A declaration of the method, with whatever else it says.
fn declared(method: &str, more: Value) -> Value {
    let mut declared = json!({ "quant_method": method });
    for (key, value) in more.as_object().expect("an object") {
        declared[key] = value.clone();
    }
    json!({ "quantization_config": declared })
}

#[track_caller]
fn refuses(tensors: &[Stored<'_>], config: Value, kind: ErrorKind, complaint: &str) {
    let (_dir, opened) = open(tensors, &config);
    let error = opened.expect_err("accepted");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(complaint), "{error:?} does not say {complaint:?}");
    assert!(!error.to_string().contains('\n'), "{error}");
}

/// All elements of a tensor, as f32.
fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let id = checkpoint.catalog().find(name).expect("there");
    let tensor = &checkpoint.catalog()[id];
    let files = SourceFiles::new(NonZeroUsize::MIN);
    let cols = tensor.elements();
    let window = Window { width: cols, first_row: 0, rows: 1, first_col: 0, cols };
    let decode = crate::source::f32_decoder(tensor.dtype).expect("reals");
    let on = |isa| {
        let mut out = Vec::new();
        let read = |bytes: &[u8], _| decode(bytes, &mut out);
        checkpoint.with_window(isa, &files, id, window, read).expect("read");
        out
    };
    let first = on(Isa::detect());
    for isa in Isa::available() {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(on(isa)), bits(first.clone()), "{name} on {}", isa.name());
    }
    first
}

#[track_caller]
fn decodes(tensors: &[Stored<'_>], config: Value, name: &str, shape: &[u64], expected: &[f32]) {
    let (_dir, opened) = open(tensors, &config);
    let checkpoint = opened.expect("refused");
    let id = checkpoint.catalog().find(name).expect("there");
    assert_eq!(checkpoint.catalog()[id].shape, shape, "{name}");
    let found = values(&checkpoint, name);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(expected), "{name}: {found:?} instead of {expected:?}");
    let config = &checkpoint.config().expect("a config").value;
    assert_eq!(config.get("quantization_config"), None);
    assert_eq!(config.get("quantization"), None);
}

#[track_caller]
fn unsupported(tensor: Stored<'_>, config: Value, complaint: &str) {
    refuses(&[tensor], config, ErrorKind::Unsupported, complaint);
}

#[test]
fn what_nobody_decodes_is_refused_by_name() {
    let (_dir, opened) = open(&[("a.weight", "BF16", &[128, 128], &[])], &json!({}));
    assert!(!opened.expect("plain").is_decoded());
    let null = json!({"quantization_config": null});
    assert!(open(&[("a.weight", "BF16", &[2, 2], &[])], &null).1.is_ok());
    let end = "start from the original";
    unsupported(("a.weight", "BF16", &[2, 2], &[]), declared("fp8", json!({})), "declares fp8;");
    let codes = ("a.weight", "F8_E4M3", &[2, 2][..], &[][..]);
    unsupported(codes, declared("fp8", json!({})), "declares fp8, as in `a.weight` (F8_E4M3)");
    unsupported(codes, json!({}), "can't be decoded: `a.weight` (F8_E4M3); start");
    let nested = json!({"text_config": declared("awq", json!({}))});
    unsupported(
        ("a.qweight", "I32", &[2, 2], &[]),
        nested,
        "declares awq, as in `a.qweight` (I32)",
    );
    for method in ["gptq", "awq", "torchao", "modelopt", "quanto"] {
        unsupported(("a.qweight", "I32", &[2, 2], &[]), declared(method, json!({})), method);
    }
    unsupported(("a.qweight", "I32", &[2, 2], &[]), json!({}), end);
    unsupported(("a.weight_packed", "I32", &[2, 2], &[]), json!({}), "`a.weight_packed` (I32)");
}

#[test]
fn operands_of_fp8_must_fit() {
    let fp8 = || declared("fp8", json!({}));
    let codes: Stored<'_> = ("a.weight", "F8_E4M3", &[200, 130], &[]);
    let scale = |shape| -> Stored<'_> { ("a.weight_scale_inv", "F32", shape, &[]) };
    assert!(open(&[codes, scale(&[2, 2])], &fp8()).1.is_ok());
    let check = |tensors: &[Stored<'_>], complaint: &str| {
        refuses(tensors, fp8(), ErrorKind::Corrupt, complaint);
    };
    check(
        &[codes, scale(&[1, 2, 2])],
        "`a.weight_scale_inv`: F32 [1, 2, 2] is no scale of [200, 130]",
    );
    check(&[codes, scale(&[3, 2])], "`a.weight_scale_inv`: F32 [3, 2]");
    check(&[codes, scale(&[0, 2])], "`a.weight_scale_inv`: F32 [0, 2]");
    check(&[scale(&[2, 2])], "`a.weight_scale_inv`: F32 [2, 2] belongs to no `a.weight`");
    let wide: Stored<'_> = ("a.weight", "BF16", &[200, 130], &[]);
    check(&[wide, scale(&[2, 2])], "`a.weight`: BF16 [200, 130] has a scale, but is not F8_E4M3");
    let odd: Stored<'_> = ("a.weight_scale_inv", "I32", &[2, 2], &[]);
    check(&[codes, odd], "`a.weight_scale_inv`: I32 [2, 2] is no type of a scale");
    // Two of a kind, of which one has no scale.
    let other: Stored<'_> = ("b.weight", "F8_E4M3", &[2, 2], &[]);
    unsupported_all(&[codes, scale(&[2, 2]), other], fp8(), "as in `b.weight` (F8_E4M3)");
}

#[track_caller]
fn unsupported_all(tensors: &[Stored<'_>], config: Value, complaint: &str) {
    refuses(tensors, config, ErrorKind::Unsupported, complaint);
}

#[test]
fn operands_of_compressed_tensors_must_fit() {
    let ct = |more| declared("compressed-tensors", more);
    let shape = |dims: [i64; 2]| dims.map(i64::to_le_bytes).concat();
    let good = shape([4, 64]);
    let codes: Stored<'_> = ("a.weight_packed", "I32", &[4, 8], &[]);
    let scale: Stored<'_> = ("a.weight_scale", "BF16", &[4, 2], &[]);
    let dims: Stored<'_> = ("a.weight_shape", "I64", &[2], &good);
    assert!(open(&[codes, scale, dims], &ct(json!({}))).1.is_ok());
    let check = |tensors: &[Stored<'_>], complaint: &str| {
        refuses(tensors, ct(json!({})), ErrorKind::Corrupt, complaint);
    };
    check(&[codes, dims], "`a.weight`: without `a.weight_scale` it has no meaning");
    check(&[codes, scale], "`a.weight`: without `a.weight_shape` it has no meaning");
    for bad in [[5, 64], [4, 0x7fff_ffff_ffff_ffff], [4, -1], [-4, 64]] {
        check(&[codes, scale, ("a.weight_shape", "I64", &[2], &shape(bad))], "as `a.weight_shape`");
    }
    check(&[codes, scale, ("a.weight_shape", "I64", &[2], &shape([4, 3]))], "1 to 8 bits for 3");
    check(&[codes, scale, ("a.weight_shape", "I64", &[3], &[])], "a shape of two dimensions");
    check(&[codes, ("a.weight_scale", "BF16", &[4, 3], &[]), dims], "is no scale of [4, 64]");
    check(&[codes, ("a.weight_scale", "U8", &[4, 2], &[]), dims], "is no type of a scale");
    let zero = |shape| -> Stored<'_> { ("a.weight_zero_point", "I32", shape, &[]) };
    assert!(open(&[codes, scale, dims, zero(&[1, 2])], &ct(json!({}))).1.is_ok());
    check(&[codes, scale, dims, zero(&[2, 2])], "has no zero points of 4 bits for [4, 2]");
    check(&[("a.weight_packed", "F32", &[4, 8], &[]), scale, dims], "no type of packed codes");
    let order: Stored<'_> = ("a.weight_g_idx", "I32", &[64], &[]);
    unsupported_all(&[codes, scale, dims, order], ct(json!({})), "`a.weight`: its columns are in");
    check(&[scale], "`a.weight_scale`: without `a.weight` it has no meaning");
    check(&[("a.weight", "BF16", &[4, 64], &[]), scale], "is neither I8 nor F8_E4M3");
    let bytes: Stored<'_> = ("a.weight", "I8", &[4, 64], &[]);
    check(
        &[bytes, scale, ("a.weight_zero_point", "I8", &[4, 1], &[])],
        "has no zero point for each",
    );
    check(
        &[("a.weight", "F8_E4M3", &[4, 64], &[]), ("a.weight_scale", "U8", &[4, 1], &[])],
        "has no scale for each 32 of [4, 64]",
    );
    let floats: Stored<'_> = ("a.weight_packed", "U8", &[4, 32], &[]);
    check(&[floats, ("a.weight_scale", "U8", &[4, 3], &[])], "no scale for each 32 of [4, 64]");
    check(&[floats, ("a.weight_scale", "F8_E4M3", &[4, 4], &[])], "`a.weight_global_scale`");
    let packed = [codes, scale, dims];
    let sparse = ct(json!({"sparsity_config": {"format": "sparse-24-bitmask"}}));
    unsupported_all(&packed, sparse, "sparsity sparse-24-bitmask");
    unsupported_all(&packed, ct(json!({"format": "marlin-24"})), "format marlin-24");
    let rotated = ct(json!({"transform_config": {"config_groups": {"u": {}}}}));
    unsupported_all(&packed, rotated, "with transforms");
}

#[test]
fn operands_of_bitsandbytes_must_fit() {
    let bnb = || declared("bitsandbytes", json!({}));
    let state = |text: &str| text.as_bytes().to_vec();
    let good = state(r#"{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[3,50]}"#);
    let name = "a.weight.quant_state.bitsandbytes__nf4";
    let len = [good.len() as u64];
    let (codes, map, absmax): (Stored<'_>, Stored<'_>, Stored<'_>) = (
        ("a.weight", "U8", &[75, 1], &[]),
        ("a.weight.quant_map", "F32", &[16], &[]),
        ("a.weight.absmax", "F32", &[3], &[]),
    );
    let whole: Stored<'_> = (name, "U8", &len, &good);
    assert!(open(&[codes, map, absmax, whole], &bnb()).1.is_ok());
    let check = |tensors: &[Stored<'_>], complaint: &str| {
        refuses(tensors, bnb(), ErrorKind::Corrupt, complaint);
    };
    check(&[map, absmax, whole], "without `a.weight` it has no meaning");
    check(&[codes, absmax, whole], "`a.weight`: without `a.weight.quant_map`");
    check(&[codes, map, whole], "`a.weight`: without `a.weight.absmax`");
    check(&[("a.weight", "U8", &[74, 1], &[]), map, absmax, whole], "two codes a byte of [3, 50]");
    let few: Stored<'_> = ("a.weight.absmax", "F32", &[2], &[]);
    check(&[codes, map, few, whole], "`a.weight.absmax`: F32 [2] is not 3 of F32");
    check(
        &[("a.weight", "BF16", &[2, 2], &[]), absmax],
        "belongs to no weight with a quantization",
    );
    for (text, complaint) in [
        ("{", "quant_state.bitsandbytes__nf4`: EOF"),
        (r#"{"blocksize":0,"dtype":"float16","shape":[3,50]}"#, "a block of 0"),
        (r#"{"blocksize":64,"dtype":"int8","shape":[3,50]}"#, "no weight has the dtype \"int8\""),
        (
            r#"{"blocksize":64,"dtype":"float16","shape":[4294967296,4294967296,2]}"#,
            "its shape overflows",
        ),
        (
            r#"{"blocksize":64,"dtype":"float16","shape":[3,50],"nested_blocksize":256}"#,
            "half of a nested quantization",
        ),
    ] {
        check(
            &[codes, map, absmax, (name, "U8", &[text.len() as u64], text.as_bytes())],
            complaint,
        );
    }
    let ints: Stored<'_> = ("a.weight", "I8", &[2, 3], &[]);
    check(&[ints, ("a.SCB", "F32", &[3], &[])], "`a.SCB`: F32 [3] has no F32 for each of 2 rows");
    check(&[("a.SCB", "F32", &[3], &[])], "`a.SCB`: without `a.weight`");
    let tiled: Stored<'_> = ("a.weight_format", "U8", &[], &[2]);
    unsupported_all(&[ints, ("a.SCB", "F32", &[2], &[]), tiled], bnb(), "tiled for a GPU");
}

#[test]
fn operands_of_mlx_and_gpt_oss_must_fit() {
    let mlx = |more: Value| {
        let mut declared = json!({"group_size": 32, "bits": 4});
        for (key, value) in more.as_object().expect("an object") {
            declared[key] = value.clone();
        }
        json!({ "quantization": declared })
    };
    let codes: Stored<'_> = ("a.weight", "U32", &[2, 8], &[]);
    let scales: Stored<'_> = ("a.scales", "F16", &[2, 2], &[]);
    let biases: Stored<'_> = ("a.biases", "F16", &[2, 2], &[]);
    let all = [codes, scales, biases];
    assert!(open(&all, &mlx(json!({}))).1.is_ok());
    let check = |tensors: &[Stored<'_>], more: Value, complaint: &str| {
        refuses(tensors, mlx(more), ErrorKind::Corrupt, complaint);
    };
    check(&[codes, scales], json!({}), "`a.weight`: without `a.biases`");
    check(&[codes, biases], json!({}), "`a.weight`: without `a.scales`");
    check(&[scales, biases], json!({}), "`a.scales`: F16 [2, 2] belongs to no weight");
    check(&all, json!({"bits": 8}), "is no scale of `a.weight`: 8 bits, groups of 32");
    check(&all, json!({"bits": 0}), "0 bits, groups of 32");
    check(&all, json!({"group_size": 0}), "4 bits, groups of 0");
    check(&all, json!({"a": {"bits": 3, "group_size": 32}}), "3 bits, groups of 32");
    check(&all, json!({"mode": "mxfp4"}), "is no type of a scale of mxfp4");
    check(&[codes, scales, ("a.biases", "F16", &[2, 3], &[])], json!({}), "what the scales are");
    check(&[("a.weight", "I32", &[2, 8], &[]), scales, biases], json!({}), "but is not U32");
    unsupported_all(
        &all,
        mlx(json!({"mode": "nf4"})),
        "`a.weight`: config.json declares mode \"nf4\"",
    );

    let oss = || declared("mxfp4", json!({}));
    let blocks: Stored<'_> = ("a_proj_blocks", "U8", &[2, 3, 1, 16], &[]);
    let check = |tensors: &[Stored<'_>], complaint: &str| {
        refuses(tensors, oss(), ErrorKind::Corrupt, complaint);
    };
    assert!(open(&[blocks, ("a_proj_scales", "U8", &[2, 3, 1], &[])], &oss()).1.is_ok());
    check(&[blocks], "`a_proj_blocks`: without `a_proj_scales`");
    check(&[("a_proj_scales", "U8", &[2, 3, 1], &[])], "`a_proj_scales`: without `a_proj_blocks`");
    check(
        &[blocks, ("a_proj_scales", "U8", &[2, 3, 2], &[])],
        "has no U8 for each of [2, 3, 1, 16]",
    );
    check(&[("a_proj_blocks", "U8", &[2, 3, 1, 8], &[])], "without `a_proj_scales`");
    // A dimension that overflows when unpacked, in a tensor without bytes.
    let huge: [Stored<'_>; 2] = [
        ("a_proj_blocks", "U8", &[0, 1, 1 << 60, 16], &[]),
        ("a_proj_scales", "U8", &[0, 1, 1 << 60], &[]),
    ];
    let (_dir, opened) = open(&huge, &oss());
    assert!(opened.is_ok_and(|checkpoint| checkpoint.is_decoded()));
}

#[test]
fn fp8_blocks_reach_beyond_the_weight_and_scales_may_be_of_any_kind() {
    // 0x38 is 1, 0x40 is 2.
    let codes = [0x38, 0x40, 0xb8, 0x38, 0x38, 0x38];
    let weight: Stored<'_> = ("a.weight", "F8_E4M3", &[2, 3], &codes);
    let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let blocks = declared("fp8", json!({"weight_block_size": [1, 2]}));
    let scale = f32s(&[0.5, 3.0, 0.25, 2.0]);
    decodes(
        &[weight, ("a.weight_scale_inv", "F32", &[2, 2], &scale)],
        blocks.clone(),
        "a.weight",
        &[2, 3],
        &[0.5, 1.0, -3.0, 0.25, 0.25, 2.0],
    );
    decodes(
        &[weight, ("a.weight_scale_inv", "F8_E8M0", &[2, 2], &[127, 128, 126, 129])],
        blocks,
        "a.weight",
        &[2, 3],
        &[1.0, 2.0, -2.0, 0.5, 0.5, 4.0],
    );
    // As Mistral's: one for the tensor, beside what its activations had.
    let one = [0, 0x40];
    let config = json!({
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": null},
    });
    decodes(
        &[
            weight,
            ("a.weight_scale_inv", "BF16", &[], &one),
            ("a.activation_scale", "BF16", &[], &one),
        ],
        config,
        "a.weight",
        &[2, 3],
        &[2.0, 4.0, -2.0, 2.0, 2.0, 2.0],
    );
    // Fused experts.
    let fused = f32s(&[2.0, 4.0]);
    decodes(
        &[
            ("experts.up_proj", "F8_E4M3", &[2, 1, 3], &codes),
            ("experts.up_proj_scale_inv", "F32", &[2, 1, 1], &fused),
        ],
        declared("fp8", json!({})),
        "experts.up_proj",
        &[2, 1, 3],
        &[2.0, 4.0, -2.0, 4.0, 4.0, 4.0],
    );
}

#[test]
fn experts_of_gpt_oss_are_transposed() {
    // Expert 0 has outputs 1, 2, and 3 for input 0; expert 1 halves of them.
    let mut blocks = vec![0; 2 * 3 * 16];
    for (row, code) in [2, 4, 5, 2, 4, 5].into_iter().enumerate() {
        blocks[row * 16] = code;
        blocks[row * 16 + 15] = 0xa0;
    }
    let scales = [127, 127, 127, 126, 126, 126];
    let mut expected = vec![0.0; 2 * 32 * 3];
    for (expert, scale) in [1.0, 0.5].into_iter().enumerate() {
        for (output, value) in [1.0, 2.0, 3.0].into_iter().enumerate() {
            expected[(expert * 32) * 3 + output] = value * scale;
            expected[(expert * 32 + 31) * 3 + output] = -scale;
        }
    }
    decodes(
        &[
            ("a_proj_blocks", "U8", &[2, 3, 1, 16], &blocks),
            ("a_proj_scales", "U8", &[2, 3, 1], &scales),
        ],
        declared("mxfp4", json!({})),
        "a_proj",
        &[2, 32, 3],
        &expected,
    );
}

#[test]
fn codes_packed_before_0_18_leave_the_rest_of_a_word_unused() {
    // 12 codes of 3 bits: ten in the first word, two in the second; -4 + i % 8.
    let word = |codes: &[u32]| codes.iter().enumerate().map(|(i, c)| c << (3 * i)).sum::<u32>();
    let codes: Vec<u32> = (0..12).map(|i| i % 8).collect();
    let packed = [word(&codes[..10]), word(&codes[10..])].map(u32::to_le_bytes).concat();
    let shape = [1i64, 12].map(i64::to_le_bytes).concat();
    let expected: Vec<f32> = codes.iter().map(|code| *code as f32 * 0.5 - 2.0).collect();
    let declared = declared(
        "compressed-tensors",
        json!({"version": "0.17.1", "config_groups": {"g": {"weights": {"num_bits": 3}}}}),
    );
    decodes(
        &[
            ("a.weight_packed", "I32", &[1, 2], &packed),
            ("a.weight_scale", "F32", &[1, 1], &0.5f32.to_le_bytes()),
            ("a.weight_shape", "I64", &[2], &shape),
        ],
        declared,
        "a.weight",
        &[1, 12],
        &expected,
    );
}

#[test]
fn integers_with_zero_points_are_rounded_to_the_type_of_their_scale() {
    let scale = 0x3f81u16.to_le_bytes();
    let factor = f32::from_bits(0x3f81_0000);
    let product = |code: f32| {
        // 1.0078125 has eight bits: the product is rounded to as many, then to F32 unchanged.
        let bits = (code * factor).to_bits();
        f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
    };
    let config = json!({
        "dtype": "float32",
        "quantization_config": {"quant_method": "compressed-tensors"},
    });
    decodes(
        &[
            ("a.weight", "I8", &[1, 3], &[127, 0x80, 100]),
            ("a.weight_scale", "BF16", &[1, 1], &scale),
            ("a.weight_zero_point", "I8", &[1, 1], &[0xfe]),
        ],
        config,
        "a.weight",
        &[1, 3],
        &[product(129.0), product(-126.0), product(102.0)],
    );
}

#[test]
fn a_nested_quantization_scales_its_scales() {
    let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let map = f32s(&std::array::from_fn::<_, 16, _>(|code| code as f32));
    let nested_map = f32s(&std::array::from_fn::<_, 256, _>(|code| code as f32 / 4.0));
    let state = r#"{"quant_type": "nf4", "blocksize": 2, "dtype": "float32", "shape": [3, 2],
        "nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.5}"#;
    decodes(
        &[
            ("a.weight", "U8", &[3, 1], &[0x12, 0x34, 0x5f]),
            ("a.weight.absmax", "U8", &[3], &[4, 8, 4]),
            ("a.weight.quant_map", "F32", &[16], &map),
            ("a.weight.nested_absmax", "F32", &[2], &f32s(&[1.0, 3.0])),
            ("a.weight.nested_quant_map", "F32", &[256], &nested_map),
            (
                "a.weight.quant_state.bitsandbytes__nf4",
                "U8",
                &[state.len() as u64],
                state.as_bytes(),
            ),
        ],
        declared("bitsandbytes", json!({})),
        "a.weight",
        &[3, 2],
        // Scales 1.5, 2.5 and 3.5; the first code is in the high half.
        &[1.5, 3.0, 7.5, 10.0, 17.5, 52.5],
    );
}

#[test]
fn operands_may_lie_in_other_shards_and_configs_may_be_nested() {
    let dir = tempfile::tempdir().expect("a directory");
    let codes: Stored<'_> = ("a.weight", "F8_E4M3", &[1, 2], &[0x38, 0x40]);
    let norm: Stored<'_> = ("norm.weight", "BF16", &[1], &[0, 0x40]);
    let scale = 3.0f32.to_le_bytes();
    write(&dir.path().join("1.safetensors"), &[("a.weight_scale_inv", "F32", &[1, 1], &scale)]);
    write(&dir.path().join("2.safetensors"), &[norm, codes]);
    let weight_map = json!({
        "a.weight": "2.safetensors",
        "norm.weight": "2.safetensors",
        "a.weight_scale_inv": "1.safetensors",
    });
    super::write_index(&dir.path().join("model.safetensors.index.json"), &weight_map);
    let text = "{\"eps\": 1e-06, \"text_config\": {\"a\": 1, \"quantization_config\": \
                {\"quant_method\": \"fp8\"}, \"dtype\": \"float32\"}, \"inf\": Infinity}";
    std::fs::write(dir.path().join("config.json"), text).expect("written");
    let checkpoint = Checkpoint::open(dir.path()).expect("opened");
    assert_eq!(values(&checkpoint, "a.weight"), [3.0, 6.0]);
    assert_eq!(values(&checkpoint, "norm.weight"), [2.0]);
    let tensors = checkpoint.catalog().tensors();
    let names: Vec<(&str, usize)> = tensors.iter().map(|t| (&*t.name, t.shard())).collect();
    assert_eq!(names, [("norm.weight", 1), ("a.weight", 1)]);
    assert_eq!(tensors[1].dtype, Dtype::F32);
    assert_eq!(
        checkpoint.config().expect("a config").text,
        "{\"eps\": 1e-06, \"text_config\": {\"a\": 1, \"dtype\": \"float32\"}, \"inf\": Infinity}"
    );
}

#[test]
fn any_window_is_a_part_of_the_whole() {
    // Transposed, with rows and columns that fill no block of the decoder's.
    let (experts, outputs, inputs) = (3u64, 37u64, 160u64);
    let bytes = |len: u64, mul: u64| (0..len).map(|i| (i * mul % 251) as u8).collect::<Vec<_>>();
    let blocks = bytes(experts * outputs * inputs / 2, 97);
    let scales: Vec<u8> =
        bytes(experts * outputs * inputs / 32, 31).iter().map(|b| 120 + b % 16).collect();
    let packed = bytes(37 * 15 * 4, 89);
    let zeros = bytes(4 * 5 * 4, 83);
    let ct_scale: Vec<u8> = (0..37 * 5).flat_map(|i: u16| (0x3f00 + i).to_le_bytes()).collect();
    let shape = [37i64, 160].map(i64::to_le_bytes).concat();
    let oss: [Stored<'_>; 2] = [
        ("a_proj_blocks", "U8", &[experts, outputs, inputs / 32, 16], &blocks),
        ("a_proj_scales", "U8", &[experts, outputs, inputs / 32], &scales),
    ];
    let ct: [Stored<'_>; 4] = [
        ("a.weight_packed", "I32", &[37, 15], &packed),
        ("a.weight_scale", "BF16", &[37, 5], &ct_scale),
        ("a.weight_zero_point", "I32", &[4, 5], &zeros),
        ("a.weight_shape", "I64", &[2], &shape),
    ];
    let files = SourceFiles::new(NonZeroUsize::MIN);
    for (tensors, config, name) in [
        (&oss[..], declared("mxfp4", json!({})), "a_proj"),
        (&ct[..], declared("compressed-tensors", json!({})), "a.weight"),
    ] {
        let (_dir, opened) = open(tensors, &config);
        let checkpoint = opened.expect("refused");
        let id = checkpoint.catalog().find(name).expect("there");
        let elements = checkpoint.catalog()[id].elements();
        let read = |isa, window: Window| {
            let read = |bytes: &[u8], stride: usize| {
                let rows = (0..window.rows as usize).map(|row| row * stride * 2);
                rows.flat_map(|at| bytes[at..][..window.cols as usize * 2].to_vec()).collect()
            };
            let out: Vec<u8> = checkpoint.with_window(isa, &files, id, window, read).expect("read");
            out
        };
        let whole = read(
            Isa::detect(),
            Window { width: elements, first_row: 0, rows: 1, first_col: 0, cols: elements },
        );
        assert!(whole.windows(2).any(|pair| pair[0] != pair[1]));
        for width in [37, 160, 74, elements / 5, elements] {
            let height = elements / width;
            for k in 0..40 {
                let first_row = k * 7 % height;
                let rows = 1 + k * 5 % (height - first_row);
                let first_col = k * 11 % width;
                let cols = 1 + k * 13 % (width - first_col);
                let window = Window { width, first_row, rows, first_col, cols };
                let expected: Vec<u8> = (first_row..first_row + rows)
                    .flat_map(|row| {
                        let at = (row * width + first_col) as usize * 2;
                        whole[at..at + cols as usize * 2].to_vec()
                    })
                    .collect();
                for isa in Isa::available() {
                    assert!(read(isa, window) == expected, "{name}: {window:?} {isa:?}");
                }
            }
        }
    }
}
