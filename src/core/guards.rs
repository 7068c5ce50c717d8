//! The rules of a sub-agent's change of release that the search in `core/agent/tests` turns off one at a time, to see that each is needed.
//!
//! Outside of tests each of them holds, at no cost.

macro_rules! guards {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Guard {
            $($(#[$doc])* $name,)*
        }

        #[cfg(test)]
        impl Guard {
            pub const ALL: &[Guard] = &[$(Guard::$name,)*];
        }
    };
}

guards! {
    /// Of the answers to a staging, the one that is waited for counts.
    StagedIsWanted,
    /// What failed is not tried again at once.
    HoldFailed,
    /// A release that the ledger on disk does not name is not put into use.
    RecordBeforeStop,
    DownBeforeSwitch,
    RecordBeforeReturn,
    /// A start that was asked for is under way before its release makes way.
    StartBeforeReturn,
    WellBeforeCommit,
    LifeBeforeCommit,
    TriesBudget,
    TimeBudget,
    StopPauses,
    /// A home that cannot be relied on is not the release's fault.
    RefusedStartPauses,
    EndCountsOnce,
    FailureIsWritten,
    SkipOnRollBack,
    /// Where another is ordered, a release that fails is not skipped.
    SkipWhatIsOrdered,
    HoldForOperator,
    /// Another order ends skips and holds, also one that an earlier manager did not follow yet.
    OrderEndsSkips,
    ResumeOrder,
    ActiveNeedsNoProbation,
    KeepBackup,
    /// A release that was not started yet is not on probation for another's failures.
    ResumeRollsBack,
    ResumeReturns,
}

#[cfg(not(test))]
pub const fn holds(_guard: Guard) -> bool {
    true
}

#[cfg(test)]
pub use tests::{holds, without};

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::Guard;

    thread_local! {
        static OFF: Cell<Option<Guard>> = const { Cell::new(None) };
    }

    pub fn holds(guard: Guard) -> bool {
        OFF.get() != Some(guard)
    }

    /// Does something while a guard does not hold.
    pub fn without<T>(guard: Guard, work: impl FnOnce() -> T) -> T {
        OFF.set(Some(guard));
        let done = work();
        OFF.set(None);
        done
    }
}
