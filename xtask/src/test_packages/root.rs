//! A root file system for containers with rpm in it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::command::{run_quietly, say, text};
use crate::{rootfs, workspace};

/// The containers' root file system and Debian's rpm, created if it does not exist.
pub(super) fn with_rpm() -> Result<PathBuf> {
    let plain = rootfs::get()?;
    workspace::cached("rootfs-rpm", |unfinished| {
        say("creating a root file system with rpm (once; 40 MB more)");
        run_quietly(Command::new("cp").args(["-a", "--reflink=auto"]).arg(&plain).arg(unfinished))?;
        let inside = "mount -t proc proc /proc && apt-get update -q && \
                      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends rpm && rm -rf /var/lib/apt/lists/* /var/cache/apt";
        let mut install = Command::new("unshare");
        install.args(["--mount", "--pid", "--fork", "--kill-child", "chroot"]).arg(text(unfinished));
        run_quietly(install.args(["sh", "-c", inside]))
    })
}
