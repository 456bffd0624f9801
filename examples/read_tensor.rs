//! Prints what a checkpoint holds, and a tensor's first values.
//!
//! `cargo run --example read_tensor -- MODEL [TENSOR]`

use aq_fs::ShardedSafeTensorsAdapter;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("which model?")?;
    let checkpoint = ShardedSafeTensorsAdapter::load(path)?;
    let detected = checkpoint.detect_modality();
    println!(
        "{} tensors of {} bytes in {} shards; {} ({})",
        checkpoint.tensor_names().len(),
        checkpoint.get_total_size(),
        checkpoint.num_shards(),
        detected.modality,
        detected.rule
    );
    match arguments.next() {
        Some(name) => {
            let values = checkpoint.get_tensor_f32(&name)?;
            let shard = checkpoint.get_shard_for_tensor(&name).expect("it was just read");
            println!("{name} in {shard}: {:?} …", &values[..values.len().min(8)]);
        }
        None => {
            for (name, values) in checkpoint.get_all_tensors_f32() {
                let largest = values?.into_iter().fold(0f32, |largest, x| largest.max(x.abs()));
                println!("{name}: absolute values up to {largest}");
            }
        }
    }
    Ok(())
}
