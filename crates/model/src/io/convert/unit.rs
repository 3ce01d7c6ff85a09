//! One published tensor on its way: read in pieces, changed, written to its place.

use super::ConvertObserver;
use super::out::Sparse;
use crate::io::IoError;
use crate::io::source::{Source, scales_name};
use hadal_kernels::{Elem, bf16};
use hadal_numerics::block::{BLOCK, ScaleFormat, quantise};
use hadal_numerics::ue8m0;
use safetensors::Dtype;

/// Elements held at once where rows do not matter.
const PIECE: usize = 1 << 18;
/// Columns of a strip of blocks that are quantised at once: whole rows of any published model.
const STRIP: usize = 1 << 15;

/// What happens to the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Bytes are copied.
    Copy,
    /// Into BF16 or F32, rounded once.
    Cast(Dtype),
    /// Into E4M3, with scales of their own.
    Quantise(ScaleFormat),
    /// Codes are copied, and scales written in another format that holds them exactly.
    Recode(ScaleFormat),
}

/// A tensor of the output.
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Tensor {
    pub(super) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * width(self.dtype)
    }
}

/// Bytes of an element.
pub(super) fn width(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// A published tensor, with the scales that it may get.
pub(super) struct Unit<'a> {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) source: Source<'a>,
    pub(super) way: Way,
}

/// Where in its file the bytes of a unit's weights and scales begin.
pub(super) type Places = [u64; 2];

