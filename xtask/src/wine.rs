//! Runs Windows programs in a disposable root file system with Wine: a minimal Debian 12 with a prepared prefix, created once.
//!
//! Wine's packages install cleanly only in a root of Debian's main suite, whatever packages the machine has. Each run gets an overlay of
//! that root in its own namespaces (mounts, processes, a network with loopback only). When the run ends, the kernel ends its processes and
//! drops its files.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::command::{run_quietly, say, text};
use crate::rootfs::SUITE;
use crate::{apt, workspace};

/// The programs that this needs.
pub(crate) const NEEDS: &[apt::Need] = &[("debootstrap", "debootstrap"), ("unshare", "util-linux"), ("ip", "iproute2")];

/// Debian's loader of both widths; its `wine` in `PATH` is a script around it.
const WINE: &str = "/usr/lib/wine/wine";

/// The root file system, created if it does not exist. Needs root.
pub(crate) fn get() -> Result<PathBuf> {
    workspace::cached(&format!("rootfs-wine-{SUITE}-2"), |unfinished| {
        let mirror = apt::mirror()?;
        say("creating the root file system with Wine (once; 1.3 GB, about three minutes)");
        run_quietly(Command::new("debootstrap").args(["--variant=minbase", SUITE]).args([text(unfinished), mirror]))?;
        let inside = "mount -t proc proc /proc && dpkg --add-architecture i386 && apt-get update -q && \
                      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends wine wine64 wine32:i386";
        let mut install = Command::new("unshare");
        install.args(["--mount", "--pid", "--fork", "--kill-child", "chroot"]).arg(unfinished);
        run_quietly(install.args(["sh", "-c", inside]))?;
        for dispensable in ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"]
        {
            workspace::remove(&unfinished.join(dispensable))?;
        }
        set_up_prefix(unfinished)
    })
}

/// Does once what Wine would do at its first start in each run.
fn set_up_prefix(root: &Path) -> Result<()> {
    let script = format!("{WINE} wineboot -i && /usr/lib/wine/wineserver -w");
    run_quietly(enter(root, root, "writable").args(["sh", "-c", &script]))
}

/// A command that runs `program` (a file of `directory`) under Wine. After `seconds` it is killed with every process that it started.
pub(crate) fn command(root: &Path, directory: &Path, program: &str, seconds: u32) -> Command {
    let mut command = Command::new("timeout");
    // The init process of a PID namespace gets no other signal from outside.
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
