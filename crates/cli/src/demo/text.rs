//! Small pictures and phrases in text.

/// An eighth to eight eighths of a column.
const EIGHTHS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A column `share` full: 0 and below an eighth is the lowest, 1 and above the whole.
pub fn column(share: f64) -> char {
    EIGHTHS[((share * 8.0).round() as usize).clamp(1, 8) - 1]
}

/// A column for each of `values`, `·` where there is none; the least is lowest, the largest highest.
pub fn spark(values: &[Option<f64>]) -> String {
    let known = values.iter().flatten();
    let (low, high) = known.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
    let range = (high - low).max(f64::MIN_POSITIVE);
    values.iter().map(|x| x.map_or('·', |x| column(0.125 + 0.875 * (x - low) / range))).collect()
}

/// A bar of `width` of which `share` is filled.
pub fn bar(share: f64, width: usize) -> String {
    let full = (share * width as f64).round() as usize;
    (0..width).map(|i| if i < full { '█' } else { '░' }).collect()
}

/// Seconds as people say them.
pub fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

/// `part` of `whole` in percent, 0 of nothing.
pub fn percent(part: usize, whole: usize) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// `text` with every line moved in.
pub fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

/// A path as a shell reads it back.
pub fn quoted(path: &std::path::Path) -> String {
    let path = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+:,@%".contains(c);
    if !path.is_empty() && path.chars().all(plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn pictures() {
        assert_eq!(spark(&[4.0, 3.0, 2.0, 1.0].map(Some)), "█▆▃▁");
        assert_eq!(spark(&[None, Some(8.0), Some(1.0), Some(4.5), None]), "·█▁▅·");
        assert_eq!(spark(&[Some(2.0); 3]), "▁▁▁");
        assert_eq!(spark(&[None; 2]), "··");
        assert_eq!([0.0, 0.5, 1.0, 7.0].map(column), ['▁', '▄', '█', '█']);
        assert_eq!(bar(0.5, 4), "██░░");
    }

    #[test]
    fn phrases() {
        assert_eq!([59.4, 60.0, 3599.0, 7261.0].map(duration), ["59 s", "1 min 00 s", "59 min 59 s", "2 h 01 min"]);
        assert_eq!(quoted(Path::new("runs/first-run")), "runs/first-run");
        assert_eq!(quoted(Path::new("my run's")), r"'my run'\''s'");
        assert_eq!(indented("a\nb"), "    a\n    b\n");
        assert_eq!((percent(1, 4), percent(0, 0)), (25.0, 0.0));
    }
}
