//! Releases of the manager for upgrades: the program under test with different bytes, and bad programs.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::aops;
use super::package::Package;
use super::windows;

/// The name of the manager's package.
pub const NAME: &str = "aops-spm";

/// The program under test, with bytes that differ between versions.
pub fn good(version: &str) -> Package {
    with_executable(version, executable(version))
}

/// The bytes of the program under test.
pub fn tested() -> Vec<u8> {
    let program = windows::under_test().map_or_else(aops, |windows| windows.aops());
    fs::read(program).expect("the program under test can be read")
}

/// The bytes of [`good`]'s executable.
pub fn executable(version: &str) -> Vec<u8> {
    let mut bytes = tested();
    // Bytes after the sections of an executable change nothing.
    bytes.extend_from_slice(format!("release {version}\n").as_bytes());
    bytes
}

pub fn with_executable(version: &str, executable: impl AsRef<[u8]>) -> Package {
    let path = if windows::under_test().is_some() { "bin/aops.exe" } else { "bin/aops" };
    Package::plain(NAME, version).with_file(path, executable, 0o755)
}

/// A good program of an unpublished release, which bad ones run for the roles in which they are good.
pub fn real() -> PathBuf {
    static REAL: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("real-aops");
        let mut new = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("target can be written");
        new.write_all(&executable("for scripts")).expect("target can be written");
        fs::set_permissions(new.path(), fs::Permissions::from_mode(0o755)).expect("the file is ours");
        // A file that is open for writing cannot be executed: it is closed and renamed first.
        new.persist(&path).expect("target can be written");
        path
    };
    REAL.get_or_init(make).clone()
}

/// A program that is good in every other role, and as the manager runs this: shell words, in which `$A` is a good program, which is at
/// `real`, and `$2` the home.
pub fn bad_manager(version: &str, real: &str, manager: &str) -> Package {
    bad(version, real, manager, "exec $A \"$@\"")
}

/// As [`bad_manager`]; `preflight` is run when it has to read the home's state.
pub fn bad(version: &str, real: &str, manager: &str, preflight: &str) -> Package {
    let script = SCRIPT.replace("@REAL@", real).replace("@MANAGER@", manager).replace("@PREFLIGHT@", preflight);
    with_executable(version, script)
}

const SCRIPT: &str = r#"#!/bin/sh
A=@REAL@
case "$0 $*" in
*preflight*) @PREFLIGHT@ ;;
*--version*) exec $A "$@" ;;
*aops-spm\ *) @MANAGER@ ;;
*aops-spa\ *) exec $A spa "$@" ;;
*/control\ *) exec $A control "$@" ;;
*) exec $A "$@" ;;
esac
"#;
