//! Attacks on a host: a program that an attacker makes it run can do anything. Each row is a test, on a host that works and must continue
//! to work.
//!
//! Each row asserts of a rejection: the log and the next heartbeat report it, the running sub-agent keeps its pid, and files change only
//! in `cache/` and `staging/`.
//!
//! ```text
//! attack                                                     test
//! a package that no trusted key signed                       packages::a_package_not_signed_by_a_trusted_key_is_rejected
//! a signature for another name, version, os, arch            packages::a_signature_for_another_name_version_os_or_arch_is_rejected
//! a replay of an older epoch, downloaded or stored           packages::a_replay_of_an_older_epoch_is_rejected,
//!                                                            ::a_stored_release_of_an_older_epoch_is_not_activated
//! a revoked key, downloaded or stored release                keys::keys_rotate_…, ::a_stored_release_is_not_activated_…
//! signature and comment swapped; a legacy signature          packages::swapped_signatures_…, ::a_legacy_signature_…
//! endless data; a wrong announced size                       packages::endless_downloads_and_answers_…, ::a_wrong_announced_size_is_rejected
//! a slow drip; a cut download resumed with other bytes       faulty_network::manipulated_downloads_are_rejected_…
//! a redirect to another host, or to plain http               packages::redirects_to_another_host_or_to_plain_http_are_rejected
//! a `tarball` host or redirect that requests the identity    packages::a_package_host_receives_no_identity
//! every archive attack (support/archives.rs)                 package::unpack::tests::attacks_are_refused_…; one through a gateway:
//!                                                            packages::a_signed_archive_with_paths_outside_its_tree_is_rejected
//! a manager with another key or an older epoch, at install   packages::an_installation_rejects_a_manager_…
//! a link instead of a directory of the home                  home::a_link_instead_of_a_home_directory_is_rejected
//! a key file writable by others                              home::a_key_file_writable_by_others_is_rejected
//! another user at the control socket                         home::requests_of_another_user_at_the_control_socket_are_rejected
//! a home, a sub-agent, bin/aops owned or writable by others  owners::*
//! a named pipe instead of a file                             owners::a_named_pipe_instead_of_a_file_blocks_nothing
//! `LD_PRELOAD` in a heartbeat's env                          answers::a_loader_variable_in_the_environment_is_rejected
//! an empty answer; one for another agent                     answers::an_empty_answer_removes_nothing, ::an_answer_for_another_agent_id_…
//! a fallback endpoint with a shorter list                    answers::the_list_of_a_fallback_endpoint_removes_no_omitted_sub_agent
//! the maximum generation                                     answers::the_maximum_generation_is_rejected
//! too long texts, too many orders, repeated rejections       answers::over_long_texts_…, ::too_many_orders_…, ::repeated_rejections_…
//! a secret, searched in status, logs and process titles      answers::a_secret_is_never_shown
//! ```

mod answers;
mod home;
mod owners;
mod packages;

use std::fs;
use std::io::Cursor;

use minisign::{KeyPair, SecretKey, SecretKeyBox};
use serde_json::{Value, json};

use crate::support::files::{Files, difference, snapshot};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::hostile::Hostile;
use crate::support::package::{Package, arch};
use crate::support::processes::is_alive;
use crate::support::wait::{try_for, wait_for};

/// What a running host writes, and where it may write unverified data.
const LIVING: &[&str] =
    &["/log", "/state/desired.json", "/state/events.json", "/state/history.json", "/cache", "/staging"];

/// The time in which a state file is written completely.
const SETTLES: std::time::Duration = std::time::Duration::from_secs(5);

