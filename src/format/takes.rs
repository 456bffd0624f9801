//! What of a request a format takes; the rest is refused by name.

use std::fmt::Display;

use crate::error::{self, Result};
use crate::quant::Granularity;
use crate::recipe::Request;

/// What of a request a format takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Takes {
    /// Numbers of bits.
    pub(super) bits: &'static [u8],
    /// Which weights may share a scale.
    pub(super) grain: Grain,
    /// Whether codes can be centred on zero, not centred, or either.
    pub(super) symmetry: Option<bool>,
    /// Whether scales have formats to choose from.
    pub(super) scale_format: bool,
    /// Whether codes have storage types to choose from.
    pub(super) storage: bool,
}

/// Which weights may share a scale.
#[derive(Clone, Copy, Debug)]
pub(super) enum Grain {
    /// Groups of any size, and channels.
    Any,
    /// All of a weight.
    Tensor,
    /// All of a channel.
    Channel,
    /// Groups of these sizes.
    Groups(&'static [u32]),
    /// Flat blocks of these sizes.
    FlatBlocks(&'static [u32]),
    /// Squares of this side.
    Squares(u32),
}

impl Takes {
    /// Refuses what the format named does not take.
    ///
    /// # Errors
    /// `Invalid`, with what there is instead.
    pub(super) fn check(&self, format: &str, request: &Request) -> Result<()> {
        let refuse = |text: String| Err(error::invalid(format!("{format} {text}")));
        if let Some(bits) = request.bits.filter(|bits| !self.bits.contains(bits)) {
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
                Grain::Any => (asked != Granularity::Group(0), "at least one weight".to_owned()),
                Grain::Tensor => (false, "a whole weight".to_owned()),
                Grain::Channel => (asked == Granularity::Channel, "a whole channel".to_owned()),
                Grain::Groups(sizes) => (among(sizes), format!("groups of {}", either(sizes))),
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
        if request.scale_format.is_some() && !self.scale_format {
            return refuse("has one format of scales: it takes no --scale-format".to_owned());
        }
        if request.storage.is_some() && !self.storage {
            return refuse("has one type of codes: it takes no --storage".to_owned());
        }
        Ok(())
    }
}

/// As `2, 3 or 4`.
fn either(choices: &[impl Display]) -> String {
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
            bits: &[2, 3, 8],
            grain: Grain::Groups(&[32, 64]),
            symmetry: Some(false),
            scale_format: false,
            storage: true,
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
        ];
        for (request, complaint) in cases {
            let result = takes.check("x", &request).map_err(|error| error.to_string());
            assert_eq!(result.err().as_deref(), complaint, "{request:?}");
        }
    }
}
