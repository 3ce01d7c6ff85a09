use std::collections::HashMap;
use std::path::Path;

use serde_json::json;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::*;

/// Texts and their pieces as the published tokenizer of DeepSeek-V3 cuts them (computed with the Python `tokenizers`
/// package and the published file).
#[rustfmt::skip]
const PIECES: &[(&str, &[&str])] = &[
    ("Hello world", &["Hello", " world"]),
    ("I'm sure they've said it's John's", &["I", "'m", " sure", " they", "'ve", " said", " it", "'s", " John", "'s"]),
    ("1234567 and 12 plus 3.14159", &["123", "456", "7", " and", " ", "12", " plus", " ", "3", ".", "141", "59"]),
    ("价格是12345元", &["价格是", "123", "45", "元"]),
    ("今天天气很好，我们去公园。", &["今天天气很好", "，", "我们去公园", "。"]),
    ("東京タワーとカメラ", &["東京タワーとカメラ"]),
    ("  two  spaces\tand tab ", &[" ", " two", " ", " spaces", "\tand", " tab", " "]),
    ("line one\nline two\r\n\r\n  indented", &["line", " one", "\n", "line", " two", "\r\n\r\n", " ", " indented"]),
    ("a\n\n\nb   \n  c", &["a", "\n\n\n", "b", "   \n", " ", " c"]),
    ("def f(x_1, y):\n    return x_1 + y*2\n", &["def", " f", "(x", "_", "1", ",", " y", "):\n", "   ", " return", " x", "_", "1", " +", " y", "*", "2", "\n"]),
    ("fn main() { println!(\"{}\", a[0]); }", &["fn", " main", "()", " {", " println", "!(\"{}\",", " a", "[", "0", "]);", " }"]),
    ("x=-1;y+=2", &["x", "=-", "1", ";y", "+=", "2"]),
    ("_private __init__ don't DON'T", &["_private", " __", "init", "__", " don", "'t", " DON", "'T"]),
    ("naïve café Ω≈ç résumé", &["naïve", " café", " Ω", "≈", "ç", " résumé"]),
    ("😀 ok👍🏽!", &["😀", " ok", "👍🏽!"]),
    ("你好world你好", &["你好", "world", "你好"]),
    ("   ", &["   "]),
    ("\n", &["\n"]),
    ("...wait—what?!\n\nNo.", &["...", "wait", "—", "what", "?!\n\n", "No", "."]),
    ("½ ² ٣٤٥٦ Ⅷ", &["½", " ", "²", " ", "٣٤٥", "٦", " ", "Ⅷ"]),
    ("한국어 텍스트", &["한국어", " 텍스트"]),
    ("a\u{a0}b\u{3000}c", &["a", "\u{a0}b", "\u{3000}c"]),
    ("e\u{301}te\u{301}", &["e\u{301}te\u{301}"]),
    ("<think>no</think>", &["<think", ">no", "</", "think", ">"]),
    ("100%$5,000.00 #1", &["100", "%$", "5", ",", "000", ".", "00", " #", "1"]),
    ("path/to/file.rs:42", &["path", "/to", "/file", ".rs", ":", "42"]),
    ("Привет, мир!", &["Привет", ",", " мир", "!"]),
    ("\t\tif a<b:\n\t\t\tpass", &["\t", "\tif", " a", "<b", ":\n", "\t\t", "\tpass"]),
    ("https://example.com/a?b=c&d=1", &["https", "://", "example", ".com", "/a", "?b", "=c", "&d", "=", "1"]),
    ("~/.bashrc && ls -la | wc", &["~/.", "bashrc", " &&", " ls", " -", "la", " |", " wc"]),
];

fn sample() -> Vec<String> {
    let lines = [
        "the singer is singing a song in the ring, bringing things along",
        "今天天气很好，我们去公园。今天我们在公园唱歌。",
        "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n",
        "12 + 34 = 46, 123 + 456 = 579; 1000000 is a million",
    ];
    (0..40).map(|i| format!("{} {i}", lines[i % 4])).collect()
}

fn trained() -> Tokenizer {
    Tokenizer::train(&sample(), 320).unwrap()
}

#[test]
fn pieces_are_those_of_the_published_tokenizer() {
    let tokenizer = trained();
    let splitter = tokenizer.inner.get_pre_tokenizer().unwrap();
    for (text, expected) in PIECES {
        let mut pieces = PreTokenizedString::from(*text);
        splitter.pre_tokenize(&mut pieces).unwrap();
        let found = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let found: Vec<&str> = found.into_iter().map(|(_, (a, b), _)| &text[a..b]).collect();
        assert_eq!(&found, expected, "{text:?}");
    }
}

