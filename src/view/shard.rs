//! One virtual shard: its header, and where every tensor's bytes come from.

use std::borrow::Cow;
use std::ops::Range;

use super::text::{Entries, Outline, Sink};
use crate::dtype::{self, Dtype};
use crate::format::{Content, Item, Plan, Weight};
use crate::quant::Part;
use crate::source::{Catalog, Tensor};

/// A safetensors file laid out from a plan's items.
///
/// Tensors tile the data without holes, each aligned to its element size: metadata first, then
/// every tensor of a length that keeps what follows aligned, in the plan's order (a weight's parts
/// next to each other), then the rest by falling alignment.
#[derive(Debug)]
pub(super) struct VirtualShard {
    outline: Outline,
    /// The header's length with the eight bytes in front, and how much of it is padding.
    header_len: u64,
    padding: usize,
    /// Position of the item in the plan, by offset.
    items: Box<[u32]>,
    /// Where each of `items` starts in the data, and then the data's end.
    starts: Box<[u64]>,
}

/// A run of bytes of a shard that has one origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// This range of the header.
    Header(Range<u64>),
    /// A range of the data of the item at this position in the plan.
    Item(usize, Range<u64>),
}

/// What a virtual shard's header speaks of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    pub(super) catalog: &'a Catalog,
    pub(super) plan: &'a Plan,
    /// The source shard's `__metadata__`.
    pub(super) metadata: &'a [(String, String)],
}

/// Data starts at a multiple of this, and lengths that are multiples of it keep it so. No element
/// is wider.
const ALIGNMENT: u64 = 8;

impl VirtualShard {
    /// Lays out the items at the positions `ids` of the plan's.
    pub(super) fn new(subject: Subject<'_>, ids: &[u32]) -> Self {
        let mut types = Types::new(subject);
        let mut placed: Vec<(u64, u32, u64)> = Vec::with_capacity(ids.len());
        for &id in ids {
            let item = &subject.plan.items[id as usize];
            let (dtype, shape) = types.of(item);
            let len = dtype::byte_len(dtype, &shape).expect("planned tensors have a size");
            let class = match (len % ALIGNMENT, &item.content) {
                (0, Content::Inline(_)) => 0,
                (0, _) => 1,
                _ => 2 + ALIGNMENT - dtype::alignment(dtype),
            };
            placed.push((class, id, len));
        }
        // A stable sort: within a class the plan's order stays.
        placed.sort_by_key(|(class, ..)| *class);
        let mut end = 0;
        let lens = placed.iter().map(|(.., len)| {
            end += len;
            end
        });
        let starts: Box<[u64]> = std::iter::once(0).chain(lens).collect();
        let items: Box<[u32]> = placed.iter().map(|(_, id, _)| *id).collect();
        let dtypes = Dtypes::default();
        let mut header =
            Header { subject, items: &items, starts: &starts, len: 0, padding: 0, types, dtypes };
        let (outline, len) = Outline::of(&mut header);
        let header_len = len.next_multiple_of(ALIGNMENT);
        Self { outline, header_len, padding: (header_len - len) as usize, items, starts }
    }

    /// The length of the file.
    pub(super) fn len(&self) -> u64 {
        self.header_len + self.data_len()
    }

    /// The length of the tensors without the header.
    pub(super) fn data_len(&self) -> u64 {
        *self.starts.last().expect("the end is always there")
    }

    /// Fills `out` with the header, its length in front, from `offset` on. The range lies within
    /// it.
    pub(super) fn read_header(&self, subject: Subject<'_>, offset: u64, out: &mut [u8]) {
        let Self { items, starts, padding, .. } = self;
        let mut header = Header {
            subject,
            items,
            starts,
            len: self.header_len - 8,
            padding: *padding,
            types: Types::new(subject),
            dtypes: Dtypes::default(),
        };
        self.outline.read(&mut header, offset, out);
    }

