//! `cargo xtask check-windows`: the whole program, with and without the gateway, type-checked and linted for 64-bit and 32-bit Windows.

use anyhow::Result;

use crate::apt;
use crate::command::{self, say};
use crate::dist::Target;
use crate::toolchain::Toolchain;

const TARGETS: [Target; 2] = [Target::WindowsAmd64, Target::Windows386];

/// Some dependencies compile C code even for a type check.
pub(crate) const NEEDS: &[apt::Need] =
    &[("x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64-posix"), ("i686-w64-mingw32-gcc", "gcc-mingw-w64-i686-posix")];

pub(crate) fn run() -> Result<()> {
    apt::install(NEEDS)?;
    for target in TARGETS.map(Target::triple) {
        let toolchain = Toolchain::for_target(target)?;
        for features in [&[][..], &["--no-default-features"]] {
            say(&format!("checking for {target} {}", features.join(" ")));
            let mut clippy = toolchain.cargo_for_tests("clippy", target);
            command::run(clippy.args(["-p", "aops"]).args(features).args(["--", "-D", "warnings"]))?;
        }
    }
    Ok(())
}
