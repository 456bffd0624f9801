//! What of a request a format takes; the rest is refused by name.

use std::fmt;

use crate::error::{self, Result};
use crate::quant::Granularity;
use crate::recipe::Request;

/// What of a request a format takes. The first of a list is the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takes {
    /// Numbers of bits; none where nothing is quantized.
    pub bits: &'static [u8],
    /// Which weights may share a scale.
    pub grain: Grain,
    /// Whether codes can be centred on zero, not centred, or either, symmetric by default.
    pub symmetry: Option<bool>,
    /// Whether scales have formats to choose from.
    pub scale_format: bool,
    /// Whether codes have storage types to choose from.
    pub storage: bool,
    /// Whether scales can be quantized in turn.
    pub double_quant: bool,
}

/// Which weights may share a scale. It prints as documentation spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// There are no scales.
    None,
    /// Groups of any size, by default this, and channels.
    Any(u32),
    /// All of a weight.
    Tensor,
    /// All of a channel.
    Channel,
    /// Groups of these sizes.
    Groups(&'static [u32]),
    /// Groups of these sizes, and channels.
    GroupsOrChannel(&'static [u32]),
    /// Flat blocks of these sizes.
    FlatBlocks(&'static [u32]),
    /// Squares of this side.
    Squares(u32),
}

impl Takes {
    /// With these, and nothing else to choose.
    pub const fn new(bits: &'static [u8], grain: Grain, symmetry: Option<bool>) -> Self {
        Self { bits, grain, symmetry, scale_format: false, storage: false, double_quant: false }
    }

    /// The bits asked for, or the default.
    pub(super) fn bits(&self, request: &Request) -> u8 {
        request.bits.unwrap_or(self.bits[0])
    }

    /// The group asked for, or the default.
    pub(super) fn granularity(&self, request: &Request) -> Granularity {
        request.granularity.unwrap_or(match self.grain {
            Grain::Any(size) | Grain::Squares(size) => Granularity::Group(size),
            Grain::Groups(sizes) | Grain::GroupsOrChannel(sizes) | Grain::FlatBlocks(sizes) => {
                Granularity::Group(sizes[0])
            }
            Grain::Tensor | Grain::Channel | Grain::None => Granularity::Channel,
        })
    }

    /// Refuses what the format named does not take.
    ///
    /// # Errors
    /// `Invalid`, with what there is instead.
    pub(super) fn check(&self, format: &str, request: &Request) -> Result<()> {
        for set in &request.set {
            if let Some(applied) = set.applied(request) {
                self.check(format, &applied)
                    .map_err(|error| error::invalid(format!("--set {:?}: {error}", set.pattern)))?;
            }
        }
        let refuse = |text: String| Err(error::invalid(format!("{format} {text}")));
        if let Some(bits) = request.bits.filter(|bits| !self.bits.contains(bits)) {
            if self.bits.is_empty() {
                return refuse("quantizes nothing: it takes no --bits".to_owned());
            }
            return refuse(format!("has {} bits, not {bits}", either(self.bits)));
        }
        if let Some(asked) = request.granularity {
            let asked_for = match asked {
                Granularity::Group(size) => format!("{size} weights"),
                Granularity::Channel => "a whole channel".to_owned(),
            };
            let among = |sizes: &[u32]| match asked {
                Granularity::Group(size) => sizes.contains(&size),
                Granularity::Channel => false,
            };
            let (taken, has) = match self.grain {
                Grain::None => (false, "nothing".to_owned()),
                Grain::Any(_) => (asked != Granularity::Group(0), "at least one weight".to_owned()),
                Grain::Tensor => (false, "a whole weight".to_owned()),
                Grain::Channel => (asked == Granularity::Channel, "a whole channel".to_owned()),
                Grain::Groups(sizes) => (among(sizes), format!("groups of {}", either(sizes))),
                Grain::GroupsOrChannel(sizes) => (
                    asked == Granularity::Channel || among(sizes),
                    format!("groups of {}, or a whole channel", either(sizes)),
                ),
                Grain::FlatBlocks(sizes) => (among(sizes), format!("blocks of {}", either(sizes))),
                Grain::Squares(side) => (among(&[side]), format!("blocks of {side} x {side}")),
            };
            if !taken {
                return refuse(format!("has a scale for {has}, not for {asked_for}"));
            }
        }
        if let (Some(only), Some(asked)) = (self.symmetry, request.symmetric)
            && only != asked
        {
            return refuse(if only { "is symmetric" } else { "is asymmetric" }.to_owned());
        }
        if request.simulate.is_some() || request.dtype.is_some() {
            let text = "shows no plain numbers: --simulate and --dtype go with --format dense, or \
                        with a diffusers pipeline";
            return refuse(text.to_owned());
        }
        if request.scale_format.is_some() && !self.scale_format {
            return refuse("has one format of scales: it takes no --scale-format".to_owned());
        }
        if request.storage.is_some() && !self.storage {
            return refuse("has one type of codes: it takes no --storage".to_owned());
        }
        if request.double_quant && !self.double_quant {
            return refuse("does not quantize its scales: it takes no --double-quant".to_owned());
        }
        Ok(())
    }
}

impl fmt::Display for Grain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Any(default) => write!(f, "group (default {default}), channel"),
            Self::Tensor => f.write_str("tensor"),
            Self::Channel => f.write_str("channel"),
            Self::Groups(sizes) => write!(f, "group of {}", ranges(sizes)),
            Self::GroupsOrChannel(sizes) => write!(f, "group of {}, channel", ranges(sizes)),
            Self::FlatBlocks(sizes) => write!(f, "flat block of {}", ranges(sizes)),
            Self::Squares(side) => write!(f, "{side} × {side}"),
        }
    }
}

