//! Quantizes a checkpoint tensor by tensor, in bounded memory.

use std::ops::ControlFlow;
use std::path::Path;

use crate::dtype::Dtype;
use crate::error::{self, Result};
use crate::recipe::Request;
use crate::source::Header;
use crate::view::{Budget, NodeId, NodeKind, View};

/// Bytes of a tensor that are handed over at a time.
const PIECE: u64 = 4 << 20;

/// Quantizes a checkpoint as a stream: one tensor after the other, in pieces, through a closure.
///
/// What comes are the tensors of the quantized checkpoint, by the names, element types and shapes
/// that loaders of its format expect: the very bytes that a mount shows and `export` writes.
/// Memory stays bounded whatever the model's size, by the budget's cache, a chunk per thread, and
/// one piece.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use aq_fs::StreamingQuantizer;
/// use aq_fs::recipe::Request;
/// # use aq_fs::dtype::Dtype;
/// # use safetensors::tensor::TensorView;
///
/// # let dir = tempfile::tempdir()?;
/// # let model_dir = dir.path();
/// # let data: Vec<u8> = (0..256 * 256).flat_map(|i| [(i % 256) as u8, 0x3c]).collect();
/// # let name = "model.layers.0.mlp.down_proj.weight";
/// # let view = TensorView::new(Dtype::BF16, vec![256, 256], &data)?;
/// # safetensors::serialize_to_file([(name, view)], None, &model_dir.join("model.safetensors"))?;
/// # let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}"#;
/// # std::fs::write(model_dir.join("config.json"), config)?;
/// let request = Request { bits: Some(4), ..Request::default() };
/// let quantizer = StreamingQuantizer::new(model_dir, &request)?;
/// let mut packed = Vec::new();
/// let progress = quantizer.run(
///     |piece| {
///         if piece.name == "model.layers.0.mlp.down_proj.weight_packed" {
///             assert_eq!(piece.shape, [256, 32]);
///             packed.extend_from_slice(piece.bytes);
///         }
///         Ok(())
///     },
///     |progress| {
///         println!("{} of {} bytes", progress.bytes_done, progress.bytes);
///         ControlFlow::Continue(())
///     },
/// )?;
/// assert!(progress.is_complete());
/// assert_eq!(packed.len(), 256 * 32 * 4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StreamingQuantizer {
    view: View,
    shards: Vec<Shard>,
    total: Progress,
}

/// A shard of the quantized checkpoint.
#[derive(Debug)]
struct Shard {
    node: NodeId,
    name: String,
    header: Header,
}

/// A piece of a tensor of the quantized checkpoint. The pieces of a tensor come in order, without
/// gaps; a tensor without elements is one piece without bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The path of the shard that the tensor belongs to, below the model's directory.
    pub shard: &'a str,
    /// The tensor's name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [u64],
    /// Its length in bytes, all pieces together.
    pub len: u64,
    /// Where in it `bytes` start.
    pub offset: u64,
    /// Some of its bytes.
    pub bytes: &'a [u8],
}

/// How far a stream is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Tensors handed over in full.
    pub tensors_done: usize,
    /// All tensors of the quantized checkpoint.
    pub tensors: usize,
    /// Bytes handed over.
    pub bytes_done: u64,
    /// Bytes of all its tensors.
    pub bytes: u64,
}

impl Progress {
    /// Whether everything was handed over.
    pub fn is_complete(&self) -> bool {
        self.tensors_done == self.tensors
    }
}

impl StreamingQuantizer {
    /// Opens a checkpoint and plans what `request` makes of it, with a cache of 64 MiB.
    ///
    /// # Errors
    /// Whatever is wrong with the model or the request; see [`View::open`].
    pub fn new(path: impl AsRef<Path>, request: &Request) -> Result<Self> {
        Self::with_budget(path, request, Budget { cache: 64 << 20, ahead: 0, ..Budget::default() })
    }

    /// As [`new`](Self::new), with other bounds on memory. They don't change what comes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_budget(path: impl AsRef<Path>, request: &Request, budget: Budget) -> Result<Self> {
        let view = View::open(path.as_ref(), request, budget)?;
        let shards = view
            .shards()
            .map(|(node, _, _)| Shard::read(&view, node))
            .collect::<Result<Vec<_>>>()?;
        let entries = || shards.iter().flat_map(|shard| &shard.header.entries);
        let total = Progress {
            tensors: entries().count(),
            bytes: entries().map(|entry| entry.len).sum(),
            ..Progress::default()
        };
        Ok(Self { view, shards, total })
    }

    /// The view that is streamed: its plan, and every file beside the weights.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// How much there is to do.
    pub fn total(&self) -> Progress {
        self.total
    }

    /// Hands every tensor to `sink`, and after every piece asks `progress` whether to go on. Where
    /// it breaks, what is returned is incomplete.
    ///
    /// # Errors
    /// `Stale` or `Io` where the source can't be read any more, or what `sink` returns.
    pub fn run(
        &self,
        mut sink: impl FnMut(Piece<'_>) -> Result<()>,
        mut progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Progress> {
        let mut at = self.total;
        let mut buf = Vec::new();
        for Shard { node, name: shard, header } in &self.shards {
            for entry in &header.entries {
                for offset in (0..entry.len.max(1)).step_by(PIECE as usize) {
                    let len = PIECE.min(entry.len - offset);
                    buf.resize(len as usize, 0);
                    self.view
                        .read_at(*node, entry.start + offset, &mut buf)
                        .map_err(|error| error.within(format_args!("`{}`", entry.name)))?;
                    sink(Piece {
                        shard,
                        name: &entry.name,
                        dtype: entry.dtype,
                        shape: &entry.shape,
                        len: entry.len,
                        offset,
                        bytes: &buf,
                    })?;
                    at.bytes_done += len;
                    at.tensors_done += usize::from(offset + len == entry.len);
                    if progress(at).is_break() {
                        return Ok(at);
                    }
                }
            }
        }
        Ok(at)
    }
}

impl Shard {
    fn read(view: &View, node: NodeId) -> Result<Self> {
        let name = view.tree().path(node).to_string_lossy().into_owned();
        let NodeKind::File { size } = view.tree().nodes()[node].kind else {
            unreachable!("a shard is a file");
        };
        let header = read_header(view, node, size).map_err(|error| error.within(&name))?;
        Ok(Self { node, name, header })
    }
}

/// The header that the view shows.
fn read_header(view: &View, node: NodeId, size: u64) -> Result<Header> {
    let mut length = [0; 8];
    let mut json = Vec::new();
    if view.read_at(node, 0, &mut length)? == length.len() {
        // Bounded by the file's size: where the source changed, this may be anything.
        json.resize(u64::from_le_bytes(length).min(size) as usize, 0);
        if view.read_at(node, 8, &mut json)? == json.len() {
            return Header::parse(&json, size);
        }
    }
    Err(error::corrupt("the header is truncated"))
}
