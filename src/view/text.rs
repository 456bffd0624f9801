//! Synthesized JSON: its length beforehand, any part of it when it is read.
//!
//! Headers and indexes of large models are tens of megabytes that are read once, if ever. So nothing
//! keeps them: their lengths are counted when a view is opened, and a read has the entries written
//! that it touches.

use std::ops::Range;

/// Where text goes.
pub(super) trait Sink {
    /// Appends bytes as they are.
    fn bytes(&mut self, bytes: &[u8]);

    /// Appends a number in decimal.
    fn number(&mut self, number: u64);

    /// Appends what stands for a text inside of a JSON string.
    fn escaped(&mut self, text: &str) {
        if !has_special(text.as_bytes()) {
            self.bytes(text.as_bytes());
        } else {
            let quoted = serde_json::to_string(text).expect("strings serialize");
            self.bytes(&quoted.as_bytes()[1..quoted.len() - 1]);
        }
    }

    /// Appends a text as a JSON string.
    fn quoted(&mut self, text: &str) {
        self.bytes(b"\"");
        self.escaped(text);
        self.bytes(b"\"");
    }
}

/// Whether JSON strings have to escape one of the bytes.
fn has_special(text: &[u8]) -> bool {
    // All bytes of a chunk, which goes faster than to stop at the first.
    let any = |bytes: &[u8]| {
        let is_special = |byte| byte < b' ' || byte == b'"' || byte == b'\\';
        bytes.iter().fold(false, |any, byte| any | is_special(*byte))
    };
    let (chunks, rest) = text.as_chunks::<16>();
    chunks.iter().any(|chunk| any(chunk)) || any(rest)
}

impl Sink for Vec<u8> {
    fn bytes(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }

    fn number(&mut self, mut number: u64) {
        let mut digits = [0; 20];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.extend_from_slice(&digits[first..]);
    }
}

/// Counts bytes instead of keeping them.
#[derive(Debug, Default)]
pub(super) struct Length(pub(super) u64);

impl Sink for Length {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0 += bytes.len() as u64;
    }

    fn number(&mut self, number: u64) {
        self.0 += u64::from(number.checked_ilog10().unwrap_or(0)) + 1;
    }
}

/// What a text consists of.
pub(super) trait Entries {
    /// How many there are.
    fn count(&self) -> usize;

    /// Writes one of them.
    fn write(&mut self, entry: usize, sink: &mut impl Sink);
}

/// Entries that are written together.
const RUN: usize = 64;

/// Where the runs of a text's entries begin.
#[derive(Debug)]
pub(super) struct Outline(Box<[u64]>);

impl Outline {
    /// Measures a text: its outline and its length.
    pub(super) fn of(entries: &mut impl Entries) -> (Self, u64) {
        let mut starts = Vec::with_capacity(entries.count().div_ceil(RUN));
        let mut length = Length::default();
        for entry in 0..entries.count() {
            if entry.is_multiple_of(RUN) {
                starts.push(length.0);
            }
            entries.write(entry, &mut length);
        }
        (Self(starts.into()), length.0)
    }

    /// Fills `out` with the text from `offset` on; the entries are those that were measured, save
    /// that the last may have become longer.
    pub(super) fn read(&self, entries: &mut impl Entries, offset: u64, out: &mut [u8]) {
        let Range { start, end } = offset..offset + out.len() as u64;
        let first = self.0.partition_point(|at| *at <= start).saturating_sub(1);
        let mut text = Vec::new();
        for (run, &at) in self.0.iter().enumerate().skip(first).take_while(|(_, at)| **at < end) {
            text.clear();
            for entry in run * RUN..((run + 1) * RUN).min(entries.count()) {
                entries.write(entry, &mut text);
            }
            let (from, to) = (start.max(at), end.min(at + text.len() as u64));
            if from < to {
                let part = &text[(from - at) as usize..(to - at) as usize];
                out[(from - start) as usize..(to - start) as usize].copy_from_slice(part);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Names(Vec<String>);

    impl Entries for Names {
        fn count(&self) -> usize {
            self.0.len()
        }

        fn write(&mut self, entry: usize, sink: &mut impl Sink) {
            sink.quoted(&self.0[entry]);
            sink.number(entry as u64);
        }
    }

    #[test]
    fn every_part_of_a_text_is_a_slice_of_the_whole() {
        for count in [0, 1, RUN - 1, RUN, RUN + 1, RUN * 3 + 5] {
            let special = ["", "plain", "\"", "tab\t and \\", "é\u{1}", "\n"];
            let names = (0..count).map(|i| special[i * i % 6].repeat(i % 3)).collect();
            let mut names = Names(names);
            let whole: Vec<u8> = (0..count)
                .flat_map(|i| format!("{}{i}", serde_json::json!(names.0[i])).into_bytes())
                .collect();
            let (outline, len) = Outline::of(&mut names);
            assert_eq!(len, whole.len() as u64);
            for start in 0..=whole.len() {
                for end in (start..=whole.len()).step_by(1 + start % 97) {
                    let mut out = vec![0; end - start];
                    outline.read(&mut names, start as u64, &mut out);
                    assert_eq!(out, whole[start..end], "{count}: {start}..{end}");
                }
            }
        }
    }

    #[test]
    fn numbers_have_the_length_that_was_counted() {
        let powers = (0..20).map(|power| 10u64.pow(power));
        for number in powers.flat_map(|power| [power - 1, power, power + 1]).chain([u64::MAX]) {
            let (mut text, mut length) = (Vec::new(), Length::default());
            text.number(number);
            length.number(number);
            assert_eq!(text, number.to_string().into_bytes());
            assert_eq!(length.0, text.len() as u64);
        }
    }
}
