//! When a role is renewed for the memory that it uses.

/// Above its limit at so many looks in a row, the other role is renewed.
const IN_A_ROW: u32 = 3;

/// Bytes of memory, of the role that looks and of the one that it watches: used, or allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes {
    pub own: u64,
    pub other: u64,
}

/// Which role uses more than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Excess {
    Own,
    /// At several looks in a row.
    Other,
}

/// The looks at the memory of both roles.
#[derive(Debug, Default)]
pub struct Memory {
    /// In a row, at which the other one used too much.
    large: u32,
}

impl Memory {
    /// Takes in what both roles use now. An excess of the other one begins the count anew: it is renewed, which takes it a moment.
    pub fn look(&mut self, used: Bytes, limit: Bytes) -> Option<Excess> {
        if used.own > limit.own {
            return Some(Excess::Own);
        }
        self.large = if used.other > limit.other { self.large + 1 } else { 0 };
        if self.large < IN_A_ROW {
            return None;
        }
        self.large = 0;
        Some(Excess::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Bytes = Bytes { own: 10, other: 100 };

    #[test]
    fn the_other_role_is_renewed_after_three_large_looks_in_a_row() {
        let mut memory = Memory::default();
        let mut look = |other| memory.look(Bytes { own: 10, other }, LIMIT);
        let looks = [101, 101, 100, 101, 101, 101, 101, 101, 101].map(&mut look);
        let renewed = Some(Excess::Other);
        assert_eq!(looks, [None, None, None, None, None, renewed, None, None, renewed]);
    }

    #[test]
    fn the_own_excess_counts_at_once() {
        let mut memory = Memory::default();
        assert_eq!(memory.look(Bytes { own: 11, other: 101 }, LIMIT), Some(Excess::Own));
        assert_eq!(memory.look(Bytes { own: 10, other: 101 }, LIMIT), None);
    }
}
