//! The library's way to a checkpoint's tensors: by name, as f32, lazily.

mod all;
mod stream;

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

pub use all::{AllTensors, LookAhead};
pub use stream::{Piece, Progress, StreamingQuantizer};

use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::isa::Isa;
use crate::modality::{self, DetectedModality};
use crate::source::{
    Checkpoint, ELEMENTS_ALIGN, SourceFile, SourceFiles, TensorId, Window, f32_decoder,
    find_index_file,
};

/// Shards kept open and mapped at a time.
const OPEN_SHARDS: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not zero");

/// Source bytes decoded at a time: their pages are given back before the next.
const PIECE: u64 = ELEMENTS_ALIGN << 18;

/// A checkpoint, sharded or not, whose tensors are read by name.
///
/// Opening it reads the headers of all shards and checks them against each other and the index, so
/// that everything wrong with the checkpoint is known by then. A shard's data are mapped when the
/// first of its tensors is read. Cloning is cheap and shares the maps; any number of threads may
/// read at the same time.
///
/// ```
/// use aq_fs::ShardedSafeTensorsAdapter;
/// # use aq_fs::dtype::Dtype;
/// # use safetensors::tensor::TensorView;
///
/// # let dir = tempfile::tempdir()?;
/// # let model_dir = dir.path();
/// # let data = [0x80, 0x3f, 0x00, 0x40, 0x00, 0xbf, 0x00, 0x00];
/// # for (number, name) in [(1, "embed.weight"), (2, "head.weight")] {
/// #     let view = TensorView::new(Dtype::BF16, vec![2, 2], &data)?;
/// #     let path = model_dir.join(format!("model-0000{number}-of-00002.safetensors"));
/// #     safetensors::serialize_to_file([(name, view)], None, &path)?;
/// # }
/// # std::fs::write(model_dir.join("model.safetensors.index.json"), r#"{
/// #     "metadata": { "total_size": 16, "modality": "text" },
/// #     "weight_map": { "embed.weight": "model-00001-of-00002.safetensors",
/// #                     "head.weight": "model-00002-of-00002.safetensors" } }"#)?;
/// let checkpoint = ShardedSafeTensorsAdapter::load(model_dir)?;
/// assert_eq!(checkpoint.num_shards(), 2);
/// assert_eq!(
///     checkpoint.get_shard_for_tensor("head.weight"),
///     Some("model-00002-of-00002.safetensors")
/// );
/// assert_eq!(checkpoint.tensor_info("head.weight").map(|info| info.shape), Some(&[2, 2][..]));
/// assert_eq!(checkpoint.get_tensor_f32("head.weight")?, [1.0, 2.0, -0.5, 0.0]);
///
/// for (name, values) in checkpoint.get_all_tensors_f32() {
///     println!("{name}: {} elements", values?.len());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ShardedSafeTensorsAdapter {
    shared: Arc<Shared>,
}

/// What the adapter and the threads that read ahead for it share.
#[derive(Debug)]
struct Shared {
    checkpoint: Checkpoint,
    files: SourceFiles,
}

/// What is known of a tensor before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Its element type, once decoded where it is stored quantized.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first; empty for a scalar.
    pub shape: &'a [u64],
}

impl TensorInfo<'_> {
    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

