//! Matrices of one tensor as tensors of their own.

use std::num::NonZeroUsize;

use crate::dtype::{Dtype, byte_len};
use crate::isa::Isa;
use crate::source::{Catalog, Checkpoint, Matrices, Order, SourceFiles, Window};

/// A checkpoint of one tensor `[3, 37, 150]`, whose every element is other bytes, behind another one.
fn checkpoint(dtype: Dtype) -> (tempfile::TempDir, Checkpoint, Vec<u8>) {
    let shape = [3u64, 37, 150];
    let len = byte_len(dtype, &shape).expect("whole bytes");
    let size = dtype.bitsize() as u64 / 8;
    let bytes: Vec<u8> = (0..len / size)
        .flat_map(|i| (i as u32 * 0x9e37).to_le_bytes()[..size as usize].to_vec())
        .collect();
    let header = serde_json::json!({
        "norm": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "experts": {"dtype": dtype, "shape": shape, "data_offsets": [8, 8 + len]},
    });
    let data = [&[0; 8], &bytes[..]].concat();
    let dir = tempfile::tempdir().expect("a directory");
    let file = super::safetensors(&header.to_string(), &data);
    std::fs::write(dir.path().join("model.safetensors"), file).expect("written");
    let opened = Checkpoint::open(dir.path()).expect("opened");
    (dir, opened, bytes)
}

#[test]
fn any_window_of_a_matrix_is_what_the_tensor_holds_there() {
    let files = SourceFiles::new(NonZeroUsize::MIN);
    for (dtype, order) in [
        (Dtype::BF16, Order::Rows),
        (Dtype::BF16, Order::Columns),
        (Dtype::F32, Order::Rows),
        (Dtype::F32, Order::Columns),
    ] {
        let (_dir, mut opened, bytes) = checkpoint(dtype);
        let size = dtype.bitsize() / 8;
        let stored = &opened.catalog()[opened.catalog().find("experts").expect("there")];
        let (all, inputs) = if order == Order::Rows { (37u64, 150u64) } else { (150, 37) };
        let outputs = all / 3..all;
        let matrices = Matrices::new(stored, order, outputs.clone()).expect("within");
        let tensors = (0..3).map(|matrix| matrices.tensor(matrix, matrix.to_string()));
        let tensors: Vec<_> = tensors.collect();
        for tensor in &tensors {
            assert_eq!(tensor.shape, [all - all / 3, inputs]);
            assert_eq!(tensor.stored_len(), tensor.elements() * size as u64);
        }
        opened.set_catalog(Catalog::new(tensors).expect("unique"));
        for matrix in 0..3 {
            let element = |row: u64, col: u64| {
                let output = outputs.start + row;
                let at = match order {
                    Order::Rows => (matrix as u64 * 37 + output) * 150 + col,
                    Order::Columns => (matrix as u64 * 37 + col) * 150 + output,
                };
                bytes[at as usize * size..][..size].to_vec()
            };
            let height = outputs.end - outputs.start;
            for k in 0..20 {
                let first_row = k * 7 % height;
                let rows = 1 + k * 5 % (height - first_row);
                let first_col = k * 11 % inputs;
                let cols = 1 + k * 13 % (inputs - first_col);
                let window = Window { width: inputs, first_row, rows, first_col, cols };
                let expected: Vec<u8> = (first_row..first_row + rows)
                    .flat_map(|row| {
                        (first_col..first_col + cols).flat_map(move |col| element(row, col))
                    })
                    .collect();
                assert_eq!(opened.window_len(matrix, &window), expected.len() as u64);
                for isa in Isa::available() {
                    let read = |bytes: &[u8], stride: usize| -> Vec<u8> {
                        let rows = (0..rows as usize).map(|row| row * stride * size);
                        rows.flat_map(|at| bytes[at..][..cols as usize * size].to_vec()).collect()
                    };
                    let found =
                        opened.with_window(isa, &files, matrix, window, read).expect("read");
                    assert!(found == expected, "{dtype:?} {order:?} {window:?} {isa:?}");
                }
            }
        }
    }
}

#[test]
fn only_floats_that_are_there_are_taken() {
    let taken = |dtype, outputs, order| {
        let (_dir, opened, _) = checkpoint(dtype);
        let stored = &opened.catalog()[opened.catalog().find("experts").expect("there")];
        Matrices::new(stored, order, outputs).is_some()
    };
    assert!(taken(Dtype::F16, 0..37, Order::Rows));
    assert!(!taken(Dtype::F16, 0..38, Order::Rows));
    assert!(taken(Dtype::F16, 0..150, Order::Columns));
    assert!(!taken(Dtype::F16, 3..3, Order::Rows));
    assert!(!taken(Dtype::U8, 0..37, Order::Rows));
    assert!(!taken(Dtype::I32, 0..37, Order::Columns));
}