#[test]
fn any_text_comes_back() {
    let tokenizer = trained();
    for (text, _) in PIECES {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text), false), *text);
    }
    assert!(tokenizer.encode("").is_empty());
    assert_eq!(tokenizer.decode(&[], true), "");
    // Ids beyond the vocabulary pad the embedding and stand for nothing.
    assert_eq!(tokenizer.decode(&[5000], false), "");
}

#[test]
fn vocabulary_has_the_asked_size_and_layout() {
    let tokenizer = trained();
    assert_eq!(tokenizer.vocab_size(), 320);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (Some(0), Some(1), Some(2)));
    let all: HashMap<u32, String> = tokenizer.inner.get_vocab(true).into_iter().map(|(t, id)| (id, t)).collect();
    assert_eq!(all.len(), 320);
    // The bytes follow the special tokens by the code point of the character that stands for them.
    assert_eq!((10..266).filter(|id| all[id].chars().count() == 1).count(), 256);
    assert!((11..266).all(|id| all[&(id - 1)] < all[&id]));
    for (id, token) in SPECIAL_TOKENS.iter().enumerate() {
        assert_eq!(all[&(id as u32)], token.content);
        assert_eq!(tokenizer.encode(&format!("a{}b", token.content))[1], id as u32);
    }
}

#[test]
fn byte_lengths_add_up_to_the_text() {
    let tokenizer = trained();
    let lengths = tokenizer.token_byte_lengths();
    assert_eq!(lengths[..3], [0, 0, 0]);
    for (text, _) in PIECES {
        let sum: u32 = tokenizer.encode(text).iter().map(|&id| lengths[id as usize]).sum();
        assert_eq!(sum as usize, text.len(), "{text:?}");
    }
    assert_eq!(lengths[tokenizer.eos().unwrap() as usize], 0);
}

#[test]
fn special_tokens_are_left_out_on_request() {
    let tokenizer = trained();
    let ids = tokenizer.encode("<｜begin▁of▁sentence｜>hi<think>x</think><｜end▁of▁sentence｜>");
    assert_eq!(tokenizer.decode(&ids, true), "hi<think>x</think>");
}

/// Merges found by hand: counts of "aab" x 3 and "ab" x 1 are ab 4, aa 3; after ab the words are a|ab and ab.
#[test]
fn merges_are_those_worked_by_hand() {
    let documents = ["aab\naab", "aab\nab"];
    let tokenizer = Tokenizer::train(&documents, 268).unwrap();
    let (a, b) = (tokenizer.inner.token_to_id("a").unwrap(), tokenizer.inner.token_to_id("b").unwrap());
    assert!(a < b && b < 266);
    assert_eq!(tokenizer.inner.token_to_id("ab"), Some(266));
    assert_eq!(tokenizer.inner.token_to_id("aab"), Some(267));
    assert_eq!(tokenizer.encode("aabb"), [267, b]);
}

#[test]
fn ties_go_to_the_lowest_ids() {
    let tokenizer = Tokenizer::train(&["xy\nzw\nab\nxy\nzw\nab"], 269).unwrap();
    assert_eq!(["ab", "xy", "zw"].map(|t| tokenizer.inner.token_to_id(t)), [Some(266), Some(267), Some(268)]);
}

/// The crate seeds its hash maps anew for every training; nothing of that may reach the file.
#[test]
fn training_gives_the_same_bytes_every_time_on_any_number_of_threads() {
    let documents = crate::corpus::builtin::documents(3, 60_000);
    let train = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| Tokenizer::train(&documents, 700)).unwrap().files()
    };
    let first = train(1);
    for _ in 0..6 {
        for threads in [1, 2, 3, 5] {
            assert!(train(threads) == first, "{threads} threads gave another file");
        }
    }
}

/// Words of few letters: one token is spelled by several merges and its pairs come and go, so that the trainer's queue
/// holds a pair more than once. This is where the order of a hash map would show if it did anywhere.
#[test]
fn training_on_repetitive_words_gives_the_same_bytes_every_time() {
    let word = |i: usize| -> String {
        (0..3 + i % 23).map(|j| char::from(b'a' + (i * i + j * j * (i % 7)).to_le_bytes()[0] % 3)).collect()
    };
    let documents: Vec<String> = (0..60).map(|i| format!("{} ", word(i)).repeat(1 + i % 9)).collect();
    let first = Tokenizer::train(&documents, 400).unwrap().files();
    for _ in 0..24 {
        assert!(Tokenizer::train(&documents, 400).unwrap().files() == first);
    }
}

