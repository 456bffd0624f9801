//! The synthesized index: which tensor is in which shard.

use std::sync::OnceLock;

use serde_json::{Map, Value};

use super::shard::quoted_name;
use super::text::{Entries, Length, Outline, Sink};
use crate::format::Plan;
use crate::source::{Catalog, Shard};
use crate::threads;

/// An index of a plan's items by name.
#[derive(Debug)]
pub(super) struct VirtualIndex {
    /// What stands before the first tensor.
    head: Box<str>,
    len: u64,
    /// The items in the order of their names, once somebody reads them.
    sorted: OnceLock<(Box<[u32]>, Outline)>,
}

/// What an index speaks of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    pub(super) catalog: &'a Catalog,
    pub(super) plan: &'a Plan,
    pub(super) shards: &'a [Shard],
}

const TAIL: &[u8] = b"\n  }\n}\n";

impl VirtualIndex {
    /// An index with these `metadata`.
    pub(super) fn new(subject: Subject<'_>, metadata: &Map<String, Value>) -> Self {
        let metadata = serde_json::to_string_pretty(metadata).expect("JSON values serialize");
        let metadata = metadata.replace('\n', "\n  ");
        let head = format!("{{\n  \"metadata\": {metadata},\n  \"weight_map\": {{");
        let entries = threads::map_ranges(subject.plan.items.len(), |range| {
            let mut length = Length::default();
            for item in range {
                subject.write(item, true, &mut length);
            }
            length.0
        });
        // No comma stands before the first.
        let entries = entries.iter().sum::<u64>().saturating_sub(1);
        let len = head.len() as u64 + entries + TAIL.len() as u64;
        Self { head: head.into(), len, sorted: OnceLock::new() }
    }

    /// The length of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` from `offset` on. The range lies within the file.
    pub(super) fn read(&self, subject: Subject<'_>, offset: u64, out: &mut [u8]) {
        let (items, outline) = self.sorted.get_or_init(|| {
            let items = subject.sorted();
            let mut text = Text { subject, head: &self.head, items: &items };
            let (outline, len) = Outline::of(&mut text);
            assert_eq!(len, self.len, "the order of the entries doesn't change their length");
            (items, outline)
        });
        outline.read(&mut Text { subject, head: &self.head, items }, offset, out);
    }
}

impl Subject<'_> {
    fn write(&self, item: usize, comma: bool, sink: &mut impl Sink) {
        let item = &self.plan.items[item];
        sink.bytes(if comma { b",\n    " } else { b"\n    " });
        quoted_name(self.plan, self.catalog, item, sink);
        sink.bytes(b": ");
        sink.quoted(self.shards[self.catalog[item.tensor].shard()].file.name());
    }

    /// The positions of all items in the order of their names.
    fn sorted(&self) -> Box<[u32]> {
        let Self { catalog, plan, .. } = *self;
        let tensors = catalog.tensors();
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_unstable_by_key(|id| &tensors[*id as usize].name);
        let mut rank = vec![0u32; tensors.len()];
        for (position, id) in (0..).zip(by_name) {
            rank[id as usize] = position;
        }
        let mut items: Box<[u32]> = (0..plan.items.len() as u32).collect();
        // Almost their order already, and quicker to compare.
        items.sort_unstable_by_key(|id| {
            let item = &plan.items[*id as usize];
            (rank[item.tensor], item.suffix)
        });
        items.sort_by(|a, b| {
            let [a, b] = [a, b].map(|id| plan.name_parts(catalog, &plan.items[*id as usize]));
            bytes(a).cmp(bytes(b))
        });
        items
    }
}

/// The bytes of a name in parts.
fn bytes((name, joint, suffix): (&str, &'static str, &'static str)) -> impl Iterator<Item = u8> {
    name.bytes().chain(joint.bytes()).chain(suffix.bytes())
}

/// The text of an index: its head, its tensors and its tail.
struct Text<'a> {
    subject: Subject<'a>,
    head: &'a str,
    items: &'a [u32],
}

impl Entries for Text<'_> {
    fn count(&self) -> usize {
        self.items.len() + 2
    }

    fn write(&mut self, entry: usize, sink: &mut impl Sink) {
        if entry == 0 {
            sink.bytes(self.head.as_bytes());
        } else if let Some(&item) = self.items.get(entry - 1) {
            self.subject.write(item as usize, entry > 1, sink);
        } else {
            sink.bytes(TAIL);
        }
    }
}
