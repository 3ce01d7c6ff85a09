//! Training of byte-level BPE by the `tokenizers` crate, on text cut the way DeepSeek-V3's tokenizer cuts it.
//!
//! The crate merges the most frequent pair of neighbours first, of equals the one with the lowest ids. The words reach
//! it as sums over all documents, so neither their order nor the number of threads shows in the result.

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, OffsetReferential, OffsetType, PreTokenizer, Trainer};

use super::{SPECIAL_TOKENS, layout};
use crate::DataError;

/// A pair must occur this often to be worth an id.
const MIN_COUNT: u64 = 2;

/// A tokenizer of at most `vocab_size` ids: fewer where no other pair occurs often enough.
pub(super) fn train<S: AsRef<str> + Sync>(
    documents: &[S],
    vocab_size: usize,
) -> Result<tokenizers::Tokenizer, DataError> {
    if documents.is_empty() {
        return Err(DataError::EmptyCorpus);
    }
    let alphabet = ByteLevel::alphabet();
    let least = SPECIAL_TOKENS.len() + alphabet.len();
    if vocab_size < least {
        return Err(DataError::VocabTooSmall { expected: least, found: vocab_size });
    }
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(MIN_COUNT)
        .special_tokens(SPECIAL_TOKENS.iter().map(|t| AddedToken::from(t.content, t.special)).collect())
        .initial_alphabet(alphabet.into_iter().collect())
        .show_progress(false)
        .build();
    let mut tokenizer = layout::untrained();
    trainer.feed(documents.iter(), |text| words(&tokenizer, text)).expect("splitting by a compiled regex cannot fail");
    let mut model = BPE::default();
    trainer.train(&mut model).expect("counting and merging pairs cannot fail");
    tokenizer.with_model(model);
    Ok(tokenizer)
}

/// The pieces of `text` in which pairs are counted. A special token spelled out in the text is no text; the crate's own
/// `Tokenizer::train` would count pairs inside it.
fn words(tokenizer: &tokenizers::Tokenizer, text: &str) -> tokenizers::Result<Vec<String>> {
    let mut pieces = tokenizer.get_added_vocabulary().extract_and_normalize(tokenizer.get_normalizer(), text);
    tokenizer.get_pre_tokenizer().expect("our layout has a pre-tokenizer").pre_tokenize(&mut pieces)?;
    let pieces = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
    Ok(pieces.into_iter().filter(|(_, _, special)| special.is_none()).map(|(word, ..)| word.to_owned()).collect())
}
