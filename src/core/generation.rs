//! How far ahead of the clocks a generation may be. A generation numbers a desired state and only grows, so accepting one far ahead would
//! block all later ones.
//!
//! A generation is `max(previous + 1, unix milliseconds)` by its gateway's clock, which the `Date` header of an answer shows. A generation
//! far ahead of that clock is therefore a mistake or an attack. Clocks can be wrong, too: a host may boot in 1970, and a gateway's clock
//! may have been set back. So the three limits differ, and a number that one party does not continue is given up by the next:
//!
//! ```text
//! MAX_AHEAD_ACCEPTED    a host accepts no generation further ahead of the later of both clocks, or of the generation that it holds
//! MAX_AHEAD_CONTINUED   a gateway counts on from no generation that a host reports further ahead, unless it issued that one itself
//! MAX_AHEAD_KEPT        a host that holds a generation further ahead of the gateway's clock accepts a lower one
//! ```
//!
//! A clock that shows a time before this code was written counts as not set. Without any set clock the only limit is [`GREATEST`].

const DAY_MILLIS: u64 = 86_400_000;

/// Every generation is below this: 2^53, up to which a JSON number is exact in every language that a gateway may be written in.
pub const GREATEST: u64 = 1 << 53;
const MAX_AHEAD_ACCEPTED: u64 = 7 * DAY_MILLIS;
#[cfg(feature = "gateway")]
const MAX_AHEAD_CONTINUED: u64 = 3 * DAY_MILLIS;
const MAX_AHEAD_KEPT: u64 = DAY_MILLIS;
/// 2025-01-01, unix milliseconds: a clock that shows an earlier time was never set.
const CLOCK_NEVER_SET_BEFORE: u64 = 1_735_689_600_000;

/// The clocks at the time of an answer, unix milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    pub host: u64,
    /// Absent: the answer had no `Date` header.
    pub gateway: Option<u64>,
}

impl Clocks {
    /// From the host's clock, and the seconds by which it is ahead of the gateway's.
    pub fn new(host: u64, ahead_seconds: Option<i64>) -> Clocks {
        let gateway =
            ahead_seconds.map(|ahead| host.saturating_add_signed(ahead.saturating_neg().saturating_mul(1_000)));
        Clocks { host, gateway }
    }

    fn gateway(self) -> Option<u64> {
        self.gateway.filter(|gateway| *gateway >= CLOCK_NEVER_SET_BEFORE)
    }

    fn host(self) -> Option<u64> {
        Some(self.host).filter(|host| *host >= CLOCK_NEVER_SET_BEFORE)
    }

    /// The greatest generation that is accepted if none is held.
    fn max_accepted(self) -> u64 {
        below_greatest(self.gateway().max(self.host()), MAX_AHEAD_ACCEPTED)
    }

    /// The greatest held generation that is never given up for a lower one.
    fn max_final(self) -> u64 {
        below_greatest(self.gateway().or(self.host()), MAX_AHEAD_KEPT)
    }
}

fn below_greatest(clock: Option<u64>, ahead: u64) -> u64 {
    clock.map_or(GREATEST - 1, |clock| clock.saturating_add(ahead).min(GREATEST - 1))
}

/// How a generation compares with the held one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationOrder {
    /// It is higher.
    After,
    /// It is lower, but the held one is further ahead than any clock explains.
    Back,
}

/// Evaluates the generation of a desired state whose content differs from the one `held` in its lineage, if there is one.
pub fn evaluate(held: Option<u64>, offered: u64, clocks: Clocks) -> Result<GenerationOrder, String> {
    let greatest =
        held.map_or(0, |held| held.saturating_add(MAX_AHEAD_ACCEPTED).min(GREATEST - 1)).max(clocks.max_accepted());
    match held {
        Some(held) if offered == held => {
            Err(format!("cannot accept generation {offered}: it was accepted before with different content"))
        }
        Some(held) if offered < held && (held <= clocks.max_final() || offered > clocks.max_final()) => {
            Err(format!("cannot accept generation {offered}: this host already holds generation {held}"))
        }
        Some(held) if offered < held => Ok(GenerationOrder::Back),
        _ if offered > greatest => Err(format!(
            "cannot accept generation {offered}: it is more than 7 days ahead of the clocks of this host and of the gateway; a \
             generation is the time in unix milliseconds, or the previous generation plus one"
        )),
        _ => Ok(GenerationOrder::After),
    }
}

