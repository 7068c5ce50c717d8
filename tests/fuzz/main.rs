//! Mutates external input: one program, whose target the variable `AOPS_FUZZ_TARGET` names. `cargo xtask fuzz` builds and runs it.
//!
//! The targets find more than panics: a parsed value must hold what its type promises, and must be written as it was read. Each target
//! starts from the files in `corpus/<target>`, which include former failures; the archives of the attack table are added.
#![no_main]
#![allow(dead_code, unused_imports, unreachable_pub, reason = "the program's own modules, of which targets use some")]

/// The program's mechanisms and lower layers, under their usual names.
#[path = "../../src"]
mod program {
    pub mod command;
    pub mod config;
    pub mod control_socket;
    pub mod core;
    pub mod endpoint;
    pub mod home;
    pub mod host_service;
    pub mod installation;
    pub mod lifecycle;
    pub mod lock;
    pub mod logging;
    pub mod package;
    pub mod platform;
    pub mod process;
    pub mod role;
    pub mod store;
    pub mod uplink;
}
use program::*;

#[path = "../support/archives.rs"]
mod archives;
mod packages;
mod texts;

use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

type Target = fn(&[u8]);

/// Every target, by its name.
const TARGETS: &[(&str, Target)] = &[
    ("agent-toml", texts::agent_toml),
    ("answer", texts::answer),
    ("conf-toml", texts::conf_toml),
    ("conf-yml", texts::conf_yml),
    ("fleet-toml", texts::fleet_toml),
    ("range", texts::range),
    ("signature", texts::signature),
    ("state", texts::state),
    ("tar", packages::tar),
    ("tar-gz", packages::tar_gz),
    ("tar-zst", packages::tar_zst),
    ("zip", packages::zip),
];

static TARGET: OnceLock<Target> = OnceLock::new();

fn begin() {
    let name = std::env::var("AOPS_FUZZ_TARGET").expect("AOPS_FUZZ_TARGET names the target");
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = found.unwrap_or_else(|| panic!("{name} is none of {:?}", TARGETS.map_names()));
    let _ = TARGET.set(*target);
    if let Some(directory) = std::env::var_os("AOPS_FUZZ_SEEDS") {
        packages::seeds(&name, Path::new(&directory));
    }
}

trait Names {
    fn map_names(&self) -> Vec<&str>;
}

impl Names for [(&'static str, Target)] {
    fn map_names(&self) -> Vec<&str> {
        self.iter().map(|(name, _)| *name).collect()
    }
}

fuzz_target!(init: begin(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        target(data);
    }
});
