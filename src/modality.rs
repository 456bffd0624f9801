//! What a checkpoint works on: text, code, images, audio and so on.
//!
//! Three rules in turn, the first that decides wins: what the index's metadata say, what
//! `config.json` implies, and what the names of the tensors vote for. Names count by whole words:
//! "camel" says nothing of mel spectrograms, nor "decode" of code.

use std::collections::HashMap;
use std::fmt;

use serde_json::{Map, Value};

/// What a model works on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Modality {
    /// Natural language.
    Text,
    /// Source code.
    Code,
    /// Still images, in or out.
    Image,
    /// Moving images, in or out.
    Video,
    /// Speech, music and other sound, in or out.
    Audio,
    /// Text together with images, video or audio.
    Multimodal,
    /// Vectors that stand for texts.
    Embedding,
    /// What an index's metadata say, where that is none of these.
    Other(String),
    /// Nothing tells.
    Unknown,
}

/// A modality, and what told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetectedModality {
    /// What the model works on.
    pub modality: Modality,
    /// The rule that decided.
    pub rule: Rule,
}

/// The rule that decided on a modality.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// `metadata.modality` of the index.
    IndexMetadata,
    /// An entry of `config.json`.
    Config {
        /// Its key.
        key: &'static str,
        /// Its value; `None` where it is enough that there is one.
        value: Option<String>,
    },
    /// Words in the names of tensors.
    TensorNames {
        /// How many tensors speak for what, most first.
        votes: Vec<(Modality, usize)>,
    },
    /// None.
    Nothing,
}

/// Applies the rules to an index's `metadata`, the value of `config.json` and the names of all
/// tensors.
pub fn detect<'a>(
    index_metadata: &Map<String, Value>,
    config: Option<&Value>,
    tensor_names: impl IntoIterator<Item = &'a str>,
) -> DetectedModality {
    if let Some(Value::String(modality)) = index_metadata.get("modality")
        && !modality.trim().is_empty()
    {
        let modality = Modality::parse(modality);
        return DetectedModality { modality, rule: Rule::IndexMetadata };
    }
    if let Some((modality, key, value)) = config.and_then(from_config) {
        let value = value.map(str::to_owned);
        return DetectedModality { modality, rule: Rule::Config { key, value } };
    }
    from_tensor_names(tensor_names)
}

impl Modality {
    /// The modality of that name, or of one in common use for it, in any case.
    pub fn parse(name: &str) -> Self {
        let name = name.trim().to_lowercase();
        match name.as_str() {
            "text" | "language" | "nlp" | "text-generation" => Self::Text,
            "code" => Self::Code,
            "image" | "images" | "vision" => Self::Image,
            "video" => Self::Video,
            "audio" | "speech" | "music" => Self::Audio,
            "multimodal" | "multi-modal" | "vision-language" | "image-text-to-text"
            | "any-to-any" => Self::Multimodal,
            "embedding" | "embeddings" | "sentence-similarity" | "feature-extraction" => {
                Self::Embedding
            }
            "unknown" => Self::Unknown,
            _ => Self::Other(name),
        }
    }

    /// Its name, in lower case.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Text => "text",
            Self::Code => "code",
            Self::Image => "image",
            Self::Video => "video",
            Self::Audio => "audio",
            Self::Multimodal => "multimodal",
            Self::Embedding => "embedding",
            Self::Other(name) => name,
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Modality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IndexMetadata => f.write_str("the index's metadata say so"),
            Self::Config { key, value: Some(value) } => {
                write!(f, "config.json: `{key}` is {value:?}")
            }
            Self::Config { key, value: None } => write!(f, "config.json has `{key}`"),
            Self::TensorNames { votes } => {
                f.write_str("names of tensors:")?;
                for (i, (modality, count)) in votes.iter().enumerate() {
                    let comma = if i == 0 { "" } else { "," };
                    write!(f, "{comma} {count} for {modality}")?;
                }
                Ok(())
            }
            Self::Nothing => f.write_str("nothing tells"),
        }
    }
}