/// Pairs inside a special token that a document spells out are not counted.
#[test]
fn special_tokens_in_the_corpus_are_no_text() {
    let documents = ["<think>", "<think>", "<think>ab", "ab</think>"];
    let tokenizer = Tokenizer::train(&documents, 267).unwrap();
    assert_eq!(tokenizer.inner.token_to_id("ab"), Some(266));
    assert_eq!(Tokenizer::train(&documents, 268).unwrap().vocab_size(), 267);
}

#[test]
fn saved_files_load_again_from_either_path() {
    let tokenizer = trained();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("made/here");
    tokenizer.save(&target).unwrap();
    for path in [target.clone(), target.join("tokenizer.json")] {
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!((loaded.bos(), loaded.eos(), loaded.pad()), (Some(0), Some(1), Some(2)));
        assert_eq!(loaded.token_byte_lengths(), tokenizer.token_byte_lengths());
        for (text, _) in PIECES {
            assert_eq!(loaded.encode(text), tokenizer.encode(text));
        }
    }
    std::fs::remove_file(target.join("tokenizer_config.json")).unwrap();
    assert_eq!(Tokenizer::load(&target).unwrap().eos(), None);
    let named = r#"{"eos_token": {"content": "<think>"}, "bos_token": null}"#;
    std::fs::write(target.join("tokenizer_config.json"), named).unwrap();
    let loaded = Tokenizer::load(&target).unwrap();
    assert_eq!((loaded.bos(), loaded.eos()), (None, Some(5)));
}

fn load_error(path: &Path) -> String {
    Tokenizer::load(path).err().expect("must not load").to_string()
}

#[test]
fn errors_name_the_path_and_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    assert!(load_error(dir.path()).contains("tokenizer.json: cannot be read"));
    let file = dir.path().join("tokenizer.json");
    std::fs::write(&file, "{}").unwrap();
    assert!(load_error(&file).contains("tokenizer.json: not a usable tokenizer"));
    std::fs::write(&file, layout::untrained().to_string(false).unwrap()).unwrap();
    assert!(load_error(&file).contains("expected all 256 bytes in the vocabulary, found 0"));
    trained().save(dir.path()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "nope"}"#).unwrap();
    assert!(load_error(dir.path()).contains("tokenizer_config.json: not a usable tokenizer: eos_token"));
    for (text, found) in [("[]", "a list"), ("null", "null"), ("\"eos_token\"", "a string"), ("3", "a number")] {
        std::fs::write(dir.path().join("tokenizer_config.json"), text).unwrap();
        let expected = format!("tokenizer_config.json: not a usable tokenizer: expected a JSON object, found {found}");
        assert!(load_error(dir.path()).contains(&expected));
    }
}

#[test]
fn impossible_sizes_are_errors() {
    let error = |documents: &[&str], size| Tokenizer::train(documents, size).err().unwrap().to_string();
    assert!(error(&["some text"], 100).contains("expected at least 266 ids"));
    assert!(error(&[], 300).contains("the corpus is empty"));
}

/// A text without pairs to merge still has its bytes and the special tokens.
#[test]
fn a_short_text_gives_as_many_ids_as_it_supports() {
    let size = |text: &str| Tokenizer::train(&[text], 1000).unwrap().vocab_size();
    assert_eq!(size("abc"), 266);
    // ab and abc; with the space before it, the second word is another one.
    let few = size("abc abc abc");
    assert!((267..272).contains(&few), "{few}");
}

