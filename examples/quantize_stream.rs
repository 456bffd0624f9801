//! Quantizes a checkpoint tensor by tensor, and prints what each becomes.
//!
//! `cargo run --example quantize_stream -- MODEL [BITS]`

use std::ops::ControlFlow;

use aq_fs::StreamingQuantizer;
use aq_fs::recipe::Request;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("which model?")?;
    let bits = arguments.next().map(|bits| bits.parse()).transpose()?;
    let quantizer = StreamingQuantizer::new(path, &Request { bits, ..Request::default() })?;
    for warning in quantizer.view().warnings() {
        eprintln!("warning: {warning}");
    }
    let progress = quantizer.run(
        |piece| {
            if piece.offset == 0 {
                let aq_fs::adapter::Piece { shard, name, dtype, shape, len, .. } = piece;
                println!("{shard}: {name}: {dtype} {shape:?}, {len} bytes");
            }
            Ok(())
        },
        |progress| {
            let percent = progress.bytes_done as f64 / progress.bytes.max(1) as f64 * 100.0;
            eprint!("\r{percent:5.1} %");
            ControlFlow::Continue(())
        },
    )?;
    eprintln!();
    println!("{} tensors, {} bytes", progress.tensors, progress.bytes);
    Ok(())
}