/// Choices in rising order, the default named where there is one to be made: `2–6, 8 (default 4)`.
pub fn ranges<T: Copy + Ord + Into<u64>>(choices: &[T]) -> String {
    let mut sorted: Vec<u64> = choices.iter().map(|choice| (*choice).into()).collect();
    sorted.sort_unstable();
    let mut texts = Vec::new();
    for run in sorted.chunk_by(|a, b| a + 1 == *b) {
        match *run {
            [first, _, .., last] => texts.push(format!("{first}–{last}")),
            _ => texts.extend(run.iter().map(u64::to_string)),
        }
    }
    let default = match *choices {
        [first, _, ..] => format!(" (default {})", first.into()),
        _ => String::new(),
    };
    texts.join(", ") + &default
}

/// As `2, 3 or 4`, in rising order.
fn either<T: Copy + Ord + fmt::Display>(choices: &[T]) -> String {
    let mut choices = choices.to_vec();
    choices.sort_unstable();
    let texts: Vec<String> = choices.iter().map(ToString::to_string).collect();
    match texts.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => texts.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::ScaleFormat;

    #[test]
    fn refuses_by_name_what_a_format_does_not_have() {
        let takes = Takes {
            storage: true,
            ..Takes::new(&[3, 2, 8], Grain::Groups(&[64, 32]), Some(false))
        };
        let request = Request::default;
        let cases = [
            (request(), None),
            (Request { bits: Some(3), ..request() }, None),
            (Request { bits: Some(7), ..request() }, Some("x has 2, 3 or 8 bits, not 7")),
            (Request { granularity: Some(Granularity::Group(64)), ..request() }, None),
            (
                Request { granularity: Some(Granularity::Group(48)), ..request() },
                Some("x has a scale for groups of 32 or 64, not for 48 weights"),
            ),
            (
                Request { granularity: Some(Granularity::Channel), ..request() },
                Some("x has a scale for groups of 32 or 64, not for a whole channel"),
            ),
            (Request { symmetric: Some(false), ..request() }, None),
            (Request { symmetric: Some(true), ..request() }, Some("x is asymmetric")),
            (
                Request { scale_format: Some(ScaleFormat::Ue8m0), ..request() },
                Some("x has one format of scales: it takes no --scale-format"),
            ),
            (
                Request { double_quant: true, ..request() },
                Some("x does not quantize its scales: it takes no --double-quant"),
            ),
        ];
        for (request, complaint) in cases {
            let result = takes.check("x", &request).map_err(|error| error.to_string());
            assert_eq!(result.err().as_deref(), complaint, "{request:?}");
        }
    }

    #[test]
    fn choices_are_printed_as_ranges_with_their_default() {
        let cases: [(&[u8], &str); 5] = [
            (&[], ""),
            (&[8], "8"),
            (&[4, 8], "4, 8 (default 4)"),
            (&[4, 2, 3, 5, 6, 8], "2–6, 8 (default 4)"),
            (&[4, 3, 8], "3, 4, 8 (default 4)"),
        ];
        for (choices, expected) in cases {
            assert_eq!(ranges(choices), expected);
        }
    }
}
