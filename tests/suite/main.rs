//! The scenarios: whole programs, real processes, real files. One binary for all, a directory for each theme.
//!
//! `cargo xtask test --test suite -- FILTER` runs those whose path contains FILTER: `upgrades::`, `install::systemd::`.
//!
//! ```text
//! theme         file                   shows
//! install       replace_and_remove     installing over an installation, rollback of a failed installation, uninstalling
//!               systemd                units and files on a host with systemd; nothing is left after an uninstallation
//!               homes                  offline packages, certificate pins, several homes on a host, import of an old installation
//!               canonical_path         a home reached by several paths is one home with one pair of units
//!               joining                the old platform's install command; both kinds of sub-agents start
//!               take_over              an installation of the replaced system with its units is taken over, or runs as before
//!               refusals               rejections of the installer name a remedy and change nothing; a killed one can be repeated
//! roles         without_systemd        manager and watchdog restart each other; stop, start, restart; one process of each
//!               systemd                the same under systemd: stopped, masked and restarted units, boots
//!               launcher               roles outlive the unit, session or program that started them
//!               memory                 a role above its memory limit is restarted
//! sub_agents    supervision            start, stop, restart policy, user, environment, logs
//!               adoption               a manager that dies at any step leaves sub-agents running; the next one adopts each
//!               health                 health checks and the restarts that they trigger
//!               process_trees          a stop ends the whole process tree, in cgroup v2, in v1 and in none
//!               unmarked               programs without environment marker and cgroup are found by their `control` script
//!               inheritance            nothing of the manager's caller reaches a sub-agent
//! upgrades      sub_agents             probation, commit, rollback and skipped releases of sub-agents
//!               sub_agents_host        the same on full and read-only disks, and under systemd
//!               self_upgrades          upgrades of the manager: probation, commit, operator's verbs, crashes at any step
//!               self_upgrades_bad      bad releases of the manager are rolled back, or never activated
//!               self_upgrades_host     the same under systemd, for a product, and on hosts short of space or memory
//!               ledger                 the ledger of releases is rebuilt, and decides what is active
//!               state_versions         homes of earlier state versions (tests/data/state-v*) are taken over
//! downloads     faulty_network         downloads over a proxy that cuts, delays and damages are complete and correct
//!               network_namespace      downloads over partitions, packet loss, slow name servers and proxies
//! trust         keys                   rotation and revocation of keys, trusted certificates
//!               offline_key            packages signed on a machine that is never online; its key is rotated across a fleet
//!               attacks                a table of attacks on a host, one test for each (see its head)
//! gateway       serving                fleet files, heartbeats, downloads, publishing
//!               parts                  a part of the gateway that fails is named and stops no other
//!               slow_disk              heartbeats are answered while the gateway's disk blocks
//!               certificate_renewal    hosts accept a renewed certificate with a known or announced key, and no other
//!               protocol               the schema, our gateway and a third-party gateway agree with assets/protocol.md
//! faults        chaos                  roles and sub-agents are killed and stopped at random; invariants hold
//!               full_disk              full and read-only disks are reported; what runs keeps running
//!               slow_disk              the manager's event loop never waits for a disk or a lock
//! command_line  help                   help texts, usage errors, program names
//!               output                 an output that cannot be written stops no work
//! (none)        on_windows             the roles as services of Windows; files in use
//!               harness                the containers and file snapshots of tests/support work as they promise
//! ```
#![allow(clippy::disallowed_macros, reason = "a failed test panics")]

mod command_line {
    mod help;
    mod output;
}
mod downloads {
    mod faulty_network;
    mod network_namespace;
}
mod faults {
    mod chaos;
    mod full_disk;
    mod slow_disk;
}
mod gateway {
    mod certificate_renewal;
    mod parts;
    mod protocol;
    mod serving;
    mod slow_disk;
}
mod harness;
mod install {
    mod canonical_path;
    mod homes;
    mod joining;
    pub(crate) mod refusals;
    mod replace_and_remove;
    pub(crate) mod systemd;
    mod take_over;
}
mod roles {
    mod launcher;
    mod memory;
    mod systemd;
    mod without_systemd;
}
mod sub_agents {
    mod adoption;
    mod health;
    mod inheritance;
    mod process_trees;
    pub(crate) mod supervision;
    mod unmarked;
}
#[path = "../support/mod.rs"]
mod support;
mod trust {
    mod attacks;
    mod keys;
    mod offline_key;
}
mod on_windows;
mod upgrades {
    mod ledger;
    pub(crate) mod self_upgrades;
    mod self_upgrades_bad;
    mod self_upgrades_host;
    mod state_versions;
    mod sub_agents;
    mod sub_agents_host;
}
