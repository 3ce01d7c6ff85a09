//! The parts of `tokenizer.json` that are DeepSeek-V3's, spelled as in its published file: special tokens,
//! pre-tokenizer, decoder.

use serde_json::{Value, json};

/// A token that is matched as a whole before the text is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its exact spelling.
    pub content: &'static str,
    /// Left out by `decode` on request; the published file flags only the three control tokens so.
    pub special: bool,
}

const fn control(content: &'static str) -> SpecialToken {
    SpecialToken { content, special: true }
}

const fn marker(content: &'static str) -> SpecialToken {
    SpecialToken { content, special: false }
}

/// The special tokens of a trained vocabulary; the index is the id.
pub const SPECIAL_TOKENS: [SpecialToken; 10] = [
    control("<｜begin▁of▁sentence｜>"),
    control("<｜end▁of▁sentence｜>"),
    control("<｜▁pad▁｜>"),
    marker("<｜User｜>"),
    marker("<｜Assistant｜>"),
    marker("<think>"),
    marker("</think>"),
    marker("<｜fim▁begin｜>"),
    marker("<｜fim▁hole｜>"),
    marker("<｜fim▁end｜>"),
];

/// Digits in groups of up to three from the left.
const DIGITS: &str = r"\p{N}{1,3}";
/// Runs of Chinese characters and kana.
const CJK: &str = "[一-龥\u{3040}-ゟ゠-ヿ]+";
/// Words with the punctuation or space before them, punctuation with the line breaks after it, white space.
const WORDS: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
    "| ?[\\p{P}\\p{S}]+[\r\n]*",
    r"|\s*[",
    "\r\n",
    r"]+|\s+(?!\S)|\s+"
);

fn pre_tokenizer() -> Value {
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [
        split(DIGITS),
        split(CJK),
        split(WORDS),
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]})
}

fn added_tokens() -> Value {
    let all = SPECIAL_TOKENS.iter().enumerate().map(|(id, t)| {
        json!({"id": id, "content": t.content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": !t.special, "special": t.special})
    });
    all.collect()
}

/// DeepSeek-V3's tokenizer with an empty vocabulary, into which a trained model goes. The special tokens have their
/// ids.
pub(super) fn untrained() -> tokenizers::Tokenizer {
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(),
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": pre_tokenizer(),
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    });
    serde_json::from_value(file).expect("the file is made here and has the crate's format")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pattern as the published file spells it.
    #[test]
    fn words_pattern_is_the_published_one() {
        let published = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
        assert_eq!(WORDS, published);
    }
}