/// `model_type`s whose modality their architectures' names don't tell.
const MODEL_TYPES: &[(Modality, &str)] = &[
    (
        Modality::Audio,
        "audio-spectrogram-transformer audio_flamingo_encoder bark csm dac data2vec-audio dia \
         encodec fastspeech2_conformer hubert jukebox mctct mimi moonshine moshi musicgen \
         musicgen_melody parakeet parakeet_ctc seamless_m4t seamless_m4t_v2 sew sew-d \
         speech-encoder-decoder speech_to_text speecht5 unispeech unispeech-sat univnet vits \
         wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper xcodec",
    ),
    (Modality::Video, "timesformer videomae vivit vjepa2"),
    (
        Modality::Image,
        "beit bit clip_vision_model conditional_detr convnext convnextv2 cvt data2vec-vision \
         deformable_detr deit depth_anything detr dinov2 dinov2_with_registers dinov3_convnext \
         dinov3_vit dpt efficientnet focalnet glpn hiera ijepa levit mask2former maskformer \
         mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2 regnet resnet \
         rt_detr rt_detr_v2 sam sam2 segformer siglip_vision_model superglue superpoint swin \
         swin2sr swinv2 table-transformer timm_wrapper upernet van vit vit_mae vit_msn vitdet \
         vitmatte vitpose yolos zoedepth",
    ),
    (Modality::Multimodal, "vilt vision-encoder-decoder vision-text-dual-encoder visual_bert"),
    (Modality::Code, "codegen gpt_bigcode starcoder2"),
    (Modality::Embedding, "clip_text_model siglip_text_model dpr"),
];

/// Encoders of text: without a head, what they give is an embedding.
const TEXT_ENCODERS: &str = "albert bert camembert deberta deberta-v2 distilbert electra ernie \
    eurobert gte jina_bert modernbert mpnet new nomic_bert roberta \
    roberta-prelayernorm xlm-roberta xlm-roberta-xl";

/// Entries of a config that make a model one of several modalities. Those of towers that stand
/// alone have their own entries at the top.
const TOWERS: &[&str] = &[
    "audio_config",
    "audio_processor",
    "image_config",
    "img_processor",
    "mm_vision_tower",
    "speech_config",
    "thinker_config",
    "video_config",
    "vision_cfg",
    "vision_config",
    "visual",
];

/// How the names of architectures end.
const HEADS: &[(&str, Modality)] = &[
    ("ForImageTextToText", Modality::Multimodal),
    ("ForVision2Seq", Modality::Multimodal),
    ("ForVisualQuestionAnswering", Modality::Multimodal),
    ("ForDocumentQuestionAnswering", Modality::Multimodal),
    ("ForAudioClassification", Modality::Audio),
    ("ForAudioFrameClassification", Modality::Audio),
    ("ForCTC", Modality::Audio),
    ("ForSpeechSeq2Seq", Modality::Audio),
    ("ForSpeechToText", Modality::Audio),
    ("ForTextToSpeech", Modality::Audio),
    ("ForXVector", Modality::Audio),
    ("ForVideoClassification", Modality::Video),
    ("ForDepthEstimation", Modality::Image),
    ("ForImageClassification", Modality::Image),
    ("ForImageSuperResolution", Modality::Image),
    ("ForInstanceSegmentation", Modality::Image),
    ("ForMaskedImageModeling", Modality::Image),
    ("ForObjectDetection", Modality::Image),
    ("ForSemanticSegmentation", Modality::Image),
    ("ForUniversalSegmentation", Modality::Image),
    ("ForCausalLM", Modality::Text),
    ("LMHeadModel", Modality::Text),
    ("DoubleHeadsModel", Modality::Text),
    ("ForConditionalGeneration", Modality::Text),
    ("ForMaskedLM", Modality::Text),
    ("ForMultipleChoice", Modality::Text),
    ("ForPreTraining", Modality::Text),
    ("ForQuestionAnswering", Modality::Text),
    ("ForSequenceClassification", Modality::Text),
    ("ForTokenClassification", Modality::Text),
];

/// Words of the names of architectures and `model_type`s, in the order in which they decide.
const WORDS: &[(Modality, &str)] = &[
    (Modality::Multimodal, "vl vlm omni llava multimodal"),
    (Modality::Video, "video"),
    (Modality::Audio, "audio speech wav whisper tts music"),
    (Modality::Image, "vision image vit"),
    (Modality::Embedding, "embedding embeddings"),
];

/// Words of the names of diffusers' classes that make them video's or audio's, and not images'.
const DIFFUSERS_WORDS: &[(Modality, &str)] = &[
    (Modality::Video, "video motion temporal wan mochi allegro latte cosmos magvit"),
    (Modality::Audio, "audio oobleck speech music vocoder"),
];

/// Words of the names of models of code.
const CODE_WORDS: &str = "code coder codegen codellama codegemma starcoder";

