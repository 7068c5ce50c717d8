//! Runs programs for Windows in a throw-away root file system that has Wine: a minimal Debian 12 with a set-up prefix, made once.
//!
//! Debian's own packages install cleanly in a root of the main suite alone, whatever state the machine's are in. Each run sees an overlay
//! of it in name spaces of its own (mounts, processes, a network of nothing but loopback), which end with the run, whatever its manner, and so does all that runs
//! and was written in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{run_quietly, say, text};
use crate::rootfs::SUITE;
use crate::{apt, workspace};

/// What this needs of the machine.
pub(crate) const NEEDS: &[apt::Need] = &[
    ("debootstrap", "debootstrap"),
    ("unshare", "util-linux"),
    ("ip", "iproute2"),
    ("x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64-posix"),
];

/// Wine 8 lacks this library, of which Rust's standard library wants one function. For tests alone.
const BCRYPT_PRIMITIVES: &str = "\
__declspec(dllimport) unsigned char __stdcall SystemFunction036(void *bytes, unsigned long length);
__declspec(dllexport) int __stdcall ProcessPrng(unsigned char *bytes, unsigned long long length)
{
    return SystemFunction036(bytes, (unsigned long)length);
}
";

/// Debian keeps it out of the path.
const WINE: &str = "/usr/lib/wine/wine64";

/// The root file system, made if it is not there yet. Needs root.
pub(crate) fn get() -> Result<PathBuf> {
    workspace::keep(&format!("rootfs-wine-{SUITE}"), |unfinished| {
        let mirror = apt::mirror()?;
        say("making the root file system with Wine (once; 900 MB, about two minutes)");
        run_quietly(
            Command::new("debootstrap")
                .args(["--variant=minbase", "--include=wine64", SUITE])
                .args([text(unfinished), mirror]),
        )?;
        for dispensable in ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"]
        {
            workspace::remove(&unfinished.join(dispensable))?;
        }
        set_up_prefix(unfinished)
    })
}

/// What Wine does at its first start, once instead of in each run.
fn set_up_prefix(root: &Path) -> Result<()> {
    let script = format!("{WINE} wineboot -i && /usr/lib/wine/wineserver64 -w");
    run_quietly(enter(root, root, "writable").args(["sh", "-c", &script]))?;
    let source = root.join("bcryptprimitives.c");
    fs::write(&source, BCRYPT_PRIMITIVES).context("cannot write the source of a library")?;
    let library = root.join("root/.wine/drive_c/windows/system32/bcryptprimitives.dll");
    let mut compiler = Command::new("x86_64-w64-mingw32-gcc");
    compiler.args(["-shared", "-nostdlib", "-e", "0", "-o"]).args([&library, &source]).arg("-ladvapi32");
    run_quietly(&mut compiler)
}

/// A command that runs `program` (a file of `directory`) under Wine, and is killed with all that it started after `seconds`.
pub(crate) fn command(root: &Path, directory: &Path, program: &str, seconds: u32) -> Command {
    let mut command = Command::new("timeout");
    // The first process of a process name space hears nothing but this.
    command.args(["--signal=KILL", &seconds.to_string()]);
    let inner = enter(root, directory, "overlay");
    command.arg(inner.get_program()).args(inner.get_args());
    command.arg(WINE).arg(Path::new("/program").join(program));
    command
}

fn enter(root: &Path, directory: &Path, kind: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--net", "--"])
        .arg("bash")
        .args([&workspace::root().join("xtask/src/wine.sh"), root, directory])
        .arg(kind);
    command
}
