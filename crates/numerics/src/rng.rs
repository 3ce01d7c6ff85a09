//! Randomness as a function: a number is f(seed, purpose, stream, index), so that no split of the work, no batch
//! and no thread count changes it. Philox4x32-10 (Salmon et al., SC 2011).

/// What a random number is for. Two purposes never share a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights; the stream is the tensor's name.
    Init = 1,
    /// Order of training sequences; the stream is the epoch.
    Shuffle = 2,
    /// Which documents are held out.
    Split = 3,
    /// Sampling of tokens; the stream is the request, the index the position.
    Sample = 4,
    /// The built-in corpus; the stream is the document.
    Corpus = 5,
    /// Inputs of tests and benches.
    Test = 6,
}

/// One stream of random numbers; random access by index, no state.
#[derive(Clone, Copy, Debug)]
pub struct Rng {
    key: [u32; 2],
    hi: [u32; 2],
}

impl Rng {
    /// The stream numbered `stream` of `purpose` under `seed`.
    pub fn new(seed: u64, purpose: Purpose, stream: u64) -> Self {
        // The key carries seed and purpose, the counter's high half the stream, its low half the index.
        let key = [seed as u32 ^ (purpose as u32).wrapping_mul(0x9E37_79B9), (seed >> 32) as u32 ^ purpose as u32];
        Self { key, hi: [stream as u32, (stream >> 32) as u32] }
    }

    /// The stream named `name` (FNV-1a of its bytes).
    pub fn named(seed: u64, purpose: Purpose, name: &str) -> Self {
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self::new(seed, purpose, hash)
    }

    /// 64 random bits at `index`.
    pub fn bits(&self, index: u64) -> u64 {
        let b = philox([index as u32, (index >> 32) as u32, self.hi[0], self.hi[1]], self.key);
        u64::from(b[0]) | u64::from(b[1]) << 32
    }

    /// Uniform in [0, 1) at `index`, 53 bits.
    pub fn uniform(&self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform integer in 0..n at `index` (n > 0); bias below 2^-32 for n < 2^32.
    pub fn below(&self, index: u64, n: u64) -> u64 {
        ((u128::from(self.bits(index)) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal at `index` (Box-Muller in f64, rounded once).
    pub fn normal(&self, index: u64) -> f32 {
        let b = philox([index as u32, (index >> 32) as u32, self.hi[0], self.hi[1]], self.key);
        // (0, 1]: the logarithm stays finite.
        let u = (f64::from(b[0]) + 1.0) * (1.0 / 4_294_967_296.0);
        let v = f64::from(b[1]) * (1.0 / 4_294_967_296.0);
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(c[0]) * 0xD251_1F53;
        let p1 = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn normal_has_its_moments() {
        let r = Rng::new(7, Purpose::Test, 0);
        let n = 100_000;
        let (mut s, mut s2) = (0.0f64, 0.0f64);
        for i in 0..n {
            let x = f64::from(r.normal(i));
            s += x;
            s2 += x * x;
        }
        assert!((s / n as f64).abs() < 0.02);
        assert!((s2 / n as f64 - 1.0).abs() < 0.02);
    }

    #[test]
    fn streams_and_purposes_differ() {
        let a = Rng::new(7, Purpose::Test, 0).bits(3);
        assert_ne!(a, Rng::new(7, Purpose::Test, 1).bits(3));
        assert_ne!(a, Rng::new(7, Purpose::Init, 0).bits(3));
        assert_ne!(a, Rng::new(8, Purpose::Test, 0).bits(3));
        assert_ne!(a, Rng::new(7, Purpose::Test, 0).bits(4));
    }
}
