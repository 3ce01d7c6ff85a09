//! Matrices in E4M3 with one scale for each block of rows and columns, as DeepSeek-V3 is published (V3 report 3.3): a
//! number is its code's value times the scale of its block, which files call `weight_scale_inv`. Blocks at the lower and
//! the right edge may be cut; the grid of scales is ceil(rows / height) by ceil(cols / width), row-major. The scale of an
//! element is that of (row / height, column / width), never found from the grid's size.

use crate::{e4m3, ue8m0};

/// Blocks of the published weights.
pub const BLOCK: [usize; 2] = [128, 128];

/// Which numbers scales may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleFormat {
    /// amax / 448 in f32.
    F32,
    /// Powers of two: 2^ceil(log2(amax / 448)).
    Ue8m0,
}

/// The scale of a block whose largest magnitude is `amax` (finite). A block of zeros has scale 1, so that no reader
/// divides by zero. Scales are never below 2^-126: magnitudes under 448 * 2^-126 keep fewer digits, and division stays
/// defined.
pub fn scale(amax: f32, format: ScaleFormat) -> f32 {
    debug_assert!(amax.is_finite(), "a block's largest magnitude is {amax}");
    if amax == 0.0 {
        return 1.0;
    }
    let scale = (amax / e4m3::MAX).max(f32::MIN_POSITIVE);
    match format {
        ScaleFormat::F32 => scale,
        ScaleFormat::Ue8m0 => ue8m0::ceil(scale),
    }
}

/// Quantises one row of blocks: `x` is at most `height` rows of `cols` numbers, all finite (the caller's to check; NaN
/// would stay NaN, an infinity would make its block NaN). Each number is divided by its block's scale in f32 and rounded
/// once. `codes` has the shape of `x`, `scales` one number for each `width` columns.
pub fn quantise(x: &[f32], cols: usize, width: usize, format: ScaleFormat, codes: &mut [u8], scales: &mut [f32]) {
    assert_eq!(x.len(), codes.len(), "a code for each number");
    assert_eq!((x.len() % cols, scales.len()), (0, cols.div_ceil(width)), "whole rows, a scale for each block");
    scales.fill(0.0);
    for row in x.chunks_exact(cols) {
        for (part, amax) in row.chunks(width).zip(scales.iter_mut()) {
            *amax = part.iter().fold(*amax, |a, x| a.max(x.abs()));
        }
    }
    scales.iter_mut().for_each(|s| *s = scale(*s, format));
    for (row, codes) in x.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)) {
        for ((part, codes), scale) in row.chunks(width).zip(codes.chunks_mut(width)).zip(&*scales) {
            codes.iter_mut().zip(part).for_each(|(c, x)| *c = e4m3::encode(x / scale));
        }
    }
}

