//! Codes of 2 to 8 bits as dense bit streams, along rows and down columns.

/// Bytes of `count` codes of `bits` bits, padded to whole 32-bit words.
#[inline(always)]
pub(super) fn packed_len(count: usize, bits: u8) -> usize {
    (count * usize::from(bits)).div_ceil(32) * 4
}

/// Packs `codes`, one per byte and below 2^`bits`, as a little-endian bit stream, lowest bit first,
/// padded with zeros: code `j` occupies bits `[j * bits, (j + 1) * bits)`.
///
/// `codes` is padded with zeros to a multiple of eight; `out` has `packed_len` bytes.
#[inline(always)]
pub(super) fn pack(bits: u8, codes: &[u8], out: &mut [u8]) {
    match bits {
        2 => pack_bytes::<4>(codes, out),
        4 => pack_bytes::<2>(codes, out),
        8 => pack_bytes::<1>(codes, out),
        3 => pack_octets::<3>(codes, out),
        5 => pack_octets::<5>(codes, out),
        6 => pack_octets::<6>(codes, out),
        _ => pack_octets::<7>(codes, out),
    }
}

/// `N` codes to a byte.
#[inline(always)]
fn pack_bytes<const N: usize>(codes: &[u8], out: &mut [u8]) {
    let whole = (codes.len() / N).min(out.len());
    let (body, rest) = out.split_at_mut(whole);
    for (out, codes) in body.iter_mut().zip(codes.as_chunks::<N>().0) {
        let mut byte = 0;
        for (i, code) in codes.iter().enumerate() {
            byte |= code << (i * 8 / N);
        }
        *out = byte;
    }
    rest.fill(0);
}

/// Eight codes to `B` bytes.
#[inline(always)]
fn pack_octets<const B: usize>(codes: &[u8], out: &mut [u8]) {
    /// Octets that are squeezed in one loop, for the compiler to do several at a time.
    const MANY: usize = 32;
    let (octets, _) = codes.as_chunks::<8>();
    let (body, rest) = out.as_chunks_mut::<B>();
    // Words may have room for an octet more than there is.
    let full = octets.len().min(body.len()) / MANY * MANY;
    let ((blocks, last), (full, last_octets)) = (body.split_at_mut(full), octets.split_at(full));
    let blocks = blocks.as_chunks_mut::<MANY>().0;
    for (out, octets) in blocks.iter_mut().zip(full.as_chunks::<MANY>().0) {
        let mut squeezed = [0; MANY];
        for (squeezed, octet) in squeezed.iter_mut().zip(octets) {
            *squeezed = squeeze::<B>(*octet);
        }
        for (out, squeezed) in out.as_chunks_mut::<8>().0.iter_mut().zip(squeezed.as_chunks().0) {
            join(squeezed, out.as_flattened_mut());
        }
    }
    for (out, octet) in last.iter_mut().zip(last_octets) {
        *out = pack_octet::<B>(*octet);
    }
    rest.fill(0);
    if let Some(octet) = octets.get(body.len()) {
        rest.copy_from_slice(&pack_octet::<B>(*octet)[..rest.len()]);
    }
    for out in body.iter_mut().skip(octets.len()) {
        out.fill(0);
    }
}

#[inline(always)]
fn pack_octet<const B: usize>(octet: [u8; 8]) -> [u8; B] {
    let bytes = squeeze::<B>(octet).to_le_bytes();
    std::array::from_fn(|i| bytes[i])
}

/// The codes in the lowest `8 * B` bits.
#[inline(always)]
fn squeeze<const B: usize>(octet: [u8; 8]) -> u64 {
    let b = B as u32;
    let v = u64::from_le_bytes(octet);
    let v = (v & 0x00ff_00ff_00ff_00ff) | (v >> 8 & 0x00ff_00ff_00ff_00ff) << b;
    let v = (v & 0x0000_ffff_0000_ffff) | (v >> 16 & 0x0000_ffff_0000_ffff) << (2 * b);
    (v & 0xffff_ffff) | (v >> 32) << (4 * b)
}