impl ShardedSafeTensorsAdapter {
    /// Opens a checkpoint: its directory, the path of its index, or that of a single safetensors
    /// file. Reads headers, index and `config.json`; maps nothing.
    ///
    /// # Errors
    /// What [`Checkpoint::open`] finds: `NotFound`, `Corrupt` with file and tensor, `Unsupported`,
    /// or `Io`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let checkpoint = Checkpoint::open(path.as_ref())?;
        let files = SourceFiles::new(OPEN_SHARDS);
        Ok(Self { shared: Arc::new(Shared { checkpoint, files }) })
    }

    /// The checkpoint itself: its directory, catalog, index and config.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.shared.checkpoint
    }

    /// The names of all tensors in the order of the catalog: by shard, then by place in it.
    pub fn tensor_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.checkpoint().catalog().tensors().iter().map(|tensor| tensor.name.as_str())
    }

    /// The name of the shard file that holds a tensor; `None` where there is no such tensor.
    pub fn get_shard_for_tensor(&self, name: &str) -> Option<&str> {
        let catalog = self.checkpoint().catalog();
        let shard = catalog[catalog.find(name)?].shard();
        Some(self.checkpoint().shards()[shard].file.name())
    }

    /// A tensor's element type and shape; `None` where there is no such tensor.
    pub fn tensor_info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let catalog = self.checkpoint().catalog();
        let tensor = &catalog[catalog.find(name)?];
        Some(TensorInfo { dtype: tensor.dtype, shape: &tensor.shape })
    }

    /// All elements of a tensor in row-major order, as f32, from any real element type: exact where
    /// f32 holds the value, else rounded to nearest (see [`f32_decoder`]).
    ///
    /// # Errors
    /// `NotFound` where there is no such tensor, `Unsupported` for complex numbers and where its
    /// values don't fit in memory, `Stale` where its shard changed since [`load`](Self::load),
    /// `Io` where it can't be read.
    pub fn get_tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        let id = self.checkpoint().catalog().find(name).ok_or_else(|| {
            error::not_found(format!("{}: no tensor `{name}`", self.checkpoint().dir().display()))
        })?;
        self.shared.read_f32(id, &|| true)
    }

    /// Every tensor as f32, with its name, in the order of [`tensor_names`](Self::tensor_names).
    /// Tensors are read ahead on a few threads, within the bounds of [`LookAhead::default`], from
    /// the first call of `next` until the iterator is dropped.
    ///
    /// A tensor that can't be read is an error in its place; the others follow.
    pub fn get_all_tensors_f32(&self) -> AllTensors {
        self.get_all_tensors_f32_with(LookAhead::default())
    }

    /// As [`get_all_tensors_f32`](Self::get_all_tensors_f32), within other bounds.
    pub fn get_all_tensors_f32_with(&self, look_ahead: LookAhead) -> AllTensors {
        AllTensors::new(self.shared.clone(), look_ahead)
    }

    /// The names of the shard files, in name order.
    pub fn shard_files(&self) -> impl ExactSizeIterator<Item = &str> {
        self.checkpoint().shards().iter().map(|shard| shard.file.name())
    }

    /// The number of shard files; 1 for a checkpoint of a single file.
    pub fn num_shards(&self) -> usize {
        self.checkpoint().shards().len()
    }

    /// Bytes that all tensors take as stored, without headers: what `total_size` in an index should
    /// say.
    pub fn get_total_size(&self) -> u64 {
        self.checkpoint().catalog().tensors().iter().map(|tensor| tensor.stored_len()).sum()
    }

    /// What the checkpoint works on: text, images, audio and so on; and what told so.
    pub fn detect_modality(&self) -> DetectedModality {
        let config = self.checkpoint().config().map(|config| &config.value);
        modality::detect(&self.checkpoint().index_metadata(), config, self.tensor_names())
    }

    /// Asks the kernel to read a shard into its page cache, and returns at once.
    ///
    /// # Errors
    /// `NotFound` where there is no shard of that name, `Stale` or `Io` where it can't be opened.
    pub fn prefetch_shard(&self, name: &str) -> Result<()> {
        let file = self.find_shard(name).ok_or_else(|| {
            error::not_found(format!("{}: no shard {name:?}", self.checkpoint().dir().display()))
        })?;
        self.shared.files.prefetch(file)
    }

    /// Closes and unmaps every shard that is not just being read.
    pub fn clear_cache(&self) {
        self.shared.files.clear();
    }

    /// Bytes of memory that the mapped shards take in this process at this moment: the pages of the
    /// maps that are in its page table, by the kernel's count.
    ///
    /// Not the bytes mapped, which are address space and no memory (see
    /// [`mapped_bytes`](Self::mapped_bytes)); nor what the kernel's page cache holds of the files,
    /// which belongs to no process. Since the pages of a tensor are given back once it is read, the
    /// figure is small between reads, and 0 after [`clear_cache`](Self::clear_cache). It is read
    /// from `/proc/self/smaps`, which takes about a millisecond.
    pub fn cache_memory_usage(&self) -> u64 {
        self.shared.files.resident()
    }

    /// Bytes of address space that the mapped shards take.
    pub fn mapped_bytes(&self) -> u64 {
        self.shared.files.mapped().1
    }

    fn find_shard(&self, name: &str) -> Option<&Arc<SourceFile>> {
        self.checkpoint().shards().iter().map(|shard| &shard.file).find(|file| file.name() == name)
    }
}

impl Shared {
    /// A tensor's elements as f32. Between pieces `go_on` is asked; where it says no, the tensor is
    /// left unfinished.
    fn read_f32(&self, id: TensorId, go_on: &dyn Fn() -> bool) -> Result<Vec<f32>> {
        let tensor = &self.checkpoint.catalog()[id];
        let refuse = |what: &str| error::unsupported(format!("`{}`: {what}", tensor.name));
        let decode = f32_decoder(tensor.dtype)
            .ok_or_else(|| refuse(&format!("{} values are not real numbers", tensor.dtype)))?;
        let elements = tensor.elements();
        let mut out = Vec::new();
        usize::try_from(elements)
            .ok()
            .and_then(|elements| out.try_reserve_exact(elements).ok())
            .ok_or_else(|| refuse(&format!("{elements} values don't fit in memory")))?;
        let bits = tensor.dtype.bitsize() as u64;
        let isa = Isa::detect();
        for first in (0..elements).step_by((PIECE * 8 / bits) as usize) {
            if !go_on() {
                break;
            }
            let cols = (PIECE * 8 / bits).min(elements - first);
            let window = Window { width: elements, first_row: 0, rows: 1, first_col: first, cols };
            self.checkpoint
                .with_window(isa, &self.files, id, window, |bytes, _| decode(bytes, &mut out))
                .map_err(|error| error.within(format_args!("`{}`", tensor.name)))?;
        }
        Ok(out)
    }
}

/// Whether a path leads to a checkpoint that an index says is sharded: a directory with an index
/// file in it, or an index file itself. Only names are looked at.
pub fn is_sharded_model(path: impl AsRef<Path>) -> bool {
    let path = path.as_ref();
    if path.is_dir() {
        // Several indexes, of which none is the default one, are an error there.
        return find_index_file(path).map_or(true, |found| found.is_some());
    }
    let name = path.file_name().map(|name| name.to_string_lossy());
    path.is_file() && name.is_some_and(|name| name.ends_with(crate::source::INDEX_SUFFIX))
}
