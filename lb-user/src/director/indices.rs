//! Indices of the datapath's arrays: which are taken, and which is the next.

use std::collections::BTreeSet;

/// The taken and free indices below a capacity. The lowest free one goes first, which keeps the used part of the arrays dense.
#[derive(Clone, Debug)]
pub(super) struct Indices {
    capacity: u32,
    /// All indices from here on are free.
    fresh: u32,
    /// Free indices below `fresh`.
    returned: BTreeSet<u32>,
}

impl Indices {
    /// All are free.
    pub(super) fn new(capacity: u32) -> Self {
        Self { capacity, fresh: 0, returned: BTreeSet::new() }
    }

    /// The next free index; nothing if all are taken.
    pub(super) fn take(&mut self) -> Option<u32> {
        self.returned.pop_first().or_else(|| {
            let index = self.fresh;
            (index < self.capacity).then(|| self.fresh += 1).map(|()| index)
        })
    }

    /// Marks one certain index as taken. False if it is taken already, or beyond the capacity.
    pub(super) fn claim(&mut self, index: u32) -> bool {
        if index >= self.capacity {
            return false;
        }
        if index < self.fresh {
            return self.returned.remove(&index);
        }
        self.returned.extend(self.fresh..index);
        self.fresh = index + 1;
        true
    }

    /// Gives an index back.
    pub(super) fn give_back(&mut self, index: u32) {
        self.returned.insert(index);
    }

    /// How many there are in all.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_index_goes_first() {
        let mut indices = Indices::new(3);
        assert_eq!([indices.take(), indices.take(), indices.take(), indices.take()], [Some(0), Some(1), Some(2), None]);
        indices.give_back(2);
        indices.give_back(0);
        assert_eq!([indices.take(), indices.take(), indices.take()], [Some(0), Some(2), None]);
    }

    #[test]
    fn an_index_is_claimed_once() {
        let mut indices = Indices::new(4);
        assert!(indices.claim(2));
        assert!(!indices.claim(2));
        assert!(!indices.claim(4));
        assert!(indices.claim(0));
        assert_eq!([indices.take(), indices.take(), indices.take()], [Some(1), Some(3), None]);
    }
}
