//! Whoever can make a host run something owns it: one row an attack, each a test, on a host that works and goes on working.
//!
//! Each row asserts the same four things of what was refused: the log says it, the next heartbeat says it, the sub-agent that ran before has
//! its pid, and nothing was written but in `cache/` and `staging/`.
//!
//! ```text
//! attack                                                     row
//! a package by a gateway without the key                     packages::a_package_by_a_gateway_without_the_key
//! the right signature on the wrong name, version, os, arch   packages::the_right_signature_on_the_wrong_name_version_os_or_arch
//! a replay of an older epoch, fetched or kept on the disk    packages::a_replay_of_an_older_epoch, ::an_older_epoch_that_still_lies_on_the_disk
//! a revoked key, fetched or kept on the disk                 keys::keys_rotate_…, ::a_release_on_the_disk_…
//! signature and comment swapped; a legacy signature          packages::a_signature_and_a_comment_that_were_swapped, ::a_signature_of_the_legacy_kind
//! endless data; a relay that lies about the size             packages::endless_data, ::a_relay_that_lies_about_the_size
//! a slow drip; truncated, and gone on with other bytes       faulty_network::what_a_network_puts_in_the_place_of_a_package_…
//! a redirect to another host, or to plain http               packages::a_redirect_to_another_host_or_to_plain_http
//! who asks, wanted by another `tarball` host or a redirect   packages::another_host_of_packages_that_asks_who_we_are
//! every attack by an archive (support/archives.rs)           package::unpack::tests::attacks_are_refused_…; one through a gateway:
//!                                                            packages::a_signed_archive_that_reaches_outside
//! a manager by another key, or of an older epoch, to install packages::a_manager_by_another_key_or_of_an_older_epoch_…
//! a link in the place of a directory of the home             home::a_link_in_the_place_of_a_directory_of_the_home
//! a key file that others can write                           home::a_key_file_that_others_can_write
//! another user at the control socket                         home::a_control_socket_reached_by_another_user
//! a home, a sub-agent, bin/aops that others own or can write owners::*
//! a pipe in the place of a file                              owners::a_pipe_where_a_file_is_read_holds_nobody_up
//! `LD_PRELOAD` in a heartbeat's env                          words::an_environment_that_chooses_what_a_program_loads
//! an answer that is empty; one for another agent             words::an_answer_that_would_uninstall_…, ::an_answer_for_another_agent
//! a stand-in that knows less than the first endpoint         words::the_list_of_a_stand_in_removes_nothing_by_…
//! a generation after which none can come                     words::a_generation_that_would_be_the_last
//! texts, orders, refusals without end                        words::words_without_end, ::orders_without_end, ::refusals_without_end
//! a secret, looked for in status, logs and process titles    words::a_secret_is_shown_nowhere
//! ```

mod home;
mod owners;
mod packages;
mod words;

use std::fs;
use std::io::Cursor;

use minisign::{KeyPair, SecretKey, SecretKeyBox};
use serde_json::{Value, json};

use crate::support::files::{Files, difference, snapshot};
use crate::support::gateway::Gateway;
use crate::support::host::{SOON, TestHost};
use crate::support::hostile::Hostile;
use crate::support::package::Package;
use crate::support::processes::is_alive;
use crate::support::wait::{try_for, wait_for};

/// What a host writes while it works, and where it may write what is not verified yet.
const LIVING: &[&str] =
    &["/log", "/state/desired.json", "/state/events.json", "/state/history.json", "/cache", "/staging"];

/// For the writing of a state file.
const SETTLES: std::time::Duration = std::time::Duration::from_secs(5);

/// A host whose gateway, which it had every reason to trust, has fallen into the wrong hands; but not the key.
struct Scene {
    gateway: Gateway,
    hostile: Hostile,
    host: TestHost,
    /// Of the sub-agent that runs.
    pid: u32,
    before: Files,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(|_| {})
    }

    /// With something done to the depot before the host joins.
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

    /// Wants the victim too, with further fields.
    fn want_victim(&self, more: Value) {
        let mut victim = json!({"name": "victim", "version": "1.0.0"});
        for (key, value) in more.as_object().into_iter().flatten() {
            victim[key] = value.clone();
        }
        self.hostile.want(json!([native(), victim]), true);
    }

    /// Wants the victim no more, and waits until the manager knows: what is mended after that finds nobody who tries again.
    #[track_caller]
    fn forget_victim(&self) {
        let generation = self.hostile.want(json!([native()]), true);
        self.host.wait_for_status("the victim to be forgotten", SOON, |status| status["generation"] == generation);
    }

    /// An event of that kind and outcome came up, and the log said the same; both with these words. Nothing else happened.
    #[track_caller]
    fn assert_refused(&self, kind: &str, words: &[&str]) {
        self.assert_told(kind, "refused", words);
        self.assert_unharmed();
    }

    #[track_caller]
    fn assert_told(&self, kind: &str, outcome: &str, words: &[&str]) {
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
        // A state file that is just being written is there under another name for a moment.
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

    /// The victim as it should be: its package, and its signature.
    fn victim(&self) -> (Vec<u8>, String) {
        self.gateway.publish(&Package::sleeper("victim", "1.0.0"));
        let path = self.gateway.path("depot").join(file());
        let signature = fs::read_to_string(format!("{}.minisig", path.display())).expect("it was published");
        (fs::read(path).expect("it was published"), signature)
    }

    /// By the key that the host trusts.
    fn sign(&self, package: &[u8], comment: &str) -> String {
        let text = fs::read_to_string(self.gateway.path("keys/aops.key")).expect("it was made");
        let key = SecretKeyBox::from_string(&text).and_then(SecretKeyBox::into_unencrypted_secret_key);
        signed(&key.expect("it has no password"), package, comment)
    }
}

fn native() -> Value {
    json!({"name": "native", "version": "1.0.0"})
}

fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Of the victim's package.
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
    KeyPair::generate_unencrypted_keypair().expect("a key can be made").sk
}

/// Waits until the victim runs: what was refused in between was not refused for ever.
#[track_caller]
fn wait_for_victim(scene: &Scene) -> u32 {
    wait_for("the victim to run", SOON * 2, || {
        let status = scene.host.status();
        let victim = crate::support::host::agent(&status, "victim")?;
        crate::support::host::pid(&victim["pid"]).filter(|_| victim["state"] == "running")
    })
}