/// The generation of the desired state that a gateway sends to a host.
///
/// It stays the same while the content does. New content gets a number greater than the `last` one issued, than the one that the host holds
/// (`held`, if it is of our lineage: our record may be older than the host's), and than any issued before the record was lost, since none
/// is ahead of the clock for long. A reported generation that is too far ahead is ignored: any client that uses the agent id can report it.
#[cfg(feature = "gateway")]
pub fn next(last: Option<u64>, same_content: bool, held: Option<u64>, now_millis: u64) -> u64 {
    let horizon = match now_millis >= CLOCK_NEVER_SET_BEFORE {
        true => below_greatest(Some(now_millis), MAX_AHEAD_CONTINUED),
        false => GREATEST - 1,
    };
    let ours = |number: u64| number < GREATEST - 1 && last.is_some_and(|last| number <= last);
    let held = held.filter(|held| *held < horizon || ours(*held));
    // A number issued before the clock was set back is continued only for the host that holds it.
    let last = last.filter(|last| *last < horizon || held == Some(*last));
    match last {
        Some(last) if same_content && held.is_none_or(|held| held <= last) => last,
        _ => {
            let after = |number: Option<u64>| number.map_or(0, |number| number.saturating_add(1));
            after(last).max(after(held)).max(now_millis)
        }
    }
}

#[cfg(test)]
mod tests {
    #[cfg(feature = "gateway")]
    use proptest::prelude::*;

    use super::*;

    /// In 2026.
    const NOW: u64 = 1_790_000_000_000;
    const YEAR: u64 = 365 * DAY_MILLIS;

    fn clocks(host: u64, gateway: Option<u64>) -> Clocks {
        Clocks { host, gateway }
    }

    #[test]
    fn the_gateways_clock_follows_from_the_offset() {
        assert_eq!(Clocks::new(NOW, None), clocks(NOW, None));
        assert_eq!(Clocks::new(NOW, Some(3_600)), clocks(NOW, Some(NOW - 3_600_000)));
        assert_eq!(Clocks::new(60_000, Some(-60)), clocks(60_000, Some(120_000)));
        assert_eq!(Clocks::new(NOW, Some(i64::MIN)).gateway, Some(NOW + i64::MAX as u64));
        assert_eq!(Clocks::new(NOW, Some(i64::MAX)).gateway, Some(0));
    }

    #[test]
    fn a_generation_far_ahead_is_rejected_whichever_clock_is_wrong() {
        let far = [u64::MAX, u64::MAX - 1, GREATEST, NOW + YEAR, NOW + 8 * DAY_MILLIS];
        for right in [clocks(NOW, Some(NOW)), clocks(NOW, None), clocks(0, Some(NOW)), clocks(NOW, Some(0))] {
            for offered in far {
                assert!(evaluate(None, offered, right).is_err(), "{offered} {right:?}");
                assert!(evaluate(Some(5), offered, right).is_err(), "{offered} {right:?}");
            }
            for offered in [1, NOW, NOW + DAY_MILLIS] {
                assert_eq!(evaluate(None, offered, right), Ok(GenerationOrder::After), "{offered} {right:?}");
            }
        }
        // Without a set clock, only the absolute limit holds.
        for unset in [clocks(0, None), clocks(1, Some(1))] {
            assert_eq!(evaluate(None, NOW, unset), Ok(GenerationOrder::After));
            assert!(evaluate(None, GREATEST, unset).is_err() && evaluate(Some(GREATEST - 1), GREATEST, unset).is_err());
        }
    }

    #[test]
    fn a_gateway_whose_clock_was_set_back_continues_its_numbers() {
        let ahead = NOW + YEAR;
        let now = clocks(NOW, Some(NOW));
        assert_eq!(evaluate(Some(ahead), ahead + 1, now), Ok(GenerationOrder::After));
        assert!(evaluate(Some(ahead), ahead + YEAR, now).is_err());
        assert!(evaluate(Some(u64::MAX - 1), u64::MAX, now).is_err());
    }

