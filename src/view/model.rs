//! One checkpoint of a view, planned: its shards laid out, its chunks encoded on demand.

use std::hash::Hasher;
use std::iter;
use std::ops::Range;
use std::sync::Arc;

use rustix::time::ClockId;

use super::buffers::{Buffer, Buffers};
use super::cache::{Cache, ChunkKey};
use super::importance::Importances;
use super::index::{self, VirtualIndex};
use super::shard::{self, Piece, VirtualShard};
use super::spoilt::Spoilt;
use super::survey::Surveys;
use super::{Budget, Counters};
use crate::error::Result;
use crate::format::{Content, Format, Item, Plan, Weight, json_with};
use crate::quant::{self, Grid, Importance, Isa, Part, Reals, Survey, Tile};
use crate::recipe::{Job, Request};
use crate::source::{
    Checkpoint, Edit, ImportanceFile, SourceFile, SourceFiles, Tensor, TensorId, Window, edited,
    edited_within,
};
use crate::threads::{self, cpu_ns};

/// A checkpoint and what a format makes of it.
#[derive(Debug)]
pub struct Model {
    checkpoint: Checkpoint,
    format: &'static dyn Format,
    plan: Plan,
    shards: Vec<VirtualShard>,
    index: Option<VirtualIndex>,
    surveys: Surveys,
    importance: Option<Importances>,
    /// What `Model`'s weights count from in the view's cache.
    first_weight: u32,
}

/// Chunks of a weight that follow one another in one slab.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    weight: usize,
    chunks: Range<u64>,
}

/// Bytes of source, decoded, that chunks are encoded from together, more or less: what is to be done once for all of
/// them is then little.
const BATCH: u64 = 4 << 20;

/// What reads need beside the model itself; one for the whole view.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) files: SourceFiles,
    pub(super) cache: Cache,
    pub(super) buffers: Buffers,
    pub(super) isa: Isa,
    pub(super) budget: Budget,
    pub(super) counters: Counters,
    pub(super) spoilt: Spoilt,
}

impl Model {
    pub(super) fn new(
        mut checkpoint: Checkpoint,
        format: &'static dyn Format,
        request: &Request,
        importance: Option<&Arc<ImportanceFile>>,
        first_weight: u32,
    ) -> Result<Self> {
        let config = checkpoint.config().map(|config| &config.value);
        let job = Job { catalog: checkpoint.catalog(), config, request };
        let (mut plan, catalog) = format.plan_in_parts(job)?;
        if let Some(catalog) = catalog {
            checkpoint.set_catalog(catalog);
        }
        plan.decode_kept(checkpoint.catalog());
        let surveys = Surveys::new(plan.surveys.len());
        let (shards, index) = (Vec::new(), None);
        let importance = importance
            .map(|file| Importances::new(file.clone(), checkpoint.catalog(), &plan))
            .transpose()?;
        let mut model =
            Self { checkpoint, format, plan, shards, index, surveys, importance, first_weight };
        // Where nothing is encoded or decoded, every file is the source's own.
        if !model.plan.weights.is_empty() || model.checkpoint.is_decoded() {
            model.lay_out();
        }
        Ok(model)
    }

    fn lay_out(&mut self) {
        let Self { checkpoint, plan, .. } = self;
        let mut ids = vec![Vec::new(); checkpoint.shards().len()];
        for (id, item) in (0..).zip(&plan.items) {
            ids[checkpoint.catalog()[item.tensor].shard()].push(id);
        }
        self.shards = threads::map(ids.len(), |shard| {
            VirtualShard::new(self.header_subject(shard), &ids[shard])
        });
        self.index = self.checkpoint.index().map(|index| {
            let mut metadata = index.metadata.clone();
            metadata.insert("total_size".to_owned(), self.shown_len().into());
            VirtualIndex::new(self.index_subject(), &metadata)
        });
    }

