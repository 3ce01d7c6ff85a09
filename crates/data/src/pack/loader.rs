//! Which tokens training sample number i consists of: a pure function of (stream, sequence length, seed, i).

use std::sync::{Arc, Mutex};

use hadal_numerics::{Purpose, Rng};

use super::TokenStream;
use crate::DataError;

/// Serves windows of a token stream by global sample number, each epoch in an order of its own. Shareable by threads;
/// the only state is a cache, so that resuming needs no more than the number of the next sample.
pub struct Loader {
    stream: TokenStream,
    seq_len: usize,
    seed: u64,
    windows: u64,
    /// The orders of the last two epochs asked for: a batch may reach over the end of an epoch.
    orders: Mutex<Vec<(u64, Arc<Vec<u32>>)>>,
}

impl Loader {
    /// Cuts `stream` into windows of `seq_len` inputs; what is left over at the end is not trained on.
    pub fn new(stream: TokenStream, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        assert!(seq_len > 0, "sequence length 0");
        let found = stream.tokens.len();
        if found < seq_len + 1 {
            return Err(DataError::TooShort { expected: seq_len + 1, found });
        }
        let windows = (found - 1) / seq_len;
        assert!(u32::try_from(windows).is_ok(), "{windows} windows, more than fit u32");
        Ok(Self { stream, seq_len, seed, windows: windows as u64, orders: Mutex::new(Vec::new()) })
    }

    /// The `seq_len + 1` tokens of sample `global_index`: inputs are all but the last, targets all but the first. Every
    /// window occurs once in each run of [`Loader::windows`] samples that starts at a multiple of it.
    pub fn sample(&self, global_index: u64) -> Vec<u32> {
        let (epoch, place) = (global_index / self.windows, global_index % self.windows);
        let window = self.order(epoch)[place as usize] as usize;
        let start = window * self.seq_len;
        self.stream.tokens[start..=start + self.seq_len].to_vec()
    }

    /// Samples in an epoch.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Inputs in a sample.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// The stream the samples come from.
    pub fn stream(&self) -> &TokenStream {
        &self.stream
    }

    fn order(&self, epoch: u64) -> Arc<Vec<u32>> {
        // A panic while the lock is held leaves at worst a missing cache entry, so a poisoned lock is still good.
        let mut orders = self.orders.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, order)) = orders.iter().find(|(e, _)| *e == epoch) {
            return Arc::clone(order);
        }
        let rng = Rng::new(self.seed, Purpose::Shuffle, epoch);
        let mut order: Vec<u32> = (0..self.windows as u32).collect();
        // Equal draws are all but impossible; the window number makes even them well-defined.
        order.sort_by_cached_key(|&w| (rng.bits(u64::from(w)), w));
        let order = Arc::new(order);
        if orders.len() == 2 {
            orders.remove(0);
        }
        orders.push((epoch, Arc::clone(&order)));
        order
    }
}
