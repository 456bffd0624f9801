//! Element types, as safetensors spells them.

pub use safetensors::Dtype;

/// Bytes that `shape` elements of `dtype` take, or `None` where that overflows or does not fill
/// whole bytes (4- and 6-bit types).
pub fn byte_len(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// The alignment in bytes that a reader may expect of the element type's data.
pub fn alignment(dtype: Dtype) -> u64 {
    match dtype {
        // Two 32-bit parts.
        Dtype::C64 => 4,
        _ => (dtype.bitsize() as u64 / 8).max(1),
    }
}
