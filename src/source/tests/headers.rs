//! Literal headers with the complaint they deserve, and the safetensors library as judge.

use std::fs::File;
use std::io::Write;

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::safetensors as file_of;
use crate::dtype::Dtype;
use crate::error::ErrorKind;
use crate::source::{Entry, Header, MAX_HEADER_BYTES};

/// Reads a header from a file with these bytes.
fn read(bytes: &[u8]) -> crate::error::Result<Header> {
    let mut file: File = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("written");
    Header::read(&file, bytes.len() as u64)
}

#[track_caller]
fn refuses_bytes(bytes: &[u8], complaint: &str) {
    let error = read(bytes).expect_err("accepted");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let message = error.to_string();
    assert!(message.contains(complaint), "{message:?} does not say {complaint:?}");
    assert!(!message.contains('\n'), "{message:?}");
}

#[track_caller]
fn refuses(header: &str, data: usize, complaint: &str) {
    refuses_bytes(&file_of(header, &vec![0; data]), complaint);
}

#[track_caller]
fn accepts(header: &str, data: usize) -> Header {
    read(&file_of(header, &vec![0; data])).expect("refused")
}

/// `"name": {…}` of a header.
fn tensor(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

/// A header of one tensor `a`.
fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!("{{{}}}", tensor("a", dtype, shape, offsets))
}

/// A header of the tensors given.
fn all(tensors: &[String]) -> String {
    format!("{{{}}}", tensors.join(","))
}

