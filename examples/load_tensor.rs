//! Loads tensors of a checkpoint with the safetensors library alone, as any program would.
//!
//! ```sh
//! cargo run --release --example load_tensor -- /mnt/q [TENSOR]
//! ```

use std::error::Error;
use std::fs::File;
use std::path::PathBuf;

use memmap2::Mmap;
use safetensors::SafeTensors;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: load_tensor CHECKPOINT [TENSOR]")?);
    let wanted = args.next().map(|name| name.to_string_lossy().into_owned());
    let mut shards: Vec<PathBuf> =
        std::fs::read_dir(&dir)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    shards.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    shards.sort();
    let mut shown = 0;
    for path in shards {
        let map = map(&File::open(&path)?)?;
        let tensors = SafeTensors::deserialize(&map)?;
        for (name, tensor) in tensors.iter() {
            let default = name.contains("q_proj") && shown < 3;
            if wanted.as_deref().map_or(default, |wanted| wanted == name) {
                let data = tensor.data();
                println!(
                    "{name}: {} {:?}, {} bytes, first {:02x?}",
                    tensor.dtype(),
                    tensor.shape(),
                    data.len(),
                    &data[..data.len().min(8)]
                );
                shown += 1;
            }
        }
    }
    if shown == 0 { Err("no such tensor".into()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "memory maps are how the safetensors library is used")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the file is one of a read-only mount, or of a checkpoint that nobody writes while
    // this example runs.
    unsafe { Mmap::map(file) }
}