#[test]
fn ids_that_no_model_has_are_refused() {
    let mut file: Value = serde_json::from_slice(&trained().files()[0].1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    for id in [1u32 << 24, u32::MAX] {
        file["model"]["vocab"]["zzzzzz"] = id.into();
        std::fs::write(&path, file.to_string()).unwrap();
        let error = load_error(&path);
        // Twice the 320 tokens and the new one, and 4096.
        assert!(error.ends_with(&format!("model.vocab.\"zzzzzz\": expected ids below 4738, found {id}")), "{error}");
    }
}

/// A change to the trained file, and the end of the message it must give.
#[test]
fn files_that_the_tokenizers_crate_would_trust_are_refused() {
    let file: Value = serde_json::from_slice(&trained().files()[0].1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let token = |key: &str, v: Value| {
        let mut token = file["added_tokens"][3].clone();
        token[key] = v;
        json!([token])
    };
    let split = |v: Value| json!({"type": "Sequence", "pretokenizers": [v, {"type": "ByteLevel"}]});
    let template =
        |single: Value| json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}});
    let a = json!({"Sequence": {"id": "A", "type_id": 0}});
    for (place, value, end) in [
        // Panicked: the buffer for a merged token was as long as the longest token there is.
        ("/model/merges", json!([["a", "\u{120}zq"]]), "themselves and together, found \"\u{120}zq\""),
        (
            "/model/merges",
            json!([["q", "q"]]),
            "model.merges[0]: expected tokens that the vocabulary has, themselves and together, found \"qq\"",
        ),
        ("/model/merges", json!(["q  q"]), "model.merges[0]: expected two tokens, found \"q  q\""),
        ("/model/merges", json!(7), "model.merges: expected a list, found 7"),
        // Panicked, or cut a character in half.
        ("/model/continuing_subword_prefix", json!("##"), "expected none in a byte-level model, found \"##\""),
        ("/model/end_of_word_suffix", json!("</w>"), "expected none in a byte-level model, found \"</w>\""),
        ("/model/dropout", json!(0.1), "model.dropout: expected null or 0, found 0.1"),
        ("/model/type", json!("Unigram"), "model.type: expected \"BPE\", found \"Unigram\""),
        ("/model/vocab/a", json!(3), "expected an id of its own, found 3, which another token has"),
        ("/model/vocab/a", json!(-1), "model.vocab.\"a\": expected an id, found -1"),
        ("/model/vocab", json!([]), "model.vocab: expected an object, found a list of 0"),
        // Panicked on text where two such tokens meet.
        (
            "/added_tokens",
            token("lstrip", json!(true)),
            "lstrip: expected false (the space beside a token is text), found true",
        ),
        (
            "/added_tokens",
            token("rstrip", json!(true)),
            "rstrip: expected false (the space beside a token is text), found true",
        ),
        ("/added_tokens", token("content", json!("")), "added_tokens[0].content: expected a token, found \"\""),
        (
            "/added_tokens",
            token("id", json!(u32::MAX)),
            "added_tokens[0].id: expected ids below 4738, found 4294967295",
        ),
        // Would have had another id than the file says.
        ("/added_tokens", token("id", json!(700)), "and the vocabulary, 3, found 700"),
        ("/added_tokens", token("content", json!("<new>")), "and the vocabulary, 320, found 3"),
        (
            "/normalizer",
            json!({"type": "Replace"}),
            "normalizer.type: expected one of NFC, NFD, NFKC, NFKD, Lowercase, found \"Replace\"",
        ),
        ("/pre_tokenizer", Value::Null, "pre_tokenizer: expected one \"ByteLevel\", in the last place, found null"),
        ("/pre_tokenizer", split(json!({"type": "WhitespaceSplit"})), "found \"WhitespaceSplit\""),
        (
            "/pre_tokenizer",
            split(json!({"type": "Digits", "behavior": "Removed"})),
            "MergedWithNext, Contiguous, found \"Removed\"",
        ),
        (
            "/pre_tokenizer",
            split(json!({"type": "Split", "pattern": {"Regex": "a".repeat(5000)}})),
            "expected at most 4096 bytes, found 5000",
        ),
        (
            "/post_processor",
            template(json!([a, a])),
            "post_processor.single: expected pieces with the sequence \"A\" once, found a list of 2",
        ),
        ("/post_processor", template(json!("$B")), "the sequence \"A\" once, found \"$B\""),
        ("/decoder", json!({"type": "Fuse"}), "decoder.type: expected \"ByteLevel\", found \"Fuse\""),
    ] {
        let mut broken = file.clone();
        match broken.pointer_mut(place) {
            Some(old) => *old = value,
            None => panic!("no {place} in the file"),
        }
        std::fs::write(&path, broken.to_string()).unwrap();
        let error = load_error(&path);
        assert!(error.ends_with(end), "{place}: {error}");
    }
}

/// What another program left set would cut every text to two tokens, or fill it up.
#[test]
fn truncation_and_padding_of_a_file_are_not_applied() {
    let tokenizer = trained();
    let mut file: Value = serde_json::from_slice(&tokenizer.files()[0].1).unwrap();
    file["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    file["padding"] = json!({"strategy": {"Fixed": 1 << 30}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>"});
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    let text = PIECES[0].0;
    assert_eq!(Tokenizer::load(dir.path()).unwrap().encode(text), tokenizer.encode(text));
}
