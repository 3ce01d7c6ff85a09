//! Where a published tensor's numbers lie in the files, and how they become f32: as they are, or codes times the scales
//! that lie beside them, maybe in another file.

use super::IoError;
use super::checkpoint::Checkpoint;
use super::shard::{Shard, is_float, is_scale};
use hadal_numerics::block::{ScaleFormat, dequantise};
use hadal_numerics::ue8m0;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo as Stored;

/// Codes read at once.
const PIECE: usize = 1 << 16;

/// Part of a stored tensor that a published part is read from.
pub(super) struct Source<'a> {
    pub(super) shard: &'a Shard,
    pub(super) name: String,
    pub(super) stored: &'a Stored,
    /// First element within the stored tensor.
    pub(super) first: usize,
    /// Of FP8 weights.
    pub(super) scales: Option<Scales<'a>>,
}

/// The scales of a stored FP8 tensor: a grid for each of its matrices.
pub(super) struct Scales<'a> {
    shard: &'a Shard,
    name: String,
    stored: &'a Stored,
    pub(super) block: [usize; 2],
    /// Rows and columns of a matrix of weights.
    matrix: [usize; 2],
}

/// What the scales of the tensor `weight` are called, fused experts' (without `.weight`) too.
pub(super) fn scales_name(weight: &str) -> String {
    format!("{weight}_scale_inv")
}

impl<'a> Source<'a> {
    /// The part of the stored tensor `name` that begins at the element `first`. An error if its dtype cannot be read, or
    /// if it is FP8 without the scales that belong to it.
    pub(super) fn new(
        from: &'a Checkpoint,
        shard: &'a Shard,
        name: &str,
        stored: &'a Stored,
        first: usize,
    ) -> Result<Self, IoError> {
        let scales = match stored.dtype {
            Dtype::F8_E4M3 => Some(Scales::find(from, shard, name, stored)?),
            dtype if is_float(dtype) => None,
            dtype => {
                let expected = "BF16, F16, F32 or F8_E4M3 with scales";
                return Err(IoError::tensor(&shard.path, name, expected, format!("{dtype:?}")));
            }
        };
        Ok(Self { shard, name: name.to_string(), stored, first, scales })
    }

    /// Reads elements from `first` on, counted within this part, widened. One that is not finite is an error.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) -> Result<(), IoError> {
        let mut first = self.first + first;
        let Some(scales) = &self.scales else { return self.shard.read(&self.name, self.stored, first, out) };
        let mut codes = vec![0; PIECE.min(out.len())];
        let mut row = Row::default();
        for piece in out.chunks_mut(PIECE) {
            let codes = &mut codes[..piece.len()];
            self.shard.read_bytes(self.stored, first, codes)?;
            scales.apply(&mut row, first, codes, piece)?;
            self.shard.finite(&self.name, piece)?;
            first += piece.len();
        }
        Ok(())
    }

    /// True if `len` elements from `first` on are known to be zeros without reading them.
    pub(super) fn is_hole(&self, first: usize, len: usize) -> bool {
        self.shard.is_hole(self.stored, self.first + first, len)
    }

    /// Reads bytes of elements as they are stored.
    pub(super) fn read_bytes(&self, first: usize, out: &mut [u8]) -> Result<(), IoError> {
        self.shard.read_bytes(self.stored, self.first + first, out)
    }
}

/// Scales of one row of blocks, or of a part of it; kept while the next rows need the same.
#[derive(Default)]
struct Row {
    /// First scale within the grid.
    first: usize,
    values: Vec<f32>,
}

