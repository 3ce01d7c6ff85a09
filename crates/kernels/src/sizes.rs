//! What an op was given, as numbers: an error that shows itself after the op has returned names the op with these. They
//! are taken at every call, so they are copied and not formatted.

use crate::{DType, View, ViewMut, Weight};
use std::fmt;

/// The size of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// Elements of a buffer.
    Elements(DType, usize),
    /// `[experts, rows, cols]`.
    Matrices(DType, [usize; 3]),
    /// A count, or a stride.
    Number(usize),
    /// An optional argument that is not there.
    Absent,
}

/// The expression that an argument was given by, and its size.
pub(crate) type Named = (&'static str, Size);

/// The sizes of an op's arguments: `sizes![a.x, a.x_stride, a.y]`.
macro_rules! sizes {
    ($($x:expr),* $(,)?) => { &[$((stringify!($x), $crate::sizes::Measured::size(&$x))),*] };
}
pub(crate) use sizes;

/// What has a size.
pub(crate) trait Measured {
    /// What an error says of it.
    fn size(&self) -> Size;
}

impl Measured for View<'_> {
    fn size(&self) -> Size {
        Size::Elements(self.dtype(), self.len())
    }
}

impl Measured for ViewMut<'_> {
    fn size(&self) -> Size {
        self.as_view().size()
    }
}

impl Measured for Weight<'_> {
    fn size(&self) -> Size {
        Size::Matrices(self.data.dtype(), [self.experts, self.rows, self.cols])
    }
}

impl Measured for usize {
    fn size(&self) -> Size {
        Size::Number(*self)
    }
}

impl Measured for bool {
    fn size(&self) -> Size {
        Size::Number((*self).into())
    }
}

impl<T> Measured for [T] {
    fn size(&self) -> Size {
        Size::Number(self.len())
    }
}

impl<T: Measured + ?Sized> Measured for &T {
    fn size(&self) -> Size {
        (**self).size()
    }
}

impl<T: Measured> Measured for Option<T> {
    fn size(&self) -> Size {
        self.as_ref().map_or(Size::Absent, T::size)
    }
}

/// Of two buffers of one length, the first.
impl<A: Measured, B> Measured for (A, B) {
    fn size(&self) -> Size {
        self.0.size()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |dtype: &DType| match dtype {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::I32 => "i32",
        };
        match self {
            Self::Elements(dtype, n) => write!(f, "{}[{n}]", name(dtype)),
            Self::Matrices(dtype, [1, rows, cols]) => write!(f, "{}[{rows}, {cols}]", name(dtype)),
            Self::Matrices(dtype, dims) => write!(f, "{}{dims:?}", name(dtype)),
            Self::Number(n) => write!(f, "{n}"),
            Self::Absent => write!(f, "none"),
        }
    }
}

/// "x bf16[512], heads 4": arguments by their names within the op's struct, those left out that are not there.
pub(crate) fn list(sizes: &[Named]) -> String {
    let named = |(name, size): &Named| {
        let name = name.split_once('.').map_or(*name, |(_, field)| field);
        format!("{name} {size}")
    };
    let there: Vec<String> = sizes.iter().filter(|(_, size)| *size != Size::Absent).map(named).collect();
    there.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buf;

    #[test]
    fn arguments_are_listed_by_name() {
        struct Args<'a> {
            x: View<'a>,
            y: ViewMut<'a>,
            bias: Option<View<'a>>,
            given: Option<View<'a>>,
            pair: Option<(View<'a>, ViewMut<'a>)>,
            heads: usize,
        }
        let (x, ids) = (Buf::host_zeros(DType::Bf16, 12), Buf::host_zeros(DType::I32, 5));
        let (mut y, mut z) = (Buf::host_zeros(DType::F32, 7), Buf::host_zeros(DType::F32, 5));
        let (w, table) = (Weight::stacked(x.view(), 2, 3, 2), Weight::new(x.view(), 4, 3));
        let pair = Some((ids.view(), z.view_mut()));
        let a = Args { x: x.view(), y: y.view_mut(), bias: None, given: Some(ids.view()), pair, heads: 4 };
        let rows = &[1.0f32; 6][..];
        assert_eq!(
            list(sizes![a.x, a.y, a.bias, a.given, a.pair, a.heads, w, table, rows]),
            "x bf16[12], y f32[7], given i32[5], pair i32[5], heads 4, w bf16[2, 3, 2], table bf16[4, 3], rows 6"
        );
        assert_eq!(list(sizes![]), "");
    }
}