    #[test]
    fn a_lower_generation_is_accepted_only_if_no_clock_explains_the_held_one() {
        let now = clocks(NOW, Some(NOW));
        for (held, offered, clocks, expected) in [
            (u64::MAX, NOW, now, Some(GenerationOrder::Back)),
            (NOW + YEAR, 7, now, Some(GenerationOrder::Back)),
            (NOW + YEAR, NOW, clocks(NOW, None), Some(GenerationOrder::Back)),
            // The gateway's clock counts, not that of a host that is ahead.
            (NOW + 2 * DAY_MILLIS, NOW, clocks(NOW + YEAR, Some(NOW)), Some(GenerationOrder::Back)),
            (NOW, NOW - 1, now, None),
            (NOW + DAY_MILLIS, NOW, now, None),
            (NOW + YEAR, NOW + YEAR - 1, now, None),
            (NOW, NOW, now, None),
            (u64::MAX, u64::MAX, now, None),
            // The clock of a host that has just booted in 1970 says nothing about the held generation.
            (NOW, NOW - 1, clocks(0, None), None),
            (u64::MAX, NOW, clocks(0, None), Some(GenerationOrder::Back)),
        ] {
            assert_eq!(evaluate(Some(held), offered, clocks).ok(), expected, "{held} {offered} {clocks:?}");
        }
    }

    #[cfg(feature = "gateway")]
    #[test]
    fn an_issued_generation_is_accepted_whatever_was_reported_in_the_hosts_name() {
        let now = clocks(NOW, Some(NOW));
        for reported in [
            u64::MAX,
            u64::MAX - 1,
            GREATEST - 1,
            NOW + YEAR,
            NOW + MAX_AHEAD_CONTINUED,
            NOW + MAX_AHEAD_CONTINUED - 1,
            NOW,
            3,
        ] {
            for last in [None, Some(NOW - 5), Some(u64::MAX), Some(GREATEST - 1), Some(NOW + YEAR)] {
                let given = next(last, false, Some(reported), NOW);
                if given > NOW + MAX_AHEAD_ACCEPTED {
                    // The gateway issued that one itself, before its clock was set back.
                    assert!(given == reported + 1 && last >= Some(reported), "{reported} {last:?}: {given}");
                    continue;
                }
                // The host holds the last one issued, or an older one.
                for held in [None, Some(NOW - 9), last.filter(|last| *last < NOW + MAX_AHEAD_ACCEPTED)] {
                    let unchanged = held == Some(given);
                    assert!(unchanged || evaluate(held, given, now).is_ok(), "{reported} {last:?} {held:?}: {given}");
                }
                // The host holds the reported one.
                assert!(evaluate(Some(reported), given, now).is_ok(), "{reported} {last:?}: {given}");
            }
        }
    }

    #[cfg(feature = "gateway")]
    #[test]
    fn a_gateway_continues_the_numbers_issued_before_its_clock_was_set_back() {
        let ahead = NOW + YEAR;
        assert_eq!(next(Some(ahead), true, Some(ahead), NOW), ahead);
        assert_eq!(next(Some(ahead), false, Some(ahead), NOW), ahead + 1);
        // Another host with that id, or this one reinstalled.
        assert_eq!(next(Some(ahead), true, None, NOW), NOW);
        // Its own clock is not set yet.
        assert_eq!(next(None, false, Some(NOW), 1_000), NOW + 1);
    }

    #[cfg(feature = "gateway")]
    #[test]
    fn a_generation_stays_with_its_content_and_only_grows() {
        assert_eq!(next(None, false, None, 1_000), 1_000);
        assert_eq!(next(Some(5), true, Some(5), 1_000), 5);
        assert_eq!(next(Some(5), true, None, 1_000), 5);
        assert_eq!(next(Some(5), false, Some(5), 1_000), 1_000);
        // The clock is behind.
        assert_eq!(next(Some(2_000), false, Some(2_000), 1_000), 2_001);
        // The record was lost, or restored from an older copy: the host holds a higher number.
        assert_eq!(next(Some(5), true, Some(3_000), 1_000), 3_001);
        assert_eq!(next(None, false, Some(3_000), 1_000), 3_001);
        assert_eq!(next(None, false, Some(u64::MAX), 1_000), 1_000);
    }

    #[cfg(feature = "gateway")]
    proptest! {
        #[test]
        fn generations_never_go_back_and_never_repeat_for_other_content(
            contents in prop::collection::vec((0u8..3, 0u64..50, prop::option::of(0u64..100)), 1..40)
        ) {
            let mut given: Option<(u8, u64)> = None;
            for (content, now, held) in contents {
                let same = given.is_some_and(|(last, _)| last == content);
                let generation = next(given.map(|(_, generation)| generation), same, held, now);
                if let Some((last, before)) = given {
                    prop_assert!(generation >= before);
                    prop_assert!(last == content || generation > before);
                }
                prop_assert!(held.is_none_or(|held| generation >= held));
                given = Some((content, generation));
            }
        }
    }
}