/// A host whose gateway, once trustworthy, is under an attacker's control; the signing key is not.
struct Scene {
    gateway: Gateway,
    hostile: Hostile,
    host: TestHost,
    /// The pid of the running sub-agent.
    pid: u32,
    before: Files,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(|_| {})
    }

    /// With a change to the depot before the host joins.
    fn with(prepare: impl FnOnce(&Gateway)) -> Scene {
        let gateway = Gateway::stopped();
        gateway.publish_self("1.0.0");
        gateway.publish(&Package::sleeper("native", "1.0.0"));
        prepare(&gateway);
        let hostile = Hostile::in_place_of(&gateway);
        hostile.want(json!([native()]), true);
        let host = TestHost::new();
        let mut arguments = vec!["--agent-id", "5402", "--endpoint", hostile.url(), "--version", "1.0.0"];
        let trust = gateway.trust();
        arguments.extend(trust.iter().map(String::as_str));
        host.install(&arguments).expect_success();
        let pid = host.wait_for_agent("native");
        let mut scene = Scene { gateway, hostile, host, pid, before: Files::new() };
        scene.before = scene.files();
        scene
    }

    fn files(&self) -> Files {
        snapshot(&self.host.home(), LIVING)
    }

    /// Orders the victim too, with further fields.
    fn order_victim(&self, more: Value) {
        let mut victim = json!({"name": "victim", "version": "1.0.0"});
        for (key, value) in more.as_object().into_iter().flatten() {
            victim[key] = value.clone();
        }
        self.hostile.want(json!([native(), victim]), true);
    }

    /// Orders the victim no more, and waits until the manager has applied it: no attempt is pending afterwards.
    #[track_caller]
    fn forget_victim(&self) {
        let generation = self.hostile.want(json!([native()]), true);
        self.host.wait_for_status("the victim to be forgotten", SOON, |status| status["generation"] == generation);
    }

    /// An event of that kind and outcome was reported, and logged; both contain these words. Nothing else happened.
    #[track_caller]
    fn assert_refused(&self, kind: &str, words: &[&str]) {
        self.assert_reported(kind, "refused", words);
        self.assert_unharmed();
    }

    #[track_caller]
    fn assert_reported(&self, kind: &str, outcome: &str, words: &[&str]) {
        let says = |text: &str| words.iter().all(|word| text.contains(word));
        self.hostile.wait_for_event(&format!("an event {kind}, {outcome}, that says {words:?}"), |event| {
            event["kind"] == kind && event["outcome"] == outcome && says(event["message"].as_str().unwrap_or_default())
        });
        let log = fs::read_to_string(self.host.home().join("log/spm.log")).expect("the manager has a log");
        assert!(log.lines().any(says), "{words:?} in\n{log}");
    }

    #[track_caller]
    fn assert_unharmed(&self) {
        let mut changed = Vec::new();
        // A state file that is being written exists under another name for a moment.
        let same = try_for(SETTLES, || {
            changed = difference(&self.before, &self.files());
            changed.is_empty().then_some(())
        });
        assert!(same.is_some(), "{changed:#?}");
        self.assert_native_runs();
    }

    #[track_caller]
    fn assert_native_runs(&self) {
        assert!(is_alive(self.pid));
        assert_eq!(self.host.wait_for_agent("native"), self.pid);
    }

    /// The valid package of the victim, and its signature.
    fn victim(&self) -> (Vec<u8>, String) {
        self.gateway.publish(&Package::sleeper("victim", "1.0.0"));
        let path = self.gateway.path("depot").join(file());
        let signature = fs::read_to_string(format!("{}.minisig", path.display())).expect("it was published");
        (fs::read(path).expect("it was published"), signature)
    }

    /// Signs with the key that the host trusts.
    fn sign(&self, package: &[u8], comment: &str) -> String {
        let text = fs::read_to_string(self.gateway.path("keys/aops.key")).expect("it was created");
        let key = SecretKeyBox::from_string(&text).and_then(SecretKeyBox::into_unencrypted_secret_key);
        signed(&key.expect("it has no password"), package, comment)
    }
}

fn native() -> Value {
    json!({"name": "native", "version": "1.0.0"})
}

/// The name of the victim's package file.
fn file() -> String {
    format!("victim-1.0.0_linux_{}.tar.zst", arch())
}

fn comment(epoch: u64) -> String {
    format!("name=victim version=1.0.0 os=linux arch={} epoch={epoch}", arch())
}

fn signed(key: &SecretKey, package: &[u8], comment: &str) -> String {
    minisign::sign(None, key, Cursor::new(package), Some(comment), None).expect("the key signs").to_string()
}

/// A key that the host does not trust.
fn stranger() -> SecretKey {
    KeyPair::generate_unencrypted_keypair().expect("a key can be created").sk
}

/// Waits until the victim runs: earlier rejections were not permanent.
#[track_caller]
fn wait_for_victim(scene: &Scene) -> u32 {
    wait_for("the victim to run", SOON * 2, || {
        let status = scene.host.status();
        let victim = crate::support::host::agent(&status, "victim")?;
        crate::support::host::pid(&victim["pid"]).filter(|_| victim["state"] == "running")
    })
}