/// Words of the names of tensors.
const TENSOR_WORDS: &[(Modality, &str)] = &[
    (Modality::Text, "language llm lm text tok tokens vocab word words wte"),
    (Modality::Code, "code coder"),
    (Modality::Image, "image images img patch patches pixel pixels unet vae vision visual vit"),
    (Modality::Video, "frame frames motion temporal tubelet video videos"),
    (
        Modality::Audio,
        "acoustic audio codec conformer hubert mel phoneme spectrogram speech vocoder wav waveform \
         wavlm whisper",
    ),
];

/// The modality, and the key and value that tell it.
fn from_config(config: &Value) -> Option<(Modality, &'static str, Option<&str>)> {
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    if let Some(class) = text("_class_name") {
        return from_diffusers(class).map(|modality| (modality, "_class_name", Some(class)));
    }
    let model_type = text("model_type").unwrap_or_default();
    let listed = MODEL_TYPES.iter().find(|(_, types)| lists(types, model_type));
    if let Some((modality, _)) = listed {
        return Some((modality.clone(), "model_type", Some(model_type)));
    }
    let is_there = |key: &str| config.get(key).is_some_and(|value| !value.is_null());
    if let Some(tower) = TOWERS.iter().copied().find(|key| is_there(key)) {
        return Some((Modality::Multimodal, tower, None));
    }
    let architectures = config.get("architectures").and_then(Value::as_array);
    for class in architectures.into_iter().flatten().filter_map(Value::as_str) {
        if let Some(modality) = from_architecture(class, model_type) {
            if modality == Modality::Text
                && let Some(name) = text("_name_or_path")
                && words(name.rsplit('/').next().unwrap_or(name))
                    .any(|word| lists(CODE_WORDS, &word))
            {
                return Some((Modality::Code, "_name_or_path", Some(name)));
            }
            return Some((modality, "architectures", Some(class)));
        }
    }
    if lists(TEXT_ENCODERS, model_type) {
        return Some((Modality::Text, "model_type", Some(model_type)));
    }
    by_words(WORDS, model_type).map(|modality| (modality, "model_type", Some(model_type)))
}

fn from_diffusers(class: &str) -> Option<Modality> {
    if let Some(modality) = by_words(DIFFUSERS_WORDS, class) {
        return Some(modality);
    }
    if class.contains("3D") {
        return Some(Modality::Video);
    }
    let parts = ["net", "transformer", "autoencoder", "vq", "pipeline"];
    let is_model = words(class).any(|word| parts.contains(&word.as_str()));
    (is_model && !class.contains("1D")).then_some(Modality::Image)
}

fn from_architecture(class: &str, model_type: &str) -> Option<Modality> {
    if let Some(modality) = by_words(WORDS, class) {
        return Some(modality);
    }
    if let Some((_, modality)) = HEADS.iter().find(|(head, _)| class.ends_with(head)) {
        return Some(modality.clone());
    }
    if class.ends_with("T5EncoderModel")
        || class.ends_with("Model") && lists(TEXT_ENCODERS, model_type)
    {
        return Some(Modality::Embedding);
    }
    None
}

/// The first modality of the table of which `name` has a word.
fn by_words(table: &[(Modality, &str)], name: &str) -> Option<Modality> {
    let found: Vec<String> = words(name).collect();
    let says = |listed: &str| found.iter().any(|word| lists(listed, word));
    table.iter().find(|(_, listed)| says(listed)).map(|(modality, _)| modality.clone())
}

/// Whether a list of words separated by spaces has that one.
fn lists(listed: &str, word: &str) -> bool {
    listed.split(' ').any(|one| one == word)
}

fn from_tensor_names<'a>(names: impl IntoIterator<Item = &'a str>) -> DetectedModality {
    let meaning: HashMap<&str, usize> = TENSOR_WORDS
        .iter()
        .enumerate()
        .flat_map(|(row, (_, listed))| listed.split(' ').map(move |word| (word, row)))
        .collect();
    let mut counts = [0; TENSOR_WORDS.len()];
    for name in names {
        let mut rows: Vec<usize> =
            words(name).filter_map(|word| meaning.get(word.as_str()).copied()).collect();
        rows.sort_unstable();
        rows.dedup();
        for row in rows {
            counts[row] += 1;
        }
    }
    let mut votes: Vec<(Modality, usize)> = TENSOR_WORDS
        .iter()
        .zip(counts)
        .filter(|(_, count)| *count > 0)
        .map(|((modality, _), count)| (modality.clone(), count))
        .collect();
    // A stable sort: equals stay in the table's order.
    votes.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    match decide(&votes) {
        Some(modality) => DetectedModality { modality, rule: Rule::TensorNames { votes } },
        None => DetectedModality { modality: Modality::Unknown, rule: Rule::Nothing },
    }
}

