//! Tells by its parts that a weight holds a NaN or an infinity.
//!
//! Whatever shares a scale with one has a scale that is no number either: every scheme says so. So
//! the scales tell, and the weights need not be looked at again.

use crate::dtype::Dtype;

use super::minifloat::{E4M3_NAN, E8M0_NAN};
use super::{MicroDialect, Part, Role, Scheme};

impl Scheme {
    /// Whether encoded parts hold a scale, or a plain number, that is not finite. `parts` says what
    /// they are, the [`scalar`](Self::scalar) after them, in the order of `bytes`.
    pub fn is_spoilt(&self, parts: &[Part], bytes: &[&[u8]]) -> bool {
        parts.iter().zip(bytes).any(|(part, bytes)| match (part.role, part.dtype) {
            (Role::Scale, Dtype::U8) => match self {
                Self::Micro(scheme) if scheme.dialect == MicroDialect::MlxE4m3 => {
                    bytes.contains(&E4M3_NAN)
                }
                Self::Micro(_) | Self::Experts(_) => bytes.contains(&E8M0_NAN),
                _ => false,
            },
            (Role::Scale, Dtype::F8_E8M0) => bytes.contains(&E8M0_NAN),
            (Role::Scale, Dtype::F8_E4M3) => bytes.contains(&E4M3_NAN),
            (Role::Scale | Role::Reals, dtype) => has_infinite(dtype, bytes),
            _ => false,
        })
    }
}

/// Whether one of the elements is a NaN or an infinity.
fn has_infinite(dtype: Dtype, bytes: &[u8]) -> bool {
    // All ones is the exponent of both. Without an early end, for the compiler to make vectors of.
    let any_16 = |exponent: u16| {
        let is = |raw: &[u8; 2]| u16::from_le_bytes(*raw) & exponent == exponent;
        bytes.as_chunks().0.iter().fold(false, |any, raw| any | is(raw))
    };
    match dtype {
        Dtype::BF16 => any_16(0x7f80),
        Dtype::F16 => any_16(0x7c00),
        Dtype::F32 => {
            let is = |raw: &[u8; 4]| u32::from_le_bytes(*raw) & 0x7f80_0000 == 0x7f80_0000;
            bytes.as_chunks().0.iter().fold(false, |any, raw| any | is(raw))
        }
        _ => false,
    }
}
