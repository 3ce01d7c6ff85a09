//! What "close" means, in one table. A comparison has three gates: the non-finite masks are equal; each element
//! satisfies |a - b| <= tol * (|b| + rms(b)), so that values near zero are judged by the scale of their tensor; and
//! the cosine, taken in f64, is high enough.

/// Limits of one comparison. Tolerance belongs to the number format and to how many roundings lie between.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Elementwise, relative to |b| + rms(b).
    pub element: f64,
    /// The cosine may fall short of 1 by this much.
    pub cosine: f64,
}

impl Tolerance {
    /// One op in f32 against its reference: a sum of up to some thousand f32 products in another order.
    pub const F32_OP: Self = Self { element: 2e-5, cosine: 1e-9 };
    /// A whole model in f32 against an independent implementation.
    pub const F32_MODEL: Self = Self { element: 1e-4, cosine: 1e-8 };
    /// An analytic gradient against a central difference of an f64 reference.
    pub const FINITE_DIFFERENCE: Self = Self { element: 1e-5, cosine: 1e-9 };
    /// One op with bf16 inputs and outputs: two roundings of 2^-9 each, and what they do to a sum.
    pub const BF16_OP: Self = Self { element: 1.6e-2, cosine: 1e-4 };
}

/// What a comparison measured.
#[derive(Clone, Copy, Debug)]
pub struct Closeness {
    /// Largest |a - b| / (|b| + rms(b)).
    pub worst: f64,
    /// Where it is.
    pub index: usize,
    /// Cosine of a and b; 1 where both are zero.
    pub cosine: f64,
}

/// Compares `found` with `expected`; the error says which gate failed, where, and by how much.
pub fn close(name: &str, found: &[f32], expected: &[f32], tol: Tolerance) -> Result<Closeness, String> {
    if found.len() != expected.len() {
        return Err(format!("{name}: {} elements, expected {}", found.len(), expected.len()));
    }
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let same = (a.is_nan() && b.is_nan()) || (a.is_infinite() && a == b) || (a.is_finite() && b.is_finite());
        if !same {
            return Err(format!("{name}[{i}]: {a}, expected {b}"));
        }
    }
    let finite = || expected.iter().filter(|x| x.is_finite());
    let count = finite().count().max(1) as f64;
    let rms = (finite().map(|&x| f64::from(x).powi(2)).sum::<f64>() / count).sqrt();
    let mut out = Closeness { worst: 0.0, index: 0, cosine: cosine(found, expected) };
    for (i, (&a, &b)) in found.iter().zip(expected).enumerate() {
        if !b.is_finite() || a == b {
            continue;
        }
        let e = (f64::from(a) - f64::from(b)).abs() / (f64::from(b).abs() + rms);
        if e > out.worst {
            (out.worst, out.index) = (e, i);
        }
    }
    if out.worst > tol.element {
        let i = out.index;
        return Err(format!(
            "{name}[{i}]: {} expected {} (error {:.3e} of |b| + rms, allowed {:.1e}; cosine {:.9})",
            found[i], expected[i], out.worst, tol.element, out.cosine
        ));
    }
    if out.cosine < 1.0 - tol.cosine {
        return Err(format!("{name}: cosine {:.12}, expected at least 1 - {:.1e}", out.cosine, tol.cosine));
    }
    Ok(out)
}

/// Cosine of two vectors in f64, over the elements finite in both; 1 if both are zero, 0 if one is.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let (mut ab, mut aa, mut bb) = (0.0f64, 0.0f64, 0.0f64);
    for (&x, &y) in a.iter().zip(b) {
        if x.is_finite() && y.is_finite() {
            ab += f64::from(x) * f64::from(y);
            aa += f64::from(x) * f64::from(x);
            bb += f64::from(y) * f64::from(y);
        }
    }
    if aa == 0.0 && bb == 0.0 {
        1.0
    } else if aa == 0.0 || bb == 0.0 {
        0.0
    } else {
        ab / (aa.sqrt() * bb.sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates() {
        let t = Tolerance::F32_OP;
        assert!(close("x", &[1.0, 0.0], &[1.0, 0.0], t).is_ok());
        assert!(close("x", &[1.0], &[1.0, 0.0], t).is_err());
        assert!(close("x", &[f32::NAN], &[1.0], t).is_err());
        assert!(close("x", &[f32::INFINITY], &[f32::INFINITY], t).is_ok());
        assert!(close("x", &[f32::NEG_INFINITY], &[f32::INFINITY], t).is_err());
        // Near zero the tensor's scale counts, far from zero the value's own.
        assert!(close("x", &[1e-6, 1.0], &[0.0, 1.0], t).is_ok());
        assert!(close("x", &[1e-3, 1.0], &[0.0, 1.0], t).is_err());
    }
}