    fn header_subject(&self, shard: usize) -> shard::Subject<'_> {
        let metadata = &self.checkpoint.shards()[shard].metadata;
        shard::Subject { catalog: self.checkpoint.catalog(), plan: &self.plan, metadata }
    }

    fn index_subject(&self) -> index::Subject<'_> {
        let Self { checkpoint, plan, .. } = self;
        index::Subject { catalog: checkpoint.catalog(), plan, shards: checkpoint.shards() }
    }

    /// The source.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The format that it is shown in.
    pub fn format(&self) -> &'static dyn Format {
        self.format
    }

    /// What every tensor becomes.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What the errors of its weights count for, if a file was named that says it.
    pub(super) fn importance(&self) -> Option<&Importances> {
        self.importance.as_ref()
    }

    /// Bytes of all tensors as they are shown, without headers.
    pub fn shown_len(&self) -> u64 {
        if self.shards.is_empty() {
            return self.source_len();
        }
        self.shards.iter().map(VirtualShard::data_len).sum()
    }

    /// Bytes of all tensors in the source, without headers.
    pub fn source_len(&self) -> u64 {
        self.checkpoint.catalog().tensors().iter().map(|tensor| tensor.stored_len()).sum()
    }

    /// The items that each tensor becomes, or becomes a part of, in the catalog's order.
    pub fn items_by_tensor(&self) -> Vec<Vec<&Item>> {
        let mut items = vec![Vec::new(); self.checkpoint.catalog().tensors().len()];
        for item in &self.plan.items {
            match item.content {
                Content::Stacked { .. } => {
                    for weight in self.plan.weights_of(item) {
                        items[self.plan.weights[*weight].tensor].push(item);
                    }
                }
                _ => items[item.tensor].push(item),
            }
        }
        items
    }

    /// The items of a virtual shard in the order of their data, as positions in [`Plan::items`].
    pub fn shard_items(&self, shard: usize) -> &[u32] {
        self.shards[shard].items()
    }

    /// The virtual shards; none where the source's own are shown.
    pub(super) fn shards(&self) -> &[VirtualShard] {
        &self.shards
    }

    /// The length of the synthesized index, where the source has one and it changes.
    pub(super) fn index_len(&self) -> Option<u64> {
        self.index.as_ref().map(VirtualIndex::len)
    }

    /// Fills `out` from `offset` of the synthesized index; the range lies within it.
    pub(super) fn read_index(&self, offset: u64, out: &mut [u8]) {
        let index = self.index.as_ref().expect("the view shows it");
        index.read(self.index_subject(), offset, out);
    }

    /// Hashes the synthesized index.
    pub(super) fn hash_index(&self, hash: &mut impl Hasher) {
        let len = self.index_len().expect("the view shows it");
        let mut text = vec![0; len.min(1 << 20) as usize];
        for offset in (0..len).step_by(1 << 20) {
            let part = &mut text[..(len - offset).min(1 << 20) as usize];
            self.read_index(offset, part);
            hash.write(part);
        }
    }

    /// `config.json` with the quantization declared, where there is one and it changes.
    pub(super) fn config_text(&self) -> Option<Vec<u8>> {
        let Plan { config, nested, .. } = &self.plan;
        let changes = self.checkpoint.is_decoded() || !config.is_empty() || !nested.is_empty();
        let source = self.checkpoint.config().filter(|_| changes)?;
        let text = edited(&source.text, &[], config);
        let edit =
            |text: String, (member, edit): &(String, Edit)| edited_within(&text, member, edit);
        Some(nested.iter().fold(text, edit).into_bytes())
    }

    /// Fills `buf` from `offset` of a virtual shard; the range lies within it.
    pub(super) fn read_shard(
        &self,
        engine: &Engine,
        shard: usize,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let subject = self.header_subject(shard);
        let shard = &self.shards[shard];
        let mut rest = buf;
        for piece in shard.pieces(offset..offset + rest.len() as u64) {
            let (Piece::Header(range) | Piece::Item(_, range)) = &piece;
            let (out, after) = rest.split_at_mut((range.end - range.start) as usize);
            rest = after;
            match piece {
                Piece::Header(range) => shard.read_header(subject, range.start, out),
                Piece::Item(id, range) => match &self.plan.items[id].content {
                    Content::Source => {
                        let tensor = self.plan.items[id].tensor;
                        engine.counters.source.add(out.len() as u64);
                        self.checkpoint.read_exact_at(&engine.files, tensor, range.start, out)?;
                    }
                    Content::Inline(inline) => {
                        let range = range.start as usize..range.end as usize;
                        out.copy_from_slice(&inline.bytes[range]);
                    }
                    Content::Part { part, .. } | Content::Stacked { part, .. } => {
                        let mut rest = out;
                        for (weight, range) in self.runs(&self.plan.items[id], range) {
                            let len = (range.end - range.start) as usize;
                            let (out, after) = rest.split_at_mut(len);
                            rest = after;
                            let part = usize::from(*part);
                            self.read_part(engine, weight, part, range.start, out)?;
                        }
                    }
                    Content::Scalar { weight } => {
                        let bytes = self.scalar(engine, *weight)?;
                        out.copy_from_slice(&bytes[range.start as usize..range.end as usize]);
                    }
                    Content::Json(scalar) => {
                        let number = self.scalar(engine, scalar.weight)?.try_into();
                        let number = f32::from_le_bytes(number.expect("JSON ends with an F32"));
                        let bytes = json_with(&scalar.begin, number);
                        out.copy_from_slice(&bytes[range.start as usize..range.end as usize]);
                    }
                },
            }
        }
        Ok(())
    }

    /// The file of the source that has a range of a virtual shard as it is shown, and where it starts there.
    pub(super) fn source_of(
        &self,
        shard: usize,
        range: Range<u64>,
    ) -> Option<(&Arc<SourceFile>, u64)> {
        let mut pieces = self.shards[shard].pieces(range);
        let (Some(Piece::Item(id, range)), None) = (pieces.next(), pieces.next()) else {
            return None;
        };
        let item = &self.plan.items[id];
        matches!(item.content, Content::Source)
            .then(|| self.checkpoint.place(item.tensor, range.start))
    }

    /// A range of an item as ranges of the part of each weight that it shows.
    fn runs<'a>(
        &'a self,
        item: &'a Item,
        range: Range<u64>,
    ) -> impl Iterator<Item = (usize, Range<u64>)> + 'a {
        let weights = self.plan.weights_of(item);
        let len = self.plan.byte_len(self.checkpoint.catalog(), item) / weights.len() as u64;
        (range.start / len..=(range.end - 1) / len).map(move |place| {
            let start = place * len;
            let within = range.start.max(start) - start..range.end.min(start + len) - start;
            (weights[place as usize], within)
        })
    }

    fn read_part(
        &self,
        engine: &Engine,
        weight: usize,
        part: usize,
        offset: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let grid = self.grid(weight, engine.budget.chunk);
        let end = offset + out.len() as u64;
        // Where nobody encodes ahead, nobody reads through the kernel, which keeps what it read.
        let is_kept_elsewhere = engine.budget.ahead > 0;
        let mut rest = out;
        let mut next = grid.chunk_at(part, offset);
        let last = grid.chunk_at(part, end - 1);
        while next <= last {
            let chunk = next;
            let range = grid.range(part, chunk);
            let first = offset.max(range.start);
            if is_kept_elsewhere && part == 0 && first == range.start {
                // The last one may go on beyond what was asked for.
                let whole = if grid.range(part, last).end > end { last } else { last + 1 };
                let chunks = chunk..whole.min(self.batch_end(engine.budget, weight, &grid, chunk));
                if let Some(claim) = engine.cache.claim(&self.keys(weight, chunks)) {
                    next += claim.len() as u64;
                    let len = (grid.range(part, next - 1).end - first) as usize;
                    let (out, after) = rest.split_at_mut(len);
                    rest = after;
                    claim.land(self.encode_into(engine, weight, chunk..next, out)?);
                    continue;
                }
            }
            next += 1;
            let (out, after) = rest.split_at_mut((end.min(range.end) - first) as usize);
            rest = after;
            let key = self.key(weight, chunk);
            let bytes = engine.cache.get(key, part, || self.encode(engine, weight, chunk))?;
            let skipped = (first - range.start) as usize;
            out.copy_from_slice(&bytes[skipped..skipped + out.len()]);
            if is_kept_elsewhere {
                engine.cache.spend(key, part, out.len());
            }
        }
        Ok(())
    }

    /// Number of chunks that a weight is cut into.
    pub(super) fn chunks(&self, weight: usize, chunk_bytes: u64) -> u64 {
        self.grid(weight, chunk_bytes).chunks()
    }

    /// Encodes a chunk, which isn't cached, and hands out its bytes in each part, with their offset
    /// there.
    pub(super) fn make_chunk(
        &self,
        engine: &Engine,
        weight: usize,
        chunk: u64,
        mut put: impl FnMut(usize, u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let grid = self.grid(weight, engine.budget.chunk);
        let parts = self.encode(engine, weight, chunk)?;
        let mut parts = parts.iter().enumerate();
        parts.try_for_each(|(part, bytes)| put(part, grid.range(part, chunk).start, bytes))
    }

    /// Encodes those chunks of a batch into the cache that are not there.
    pub(super) fn prepare(&self, engine: &Engine, batch: &Batch) -> Result<()> {
        let Batch { weight, chunks } = batch;
        let keys = self.keys(*weight, chunks.clone());
        let mut at = 0;
        while let Some((before, claim)) = engine.cache.claim_due(&keys[at..]) {
            let first = at + before;
            at = first + claim.len();
            let chunks = chunks.start + first as u64..chunks.start + at as u64;
            claim.land(self.encode_batch(engine, *weight, chunks)?);
        }
        Ok(())
    }

    /// The chunks whose codes lie in a range that starts in a virtual shard and may end beyond it, in the
    /// next one: whoever reads a shard to its end goes on there. Scales come with the codes that stand
    /// before them.
    pub(super) fn batches_across(
        &self,
        engine: &Engine,
        shard: usize,
        range: Range<u64>,
    ) -> impl Iterator<Item = Batch> {
        let beyond = range.end.saturating_sub(self.shards[shard].len());
        let next = (shard + 1 < self.shards.len() && beyond > 0)
            .then(|| self.batches_of(engine, shard + 1, 0..beyond));
        self.batches_of(engine, shard, range).chain(next.into_iter().flatten())
    }

    fn batches_of(
        &self,
        engine: &Engine,
        shard: usize,
        range: Range<u64>,
    ) -> impl Iterator<Item = Batch> {
        let shard = &self.shards[shard];
        let range = range.start.min(shard.len())..range.end.min(shard.len());
        let budget = engine.budget;
        let batches = move |piece| match piece {
            Piece::Item(id, range) => match self.plan.items[id].content {
                Content::Part { part: 0, .. } | Content::Stacked { part: 0, .. } => {
                    let runs = self.runs(&self.plan.items[id], range);
                    Some(runs.flat_map(move |(weight, range)| {
                        let grid = self.grid(weight, budget.chunk);
                        let mut next = grid.chunk_at(0, range.start);
                        let end = grid.chunk_at(0, range.end - 1) + 1;
                        std::iter::from_fn(move || {
                            let first = next;
                            (first < end).then(|| {
                                next = end.min(self.batch_end(budget, weight, &grid, first));
                                Batch { weight, chunks: first..next }
                            })
                        })
                    }))
                }
                _ => None,
            },
            Piece::Header(_) => None,
        };
        shard.pieces(range).filter_map(batches).flatten()
    }

    /// Encodes every part of one chunk in one pass over its source.
    fn encode(&self, engine: &Engine, weight: usize, chunk: u64) -> Result<Vec<Buffer>> {
        let mut made = self.encode_batch(engine, weight, chunk..chunk + 1)?;
        Ok(made.pop().expect("one chunk"))
    }

    /// The parts of some chunks of one slab, whose source is shown once for all.
    fn encode_batch(
        &self,
        engine: &Engine,
        weight: usize,
        chunks: Range<u64>,
    ) -> Result<Vec<Vec<Buffer>>> {
        let encoding = Encoding::new(self, engine, weight)?;
        let made = encoding.with_tile(&chunks, |tile| {
            let each = chunks.clone().map(|chunk| {
                let chunk = chunk..chunk + 1;
                let lens = (0..encoding.parts.len()).map(|part| encoding.range(part, &chunk).len());
                let mut buffers: Vec<Buffer> = lens.map(|len| engine.buffers.take(len)).collect();
                let mut out: Vec<&mut [u8]> =
                    buffers.iter_mut().map(|buffer| &mut buffer[..]).collect();
                encoding.encode(&chunk, &encoding.cut(tile, &chunks, &chunk), &mut out)?;
                Ok(buffers)
            });
            each.collect::<Result<Vec<_>>>()
        })??;
        for buffers in &made {
            let (codes, others) = buffers.split_first().expect("codes are the first part");
            encoding.note_spoilt(codes, others);
        }
        Ok(made)
    }

    /// Encodes some chunks of one slab in one pass over their source: their codes into `codes`, which are
    /// empty in what is returned.
    fn encode_into(
        &self,
        engine: &Engine,
        weight: usize,
        chunks: Range<u64>,
        codes: &mut [u8],
    ) -> Result<Vec<Vec<Buffer>>> {
        let encoding = Encoding::new(self, engine, weight)?;
        let lens = (1..encoding.parts.len()).map(|part| encoding.range(part, &chunks).len());
        let mut others: Vec<Buffer> = lens.map(|len| engine.buffers.lend(len)).collect();
        encoding.with_tile(&chunks, |tile| {
            let others = others.iter_mut().map(|buffer| &mut buffer[..]);
            let mut out: Vec<&mut [u8]> = iter::once(&mut *codes).chain(others).collect();
            encoding.encode(&chunks, tile, &mut out)
        })??;
        encoding.note_spoilt(codes, &others);
        let of_chunk = |chunk: u64| {
            let cut = |(part, bytes): (usize, &Buffer)| {
                let start = encoding.range(part, &chunks).start;
                let Range { start: first, end } = encoding.range(part, &(chunk..chunk + 1));
                Buffer::from(bytes[first - start..end - start].to_vec())
            };
            let others = (1..).zip(&others).map(cut);
            iter::once(Buffer::from(Vec::new())).chain(others).collect()
        };
        Ok(chunks.clone().map(of_chunk).collect())
    }

    /// What the errors of a window of a weight count for. `numbers` lends the memory.
    fn importance_of<'a>(
        &self,
        engine: &Engine,
        weight: usize,
        window: &quant::Window,
        numbers: &'a mut Vec<f32>,
    ) -> Result<Option<Importance<'a>>> {
        let Some(importances) = &self.importance else { return Ok(None) };
        let planned = &self.plan.weights[weight];
        let tensor = &self.checkpoint.catalog()[planned.tensor];
        importances.of_window(&engine.files, (weight, planned, tensor), window, numbers)
    }

    /// What must be known of all of a weight before it can be encoded. The first to ask reads it,
    /// and whatever shares its survey.
    fn survey(&self, engine: &Engine, weight: usize) -> Result<Arc<Survey>> {
        let Weight { scheme, survey, .. } = self.plan.weights[weight];
        let Some(id) = survey else { return Ok(Arc::default()) };
        self.surveys.get(id, || {
            let mut survey = Survey::default();
            let mut numbers = Vec::new();
            for &tensor in &self.plan.surveys[id] {
                let Tensor { dtype, shape, .. } = &self.checkpoint.catalog()[tensor];
                let grid = scheme.survey_grid(*dtype, shape, engine.budget.chunk);
                for chunk in 0..grid.chunks() {
                    // Rows are surveyed for one weight alone.
                    let importance = match scheme.is_surveyed_by_row() {
                        true => {
                            let window = grid.window(chunk);
                            self.importance_of(engine, weight, &window, &mut numbers)?
                        }
                        false => None,
                    };
                    self.with_tile(engine, tensor, &grid, grid.window(chunk), |tile| {
                        let tile = Tile { importance, ..*tile };
                        scheme.survey(engine.isa, &tile, &mut survey);
                    })?;
                }
            }
            Ok(survey)
        })
    }

    /// The bytes of a surveyed weight's scalar.
    fn scalar(&self, engine: &Engine, weight: usize) -> Result<Vec<u8>> {
        let survey = self.survey(engine, weight)?;
        let Weight { tensor, scheme, .. } = self.plan.weights[weight];
        Ok(scheme.scalar_bytes(self.checkpoint.catalog()[tensor].dtype, &survey))
    }

    fn grid(&self, weight: usize, chunk_bytes: u64) -> Grid {
        let weight = &self.plan.weights[weight];
        weight.grid(&self.checkpoint.catalog()[weight.tensor], chunk_bytes)
    }

    /// Where a batch ends that starts with a chunk: so that its source is about [`BATCH`] bytes, or what a
    /// small budget has room for, or one chunk.
    fn batch_end(&self, budget: Budget, weight: usize, grid: &Grid, first: u64) -> u64 {
        let tensor = &self.checkpoint.catalog()[self.plan.weights[weight].tensor];
        let quant::Window { rows, cols, .. } = grid.window(first);
        let bytes = rows * cols * tensor.dtype.bitsize() as u64 / 8;
        grid.slab_end(first).min(first + (BATCH.min(budget.cache / 16) / bytes).max(1))
    }

    /// Has the source of a batch read into the kernel's page cache, and waits for it.
    pub(super) fn fetch(&self, engine: &Engine, batch: &Batch) {
        let (tensor, window) = self.source_of_batch(engine, batch);
        self.checkpoint.fetch_window(&engine.files, tensor, &window);
    }

    /// Whether to [`fetch`](Self::fetch) a batch is of no use: its source seems to be there, or is not
    /// needed, as [`prepare`](Self::prepare) would not read it.
    pub(super) fn is_fetched(&self, engine: &Engine, batch: &Batch) -> bool {
        let (tensor, window) = self.source_of_batch(engine, batch);
        !engine.cache.is_due(self.key(batch.weight, batch.chunks.start))
            || self.checkpoint.is_fetched(&engine.files, tensor, &window)
    }

    fn source_of_batch(&self, engine: &Engine, batch: &Batch) -> (TensorId, Window) {
        let grid = self.grid(batch.weight, engine.budget.chunk);
        let window = source_window(&grid, grid.window_of(batch.chunks.clone()));
        (self.plan.weights[batch.weight].tensor, window)
    }

    /// Calls `f` with the source of a window.
    fn with_tile<T>(
        &self,
        engine: &Engine,
        tensor: TensorId,
        grid: &Grid,
        window: quant::Window,
        f: impl FnOnce(&Tile<'_>) -> T,
    ) -> Result<T> {
        let dtype = self.checkpoint.catalog()[tensor].dtype;
        let window = source_window(grid, window);
        engine.counters.source.add(self.checkpoint.window_len(tensor, &window));
        let begun = cpu_ns(ClockId::ThreadCPUTime);
        let (isa, files) = (engine.isa, &engine.files);
        let made = self.checkpoint.with_window(isa, files, tensor, window, |bytes, stride| {
            let data = Reals::new(dtype, bytes).expect("the scheme accepted the type");
            let (rows, cols) = (window.rows as usize, window.cols as usize);
            f(&Tile { data, rows, cols, stride, importance: None })
        });
        engine.counters.encode_ns.add(cpu_ns(ClockId::ThreadCPUTime) - begun);
        made
    }

    fn keys(&self, weight: usize, chunks: Range<u64>) -> Vec<ChunkKey> {
        chunks.map(|chunk| self.key(weight, chunk)).collect()
    }

    fn key(&self, weight: usize, chunk: u64) -> ChunkKey {
        let weight = self.first_weight + u32::try_from(weight).expect("weights were counted");
        (weight, u32::try_from(chunk).expect("a weight has fewer than 2^32 chunks"))
    }
}

