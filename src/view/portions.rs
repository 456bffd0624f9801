//! A file's bytes as portions of work, for whoever wants each of them once.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::model::Model;
use super::shard::Piece;
use super::tree::{NodeId, NodeKind};
use super::{Content, Shared, View};
use crate::error::Result;
use crate::format;

/// Bytes of a portion that isn't encoded.
const RUN: u64 = 1 << 20;

/// Bytes of a portion that the kernel copies from one file to another.
const COPY: u64 = 16 << 20;

/// A part of the work of making a file, of a few MiB at most.
#[derive(Clone, Debug)]
pub struct Portion(Kind);

#[derive(Clone, Debug)]
enum Kind {
    /// A range of a file that is the source's own.
    Copy(Range<u64>),
    /// A range of the file, without encoded bytes.
    Run(Range<u64>),
    /// A chunk of a weight, all parts of it.
    Chunk {
        model: usize,
        weight: usize,
        chunk: u64,
        /// Where the weight's parts start in the file.
        starts: Arc<[u64]>,
    },
}

impl View {
    /// What a file is made of, each byte in one portion; none for a directory. Which portions there
    /// are, and their order, follows from the view and its [`Budget::chunk`](super::Budget).
    pub fn portions(&self, file: NodeId) -> Box<dyn Iterator<Item = Portion> + Send + '_> {
        let NodeKind::File { size } = self.tree.nodes()[file].kind else {
            return Box::new(std::iter::empty());
        };
        match self.contents[file] {
            Content::Dir => Box::new(std::iter::empty()),
            Content::Copy(_) => {
                Box::new(cut(0..size, COPY).map(|range| Portion(Kind::Copy(range))))
            }
            Content::Inline(_) | Content::Index(_) => {
                Box::new(cut(0..size, RUN).map(|range| Portion(Kind::Run(range))))
            }
            Content::Shard { model, shard } => Box::new(self.shared.models[model].portions(
                model,
                shard,
                self.shared.engine.budget.chunk,
            )),
        }
    }

    /// Makes the bytes of a portion of `file`, writes them to where they belong in `out`, and
    /// returns how many they were.
    ///
    /// Nothing is cached: every chunk is encoded once if every portion is asked for once.
    ///
    /// # Errors
    /// `Stale` or `Io` where the source can't be read any more, and what `put` returns, which gets
    /// runs of bytes and their offsets in the file.
    pub fn make(
        &self,
        file: NodeId,
        portion: &Portion,
        out: &File,
        put: &dyn Fn(u64, &[u8]) -> Result<()>,
    ) -> Result<u64> {
        let Shared { models, engine } = &*self.shared;
        let bytes = match &portion.0 {
            Kind::Copy(range) => {
                let Content::Copy(source) = &self.contents[file] else {
                    unreachable!("only such files have such portions")
                };
                let copied = engine.files.copy_range(source, range.clone(), out)?;
                engine.counters.source.add(copied);
                engine.counters.output.add(copied);
                for run in cut(range.start + copied..range.end, RUN) {
                    self.make_run(file, run, put)?;
                }
                range.end - range.start
            }
            Kind::Run(range) => self.make_run(file, range.clone(), put)?,
            Kind::Chunk { model, weight, chunk, starts } => {
                let mut bytes = 0;
                models[*model].make_chunk(engine, *weight, *chunk, |part, offset, run| {
                    bytes += run.len() as u64;
                    put(starts[part] + offset, run)
                })?;
                engine.counters.output.add(bytes);
                bytes
            }
        };
        Ok(bytes)
    }

    fn make_run(
        &self,
        file: NodeId,
        range: Range<u64>,
        put: &dyn Fn(u64, &[u8]) -> Result<()>,
    ) -> Result<u64> {
        let len = range.end - range.start;
        let mut buf = self.shared.engine.buffers.take(len as usize);
        self.read_at(file, range.start, &mut buf)?;
        put(range.start, &buf)?;
        Ok(len)
    }
}

impl Model {
    /// What a virtual shard is made of; this is the model at position `model` of its view.
    fn portions(
        &self,
        model: usize,
        shard: usize,
        chunk_bytes: u64,
    ) -> impl Iterator<Item = Portion> + Send {
        let shard = &self.shards()[shard];
        let mut starts: HashMap<usize, Vec<u64>> = HashMap::new();
        let mut at = 0;
        for piece in shard.pieces(0..shard.len()) {
            let (Piece::Header(range) | Piece::Item(_, range)) = &piece;
            if let Piece::Item(id, _) = piece
                && let format::Content::Part { weight, part } = self.plan().items[id].content
            {
                let starts = starts.entry(weight).or_default();
                let part = usize::from(part);
                starts.resize(starts.len().max(part + 1), 0);
                starts[part] = at;
            }
            at += range.end - range.start;
        }
        let mut at = 0;
        // Of small tensors next to each other one run is made.
        let mut run = 0..0;
        let mut pieces = shard.pieces(0..shard.len());
        let stretches = std::iter::from_fn(move || {
            loop {
                let Some(piece) = pieces.next() else {
                    let last = std::mem::replace(&mut run, at..at);
                    return (!last.is_empty()).then_some((last, None));
                };
                let (Piece::Header(range) | Piece::Item(_, range)) = &piece;
                let here = at..at + range.end - range.start;
                at = here.end;
                let part = match piece {
                    Piece::Item(id, _) => match self.plan().items[id].content {
                        format::Content::Part { weight, part } => Some((weight, part)),
                        _ => None,
                    },
                    Piece::Header(_) => None,
                };
                let Some((weight, part)) = part else {
                    run.end = at;
                    continue;
                };
                let before = std::mem::replace(&mut run, at..at);
                // The other parts are made with the codes.
                let weight = (part == 0).then_some(weight);
                if !before.is_empty() || weight.is_some() {
                    return Some((before, weight));
                }
            }
        });
        stretches.flat_map(move |(run, weight)| {
            let runs = cut(run, RUN).map(|range| Portion(Kind::Run(range)));
            let chunks = weight.into_iter().flat_map({
                let starts: Option<Arc<[u64]>> =
                    weight.and_then(|weight| starts.remove(&weight)).map(Into::into);
                move |weight| {
                    let starts = starts.clone().expect("its parts are in this shard");
                    (0..self.chunks(weight, chunk_bytes)).map(move |chunk| {
                        Portion(Kind::Chunk { model, weight, chunk, starts: starts.clone() })
                    })
                }
            });
            runs.chain(chunks)
        })
    }
}

/// A range, in pieces of at most `len`.
fn cut(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> + Send {
    (0..(range.end - range.start).div_ceil(len)).map(move |i| {
        let start = range.start + i * len;
        start..range.end.min(start + len)
    })
}
