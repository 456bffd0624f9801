//! One virtual shard: its header, and where every tensor's bytes come from.

use std::fmt::Write as _;
use std::ops::Range;

use crate::dtype;
use crate::format::{Content, Plan};
use crate::source::Catalog;

/// A safetensors file laid out from a plan's items.
///
/// Tensors tile the data without holes, each aligned to its element size: metadata first, then
/// every tensor of a length that keeps what follows aligned, in the plan's order (a weight's parts
/// next to each other), then the rest by falling alignment.
#[derive(Debug)]
pub(super) struct VirtualShard {
    header: Box<[u8]>,
    /// Position of the item in the plan, by offset.
    items: Vec<usize>,
    /// Where each of `items` starts, from the start of the file, and then the file's end.
    starts: Vec<u64>,
}

/// A run of bytes of a shard that has one origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// This range of the header.
    Header(Range<u64>),
    /// A range of the data of the item at this position in the plan.
    Item(usize, Range<u64>),
}

/// Data starts at a multiple of this, and lengths that are multiples of it keep it so. No element
/// is wider.
const ALIGNMENT: u64 = 8;

impl VirtualShard {
    /// Lays out the items at the positions `ids` of the plan's.
    pub(super) fn new(
        catalog: &Catalog,
        plan: &Plan,
        ids: &[usize],
        metadata: &[(String, String)],
    ) -> Self {
        let describe = |&id: &usize| {
            let item = &plan.items[id];
            let (dtype, shape) = plan.type_of(catalog, item);
            let len = dtype::byte_len(dtype, &shape).expect("planned tensors have a size");
            let class = match (len % ALIGNMENT, &item.content) {
                (0, Content::Inline { .. }) => 0,
                (0, _) => 1,
                _ => 2 + ALIGNMENT - dtype::alignment(dtype),
            };
            (class, id, dtype, shape, len)
        };
        let mut placed: Vec<_> = ids.iter().map(describe).collect();
        // A stable sort: within a class the plan's order stays.
        placed.sort_by_key(|(class, ..)| *class);
        let mut json = String::from("{\"__metadata__\":{");
        for (i, (key, value)) in metadata.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            json += &format!("{comma}{}:{}", quoted(key), quoted(value));
        }
        json.push('}');
        let mut starts = Vec::with_capacity(ids.len() + 1);
        let mut offset = 0;
        for (_, id, dtype, shape, len) in &placed {
            let name = quoted(&plan.name(catalog, &plan.items[*id]));
            let end = offset + len;
            let _ = write!(json, ",{name}:{{\"dtype\":\"{dtype}\",\"shape\":[");
            for (i, dim) in shape.iter().enumerate() {
                let comma = if i == 0 { "" } else { "," };
                let _ = write!(json, "{comma}{dim}");
            }
            let _ = write!(json, "],\"data_offsets\":[{offset},{end}]}}");
            starts.push(offset);
            offset = end;
        }
        json.push('}');
        while !json.len().is_multiple_of(ALIGNMENT as usize) {
            json.push(' ');
        }
        let mut header = Vec::with_capacity(8 + json.len());
        header.extend((json.len() as u64).to_le_bytes());
        header.extend(json.as_bytes());
        starts.push(offset);
        for start in &mut starts {
            *start += header.len() as u64;
        }
        let items = placed.into_iter().map(|(_, id, ..)| id).collect();
        Self { header: header.into(), items, starts }
    }

    /// The length of the file.
    pub(super) fn len(&self) -> u64 {
        *self.starts.last().expect("the end is always there")
    }

    /// The length of the tensors without the header.
    pub(super) fn data_len(&self) -> u64 {
        self.len() - self.header.len() as u64
    }

    /// The header, its length in front.
    pub(super) fn header(&self) -> &[u8] {
        &self.header
    }

    /// The items shown, in the order of their data.
    pub(super) fn items(&self) -> &[usize] {
        &self.items
    }

    /// What the bytes of `range` are made of, in order and without gaps. The range lies within the
    /// file.
    pub(super) fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece> {
        let data = self.header.len() as u64;
        let header = range.start..range.end.min(data);
        // The last item that starts at or before the range; empty ones start where others do.
        let first = self.starts.partition_point(|start| *start <= range.start).saturating_sub(1);
        let items = (first..self.items.len())
            .take_while(move |&i| self.starts[i] < range.end)
            .map(move |i| {
                let (start, end) = (self.starts[i], self.starts[i + 1]);
                let piece = range.start.max(start)..range.end.min(end);
                (self.items[i], piece.start - start..piece.end.saturating_sub(start))
            })
            .filter(|(_, piece)| piece.start < piece.end)
            .map(|(id, piece)| Piece::Item(id, piece));
        (header.start < header.end).then_some(Piece::Header(header)).into_iter().chain(items)
    }
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("strings serialize")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::format;
    use crate::recipe::Request;
    use crate::source::{Decoder, Extent, Tensor};

    /// Tensors of odd sizes, shown as they are but for the last, which is metadata.
    fn odd_shard() -> (Catalog, Plan, VirtualShard) {
        let tensors = [
            ("codes", Dtype::I32, &[3, 4][..]),
            ("odd halves", Dtype::BF16, &[3]),
            ("odd bytes", Dtype::U8, &[5]),
            ("empty", Dtype::F32, &[0, 7]),
            ("odd words", Dtype::F32, &[1]),
            ("scalar", Dtype::U8, &[]),
            ("long", Dtype::F64, &[2]),
            ("a \"name\"", Dtype::I64, &[2]),
        ];
        let tensor = |(name, dtype, shape): (&str, Dtype, &[u64])| Tensor {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            decoder: Decoder::Plain,
            operands: vec![Extent { shard: 0, start: 0, len: 0 }],
        };
        let catalog = Catalog::new(tensors.map(tensor).into()).expect("eight names");
        let config = None;
        let request = Request { format: "dense".to_owned(), ..Request::default() };
        let dense = format::find("dense").expect("there");
        let mut plan = dense.plan(&catalog, config, &request).expect("planned");
        plan.items[7].content =
            Content::Inline { dtype: Dtype::I64, shape: [2].into(), bytes: [0; 16].into() };
        let ids: Vec<usize> = (0..8).collect();
        let shard = VirtualShard::new(&catalog, &plan, &ids, &[("format".into(), "pt".into())]);
        (catalog, plan, shard)
    }

    #[test]
    fn the_library_reads_the_header_and_every_tensor_is_aligned() {
        let (catalog, _, shard) = odd_shard();
        let mut file = shard.header().to_vec();
        file.resize(shard.len() as usize, 0);
        let (header_len, metadata) =
            safetensors::SafeTensors::read_metadata(&file).expect("the library accepts it");
        assert_eq!((header_len + 8) % 8, 0);
        assert_eq!(metadata.metadata().as_ref().expect("metadata")["format"], "pt");
        for Tensor { name, dtype, .. } in catalog.tensors() {
            let info = metadata.info(name).expect("named");
            assert_eq!(info.data_offsets.0 as u64 % dtype::alignment(*dtype), 0, "{name}");
        }
        assert_eq!(metadata.offset_keys()[0], "a \"name\"");
    }

    #[test]
    fn pieces_of_any_range_join_up_to_it() {
        let (.., shard) = odd_shard();
        for start in 0..=shard.len() {
            for end in start..=shard.len() {
                let mut at = start;
                for piece in shard.pieces(start..end) {
                    let (first, range) = match piece {
                        Piece::Header(range) => (0, range),
                        Piece::Item(id, range) => {
                            let i = shard.items.iter().position(|item| *item == id).expect("shown");
                            assert!(range.end <= shard.starts[i + 1] - shard.starts[i]);
                            (shard.starts[i], range)
                        }
                    };
                    assert_eq!(first + range.start, at);
                    assert!(range.start < range.end);
                    at = first + range.end;
                }
                assert_eq!(at, end, "{start}..{end}");
            }
        }
    }
}