/// A weight that is being encoded, with what must be known of all of it.
struct Encoding<'a> {
    model: &'a Model,
    engine: &'a Engine,
    weight: usize,
    grid: Grid,
    survey: Arc<Survey>,
    /// Those that chunks are made of, codes first.
    parts: Vec<Part>,
}

impl<'a> Encoding<'a> {
    fn new(model: &'a Model, engine: &'a Engine, weight: usize) -> Result<Self> {
        let survey = model.survey(engine, weight)?;
        let grid = model.grid(weight, engine.budget.chunk);
        let planned = &model.plan.weights[weight];
        let parts = planned.parts(&model.checkpoint.catalog()[planned.tensor]);
        Ok(Self { model, engine, weight, grid, survey, parts })
    }

    fn planned(&self) -> (&'a Weight, &'a Tensor) {
        let weight = &self.model.plan.weights[self.weight];
        (weight, &self.model.checkpoint.catalog()[weight.tensor])
    }

    /// The bytes of a part that some chunks make.
    fn range(&self, part: usize, chunks: &Range<u64>) -> Range<usize> {
        let [first, last] =
            [chunks.start, chunks.end - 1].map(|chunk| self.grid.range(part, chunk));
        first.start as usize..last.end as usize
    }

    /// Calls `f` with the source of some chunks of one slab.
    fn with_tile<T>(&self, chunks: &Range<u64>, f: impl FnOnce(&Tile<'_>) -> T) -> Result<T> {
        let (weight, _) = self.planned();
        let window = self.grid.window_of(chunks.clone());
        self.model.with_tile(self.engine, weight.tensor, &self.grid, window, f)
    }

    /// The source of some chunks, within that of more of them.
    fn cut<'t>(&self, tile: &Tile<'t>, of: &Range<u64>, chunks: &Range<u64>) -> Tile<'t> {
        let [all, some] = [of, chunks].map(|chunks| self.grid.window_of(chunks.clone()));
        let first = (some.first_row - all.first_row, some.first_col - all.first_col);
        tile.part((first.0 as usize, first.1 as usize), (some.rows as usize, some.cols as usize))
    }

    /// Encodes all parts of some chunks from their source.
    fn encode(&self, chunks: &Range<u64>, tile: &Tile<'_>, out: &mut [&mut [u8]]) -> Result<()> {
        let Self { model, engine, weight, .. } = *self;
        let window = self.grid.window_of(chunks.clone());
        let mut numbers = Vec::new();
        let importance = model.importance_of(engine, weight, &window, &mut numbers)?;
        let (weight, _) = self.planned();
        weight.encode(engine.isa, &Tile { importance, ..*tile }, &self.survey, out);
        Ok(())
    }

    /// Notes it if the bytes of all parts show that their source has a NaN or an infinity.
    fn note_spoilt(&self, codes: &[u8], others: &[Buffer]) {
        let (weight, tensor) = self.planned();
        let scheme = weight.scheme;
        let mut parts = self.parts.clone();
        parts.extend(scheme.scalar(tensor.dtype));
        let scalar = scheme.scalar_bytes(tensor.dtype, &self.survey);
        let others = others.iter().map(|buffer| &buffer[..]).chain([&scalar[..]]);
        let bytes: Vec<&[u8]> = iter::once(codes).chain(others).take(parts.len()).collect();
        if scheme.is_spoilt(&parts, &bytes) {
            let (weight, _) = self.model.key(self.weight, 0);
            self.engine.spoilt.note(weight, || {
                let shard = self.model.checkpoint.shards()[tensor.shard()].file.name();
                format!("{shard}: `{}` holds a NaN or an infinity", tensor.name)
            });
        }
    }
}

/// A window of a weight's 2-D view as one of its tensor.
fn source_window(grid: &Grid, window: quant::Window) -> Window {
    let (_, width) = grid.view();
    let quant::Window { first_row, rows, first_col, cols } = window;
    Window { width, first_row, rows, first_col, cols }
}
