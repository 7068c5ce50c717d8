//! Each rule on a few calls: the right order passes, each violation is found.

use std::path::{Path, PathBuf};

use super::checker::{Report, check};
use super::event::{Event, Moment, Outcome, Recording, RunningAgent};
use super::layout::Layout;
use super::rule::Rule;
use crate::trace::{Call, Change};

/// Calls on the home `/h`, whose paths are below it.
struct Tape {
    recording: Recording,
    role: &'static str,
    thread: i32,
}

fn at(inside: &str) -> PathBuf {
    Path::new("/h").join(inside)
}

impl Tape {
    fn new() -> Tape {
        Tape { recording: Recording::default(), role: "spm", thread: 1 }
    }

    /// Who makes the calls from now on; each thread is a process of its own.
    fn by(mut self, role: &'static str, thread: i32) -> Tape {
        (self.role, self.thread) = (role, thread);
        self
    }

    fn begin(&mut self, change: Change, content: Option<&str>, agent: Option<RunningAgent>) -> usize {
        let call = Call { role: self.role.to_owned(), process: self.thread, thread: self.thread, name: "call", change };
        let index = self.recording.events.len();
        let content = content.map(str::to_owned);
        self.recording.events.push(Event { call, content, agent, outcome: Outcome::Succeeded });
        self.recording.moments.push(Moment::Begin(index));
        index
    }

    fn end(&mut self, index: usize) {
        self.recording.moments.push(Moment::End(index));
    }

    fn call(mut self, change: Change) -> Tape {
        let index = self.begin(change, None, None);
        self.end(index);
        self
    }

    fn create(self, path: &str) -> Tape {
        self.call(Change::Open { path: at(path), creates: true, truncates: false }).call(Change::Write(at(path)))
    }

    fn mkdir(self, path: &str) -> Tape {
        self.call(Change::Directory(at(path)))
    }

    fn sync(self, path: &str) -> Tape {
        self.call(Change::Sync(at(path).components().collect()))
    }

    fn sync_all(self) -> Tape {
        self.call(Change::SyncFileSystem(at("staging")))
    }

    fn rename(self, from: &str, to: &str) -> Tape {
        self.call(Change::Rename { from: at(from), to: at(to) })
    }

    fn remove(self, path: &str) -> Tape {
        self.call(Change::Remove(at(path)))
    }

    fn link(self, target: &str, to: &str) -> Tape {
        let temporary = at(to).with_file_name(".new-link");
        self.call(Change::SymbolicLink { target: target.into(), to: temporary.clone() })
            .call(Change::Rename { from: temporary, to: at(to) })
    }

    fn message(self) -> Tape {
        self.call(Change::Message("anon_inode:[eventfd]".to_owned()))
    }

    /// All but the sync of the directory.
    fn put(self, path: &str, content: &str) -> Tape {
        let temporary = at(path).with_file_name(".new-file");
        let mut tape = self
            .call(Change::Open { path: temporary.clone(), creates: true, truncates: false })
            .call(Change::Write(temporary.clone()))
            .call(Change::Sync(temporary.clone()));
        let index = tape.begin(Change::Rename { from: temporary, to: at(path) }, Some(content), None);
        tape.end(index);
        tape
    }

    /// A file replaced as it should be.
    fn save(self, path: &str, content: &str) -> Tape {
        let directory = Path::new(path).parent().and_then(Path::to_str).unwrap_or_default().to_owned();
        self.put(path, content).sync(&directory)
    }

    fn stop(mut self, name: &str, version: &str) -> Tape {
        let agent = RunningAgent { name: name.to_owned(), version: version.to_owned() };
        let index = self.begin(Change::Signal { process: 7, signal: 15 }, None, Some(agent));
        self.end(index);
        self
    }

    fn report(&self) -> Report {
        check(&Layout::new(Path::new("/h")), &self.recording)
    }
}

/// The rules that are broken.
fn broken(tape: Tape) -> Vec<Rule> {
    let mut rules: Vec<Rule> = tape.report().findings.iter().map(|finding| finding.rule).collect();
    rules.sort();
    rules.dedup();
    rules
}

