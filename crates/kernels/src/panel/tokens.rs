//! Rows that are read by index.

/// The tokens whose rows are some rows of a product, in an order of their own: row i is that of token
/// `slots[i] / top_k`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens<'a> {
    slots: &'a [i32],
    /// A little more than 2^63 / top_k, because divisions take long.
    share: u64,
}

impl<'a> Tokens<'a> {
    /// Of slots as `moe_permute` numbers them, none below zero.
    pub fn new(slots: &'a [i32], top_k: usize) -> Self {
        assert!(top_k > 0 && i32::try_from(top_k).is_ok(), "top {top_k} of the experts");
        Self { slots, share: (1 << 63) / top_k as u64 + 1 }
    }

    /// Those of no rows, of products that are only spoken of.
    pub fn none() -> Self {
        Self::new(&[], 1)
    }

    /// The token of row i.
    #[inline(always)]
    pub fn of(&self, i: usize) -> usize {
        // What the share has too much is at most 1, and a slot times it less than 2^32: of 2^63 that is less than 1 / top_k,
        // so that no quotient reaches the next number. A slot below zero is 2^31 or more here, whose token no buffer has.
        let slot = self.slots[i] as u32;
        ((u128::from(slot) * u128::from(self.share)) >> 63) as usize
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_divided_exactly() {
        for top_k in [1, 2, 3, 4, 6, 7, 8, 9, 1000, 65_535, i32::MAX as usize - 1, i32::MAX as usize] {
            let near = |n: usize| [n.saturating_sub(1), n, n + 1];
            let multiples = [0, 1, 2, 5, 1 << 20, i32::MAX as usize / top_k].map(|n| n * top_k);
            let slots = multiples.into_iter().flat_map(near).chain(near(i32::MAX as usize - 1));
            let slots: Vec<i32> = slots.filter_map(|slot| slot.try_into().ok()).collect();
            let tokens = Tokens::new(&slots, top_k);
            for (i, &slot) in slots.iter().enumerate() {
                assert_eq!(tokens.of(i), slot as usize / top_k, "{slot} of top {top_k}");
            }
        }
    }

    #[test]
    fn a_slot_below_zero_is_in_no_buffer() {
        assert_eq!([6, 1].map(|top_k| Tokens::new(&[-1], top_k).of(0)), [715_827_882, (1 << 32) - 1]);
    }
}
