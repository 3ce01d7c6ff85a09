//! The printable alphabet of byte-level BPE files: every byte is written as one character. Bytes that print as
//! themselves in Latin-1 stay; the rest, in order, are written from U+0100 on (so a space is `Ġ`, a newline `Ċ`).

/// The character that stands for `byte`.
pub(super) fn char_of(byte: u8) -> char {
    if prints(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !prints(b)).count() as u32;
    char::from_u32(256 + rank).expect("at most 256 + 67, far below the surrogates")
}

fn prints(byte: u8) -> bool {
    matches!(byte, 33..=126 | 161..=172 | 174..=255)
}

/// All 256 characters by code point: the order of the ids in published vocabularies.
pub(super) fn in_id_order() -> Vec<char> {
    let mut all: Vec<char> = (0..=255).map(char_of).collect();
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_characters() {
        assert_eq!([b' ', b'\n', b'\t', b'a', 0, 255].map(char_of), ['Ġ', 'Ċ', 'ĉ', 'a', 'Ā', 'ÿ']);
        let all = in_id_order();
        assert_eq!((all.len(), all[0]), (256, '!'));
        assert!(all.windows(2).all(|w| w[0] < w[1]));
    }
}
