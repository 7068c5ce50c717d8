//! The Debian package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Content, architectures, compress, directory, file_name, mode};
use crate::command::{read, run_quietly};
use crate::workspace;

/// The files of an old installation would be overwritten.
const PREINST: &str = r#"#!/bin/sh
set -e
if [ ! -e /opt/aops/package.json ] && { [ -e /opt/aops/etc/conf.yml ] || { [ -f /opt/aops/control ] && [ ! -L /opt/aops/control ]; }; }; then
    echo "cannot install the package aops: an installation of the old platform is in /opt/aops; take it over with the installer, \
aops-agent-service, and install the package again" >&2
    exit 1
fi
"#;

const POSTINST: &str = r#"#!/bin/sh
set -e
if [ "$1" = configure ]; then
    if [ -z "$2" ]; then
        /opt/aops/bin/aops service packaged configure --first --home /opt/aops
    else
        /opt/aops/bin/aops service packaged configure --home /opt/aops
    fi
fi
"#;

/// Not in an upgrade: sub-agents keep running.
const PRERM: &str = r#"#!/bin/sh
set -e
if [ "$1" = remove ]; then
    /opt/aops/bin/aops service packaged remove --home /opt/aops
fi
"#;

const POSTRM: &str = r#"#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
"#;

const OVERRIDES: &str = "\
# The home of an installation is the same with and without a package, on every system.
aops: dir-or-file-in-opt
# Hosts are old and different: the executable needs nothing of them.
aops: statically-linked-binary
# systemd reads the units again in any case; the scripts work without it.
aops: maintainer-script-calls-systemctl
# A self-upgrade replaces it: it belongs to the release that runs.
aops: file-missing-in-md5sums *opt/aops/bin/aops*
";

const COPYRIGHT: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: aops

Files: *
Copyright: 2026 The aops authors
License: Apache-2.0
 On Debian systems, the text of the licence is in
 /usr/share/common-licenses/Apache-2.0.
";

pub(super) fn build(content: &Content<'_>, output: &Path) -> Result<PathBuf> {
    let scratch = tempfile::tempdir().context("cannot create a temporary directory")?;
    let stage = scratch.path().join("stage");
    content.lay_out(&stage, "deb", "lib/systemd/system", "usr/share/zsh/vendor-completions")?;
    let (_, arch) = architectures(content.target);
    let version = content.version;
    let write = |path: &str, text: &str, with: u32| -> Result<()> {
        let path = stage.join(path);
        directory(path.parent().context("a file is in a directory")?)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        mode(&path, with)
    };
    write("usr/share/doc/aops/copyright", COPYRIGHT, 0o644)?;
    let changes = format!(
        "aops ({version}) stable; urgency=medium\n\n  * See CHANGELOG.md.gz in this directory.\n\n -- {MAINTAINER}  Thu, 01 Jan 2026 00:00:00 +0000\n"
    );
    write("usr/share/doc/aops/changelog", &changes, 0o644)?;
    let changelog = fs::read_to_string(workspace::root().join("CHANGELOG.md")).context("cannot read CHANGELOG.md")?;
    write("usr/share/doc/aops/CHANGELOG.md", &changelog, 0o644)?;
    compress(&["changelog", "CHANGELOG.md"].map(|file| stage.join("usr/share/doc/aops").join(file)))?;
    write("usr/share/lintian/overrides/aops", OVERRIDES, 0o644)?;
    let size: u64 = read(Command::new("du").args(["-sk"]).arg(&stage))?
        .split_whitespace()
        .next()
        .and_then(|size| size.parse().ok())
        .context("du prints no size")?;
    write("DEBIAN/control", &control(version, arch, size), 0o644)?;
    for (name, script) in [("preinst", PREINST), ("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)] {
        write(&format!("DEBIAN/{name}"), script, 0o755)?;
    }
    write("DEBIAN/md5sums", &sums(&stage)?, 0o644)?;
    let package = output.join(file_name(content.target, version, false));
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "--build"]).arg(&stage).arg(&package);
    run_quietly(&mut build)?;
    Ok(package)
}

const MAINTAINER: &str = "The aops authors <aops@aops.example.org>";

fn control(version: &str, arch: &str, size: u64) -> String {
    format!(
        "Package: aops\nVersion: {version}\nArchitecture: {arch}\nMaintainer: {MAINTAINER}\nInstalled-Size: {size}\n\
         Section: admin\nPriority: optional\n\
         Description: host agent manager\n Keeps a fleet's agents installed, at the right version, running and reported.\n .\n \
         The manager (aops-spm) and the watchdog (aops-spa) of a host install, start,\n upgrade and report the host's agents as \
         the gateway of the fleet orders.\n"
    )
}

/// Without the executable, which a self-upgrade changes.
fn sums(stage: &Path) -> Result<String> {
    let mut find = Command::new("sh");
    find.current_dir(stage).args([
        "-c",
        "find * -path DEBIAN -prune -o -type f ! -path opt/aops/bin/aops -print0 | sort -z | xargs -0 md5sum",
    ]);
    Ok(read(&mut find)? + "\n")
}