/// Dequantises part of one row: the columns from `first` on. `scales` are those of this row's blocks, from that of column
/// `first` on. f32(code) * scale, rounded once.
pub fn dequantise(codes: &[u8], first: usize, width: usize, scales: &[f32], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "a number for each code");
    let (mut codes, mut out) = (codes, out);
    let mut take = width - first % width;
    let mut scales = scales.iter();
    while !codes.is_empty() {
        let n = take.min(codes.len());
        let scale = *scales.next().expect("a scale for each block");
        out[..n].iter_mut().zip(&codes[..n]).for_each(|(o, &c)| *o = e4m3::decode(c) * scale);
        (codes, out, take) = (&codes[n..], &mut out[n..], width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Purpose, Rng};

    fn numbers(n: usize) -> Vec<f32> {
        let rng = Rng::new(1, Purpose::Test, 0);
        (0..n as u64).map(|i| rng.normal(i) * 10f32.powf(rng.uniform(i + 1_000_000) as f32 * 6.0 - 4.0)).collect()
    }

    /// All of a matrix, strip by strip: codes and scales.
    fn whole(x: &[f32], cols: usize, block: [usize; 2], format: ScaleFormat) -> (Vec<u8>, Vec<f32>) {
        let across = cols.div_ceil(block[1]);
        let (mut codes, mut scales) = (vec![0; x.len()], Vec::new());
        for (x, codes) in x.chunks(block[0] * cols).zip(codes.chunks_mut(block[0] * cols)) {
            let mut row = vec![0.0; across];
            quantise(x, cols, block[1], format, codes, &mut row);
            scales.extend(row);
        }
        (codes, scales)
    }

    /// Ragged edges in both directions: every scale is its block's, every number within half a step of itself.
    #[test]
    fn ragged_matrices_round_to_nearest() {
        for (rows, cols, block) in [(576, 448, BLOCK), (128, 128, BLOCK), (130, 1, BLOCK), (5, 7, [2, 3])] {
            for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
                let x = numbers(rows * cols);
                let (codes, scales) = whole(&x, cols, block, format);
                let across = cols.div_ceil(block[1]);
                assert_eq!(scales.len(), rows.div_ceil(block[0]) * across);
                let mut amax = vec![0.0f32; scales.len()];
                let at = |i: usize| (i / cols) / block[0] * across + (i % cols) / block[1];
                (0..x.len()).for_each(|i| amax[at(i)] = amax[at(i)].max(x[i].abs()));
                for i in 0..x.len() {
                    let s = scales[at(i)];
                    match format {
                        ScaleFormat::F32 => assert_eq!(s, amax[at(i)] / 448.0),
                        // The least power of two that keeps the block within 448.
                        ScaleFormat::Ue8m0 => assert!(
                            crate::ue8m0::encode(s).is_some() && amax[at(i)] / s <= 448.0 && amax[at(i)] / s > 224.0
                        ),
                    }
                    let found = e4m3::decode(codes[i]) * s;
                    // Three bits of fraction, or the step of subnormal codes.
                    let limit = (x[i].abs() / 16.0).max(s * 2f32.powi(-10)) * 1.000_001;
                    assert!((found - x[i]).abs() <= limit, "{} became {found}", x[i]);
                }
            }
        }
    }

    /// Any part of a row gives the same numbers as the whole row.
    #[test]
    fn parts_of_rows_dequantise_alike() {
        let (cols, width) = (300, 128);
        let codes: Vec<u8> = (0..cols).map(|i| (i * 7 % 127) as u8).collect();
        let scales = [0.5, 3.0, 1e-3];
        let mut all = vec![0.0; cols];
        dequantise(&codes, 0, width, &scales, &mut all);
        (0..cols).for_each(|i| assert_eq!(all[i], e4m3::decode(codes[i]) * scales[i / width]));
        for (first, n) in [(0, 1), (127, 2), (128, 172), (5, 290), (299, 1), (200, 0)] {
            let mut part = vec![0.0; n];
            dequantise(&codes[first..first + n], first, width, &scales[first / width..], &mut part);
            assert_eq!(part, all[first..first + n], "{n} from {first}");
        }
    }

    #[test]
    fn zeros_and_tiny_blocks() {
        for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
            let (codes, scales) = whole(&[0.0, -0.0, 0.0], 3, BLOCK, format);
            assert_eq!((codes, scales), (vec![0, 0x80, 0], vec![1.0]));
            // The smallest numbers of f32, and its largest.
            let (codes, scales) = whole(&[1e-45, -3e-39, 1e-38], 3, BLOCK, format);
            assert_eq!(scales, [f32::MIN_POSITIVE]);
            assert_eq!(codes.iter().map(|&c| e4m3::decode(c)).collect::<Vec<_>>(), [0.0, -0.25, 0.875]);
            let (codes, scales) = whole(&[f32::MAX, -f32::MAX], 2, BLOCK, format);
            assert!(scales[0].is_finite() && e4m3::decode(codes[0]) == -e4m3::decode(codes[1]), "{scales:?}");
        }
    }
}