impl Unit<'_> {
    /// Number of elements, scales left out.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of weights in the source.
    pub(super) fn bytes_read(&self) -> u64 {
        (self.len() * width(self.source.stored.dtype)) as u64
    }

    /// The weights, and the scales if it gets any.
    pub(super) fn tensors(&self) -> impl Iterator<Item = Tensor> {
        let (dtype, format) = match self.way {
            Way::Copy => (self.source.stored.dtype, None),
            Way::Cast(dtype) => (dtype, None),
            Way::Quantise(format) | Way::Recode(format) => (Dtype::F8_E4M3, Some(format)),
        };
        let scales = format.map(|format| Tensor {
            name: scales_name(&self.name),
            dtype: if format == ScaleFormat::F32 { Dtype::F32 } else { Dtype::F8_E8M0 },
            shape: vec![self.shape[0].div_ceil(BLOCK[0]), self.shape[1].div_ceil(BLOCK[1])],
        });
        [Tensor { name: self.name.clone(), dtype, shape: self.shape.clone() }].into_iter().chain(scales)
    }

    /// Reads, changes and writes all of it.
    pub(super) fn run(&self, out: &Sparse, places: Places, observer: &dyn ConvertObserver) -> Result<(), IoError> {
        if let Some(scales) = &self.source.scales {
            // All of them, also where the codes are a hole that nobody reads.
            let (at, last_row) = (self.source.first, self.len() - self.shape[1]);
            let (first, end) = (scales.first_of(at), scales.first_of(at + last_row) + scales.across());
            scales.each(first, end - first, |_, _| Ok(()))?;
        }
        match self.way {
            Way::Copy => self.pieces(out, places, observer, |at, n, bytes| {
                bytes.resize(n * width(self.source.stored.dtype), 0);
                self.source.read_bytes(at, bytes)
            }),
            Way::Cast(dtype) => self.cast(out, places, observer, dtype),
            Way::Quantise(format) => self.quantise(out, places, observer, format),
            Way::Recode(format) => self.recode(out, places, observer, format),
        }
    }

    /// Goes over the elements in order: `fill(at, n, bytes)` makes the bytes of `n` of them. Holes stay holes.
    fn pieces(
        &self,
        out: &Sparse,
        places: Places,
        observer: &dyn ConvertObserver,
        mut fill: impl FnMut(usize, usize, &mut Vec<u8>) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let (len, read) = (self.len(), width(self.source.stored.dtype));
        let mut bytes = Vec::new();
        let mut place = places[0];
        let written = self.tensors().next().map_or(0, |t| width(t.dtype));
        for at in (0..len).step_by(PIECE) {
            let n = PIECE.min(len - at);
            if !self.source.is_hole(at, n) {
                bytes.clear();
                fill(at, n, &mut bytes)?;
                out.write(&bytes, place)?;
            }
            place += (n * written) as u64;
            observer.advance((n * read) as u64);
        }
        Ok(())
    }

    fn cast(&self, out: &Sparse, places: Places, observer: &dyn ConvertObserver, dtype: Dtype) -> Result<(), IoError> {
        let mut numbers = vec![0.0; PIECE.min(self.len())];
        self.pieces(out, places, observer, |at, n, bytes| {
            let numbers = &mut numbers[..n];
            self.source.read(at, numbers)?;
            if dtype == Dtype::F32 {
                bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
                return Ok(());
            }
            for x in numbers {
                let rounded = <bf16 as Elem>::round(*x);
                if !rounded.f32().is_finite() {
                    let source = &self.source;
                    return Err(IoError::tensor(
                        &source.shard.path,
                        &source.name,
                        "numbers that BF16 holds",
                        format!("{x:e}"),
                    ));
                }
                bytes.extend(rounded.to_bits().to_le_bytes());
            }
            Ok(())
        })
    }

    fn quantise(
        &self,
        out: &Sparse,
        places: Places,
        observer: &dyn ConvertObserver,
        format: ScaleFormat,
    ) -> Result<(), IoError> {
        let [rows, cols] = [self.shape[0], self.shape[1]];
        let across = cols.div_ceil(BLOCK[1]);
        let (high, wide) = (BLOCK[0].min(rows), STRIP.min(cols));
        let (mut x, mut codes) = (vec![0.0; high * wide], vec![0; high * wide]);
        let mut scales = vec![0.0; wide.div_ceil(BLOCK[1])];
        for row in (0..rows).step_by(BLOCK[0]) {
            let high = high.min(rows - row);
            for col in (0..cols).step_by(STRIP) {
                let wide = wide.min(cols - col);
                let (x, codes) = (&mut x[..high * wide], &mut codes[..high * wide]);
                let scales = &mut scales[..wide.div_ceil(BLOCK[1])];
                // Whole rows lie together; parts of them are read and written one by one.
                let run = if wide == cols { high * wide } else { wide };
                let place = |i: usize| (row + i * run / wide) * cols + col;
                for (i, part) in x.chunks_mut(run).enumerate() {
                    if self.source.is_hole(place(i), run) {
                        part.fill(0.0)
                    } else {
                        self.source.read(place(i), part)?
                    }
                }
                quantise(x, wide, BLOCK[1], format, codes, scales);
                for (i, part) in codes.chunks(run).enumerate() {
                    out.write(part, places[0] + place(i) as u64)?;
                }
                self.write_scales(out, places, row / BLOCK[0] * across + col / BLOCK[1], scales, format)?;
                observer.advance((high * wide * width(self.source.stored.dtype)) as u64);
            }
        }
        Ok(())
    }

    fn recode(
        &self,
        out: &Sparse,
        places: Places,
        observer: &dyn ConvertObserver,
        format: ScaleFormat,
    ) -> Result<(), IoError> {
        let source = &self.source;
        self.pieces(out, places, observer, |at, n, bytes| {
            bytes.resize(n, 0);
            source.read_bytes(at, bytes)?;
            match bytes.iter().find(|&&code| code & 0x7f == 0x7f) {
                None => Ok(()),
                Some(_) => Err(IoError::tensor(&source.shard.path, &source.name, "finite numbers", "NaN")),
            }
        })?;
        let Some(scales) = &source.scales else { return Ok(()) };
        let count = self.shape[0].div_ceil(BLOCK[0]) * scales.across();
        scales.each(scales.first_of(source.first), count, |at, part| self.write_scales(out, places, at, part, format))
    }

    /// Writes scales to their places in the unit's grid, from the one numbered `first` on.
    fn write_scales(
        &self,
        out: &Sparse,
        places: Places,
        first: usize,
        scales: &[f32],
        format: ScaleFormat,
    ) -> Result<(), IoError> {
        let (bytes, width): (Vec<u8>, _) = match format {
            ScaleFormat::F32 => (scales.iter().flat_map(|s| s.to_le_bytes()).collect(), 4),
            // Those that are no power of two have been ruled out by whoever chose the format.
            ScaleFormat::Ue8m0 => (scales.iter().map(|&s| ue8m0::encode(s).unwrap_or(ue8m0::NAN)).collect(), 1),
        };
        out.write(&bytes, places[1] + (first * width) as u64)
    }
}