#[test]
fn refuses_files_that_are_too_short_for_their_header() {
    refuses_bytes(b"", "0 bytes are too few for a safetensors file");
    refuses_bytes(&[0; 7], "7 bytes are too few");
    refuses_bytes(&[0; 8], "EOF while parsing");
    refuses_bytes(&[3, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'], "claims 3 bytes, but the file has 10");
    let claim = |len: u64| [&len.to_le_bytes()[..], b"{}"].concat();
    refuses_bytes(&claim(MAX_HEADER_BYTES), "claims 100000000 bytes, but the file has 10");
    refuses_bytes(&claim(MAX_HEADER_BYTES + 1), "claims 100000001 bytes, more than the 100000000");
    refuses_bytes(&claim(u64::MAX), "more than the 100000000 allowed");
}

#[test]
fn refuses_what_is_not_a_json_object_of_tensors() {
    refuses("{", 0, "EOF while parsing");
    refuses("[]", 0, "an object of tensors by name");
    refuses("null", 0, "an object of tensors by name");
    refuses("{} {}", 0, "trailing characters");
    refuses("{}\0", 0, "trailing characters");
    refuses("{'a':1}", 0, "key must be a string");
    refuses_bytes(
        &[&[5, 0, 0, 0, 0, 0, 0, 0][..], b"{\"\xff\":", b""].concat(),
        "invalid utf-8 sequence",
    );
    refuses(r#"{"a":null}"#, 0, "`a`: invalid type: null");
    refuses(r#"{"a":7}"#, 0, "`a`: invalid type: integer");
    refuses(r#"{"a":{"dtype":"U8","shape":[1]}}"#, 1, "`a`: missing field `data_offsets`");
    refuses(r#"{"a":{"dtype":"U8","data_offsets":[0,1]}}"#, 1, "`a`: missing field `shape`");
    refuses(r#"{"a":{"shape":[1],"data_offsets":[0,1]}}"#, 1, "`a`: missing field `dtype`");
    refuses(&one("F128", "[1]", "[0,16]"), 16, "`a`: unknown variant `F128`");
    refuses(&one("f32", "[1]", "[0,4]"), 4, "`a`: unknown variant `f32`");
    refuses(&one("U8", "[-1]", "[0,1]"), 1, "`a`: invalid value: integer `-1`, expected u64");
    refuses(&one("U8", "[1]", "[-1,0]"), 1, "`a`: invalid value: integer `-1`, expected u64");
    refuses(&one("U8", "[1.5]", "[0,1]"), 1, "`a`: invalid type: floating point `1.5`");
    refuses(&one("U8", "1", "[0,1]"), 1, "`a`: invalid type: integer `1`, expected a sequence");
    refuses(&one("U8", "[1]", "[0]"), 1, "`a`: invalid length 1, expected a tuple of size 2");
    refuses(&one("U8", "[1]", "[0,1,1]"), 1, "`a`: ");
    refuses(&one("U8", "[1]", "[0,18446744073709551616]"), 1, "`a`: invalid type: floating point");
}

#[test]
fn refuses_duplicate_keys() {
    let a = tensor("a", "U8", "[1]", "[0,1]");
    refuses(&all(&[a.clone(), a.clone()]), 1, "`a` stands twice");
    // Written another way it is the same name.
    refuses(&all(&[a.clone(), tensor("\\u0061", "U8", "[1]", "[1,2]")]), 2, "`a` stands twice");
    refuses(r#"{"__metadata__":{"k":"1","l":"2","k":"1"}}"#, 0, "`k` stands twice");
    refuses(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "`__metadata__` stands twice");
    let shape_twice = r#"{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}"#;
    refuses(shape_twice, 1, "`a`: duplicate field `shape`");
}

#[test]
fn refuses_ranges_that_do_not_fit_dtype_and_shape() {
    refuses(&one("F32", "[2]", "[0,4]"), 4, "`a`: offsets 0..4 do not fit F32 [2] of 8 bytes");
    refuses(&one("F32", "[2]", "[0,9]"), 9, "`a`: offsets 0..9 do not fit F32 [2] of 8 bytes");
    refuses(&one("U8", "[]", "[0,0]"), 0, "`a`: offsets 0..0 do not fit U8 [] of 1 bytes");
    refuses(&one("U8", "[0]", "[0,1]"), 1, "`a`: offsets 0..1 do not fit U8 [0] of 0 bytes");
    refuses(&one("U8", "[4]", "[4,0]"), 4, "`a`: offsets 4..0 do not fit");
    let max = u64::MAX;
    refuses(&one("U8", "[4]", &format!("[{max},3]")), 4, "`a`: offsets 18446744073709551615..3");
    let large = 1u64 << 60;
    refuses(
        &one("U8", &format!("[{large}]"), &format!("[0,{large}]")),
        4,
        "shorter than its header",
    );
}

#[test]
fn refuses_shapes_that_overflow_or_leave_part_of_a_byte() {
    let not_whole = "are not a whole number of bytes below 2^64";
    refuses(&one("U8", "[4294967296,4294967296]", "[0,0]"), 0, not_whole);
    refuses(&one("F32", "[2305843009213693952]", "[0,0]"), 0, not_whole);
    refuses(&one("U8", "[18446744073709551615,2,0]", "[0,0]"), 0, not_whole);
    refuses(&one("F4", "[3]", "[0,2]"), 2, "`a`: F4 elements of shape [3] are not a whole");
    refuses(&one("F6_E2M3", "[2]", "[0,2]"), 2, not_whole);
    refuses(&one("F6_E3M2", "[3]", "[0,3]"), 3, not_whole);
    assert_eq!(accepts(&one("F4", "[1,2]", "[0,1]"), 1).entries[0].len, 1);
    assert_eq!(accepts(&one("F6_E3M2", "[4]", "[0,3]"), 3).entries[0].len, 3);
}

#[test]
fn refuses_tensors_that_do_not_tile_the_data() {
    let bytes = |name, start: usize, end: usize| {
        tensor(name, "U8", &format!("[{}]", end - start), &format!("[{start},{end}]"))
    };
    let case = |tensors: &[String], data, complaint| refuses(&all(tensors), data, complaint);
    case(&[bytes("a", 1, 2)], 2, "`a`: its bytes start at 1 and leave a hole before 0");
    case(&[bytes("b", 3, 4), bytes("a", 0, 2)], 4, "`b`: its bytes start at 3 and leave a hole");
    case(&[bytes("a", 0, 2), bytes("b", 1, 3)], 3, "`b`: its bytes start at 1 and overlap 2");
    case(&[bytes("a", 0, 2), bytes("b", 0, 2)], 2, "its bytes start at 0 and overlap 2");
    case(&[bytes("a", 0, 4), bytes("b", 1, 3)], 4, "`b`: its bytes start at 1 and overlap 4");
    case(&[bytes("a", 0, 2)], 3, "longer than its header says: `a` ends at");
    case(&[bytes("a", 0, 2)], 1, "shorter than its header says: `a` ends at");
    case(&[bytes("a", 0, 2)], 0, "shorter than its header says: `a` ends at");
    refuses("{}", 1, "longer than its header says: `no tensor` ends at 10");
}

#[test]
fn refuses_metadata_that_is_not_an_object_of_strings() {
    refuses(r#"{"__metadata__":{"a":1}}"#, 0, "invalid type: integer `1`, expected a string");
    refuses(r#"{"__metadata__":{"a":null}}"#, 0, "invalid type: null, expected a string");
    refuses(r#"{"__metadata__":["a"]}"#, 0, "expected an object of strings");
    refuses(r#"{"__metadata__":"a"}"#, 0, "expected an object of strings");
}

#[test]
fn accepts_all_that_is_valid() {
    assert_eq!(accepts("{}", 0), Header { metadata: Vec::new(), entries: Vec::new() });
    assert_eq!(accepts("  {}\n\t ", 0).entries, []);
    assert_eq!(accepts(r#"{"__metadata__":null}"#, 0).metadata, []);
    let pairs = accepts(r#"{"__metadata__":{"z":"1","format":"pt","":"\u0000"}}"#, 0).metadata;
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(pairs, [pair("z", "1"), pair("format", "pt"), pair("", "\0")]);
    let header = all(&[
        tensor("b", "F32", "[]", "[2,6]"),
        tensor("nothing", "F64", "[3,0]", "[2,2]"),
        tensor("a", "BF16", "[1,1]", "[0,2]"),
        tensor("", "C64", "[1]", "[6,14]"),
    ]);
    let data = 8 + header.len() as u64;
    let entry = |name: &str, dtype, shape: &[u64], start, len| Entry {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        start: data + start,
        len,
    };
    assert_eq!(
        accepts(&header, 14).entries,
        [
            entry("a", Dtype::BF16, &[1, 1], 0, 2),
            entry("nothing", Dtype::F64, &[3, 0], 2, 0),
            entry("b", Dtype::F32, &[], 2, 4),
            entry("", Dtype::C64, &[1], 6, 8),
        ]
    );
}

#[test]
fn what_else_is_said_of_a_tensor_means_nothing_but_must_be_json() {
    let with = |other: &str| one("U8", "[1]", &format!("[0,1],\"other\":{other}"));
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    for other in ["null", "{\"a\":[1,\"\\u00e9\"]}", "1e300", &nested(125)] {
        assert!(judged(&file_of(&with(other), &[0])).is_some());
        assert_eq!(accepts(&with(other), 1).entries.len(), 1);
    }
    for (other, complaint) in [
        ("nul", "expected ident"),
        ("1e999", "number out of range"),
        ("\"\\ud800\"", "`a`: unexpected end of hex escape"),
        (&nested(126), "`a`: recursion limit exceeded"),
        (&nested(1_000_000), "`a`: recursion limit exceeded"),
    ] {
        assert!(judged(&file_of(&with(other), &[0])).is_none());
        refuses(&with(other), 1, complaint);
    }
}

#[test]
fn every_message_is_one_line() {
    refuses(&all(&[tensor("a\\nb", "U8", "[2]", "[0,1]")]), 1, "`a\\nb`: offsets 0..1");
    refuses(r#"{"a\nb":{"dtype":"x\ny"}}"#, 0, "`a\\nb`: unknown variant `x\\ny`");
}

const DTYPES: [&str; 22] = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
];

/// What a header is spoiled with.
const FRAGMENTS: [&str; 30] = [
    "0",
    "1",
    "2",
    "-1",
    "8",
    "1e1",
    "1.0",
    "null",
    "[]",
    "{}",
    "\"\"",
    "\"F32\"",
    "\"a\"",
    ",",
    ":",
    "[",
    "]",
    "{",
    "}",
    "\"",
    "\\",
    "18446744073709551615",
    "18446744073709551616",
    "4294967296",
    "\"__metadata__\"",
    "\"shape\"",
    "\"k\":\"v\",",
    "\n",
    "é",
    "\0",
];

/// One way to spoil a file.
#[derive(Clone, Debug)]
enum Spoil {
    /// A byte of the header becomes another.
    Byte(Index, u8),
    /// A fragment is put in.
    Insert(Index, &'static str),
    /// Some bytes go.
    Remove(Index, usize),
    /// A run of digits becomes another number.
    Number(Index, &'static str),
    /// A part of the header is said again.
    Repeat(Index, Index),
    /// The data get longer or shorter.
    Data(i64),
    /// The length in front of the header becomes wrong.
    Length(i64),
}

fn spoils() -> impl Strategy<Value = Spoil> {
    let at = any::<Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Spoil::Byte(at, byte)),
        (at(), select(&FRAGMENTS[..])).prop_map(|(at, text)| Spoil::Insert(at, text)),
        (at(), 1..20usize).prop_map(|(at, len)| Spoil::Remove(at, len)),
        (at(), select(&FRAGMENTS[..])).prop_map(|(at, text)| Spoil::Number(at, text)),
        (at(), at()).prop_map(|(from, to)| Spoil::Repeat(from, to)),
        (-9..9i64).prop_map(Spoil::Data),
        (-3..3i64).prop_map(Spoil::Length),
    ]
}

fn spoil(spoils: &[Spoil], header: &mut Vec<u8>, data: &mut i64, length: &mut i64) {
    for spoil in spoils {
        if header.is_empty() {
            return;
        }
        match spoil {
            Spoil::Byte(at, byte) => {
                let at = at.index(header.len());
                header[at] = *byte;
            }
            Spoil::Insert(at, text) => {
                let at = at.index(header.len() + 1);
                header.splice(at..at, text.bytes());
            }
            Spoil::Remove(at, len) => {
                let at = at.index(header.len());
                header.drain(at..(at + len).min(header.len()));
            }
            Spoil::Number(at, text) => {
                let from = at.index(header.len());
                let digit = |byte: &u8| byte.is_ascii_digit();
                let Some(start) = header[from..].iter().position(digit) else { continue };
                let start = from + start;
                let end = header[start..].iter().position(|b| !digit(b));
                header.splice(start..end.map_or(header.len(), |end| start + end), text.bytes());
            }
            Spoil::Repeat(a, b) => {
                let (a, b) = (a.index(header.len()), b.index(header.len()));
                let again = header[a.min(b)..a.max(b)].to_vec();
                header.splice(a.max(b)..a.max(b), again);
            }
            Spoil::Data(by) => *data = (*data + by).max(0),
            Spoil::Length(by) => *length += by,
        }
    }
}

/// The text of a valid header, tensors in any order, and how many bytes of data it speaks of.
fn valid() -> impl Strategy<Value = (String, i64)> {
    let shape = prop::collection::vec(0..5u64, 0..4);
    let one = (select(&DTYPES[..]), shape, any::<u8>());
    let metadata = prop::option::of(prop::collection::vec("[a-z\"]{0,3}", 0..3));
    (prop::collection::vec(one, 0..6), metadata).prop_map(|(tensors, metadata)| {
        let mut at = 0;
        let mut parts: Vec<(u8, String)> = Vec::new();
        for (i, (dtype, mut shape, order)) in tensors.into_iter().enumerate() {
            if dtype.starts_with("F4") || dtype.starts_with("F6") {
                shape.push(4);
            }
            let parsed: Dtype = serde_json::from_value(dtype.into()).expect("a dtype");
            let len = shape.iter().product::<u64>() * parsed.bitsize() as u64 / 8;
            let offsets = format!("[{at}, {}]", at + len);
            parts.push((order, tensor(&format!("t{i}"), dtype, &format!("{shape:?}"), &offsets)));
            at += len;
        }
        if let Some(values) = metadata {
            let pairs: serde_json::Map<_, _> =
                values.into_iter().enumerate().map(|(i, v)| (i.to_string(), v.into())).collect();
            let pairs = serde_json::Value::Object(pairs);
            parts.push((128, format!("\"__metadata__\": {pairs}")));
        }
        parts.sort();
        let parts: Vec<String> = parts.into_iter().map(|(_, text)| text).collect();
        (all(&parts), at as i64)
    })
}

/// The entries of a file as the library reads them, and its metadata, both sorted.
#[expect(clippy::type_complexity, reason = "said once")]
fn judged(bytes: &[u8]) -> Option<(Vec<Entry>, Vec<(String, String)>)> {
    let (header_len, metadata) = safetensors::SafeTensors::read_metadata(bytes).ok()?;
    let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| Entry {
        name,
        dtype: info.dtype,
        shape: info.shape.iter().map(|dim| *dim as u64).collect(),
        start: (8 + header_len + info.data_offsets.0) as u64,
        len: (info.data_offsets.1 - info.data_offsets.0) as u64,
    };
    let mut entries: Vec<Entry> = metadata.tensors().into_iter().map(entry).collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let mut pairs: Vec<_> = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
    pairs.sort();
    Some((entries, pairs))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn accepts_what_the_library_accepts_and_reads_the_same(
        (header, data) in valid(),
        spoils in prop::collection::vec(spoils(), 0..3),
    ) {
        let valid = spoils.is_empty();
        let (mut header, mut data, mut length) = (header.into_bytes(), data, 0);
        spoil(&spoils, &mut header, &mut data, &mut length);
        let length = (header.len() as u64).saturating_add_signed(length);
        let bytes = [&length.to_le_bytes(), &header[..], &vec![0; data as usize]].concat();
        let judged = judged(&bytes);
        prop_assert!(judged.is_some() || !valid);
        match (read(&bytes), judged) {
            (Ok(ours), Some((entries, pairs))) => {
                let mut sorted = ours.entries.clone();
                sorted.sort_by(|a, b| a.name.cmp(&b.name));
                prop_assert_eq!(sorted, entries);
                let mut metadata = ours.metadata;
                metadata.sort();
                prop_assert_eq!(metadata, pairs);
                prop_assert!(ours.entries.is_sorted_by_key(|entry| entry.start));
            }
            (Ok(_), None) => prop_assert!(false, "we accept what the library refuses"),
            (Err(error), judged) => {
                prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
                let message = error.to_string();
                prop_assert!(!message.contains('\n'));
                prop_assert!(
                    judged.is_none() || message.contains("stands twice"),
                    "the library accepts it, we say {}", message
                );
            }
        }
    }
}