impl<'a> Scales<'a> {
    fn find(from: &'a Checkpoint, weights: &Shard, weight: &str, stored: &Stored) -> Result<Self, IoError> {
        let wrong = |expected: String, found: &str| Err(IoError::tensor(&weights.path, weight, expected, found));
        let Some(quantization) = from.quantization() else {
            return wrong("quantization_config in config.json beside an F8_E4M3 tensor".into(), "none");
        };
        let [stack @ .., rows, cols] = &stored.shape[..] else {
            return wrong("BF16, F16 or F32 (a vector has no blocks)".into(), "F8_E4M3");
        };
        let name = scales_name(weight);
        let Some((shard, scales)) = from.stored(&name) else {
            return wrong(format!("its scales, {name}, beside an F8_E4M3 tensor"), "none of that name");
        };
        let block = quantization.block;
        let shape = [stack, &[rows.div_ceil(block[0]), cols.div_ceil(block[1])]].concat();
        if scales.shape != shape {
            let expected = format!("shape {shape:?} (blocks of {} x {})", block[0], block[1]);
            return Err(IoError::tensor(&shard.path, &name, expected, format!("shape {:?}", scales.shape)));
        }
        if !is_scale(scales.dtype) {
            let found = format!("{:?}", scales.dtype);
            return Err(IoError::tensor(&shard.path, &name, "F32, BF16, F8_E8M0 or U8 scales", found));
        }
        Ok(Self { shard, name, stored: scales, block, matrix: [*rows, *cols] })
    }

    /// Columns of a matrix's grid.
    pub(super) fn across(&self) -> usize {
        self.matrix[1].div_ceil(self.block[1])
    }

    /// Index of the row of the grids that has the scales of the element `at` of the weights.
    fn row_of(&self, at: usize) -> usize {
        let [rows, cols] = self.matrix;
        let (matrix, row) = (at / cols / rows, at / cols % rows);
        matrix * rows.div_ceil(self.block[0]) + row / self.block[0]
    }

    /// True if the element `at` begins a row of blocks.
    pub(super) fn begins_blocks(&self, at: usize) -> bool {
        let [rows, cols] = self.matrix;
        at.is_multiple_of(cols) && (at / cols % rows).is_multiple_of(self.block[0])
    }

    /// First scale, within all grids, of the row of blocks that holds the element `at` of the weights.
    pub(super) fn first_of(&self, at: usize) -> usize {
        self.row_of(at) * self.across()
    }

    /// Reads scales from the one numbered `first` on. All must be finite and at least 0; 0 stands for a block of zeros.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) -> Result<(), IoError> {
        self.shard.read(&self.name, self.stored, first, out)?;
        match out.iter().find(|s| **s < 0.0) {
            None => Ok(()),
            Some(s) => Err(IoError::tensor(&self.shard.path, &self.name, "scales of at least 0", format!("{s}"))),
        }
    }

    /// Goes over `count` scales from the one numbered `first` on: `f(at, part)` gets them in order, `at` counted from 0.
    pub(super) fn each(
        &self,
        first: usize,
        count: usize,
        mut f: impl FnMut(usize, &[f32]) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let mut values = vec![0.0; PIECE.min(count)];
        for at in (0..count).step_by(PIECE) {
            let part = &mut values[..PIECE.min(count - at)];
            self.read(first + at, part)?;
            f(at, part)?;
        }
        Ok(())
    }

    /// True if `format` holds these scales exactly.
    pub(super) fn fit(&self, first: usize, count: usize, format: ScaleFormat) -> Result<bool, IoError> {
        let mut fit = true;
        if format == ScaleFormat::Ue8m0 {
            self.each(first, count, |_, part| {
                fit &= part.iter().all(|&s| ue8m0::encode(s).is_some());
                Ok(())
            })?;
        }
        Ok(fit)
    }

    /// Dequantises `codes`, the elements from `at` on.
    fn apply(&self, row: &mut Row, at: usize, codes: &[u8], out: &mut [f32]) -> Result<(), IoError> {
        let (cols, width) = (self.matrix[1], self.block[1]);
        let (mut at, mut codes, mut out) = (at, codes, out);
        while !codes.is_empty() {
            let col = at % cols;
            let n = (cols - col).min(codes.len());
            let first = self.first_of(at) + col / width;
            let count = (col + n).div_ceil(width) - col / width;
            if (row.first, row.values.len()) != (first, count) {
                row.first = first;
                row.values.resize(count, 0.0);
                self.read(first, &mut row.values)?;
            }
            dequantise(&codes[..n], col, width, &row.values, &mut out[..n]);
            (at, codes, out) = (at + n, &codes[n..], &mut out[n..]);
        }
        Ok(())
    }
}