    /// The items shown, in the order of their data.
    pub(super) fn items(&self) -> &[u32] {
        &self.items
    }

    /// What the bytes of `range` are made of, in order and without gaps. The range lies within the
    /// file.
    pub(super) fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece> {
        let data = self.header_len;
        let header = range.start..range.end.min(data);
        let range = range.start.saturating_sub(data)..range.end.saturating_sub(data);
        // The last item that starts at or before the range; empty ones start where others do.
        let first = self.starts.partition_point(|start| *start <= range.start).saturating_sub(1);
        let items = (first..self.items.len())
            .take_while(move |&i| self.starts[i] < range.end)
            .map(move |i| {
                let (start, end) = (self.starts[i], self.starts[i + 1]);
                let piece = range.start.max(start)..range.end.min(end);
                (self.items[i] as usize, piece.start - start..piece.end.saturating_sub(start))
            })
            .filter(|(_, piece)| piece.start < piece.end)
            .map(|(id, piece)| Piece::Item(id, piece));
        (header.start < header.end).then_some(Piece::Header(header)).into_iter().chain(items)
    }
}

/// The text of a header: what stands in front of the tensors, each tensor, and what follows them.
struct Header<'a> {
    subject: Subject<'a>,
    items: &'a [u32],
    starts: &'a [u64],
    len: u64,
    padding: usize,
    types: Types<'a>,
    dtypes: Dtypes,
}

/// An item's name as a JSON string.
pub(super) fn quoted_name(plan: &Plan, catalog: &Catalog, item: &Item, sink: &mut impl Sink) {
    let (name, joint, suffix) = plan.name_parts(catalog, item);
    sink.bytes(b"\"");
    sink.escaped(name);
    sink.bytes(joint.as_bytes());
    // A word of ours.
    sink.bytes(suffix.as_bytes());
    sink.bytes(b"\"");
}

impl Entries for Header<'_> {
    fn count(&self) -> usize {
        self.items.len() + 2
    }

    fn write(&mut self, entry: usize, sink: &mut impl Sink) {
        let Subject { catalog, plan, metadata } = self.subject;
        if entry == 0 {
            sink.bytes(&self.len.to_le_bytes());
            sink.bytes(b"{\"__metadata__\":{\"format\":");
            // One that loaders of quantized checkpoints accept.
            sink.quoted(plan.framework);
            for (key, value) in metadata.iter().filter(|(key, _)| key != "format") {
                sink.bytes(b",");
                sink.quoted(key);
                sink.bytes(b":");
                sink.quoted(value);
            }
            sink.bytes(b"}");
        } else if let Some(&id) = self.items.get(entry - 1) {
            let item = &plan.items[id as usize];
            let (dtype, shape) = self.types.of(item);
            sink.bytes(b",");
            quoted_name(plan, catalog, item, sink);
            sink.bytes(b":{\"dtype\":\"");
            sink.bytes(self.dtypes.name(dtype).as_bytes());
            sink.bytes(b"\",\"shape\":[");
            for (i, &dim) in shape.iter().enumerate() {
                if i > 0 {
                    sink.bytes(b",");
                }
                sink.number(dim);
            }
            sink.bytes(b"],\"data_offsets\":[");
            sink.number(self.starts[entry - 1]);
            sink.bytes(b",");
            sink.number(self.starts[entry]);
            sink.bytes(b"]}");
        } else {
            sink.bytes(b"}");
            sink.bytes(&b"       "[..self.padding]);
        }
    }
}

/// Element types and shapes of a plan's items, those of parts worked out once for weights that are
/// alike.
struct Types<'a> {
    subject: Subject<'a>,
    alike: Vec<Alike<'a>>,
    /// The weight asked for last, whose next part is mostly asked for next, and the one it is like.
    last: Option<(usize, usize)>,
}

struct Alike<'a> {
    weight: Weight,
    dtype: Dtype,
    shape: &'a [u64],
    parts: Vec<Part>,
}

