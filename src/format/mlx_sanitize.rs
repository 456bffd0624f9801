//! What mlx-lm does to plain weights while it loads them, and can't do to codes.
//!
//! Its models rename, split or scale weights in `sanitize`, many of them `weight` alone: `scales` and `biases` then
//! stay behind. (The `mlx_lm/models/*.py` of mlx-lm 0.32.2.)

use serde_json::Value;

use super::mlx_mixtures::language_type;
use crate::error::{self, Result};
use crate::recipe::Job;

/// Modules that stay as they are, by components of their names.
///
/// # Errors
/// `Unsupported` where nearly everything would have to.
pub(super) fn spared(job: Job<'_>) -> Result<&'static [&'static str]> {
    let Job { catalog, config, .. } = job;
    let shape = |name: &str| catalog.find(name).map(|id| &catalog[id].shape[..]);
    Ok(match language_type(config).unwrap_or_default() {
        // A convolution that has MLX's order already says that all is done.
        "falcon_h1"
            if !shape("model.layers.0.mamba.conv1d.weight")
                .is_some_and(|shape| matches!(*shape, [_, width, last] if last <= width)) =>
        {
            return Err(error::unsupported(
                "mlx-lm 0.32 multiplies most weights of a falcon_h1 while it loads them, which it can't do to \
                 codes: mlx_lm.convert, or --format dense",
            ));
        }
        // Split in two, one transposed: of affine codes most models encode anew what they decoded, with the error
        // of both, and fail where the group doesn't divide a head. Others can't read codes there.
        "bailing_hybrid" | "bailing_moe_v3" | "deepseek_v3" | "deepseek_v32" | "glm4_moe_lite"
        | "glm_moe_dsa" | "kimi_k25" | "kimi_k3" | "longcat_flash" | "mistral4" => &["kv_b_proj"],
        "kimi_linear" => &["shared_experts", "kv_b_proj"],
        "longcat_flash_ngram" => &["embed_tokens", "kv_b_proj"],
        "spark2_5" => &["embed_tokens"],
        "minicpm" if shape("lm_head.weight").is_none() => &["embed_tokens"],
        "granitemoehybrid" if !has_experts(config) => &["shared_mlp"],
        "lfm2_moe" => &["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
        _ => &[],
    })
}

fn has_experts(config: Option<&Value>) -> bool {
    let count = config.and_then(|config| config.get("num_local_experts")?.as_u64());
    count.is_some_and(|count| count > 0)
}
