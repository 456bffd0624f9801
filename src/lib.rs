//! Shows a safetensors checkpoint as a quantized one, computed as it is read.
//!
//! A *view* is a pure function: given a checkpoint and a recipe, every file's name and exact size
//! follow from the headers alone, and [`view::View::read_at`] is the only question anyone asks.
//! FUSE, `export`, `inspect` and this library's users are callers of that one function.
//!
//! The modules, in reading order:
//!
//! - [`dtype`], [`error`], `isa`, `threads`: element types as safetensors spells them; the one error
//!   type; the CPU's instruction sets; work spread over the cores.
//! - [`source`]: the checkpoint being viewed, its headers, catalog and bytes.
//! - [`quant`]: numerics, reals to codes; pure functions on slices.
//! - [`recipe`]: which module is quantized how, and why.
//! - [`mod@format`]: how a quantized checkpoint is written down.
//! - [`memory`]: how much there is, for budgets.
//! - [`view`]: the virtual checkpoint, its tree and `read_at`.
//! - [`loader`]: what `--for` knows of the programs that load what is shown.
//! - [`export`]: a view written to disk.
//! - [`modality`]: what a checkpoint works on.
//! - [`adapter`]: the library's way to a checkpoint's tensors, [`ShardedSafeTensorsAdapter`], and
//!   to those of a quantized one, [`StreamingQuantizer`].
//! - [`fuse`], [`mount`]: kernel requests to view calls; a mount's life.
//! - [`cli`]: the command line.

pub mod adapter;
pub mod cli;
pub mod dtype;
pub mod error;
pub mod export;
pub mod format;
pub mod fuse;
mod isa;
pub mod loader;
pub mod memory;
pub mod modality;
pub mod mount;
pub mod quant;
pub mod recipe;
pub mod source;
mod threads;
pub mod view;

pub use adapter::{ShardedSafeTensorsAdapter, StreamingQuantizer, is_sharded_model};
pub use modality::{DetectedModality, Modality};
pub use source::find_index_file;