/// Who won. A language model has few tensors that speak of text, however large it is, so text next
/// to senses is multimodal whatever the counts; among senses one with less than a tenth of the
/// other's votes doesn't count. Codes are also what audio is made of: code is one only alone.
fn decide(votes: &[(Modality, usize)]) -> Option<Modality> {
    let is_sense = |m: &Modality| matches!(m, Modality::Image | Modality::Video | Modality::Audio);
    let has = |modality| votes.iter().any(|(voted, _)| *voted == modality);
    let mut senses = votes.iter().filter(|(modality, _)| is_sense(modality));
    let Some((most, count)) = senses.next() else {
        return [Modality::Code, Modality::Text].into_iter().find(|modality| has(modality.clone()));
    };
    if has(Modality::Text) {
        return Some(Modality::Multimodal);
    }
    let others: Vec<&Modality> =
        senses.filter(|(_, votes)| votes * 10 >= *count).map(|(modality, _)| modality).collect();
    let all = || others.iter().copied().chain([most]);
    Some(match others.is_empty() {
        true => most.clone(),
        // Frames are images.
        false if !all().any(|modality| *modality == Modality::Audio) => Modality::Video,
        false => Modality::Multimodal,
    })
}

/// The words of a name, in lower case: runs of letters, cut where a capital follows a small letter
/// or begins a new word ("UNet3DConditionModel": u, net, d, condition, model).
fn words(name: &str) -> impl Iterator<Item = String> {
    let chars: Vec<char> = name.chars().collect();
    let mut words = vec![String::new()];
    for (i, c) in chars.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| chars[i]);
        let after = chars.get(i + 1);
        let begins = c.is_uppercase()
            && (before.is_some_and(char::is_lowercase) || after.is_some_and(|c| c.is_lowercase()));
        if !c.is_alphabetic() || begins {
            words.push(String::new());
        }
        if c.is_alphabetic() {
            words.last_mut().expect("it begins with one").extend(c.to_lowercase());
        }
    }
    words.into_iter().filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(config: Value, names: &[&str]) -> (Modality, Rule) {
        let found = detect(&Map::new(), Some(&config), names.iter().copied());
        (found.modality, found.rule)
    }

    #[test]
    fn the_index_wins_over_config_and_names() {
        let config = json!({ "architectures": ["LlamaForCausalLM"] });
        for (said, expected) in [
            ("audio", Modality::Audio),
            ("Speech", Modality::Audio),
            ("vision-language", Modality::Multimodal),
            ("protein", Modality::Other("protein".to_owned())),
        ] {
            let metadata = Map::from_iter([("modality".to_owned(), said.into())]);
            let found = detect(&metadata, Some(&config), ["visual.patch_embed.weight"]);
            assert_eq!((found.modality, found.rule), (expected, Rule::IndexMetadata));
        }
        for nothing in [json!(""), json!(null), json!(3)] {
            let metadata = Map::from_iter([("modality".to_owned(), nothing)]);
            assert_eq!(detect(&metadata, Some(&config), []).modality, Modality::Text);
        }
    }

    #[test]
    fn config_json_tells() {
        let class = |name: &str| json!({ "_class_name": name });
        let model = |class: &str, model_type: &str| {
            let architectures = [class];
            json!({ "architectures": architectures, "model_type": model_type })
        };
        let cases = [
            (model("LlamaForCausalLM", "llama"), Modality::Text),
            (model("GPT2LMHeadModel", "gpt2"), Modality::Text),
            (model("T5ForConditionalGeneration", "t5"), Modality::Text),
            (model("BertForMaskedLM", "bert"), Modality::Text),
            (model("BertModel", "bert"), Modality::Embedding),
            (model("XLMRobertaModel", "xlm-roberta"), Modality::Embedding),
            (model("T5EncoderModel", "t5"), Modality::Embedding),
            (model("Starcoder2ForCausalLM", "starcoder2"), Modality::Code),
            (model("WhisperForConditionalGeneration", "whisper"), Modality::Audio),
            (model("Wav2Vec2ForCTC", "wav2vec2"), Modality::Audio),
            (model("NovelAudioModel", "novel"), Modality::Audio),
            (model("ViTForImageClassification", "vit"), Modality::Image),
            (model("CLIPVisionModel", "clip_vision_model"), Modality::Image),
            (model("VideoMAEForPreTraining", "videomae"), Modality::Video),
            (model("Qwen2VLForConditionalGeneration", "qwen2_vl"), Modality::Multimodal),
            (json!({ "model_type": "clip", "vision_config": {} }), Modality::Multimodal),
            (json!({ "audio_config": {}, "text_config": {} }), Modality::Multimodal),
            (class("UNet2DConditionModel"), Modality::Image),
            (class("AutoencoderKL"), Modality::Image),
            (class("FluxTransformer2DModel"), Modality::Image),
            (class("UNet3DConditionModel"), Modality::Video),
            (class("WanTransformer3DModel"), Modality::Video),
            (class("AutoencoderKLTemporalDecoder"), Modality::Video),
            (class("StableAudioDiTModel"), Modality::Audio),
            (class("AutoencoderOobleck"), Modality::Audio),
        ];
        for (config, expected) in cases {
            let (modality, rule) = of(config.clone(), &["novel.weight"]);
            assert_eq!(modality, expected, "{config}: {rule}");
            assert!(matches!(rule, Rule::Config { .. }), "{config}: {rule}");
        }
        let coder = |name: &str| {
            json!({ "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                    "_name_or_path": name })
        };
        for name in ["Qwen/Qwen2.5-Coder-7B", "CodeLlama-7b-hf", "x/starcoder"] {
            assert_eq!(of(coder(name), &[]).0, Modality::Code, "{name}");
        }
        for name in ["coder/Qwen2.5-7B", "a-decoder", "encoded", "/code/models/qwen2"] {
            assert_eq!(of(coder(name), &[]).0, Modality::Text, "{name}");
        }
    }

    #[test]
    fn names_vote_by_whole_words() {
        let cases: [(&[&str], Modality); 14] = [
            (&["camel.weight", "caramel_2.bias"], Modality::Unknown),
            (&["mel_2.weight"], Modality::Audio),
            (&["melProj.weight"], Modality::Audio),
            (&["decode.weight", "decoder.weight", "encoder.codebook"], Modality::Unknown),
            (&["code_head.weight"], Modality::Code),
            (&["code_head.weight", "embed_tokens.weight"], Modality::Code),
            (&["code_head.weight", "audio.conv.weight"], Modality::Audio),
            (&["model.embed_tokens.weight", "lm_head.weight"], Modality::Text),
            (&["film.weight", "context.weight", "divisional.weight"], Modality::Unknown),
            (&["visual.a", "visual.b", "embed_tokens.weight"], Modality::Multimodal),
            (&["vit.embeddings.patch_embeddings.weight", "vit.cls_token"], Modality::Image),
            (&["image.a", "video.a"], Modality::Video),
            (&["image.a", "audio.a"], Modality::Multimodal),
            (&[], Modality::Unknown),
        ];
        for (names, expected) in cases {
            let found = detect(&Map::new(), None, names.iter().copied());
            assert_eq!(found.modality, expected, "{names:?}: {}", found.rule);
        }
        let spectrograms: Vec<String> =
            (0..20).map(|i| format!("spectrogram.{i}.weight")).collect();
        let names = spectrograms.iter().map(String::as_str).chain(["patch_embed.weight"]);
        let found = detect(&Map::new(), None, names);
        assert_eq!(found.modality, Modality::Audio);
        assert_eq!(found.rule.to_string(), "names of tensors: 20 for audio, 1 for image");
    }

    #[test]
    fn a_config_that_does_not_tell_leaves_it_to_the_names() {
        for config in
            [json!({}), json!({ "architectures": [3], "model_type": null, "visual": null })]
        {
            let (modality, rule) = of(config, &["audio.weight"]);
            assert_eq!(modality, Modality::Audio);
            assert_eq!(rule, Rule::TensorNames { votes: vec![(Modality::Audio, 1)] });
        }
    }

    #[test]
    fn names_of_modalities_read_back() {
        use Modality::*;
        for modality in [Text, Code, Image, Video, Audio, Multimodal, Embedding, Unknown] {
            assert_eq!(Modality::parse(&modality.to_string()), modality);
        }
    }
}
