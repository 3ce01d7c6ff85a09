//! The store as its formula says.

/// `cache[slot]` = `[c_kv | k_pe]`, token by token.
pub fn store(c_kv: &[f64], k_pe: &[f64], stride: usize, latent: usize, rope: usize, slots: &[i32], cache: &mut [f64]) {
    for (n, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        for c in 0..latent {
            cache[slot as usize * (latent + rope) + c] = c_kv[n * latent + c];
        }
        for c in 0..rope {
            cache[slot as usize * (latent + rope) + latent + c] = k_pe[n * stride + c];
        }
    }
}