/// Squeezed octets one after the other, `B` words of 64 bits.
#[inline(always)]
fn join(squeezed: &[u64; 8], out: &mut [u8]) {
    let words = out.as_chunks_mut::<8>().0;
    let bits = 8 * words.len();
    let mut held = 0;
    let mut k = 0;
    for (i, octet) in squeezed.iter().enumerate() {
        let shift = i * bits % 64;
        held |= octet << shift;
        if shift + bits >= 64 {
            words[k] = held.to_le_bytes();
            k += 1;
            held = if shift == 0 { 0 } else { octet >> (64 - shift) };
        }
    }
}

/// Packs one row of codes, number `row` of its column streams, into `out`: words of 32 bits, stream
/// `k` in word `k` of every `codes.len()`. Ors into `out`, which starts as zeros.
#[inline(always)]
pub(super) fn pack_down(bits: u8, row: usize, codes: &[u8], out: &mut [u8]) {
    let (words, _) = out.as_chunks_mut::<4>();
    let bit = row * usize::from(bits);
    let (word, shift) = (bit / 32, bit % 32);
    let lines = &mut words[word * codes.len()..];
    for (out, &code) in lines.iter_mut().zip(codes) {
        *out = (u32::from_le_bytes(*out) | u32::from(code) << shift).to_le_bytes();
    }
    if shift + usize::from(bits) > 32 {
        for (out, &code) in lines[codes.len()..].iter_mut().zip(codes) {
            *out = (u32::from_le_bytes(*out) | u32::from(code) >> (32 - shift)).to_le_bytes();
        }
    }
}

/// Code `index` of a stream of `bits`-bit codes whose 32-bit word `w` is `word(w)`.
pub(super) fn unpack(bits: u8, index: usize, word: impl Fn(usize) -> u32) -> u8 {
    let bit = index * usize::from(bits);
    let (first, shift) = (bit / 32, bit % 32);
    let mut code = word(first) >> shift;
    if shift + usize::from(bits) > 32 {
        code |= word(first + 1) << (32 - shift);
    }
    (code & ((1 << bits) - 1)) as u8
}

/// Word `w` of little-endian `bytes`.
pub(super) fn word_of(bytes: &[u8], w: usize) -> u32 {
    u32::from_le_bytes(bytes.as_chunks().0[w])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One bit at a time.
    fn naive(bits: u8, codes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; packed_len(codes.len(), bits)];
        for (j, code) in codes.iter().enumerate() {
            for i in 0..usize::from(bits) {
                let at = j * usize::from(bits) + i;
                out[at / 8] |= (code >> i & 1) << (at % 8);
            }
        }
        out
    }

    fn codes(bits: u8, len: usize) -> Vec<u8> {
        (0..len as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 & (255 >> (8 - bits)))
            .collect()
    }

    #[test]
    fn rows_are_packed_one_bit_after_the_other_at_every_length() {
        for bits in 2..=8 {
            for len in 1..600 {
                let codes = codes(bits, len);
                let expected = naive(bits, &codes);
                let mut padded = codes.clone();
                padded.resize(len.next_multiple_of(8), 0);
                let mut out = vec![0xaa; packed_len(len, bits)];
                pack(bits, &padded, &mut out);
                assert_eq!(out, expected, "{bits} bits, {len} codes");
                for (j, &code) in codes.iter().enumerate() {
                    assert_eq!(unpack(bits, j, |w| word_of(&out, w)), code);
                }
            }
        }
    }

    #[test]
    fn columns_are_packed_as_rows_of_the_transpose() {
        for bits in 2..=8 {
            for (rows, cols) in [(1, 1), (31, 3), (32, 5), (33, 2), (70, 4)] {
                let codes = codes(bits, rows * cols);
                let mut out = vec![0; packed_len(rows, bits) * cols];
                for (r, row) in codes.chunks(cols).enumerate() {
                    pack_down(bits, r, row, &mut out);
                }
                for k in 0..cols {
                    let column: Vec<u8> = (0..rows).map(|r| codes[r * cols + k]).collect();
                    let stream: Vec<u8> = (0..packed_len(rows, bits) / 4)
                        .flat_map(|w| out[(w * cols + k) * 4..][..4].to_vec())
                        .collect();
                    assert_eq!(stream, naive(bits, &column), "{bits} bits, {rows} rows");
                }
            }
        }
    }
}
