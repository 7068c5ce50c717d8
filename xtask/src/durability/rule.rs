//! The rules that the checker holds a recording to.

use std::fmt;

/// What must be on the disk before what, and which syncs are too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rule {
    /// A file is synced after its last write and before it is renamed to a name that lasts.
    ContentBeforeRename,
    /// A name that lasts is created by a rename alone, and its file is not written afterwards.
    ReplacedByRename,
    /// A directory is synced after a name in it was created, and before the next act of the same thread that announces it: the rename of a
    /// record, a signal, a new process or program, a message to another thread or process, the exit.
    NameBeforeNextAct,
    /// The target of a link is on the disk before the link.
    TargetBeforeLink,
    /// Everything in a release's directory is synced before `.complete`.
    TreeBeforeComplete,
    /// A release is complete on the disk before the ledger names it.
    CompleteBeforeLedger,
    /// Of a release that is removed, the removal of `.complete` is on the disk before anything else is removed.
    CompleteRemovedFirst,
    /// The ledger or the desired state on the disk says why a sub-agent is stopped.
    LedgerBeforeStop,
    /// The ledger on the disk names the release that `current` is about to name.
    LedgerBeforeCurrent,
    /// The ledger on the disk has committed a release before its epoch counts; the record of the manager's upgrade, before its epoch, keys
    /// and release count.
    CommitBeforeEpochs,
    /// The record of the manager's upgrade is on the disk before `bin/aops` is switched, with the phase that fits.
    RecordBeforeSwitch,
    /// The backup is on the disk before `bin/aops` is switched or restored, and before the switch the links of every role but the manager.
    BackupBeforeSwitch,
    /// The desired state on the disk orders what is fetched, and no longer what is removed.
    DesiredBeforeAct,
    /// The intent of `control stop` is on the disk before a sub-agent is stopped.
    IntentBeforeStop,
    /// The record of an installation is its last: everything else that it changed is on the disk.
    InstallRecordLast,
    /// Each sync saves something on which something depends before it is saved again.
    UselessSync,
}

impl Rule {
    pub(super) const ALL: [Rule; 16] = [
        Rule::ContentBeforeRename,
        Rule::ReplacedByRename,
        Rule::NameBeforeNextAct,
        Rule::TargetBeforeLink,
        Rule::TreeBeforeComplete,
        Rule::CompleteBeforeLedger,
        Rule::CompleteRemovedFirst,
        Rule::LedgerBeforeStop,
        Rule::LedgerBeforeCurrent,
        Rule::CommitBeforeEpochs,
        Rule::RecordBeforeSwitch,
        Rule::BackupBeforeSwitch,
        Rule::DesiredBeforeAct,
        Rule::IntentBeforeStop,
        Rule::InstallRecordLast,
        Rule::UselessSync,
    ];
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::ContentBeforeRename => "a file is synced before its rename",
            Rule::ReplacedByRename => "a file that lasts is replaced by a rename",
            Rule::NameBeforeNextAct => "a directory is synced before what announces its new name",
            Rule::TargetBeforeLink => "a link's target is on the disk before the link",
            Rule::TreeBeforeComplete => "a release's tree is synced before .complete",
            Rule::CompleteBeforeLedger => "a release is complete before the ledger names it",
            Rule::CompleteRemovedFirst => "the removal of .complete is on the disk before the rest is removed",
            Rule::LedgerBeforeStop => "the ledger is on the disk before a sub-agent is stopped",
            Rule::LedgerBeforeCurrent => "the ledger is on the disk before `current` is switched",
            Rule::CommitBeforeEpochs => "the commit is on the disk before epochs, keys and manager record",
            Rule::RecordBeforeSwitch => "the upgrade's record is on the disk before bin/aops is switched",
            Rule::BackupBeforeSwitch => "backup and links are on the disk before bin/aops is switched",
            Rule::DesiredBeforeAct => "the desired state is on the disk before it is carried out",
            Rule::IntentBeforeStop => "the stop intent is on the disk before sub-agents are stopped",
            Rule::InstallRecordLast => "the record of an installation is on the disk last",
            Rule::UselessSync => "each sync is needed",
        })
    }
}