/// No rule is broken, and this one was checked.
fn passes(rule: Rule, tape: Tape) {
    let report = tape.report();
    assert_eq!(report.findings, []);
    assert!(report.checked.contains_key(&rule), "{rule:?} was not checked");
}

fn ledger(active: &str, probation: &str) -> String {
    let release = |version: &str| format!(r#"{{"version":"{version}","epoch":{version}}}"#);
    let probation =
        if probation.is_empty() { String::new() } else { format!(r#","probation":{}"#, release(probation)) };
    format!(r#"{{"agents":{{"a":{{"active":{}{probation}}}}}}}"#, release(active))
}

fn upgrade(phase: &str) -> String {
    format!(r#"{{"trial":{{"phase":"{phase}"}}}}"#)
}

fn desired(version: &str) -> String {
    format!(r#"{{"agents":{{"a":{{"version":"{version}","run":"start"}}}}}}"#)
}

#[test]
fn a_file_is_synced_before_its_rename() {
    let unsynced = || Tape::new().create("etc/.new-1").rename("etc/.new-1", "etc/conf.toml").sync("etc");
    assert_eq!(broken(unsynced().message()), [Rule::ContentBeforeRename]);
    let written_after = Tape::new().create("etc/.new-1").sync("etc/.new-1").call(Change::Write(at("etc/.new-1")));
    assert!(broken(written_after.rename("etc/.new-1", "etc/a").sync("etc")).contains(&Rule::ContentBeforeRename));
    passes(Rule::ContentBeforeRename, Tape::new().save("etc/conf.toml", "").message());
    // What does not last needs no sync.
    assert_eq!(broken(Tape::new().create("run/.new-1").rename("run/.new-1", "run/spm.json").message()), []);
}

#[test]
fn a_write_during_a_sync_is_not_saved_by_it() {
    let mut tape = Tape::new().create("etc/.new-1");
    let sync = tape.begin(Change::Sync(at("etc/.new-1")), None, None);
    tape = tape.by("spm", 2).call(Change::Write(at("etc/.new-1")));
    tape.end(sync);
    assert!(broken(tape.rename("etc/.new-1", "etc/a").sync("etc").message()).contains(&Rule::ContentBeforeRename));
}

#[test]
fn a_file_that_lasts_is_not_written_in_place() {
    assert!(broken(Tape::new().create("etc/conf.toml")).contains(&Rule::ReplacedByRename));
    let again = Tape::new().save("etc/conf.toml", "").message().call(Change::Write(at("etc/conf.toml")));
    assert_eq!(broken(again), [Rule::ReplacedByRename]);
}

#[test]
fn a_directory_is_synced_before_what_announces_its_new_name() {
    let acts = [
        Change::Message("socket:[1]".to_owned()),
        Change::Start,
        Change::Execute(at("bin/aops")),
        Change::Signal { process: 7, signal: 9 },
        Change::Exit,
    ];
    for act in acts {
        assert_eq!(broken(Tape::new().put("etc/a", "").call(act.clone())), [Rule::NameBeforeNextAct], "{act:?}");
        passes(Rule::NameBeforeNextAct, Tape::new().save("etc/a", "").call(act));
    }
    assert_eq!(
        broken(Tape::new().put("etc/a", "").save("state/install.json", "{}")),
        [Rule::NameBeforeNextAct, Rule::InstallRecordLast]
    );
    // Another thread's message announces nothing of this one's.
    assert_eq!(broken(Tape::new().put("etc/a", "").by("spm", 2).message()), []);
    assert_eq!(broken(Tape::new().mkdir("agents/a").message()), [Rule::NameBeforeNextAct]);
}

#[test]
fn a_links_target_is_on_the_disk_before_the_link() {
    let with_backup = |synced: bool| {
        let tape = Tape::new().call(Change::Link { from: at("bin/aops"), to: at("bin/aops.prev") });
        let tape = if synced { tape.sync("bin") } else { tape };
        tape.link("aops.prev", "bin/aops-spa").sync("bin").message()
    };
    assert_eq!(broken(with_backup(false)), [Rule::TargetBeforeLink]);
    passes(Rule::TargetBeforeLink, with_backup(true));
}

/// A release that is staged and moved into its place, but not complete.
fn moved() -> Tape {
    Tape::new().mkdir("staging/t").mkdir("staging/t/bin").create("staging/t/bin/run")
}

fn complete(tape: Tape) -> Tape {
    tape.mkdir("agents/a")
        .sync("agents")
        .rename("staging/t", "agents/a/2")
        .sync("agents/a")
        .save("agents/a/2/.complete", "{}")
}

#[test]
fn a_tree_is_synced_before_it_is_complete() {
    passes(Rule::TreeBeforeComplete, complete(moved().sync_all()).message());
    // Each file and directory of its own will do too.
    passes(
        Rule::TreeBeforeComplete,
        complete(moved().sync("staging/t/bin/run").sync("staging/t/bin").sync("staging/t")),
    );
    assert_eq!(broken(complete(moved())), [Rule::TreeBeforeComplete]);
    assert_eq!(broken(complete(moved().sync_all().create("staging/t/late"))), [Rule::TreeBeforeComplete]);
    assert_eq!(broken(complete(moved().sync("staging/t/bin/run").sync("staging/t"))), [Rule::TreeBeforeComplete]);
}

#[test]
fn a_release_is_complete_before_the_ledger_names_it() {
    let named = |tape: Tape| tape.message().by("spm", 2).save("state/releases.json", &ledger("1", "2")).message();
    passes(Rule::CompleteBeforeLedger, named(complete(moved().sync_all())));
    let without_its_directory = moved()
        .sync_all()
        .mkdir("agents/a")
        .rename("staging/t", "agents/a/2")
        .sync("agents/a")
        .put("agents/a/2/.complete", "{}")
        .sync("agents/a/2");
    assert_eq!(broken(named(without_its_directory)), [Rule::NameBeforeNextAct, Rule::CompleteBeforeLedger]);
    let not_synced = Tape::new().put("agents/a/2/.complete", "{}");
    assert!(broken(named(not_synced)).contains(&Rule::CompleteBeforeLedger));
}

#[test]
fn the_removal_of_a_release_begins_with_its_mark() {
    let files = |tape: Tape| tape.remove("agents/a/1/bin/run").remove("agents/a/1/bin").remove("agents/a/1");
    let removed = || Tape::new().remove("agents/a/1/.complete");
    passes(Rule::CompleteRemovedFirst, files(removed().sync("agents/a/1")));
    assert_eq!(broken(files(removed())), [Rule::CompleteRemovedFirst]);
    let last = Tape::new().save("agents/a/1/.complete", "{}").message().remove("agents/a/1/bin/run");
    assert_eq!(broken(last), [Rule::CompleteRemovedFirst]);
    // What was never complete may go in any order.
    assert_eq!(broken(files(Tape::new())), []);
}

#[test]
fn the_ledger_is_on_the_disk_before_a_sub_agent_is_stopped() {
    let stop = |tape: Tape| tape.by("spm", 2).stop("a", "1");
    passes(Rule::LedgerBeforeStop, stop(Tape::new().save("state/releases.json", &ledger("1", "2"))));
    let rule = [Rule::LedgerBeforeStop];
    assert_eq!(broken(stop(Tape::new())), rule);
    assert_eq!(broken(stop(Tape::new().put("state/releases.json", &ledger("1", "2")))), rule);
    assert_eq!(broken(stop(Tape::new().save("state/releases.json", &ledger("1", "")))), rule);
    let no_way_back = r#"{"agents":{"a":{"probation":{"version":"2"}}}}"#;
    assert_eq!(broken(stop(Tape::new().save("state/releases.json", no_way_back))), rule);
    // A sub-agent that is not ordered any more.
    assert_eq!(broken(stop(Tape::new().save("state/desired.json", r#"{"agents":{}}"#))), []);
}

#[test]
fn the_ledger_is_on_the_disk_before_current_names_a_release() {
    let switch = |tape: Tape| tape.by("spm", 2).link("2", "agents/a/current").sync("agents/a").message();
    passes(Rule::LedgerBeforeCurrent, switch(Tape::new().save("state/releases.json", &ledger("1", "2"))));
    let rule = [Rule::LedgerBeforeCurrent];
    assert_eq!(broken(switch(Tape::new().put("state/releases.json", &ledger("1", "2")))), rule);
    assert_eq!(broken(switch(Tape::new().save("state/releases.json", &ledger("1", "")))), rule);
}

#[test]
fn a_commit_is_on_the_disk_before_its_epoch_counts() {
    let rule = [Rule::CommitBeforeEpochs];
    let raised = |tape: Tape| tape.by("spm", 2).save("state/epochs.json", r#"{"epochs":{"a":2}}"#).message();
    passes(Rule::CommitBeforeEpochs, raised(Tape::new().save("state/releases.json", &ledger("2", ""))));
    assert_eq!(broken(raised(Tape::new().put("state/releases.json", &ledger("2", "")))), rule);
    assert_eq!(broken(raised(Tape::new().save("state/releases.json", &ledger("1", "2")))), rule);

    let committed = |phase: &str| Tape::new().by("spa", 1).save("state/upgrade.json", &upgrade(phase));
    for file in ["state/keys.json", "state/manager.json"] {
        passes(Rule::CommitBeforeEpochs, committed("committing").save(file, "{}").message());
        assert_eq!(broken(committed("trial").save(file, "{}").message()), rule, "{file}");
    }
    let own = r#"{"epochs":{"aops-spm":2}}"#;
    assert_eq!(broken(committed("trial").save("state/epochs.json", own).message()), rule);
    passes(Rule::CommitBeforeEpochs, committed("rollingBack").save("state/manager.json", "{}").message());
}

/// A switch of `bin/aops` after the record of this phase; `skips` names what is left out.
fn switched(phase: &str, skips: &str) -> Vec<Rule> {
    let unless = |step: &str, tape: Tape, done: &dyn Fn(Tape) -> Tape| if skips == step { tape } else { done(tape) };
    let tape = Tape::new().put("state/upgrade.json", &upgrade(phase));
    let tape = unless("record", tape, &|tape| tape.sync("state"));
    let tape = tape.call(Change::Link { from: at("bin/aops"), to: at("bin/.aops.next") });
    let tape = tape.rename("bin/.aops.next", "bin/aops.prev");
    let tape = unless("backup", tape, &|tape| tape.sync("bin"));
    let tape = ["bin/aops-spa", "bin/aops-agent-service"].iter().fold(tape, |tape, link| tape.link("aops.prev", link));
    let tape = tape.link(if skips == "control" { "bin/aops" } else { "bin/aops.prev" }, "control");
    let tape = unless("links", tape, &|tape| tape.sync("bin").sync(""));
    let tape = tape.create("bin/.aops.next").sync("bin/.aops.next").rename("bin/.aops.next", "bin/aops");
    broken(tape.sync("bin").message())
}

#[test]
fn record_backup_and_links_are_on_the_disk_before_the_switch() {
    for phase in ["switching", "rollingBack"] {
        assert_eq!(switched(phase, ""), []);
    }
    assert_eq!(switched("trial", ""), [Rule::RecordBeforeSwitch]);
    assert!(switched("switching", "record").contains(&Rule::RecordBeforeSwitch));
    assert!(switched("switching", "backup").contains(&Rule::TargetBeforeLink));
    assert!(switched("switching", "links").contains(&Rule::BackupBeforeSwitch));
    assert_eq!(switched("switching", "control"), [Rule::BackupBeforeSwitch]);
}

#[test]
fn the_desired_state_is_on_the_disk_before_it_is_carried_out() {
    let fetch = |tape: Tape| tape.by("spm", 2).create("cache/a-2_linux_amd64.tar.zst.part");
    passes(Rule::DesiredBeforeAct, fetch(Tape::new().save("state/desired.json", &desired("2"))));
    assert_eq!(broken(fetch(Tape::new().put("state/desired.json", &desired("2")))), [Rule::DesiredBeforeAct]);
    assert_eq!(broken(fetch(Tape::new().save("state/desired.json", &desired("1")))), [Rule::DesiredBeforeAct]);
    let remove = |tape: Tape| tape.by("spm", 2).remove("agents/a/current");
    assert_eq!(broken(remove(Tape::new().save("state/desired.json", r#"{"agents":{}}"#))), []);
    assert_eq!(broken(remove(Tape::new().save("state/desired.json", &desired("1")))), [Rule::DesiredBeforeAct]);
}

#[test]
fn the_stop_intent_is_on_the_disk_before_a_sub_agent_is_stopped() {
    let stop = |tape: Tape| tape.by("spm", 2).stop("a", "1");
    passes(Rule::IntentBeforeStop, stop(Tape::new().save("state/stopped.json", "{}")));
    assert_eq!(broken(stop(Tape::new().put("state/stopped.json", "{}"))), [Rule::IntentBeforeStop]);
}

#[test]
fn the_record_of_an_installation_is_its_last() {
    let install = || Tape::new().by("install", 1).mkdir("etc").put("etc/agent-id", "1");
    passes(Rule::InstallRecordLast, install().sync("etc").sync("").save("state/install.json", "{}").message());
    assert!(broken(install().sync("").save("state/install.json", "{}")).contains(&Rule::InstallRecordLast));
    assert!(broken(install().sync("etc").save("state/install.json", "{}")).contains(&Rule::InstallRecordLast));
}

#[test]
fn a_sync_that_saves_nothing_new_is_useless() {
    let useless = [Rule::UselessSync];
    let saved = || Tape::new().save("state/events.json", "{}");
    assert_eq!(broken(saved().message()), []);
    assert_eq!(broken(saved().sync("state").message()), useless);
    assert_eq!(broken(saved().sync("bin").message()), useless);
    assert_eq!(broken(Tape::new().remove("state/old.json").sync("state").message()), useless);
    // Saved twice before anything depended on it.
    assert_eq!(broken(Tape::new().save("state/a", "").save("state/b", "").message()), useless);
    assert_eq!(broken(Tape::new().save("state/a", "").message().save("state/b", "").message()), []);
    // A tree's files one by one, and then the file system.
    assert_eq!(broken(complete(moved().sync("staging/t/bin/run").sync_all())), useless);
}

#[test]
fn a_sync_of_what_does_not_last_is_useless() {
    assert_eq!(broken(Tape::new().save("run/spm.json", "{}").message()), [Rule::UselessSync]);
    // Removed without having been announced.
    assert_eq!(broken(moved().sync_all().remove("staging/t/bin/run").message()), [Rule::UselessSync]);
    assert_eq!(broken(Tape::new().create("etc/.new-1").sync("etc/.new-1").remove("etc/.new-1")), [Rule::UselessSync]);
}

#[test]
fn a_thread_does_not_know_what_another_has_saved() {
    let mut tape = Tape::new().put("state/a", "");
    let own = tape.begin(Change::Sync(at("state")), None, None);
    tape = tape.by("spm", 2).save("state/b", "").message().by("spm", 1);
    tape.end(own);
    assert_eq!(broken(tape.message()), []);
    // After a wait a thread does something else.
    let again = Tape::new().save("state/a", "").call(Change::Wait).save("state/a", "").message();
    assert_eq!(broken(again), []);
}

#[test]
fn a_process_that_takes_the_lock_of_upgrades_syncs_what_it_finds() {
    let locked = || Tape::new().save("bin/x", "").message().call(Change::Lock(at("run/upgrade.lock"))).sync("bin");
    assert_eq!(broken(locked()), []);
    assert_eq!(broken(locked().sync("bin")), [Rule::UselessSync]);
}

#[test]
fn a_rename_of_one_file_to_its_other_name_changes_nothing() {
    let tape = Tape::new()
        .call(Change::Link { from: at("bin/aops"), to: at("bin/aops.prev") })
        .sync("bin")
        .link("aops.prev", "bin/aops-spa")
        .sync("bin")
        .rename("bin/aops", "bin/aops.prev");
    assert_eq!(broken(tape.message()), []);
}
