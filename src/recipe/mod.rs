//! Which module is quantized how, and why.

/// What the user asked for: flags, before any checkpoint is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The format's name, as `--format` takes it.
    pub format: String,
    /// Bits per weight; the format's default where `None`.
    pub bits: Option<u8>,
    /// Weights that share a scale; the format's default where `None`.
    pub group_size: Option<GroupSize>,
    /// No zero point.
    pub symmetric: bool,
    /// How scales are chosen.
    pub quality: Quality,
    /// Modules to keep: globs, or regexes after `re:`.
    pub skip: Vec<String>,
    /// The only modules to quantize: globs, or regexes after `re:`; empty for all.
    pub only: Vec<String>,
}

/// Weights of one output row that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupSize {
    /// So many consecutive input features.
    Group(u32),
    /// The whole row.
    Channel,
}

/// How scales are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Quality {
    /// The very bytes that the format's own tool writes.
    Reference,
    /// Each group's scale by error search, in the same layout.
    #[default]
    Search,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            format: "compressed-tensors".to_owned(),
            bits: None,
            group_size: None,
            symmetric: true,
            quality: Quality::default(),
            skip: Vec::new(),
            only: Vec::new(),
        }
    }
}
