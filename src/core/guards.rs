//! The safety rules of a sub-agent's change of release. The search in `core/agent/tests` disables one at a time to prove that each is needed.
//!
//! Outside of tests every rule holds, at no cost.

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
    /// Only the answer to the current staging counts.
    CurrentStagingOnly,
    /// A failed release is not tried again at once.
    HoldFailed,
    /// A release is not started unless the ledger on disk names it.
    RecordBeforeStop,
    DownBeforeSwitch,
    RecordBeforeSwitchBack,
    /// A requested start is under way before its release is replaced.
    StartBeforeRollback,
    HealthyBeforeCommit,
    UptimeBeforeCommit,
    FailureLimit,
    TimeLimit,
    StopPausesTime,
    /// An unsafe home is not the release's fault.
    ExcusedStartPausesTime,
    ExitCountsOnce,
    FailureIsRecorded,
    SkipOnRollBack,
    /// A failed release is not skipped if a different one is ordered.
    SkipOnlyOrdered,
    HoldForOperator,
    /// A different order ends skips and holds, even if the previous manager did not follow it yet.
    OrderEndsSkips,
    ResumeOrder,
    ActiveNeedsNoProbation,
    KeepBackup,
    /// A release that was not started yet is not on probation: failures of another release do not count for it.
    ResumeRollsBack,
    ResumeRollback,
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

    /// Runs `work` without a guard.
    pub fn without<T>(guard: Guard, work: impl FnOnce() -> T) -> T {
        OFF.set(Some(guard));
        let done = work();
        OFF.set(None);
        done
    }
}