/// Kinds of weights that are remembered; a layer has few.
const ALIKE: usize = 16;

impl<'a> Types<'a> {
    fn new(subject: Subject<'a>) -> Self {
        Self { subject, alike: Vec::new(), last: None }
    }

    fn of(&mut self, item: &'a Item) -> (Dtype, Cow<'_, [u64]>) {
        let Subject { catalog, plan, .. } = self.subject;
        let Content::Part { weight, part } = item.content else {
            return plan.type_of(catalog, item);
        };
        let position = match self.last {
            Some((last, position)) if last == weight => position,
            _ => self.alike(&plan.weights[weight], &catalog[item.tensor]),
        };
        self.last = Some((weight, position));
        let part = &self.alike[position].parts[usize::from(part)];
        (part.dtype, part.shape.as_slice().into())
    }

    /// Where in `alike` a weight is.
    fn alike(&mut self, weight: &Weight, tensor: &'a Tensor) -> usize {
        let is_alike = |known: &Alike<'_>| {
            known.shape == tensor.shape
                && known.dtype == tensor.dtype
                && Weight { tensor: weight.tensor, survey: weight.survey, ..known.weight }
                    == *weight
        };
        self.alike.iter().position(is_alike).unwrap_or_else(|| {
            self.alike.truncate(ALIKE - 1);
            let (dtype, shape, parts) = (tensor.dtype, &tensor.shape, weight.parts(tensor));
            self.alike.push(Alike { weight: *weight, dtype, shape, parts });
            self.alike.len() - 1
        })
    }
}

/// The names of element types that were asked for.
#[derive(Default)]
struct Dtypes(Vec<(Dtype, String)>);

impl Dtypes {
    fn name(&mut self, dtype: Dtype) -> &str {
        let known = self.0.iter().position(|(known, _)| *known == dtype);
        let position = known.unwrap_or_else(|| {
            self.0.push((dtype, dtype.to_string()));
            self.0.len() - 1
        });
        &self.0[position].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{self, Inline};
    use crate::recipe::{Job, Request};
    use crate::source::{Decoder, Extent};

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
        let request = Request { format: "dense".to_owned(), ..Request::default() };
        let dense = format::find("dense").expect("there");
        let job = Job { catalog: &catalog, config: None, request: &request };
        let mut plan = dense.plan(job).expect("planned");
        let inline = Inline { dtype: Dtype::I64, shape: [2].into(), bytes: [0; 16].into() };
        plan.items[7].content = Content::Inline(inline.into());
        let ids: Vec<u32> = (0..8).collect();
        let subject = Subject { catalog: &catalog, plan: &plan, metadata: &metadata() };
        let shard = VirtualShard::new(subject, &ids);
        (catalog, plan, shard)
    }

    fn metadata() -> [(String, String); 2] {
        [("format", "tf"), ("a \"key\"", "\n")].map(|(key, value)| (key.into(), value.into()))
    }

    #[test]
    fn the_library_reads_the_header_and_every_tensor_is_aligned() {
        let (catalog, plan, shard) = odd_shard();
        let mut file = vec![0; shard.len() as usize];
        let subject = Subject { catalog: &catalog, plan: &plan, metadata: &metadata() };
        shard.read_header(subject, 0, &mut file[..shard.header_len as usize]);
        let (header_len, metadata) =
            safetensors::SafeTensors::read_metadata(&file).expect("the library accepts it");
        assert_eq!((header_len + 8) % 8, 0);
        let pairs = metadata.metadata().as_ref().expect("metadata");
        assert_eq!((pairs.len(), &*pairs["format"], &*pairs["a \"key\""]), (2, "pt", "\n"));
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
                            let is_it = |item: &u32| *item as usize == id;
                            let i = shard.items.iter().position(is_it).expect("shown");
                            assert!(range.end <= shard.starts[i + 1] - shard.starts[i]);
                            (shard.header_len + shard.starts[i], range)
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
