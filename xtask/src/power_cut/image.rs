//! The disk image of a machine: an ext4 file system made of a root file system and further files, without mounting anything.
//!
//! Units that only cost time without udev, a console or users are masked: an emulated processor needs half of the time of a boot for them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use crate::command::{read, text};
use crate::workspace;

/// Mebibytes; what is not written takes no space.
const SIZE: u32 = 900;

const AGENT: &str = include_str!("agent.sh");
const AGENT_PATH: &str = "/usr/local/sbin/machine-agent";
const AGENT_UNIT: &str = "\
[Unit]
Description=Commands of the second serial port
Before=network.target
Wants=network.target

[Service]
ExecStart=/usr/local/sbin/machine-agent
Restart=always

[Install]
WantedBy=multi-user.target
";

const MASKED: &[&str] = &[
    "cryptsetup.target",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "e2scrub_reap.service",
    "getty.target",
    "getty@tty1.service",
    "integritysetup.target",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "serial-getty@ttyS0.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-initctl.socket",
    "systemd-journal-flush.service",
    "systemd-journald-audit.socket",
    "systemd-logind.service",
    "systemd-random-seed.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
    "timers.target",
    "veritysetup.target",
];

/// What becomes an image.
pub(crate) struct Image<'a> {
    root: &'a Path,
    kernel: &'a Kernel,
    files: Vec<File>,
}

struct File {
    path: String,
    content: Content,
    mode: u32,
}

enum Content {
    Text(String),
    CopyOf(PathBuf),
    LinkTo(String),
}

impl<'a> Image<'a> {
    /// The root file system with the kernel's modules, and the agent that runs a machine's commands.
    pub(crate) fn new(root: &'a Path, kernel: &'a Kernel) -> Image<'a> {
        let mut image = Image { root, kernel, files: Vec::new() };
        image.file(AGENT_PATH, AGENT, 0o755);
        image.unit("machine-agent.service", AGENT_UNIT);
        image.file("/etc/modules-load.d/machine.conf", "virtio_pci\nvirtio_net\n", 0o644);
        image.file("/etc/systemd/journald.conf.d/machine.conf", "[Journal]\nStorage=volatile\n", 0o644);
        image.link("/etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target");
        for unit in MASKED {
            image.link(&format!("/etc/systemd/system/{unit}"), "/dev/null");
        }
        let generators = fs::read_dir(root.join("usr/lib/systemd/system-generators")).into_iter().flatten().flatten();
        for generator in generators {
            let name = generator.file_name();
            image.link(&format!("/etc/systemd/system-generators/{}", name.to_string_lossy()), "/dev/null");
        }
        image
    }

    /// Adds a file; it replaces that of the root file system.
    pub(crate) fn file(&mut self, path: &str, content: &str, mode: u32) {
        self.files.push(File { path: path.to_owned(), content: Content::Text(content.to_owned()), mode });
    }

    /// Adds a copy of a file of this machine.
    pub(crate) fn copy(&mut self, path: &str, of: &Path, mode: u32) {
        self.files.push(File { path: path.to_owned(), content: Content::CopyOf(of.to_owned()), mode });
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.files.push(File { path: path.to_owned(), content: Content::LinkTo(target.to_owned()), mode: 0 });
    }

    /// Adds a unit that is started at boot.
    pub(crate) fn unit(&mut self, name: &str, content: &str) {
        let path = format!("/etc/systemd/system/{name}");
        self.file(&path, content, 0o644);
        self.link(&format!("/etc/systemd/system/multi-user.target.wants/{name}"), &path);
    }

    /// Creates the image. Needs root: its files belong to root.
    pub(crate) fn write(&self, image: &Path) -> Result<()> {
        let _lock = workspace::lock("machine-tree")?;
        // An interrupted run may have left it.
        let tree = workspace::cache_path(".machine-tree");
        workspace::remove(&tree)?;
        let written = self.write_from(&tree, image);
        workspace::remove(&tree)?;
        written.with_context(|| format!("cannot create the disk image {}", image.display()))
    }

    fn write_from(&self, tree: &Path, image: &Path) -> Result<()> {
        // Links, not copies: files are only ever replaced. A link to the root file system would be copied as a link, and files would be
        // written into it.
        let root = self.root.canonicalize().with_context(|| format!("cannot find {}", self.root.display()))?;
        read(Command::new("cp").args(["-al", "--"]).args([&root, tree]))?;
        ensure!(tree.symlink_metadata()?.is_dir(), "the copy of {} is no directory", root.display());
        let modules = tree.join("usr/lib/modules").join(&self.kernel.release);
        fs::create_dir_all(modules.parent().context("modules have a directory")?)?;
        read(Command::new("cp").args(["-al", "--"]).args([&self.kernel.modules.canonicalize()?, &modules]))?;
        for file in &self.files {
            file.write(tree).with_context(|| format!("cannot write {}", file.path))?;
        }
        workspace::remove(image)?;
        fs::File::create(image)?.set_len(u64::from(SIZE) << 20)?;
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]);
        read(make.args([text(tree), text(image)])).map(drop)
    }
}

impl File {
    fn write(&self, tree: &Path) -> Result<()> {
        let path = tree.join(self.path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        workspace::remove(&path)?;
        match &self.content {
            Content::Text(text) => fs::write(&path, text)?,
            Content::CopyOf(file) => fs::copy(file, &path).map(drop)?,
            Content::LinkTo(target) => return symlink(target, &path).context("cannot create a link"),
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(self.mode)).context("cannot set its mode")
    }
}
