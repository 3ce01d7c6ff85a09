//! What forward does not keep for backward, which then computes it again.

use std::fmt;
use std::str::FromStr;

/// What is computed again in backward. The bits of losses and gradients are the same for all: what is computed again
/// comes from the same numbers through the same operations.
///
/// Nothing keeps the outputs of SwiGLU or of the experts: backward needs the first beside its derivative, where it
/// costs next to nothing, and does without the second (`stages::combine`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing else: all that backward reads is kept.
    None,
    /// The set of the V3 report (3.2.3): outputs of RMSNorm, MLA's up-projections from its latents, SwiGLU's output; and
    /// the experts' input rows where they are copies of rows that are there. Rows that came from other ranks are kept.
    #[default]
    Paper,
    /// Whole blocks, each from its input, with the experts that were chosen.
    All,
}

impl Recompute {
    /// All there are.
    pub const EACH: [Self; 3] = [Self::None, Self::Paper, Self::All];

    /// As settings have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Paper => "paper",
            Self::All => "all",
        }
    }

    /// Whether the outputs of norms outside the blocks are kept.
    pub(crate) fn keeps_norms(self) -> bool {
        self == Self::None
    }

    /// Whether stages keep all that they read; with `All`, it is their block that keeps nothing of theirs.
    pub(crate) fn stages_keep(self) -> bool {
        self != Self::Paper
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Recompute {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::EACH
            .into_iter()
            .find(|r| r.name() == s)
            .ok_or_else(|| format!("recompute \"{s}\": expected none, paper or all"))
    }
}
