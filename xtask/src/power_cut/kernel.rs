//! Debian's kernels for virtual machines ("cloud"), fetched and unpacked once, with the few modules that a machine loads.
//!
//! NVMe, ext4 and the serial ports are built into them; the network card is not.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::apt::Private;
use crate::command::{run_quietly, say, text};
use crate::rootfs::Suite;
use crate::workspace;

/// The package that depends on the newest kernel, and how the name of that kernel's package begins.
const PACKAGE: &str = "linux-image-cloud-amd64";
const KERNELS: &str = "linux-image-";
/// The modules that are kept, with those that they need.
const MODULES: &[&str] = &["virtio_pci", "virtio_net", "virtio_blk", "xfs"];
/// What `depmod` reads beside the modules.
const LISTS: &[&str] = &["modules.builtin", "modules.builtin.modinfo", "modules.order"];

/// A kernel image and the directory of its modules.
pub(crate) struct Kernel {
    pub(super) image: PathBuf,
    /// To be copied to `/lib/modules/<release>`.
    pub(super) modules: PathBuf,
    pub(super) release: String,
}

/// The kernel of a suite, fetched if it is not in the cache.
pub(crate) fn get(suite: Suite) -> Result<Kernel> {
    // With other modules it is another one.
    let modules = Sha256::digest(MODULES.concat());
    let name = format!("kernel-{}-{:02x}{:02x}", suite.name(), modules[0], modules[1]);
    let directory = workspace::cached(&name, |unfinished| fetch(suite, unfinished))?;
    let modules = only_entry(&directory.join("lib/modules"))?;
    let release = modules.file_name().context("a kernel has a release")?.to_string_lossy().into_owned();
    Ok(Kernel { image: directory.join("vmlinuz"), modules, release })
}

fn fetch(suite: Suite, into: &Path) -> Result<()> {
    say(&format!("fetching the kernel of the suite {} (once; 30 MB)", suite.name()));
    let packages = Private::of(suite.name())?;
    let package = packages.dependency(PACKAGE, KERNELS)?;
    let unpacked = into.join("unpacked");
    packages.unpack(&package, &unpacked)?;
    let release = package.trim_start_matches(KERNELS);
    let image = unpacked.join("boot").join(format!("vmlinuz-{release}"));
    fs::rename(&image, into.join("vmlinuz")).with_context(|| format!("cannot find a kernel in {package}"))?;

    // `depmod` looks for modules in lib; newer packages have them in usr/lib.
    let in_usr = unpacked.join("usr/lib/modules");
    if in_usr.is_dir() {
        fs::create_dir_all(unpacked.join("lib"))?;
        fs::rename(&in_usr, unpacked.join("lib/modules"))?;
    }
    list_modules(&unpacked, release)?;
    let (from, to) = [&unpacked, into].map(|root| root.join("lib/modules").join(release)).into();
    let listed = fs::read_to_string(from.join("modules.dep")).context("cannot read the list of modules")?;
    let built_in =
        fs::read_to_string(from.join("modules.builtin")).context("cannot read the list of built-in modules")?;
    let wanted = needed(&listed, &built_in)?;
    for file in wanted.iter().map(String::as_str).chain(LISTS.iter().copied()) {
        let copy = to.join(file);
        fs::create_dir_all(copy.parent().context("a module is in a directory")?)?;
        fs::rename(from.join(file), copy).with_context(|| format!("cannot find {file} in {package}"))?;
    }
    list_modules(into, release)?;
    workspace::remove(&unpacked)
}

fn list_modules(root: &Path, release: &str) -> Result<()> {
    run_quietly(Command::new("depmod").args(["-b", &text(root), release]))
}

/// The files of [`MODULES`] and of those that they need, from the text of `modules.dep`; none for what is in that of `modules.builtin`.
fn needed(listed: &str, built_in: &str) -> Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    for name in MODULES {
        let is_it = |line: &&str| {
            let file = line.split(':').next().unwrap_or_default();
            let stem = file.rsplit('/').next().unwrap_or_default().split('.').next().unwrap_or_default();
            stem.replace('-', "_") == *name
        };
        if built_in.lines().any(|line| is_it(&line)) {
            continue;
        }
        let line = listed.lines().find(is_it).with_context(|| format!("the kernel has no module {name}"))?;
        files.extend(line.split([':', ' ']).filter(|word| !word.is_empty()).map(str::to_owned));
    }
    Ok(files)
}

fn only_entry(directory: &Path) -> Result<PathBuf> {
    let what = || format!("cannot list {}", directory.display());
    let entries =
        fs::read_dir(directory).with_context(what)?.collect::<std::io::Result<Vec<_>>>().with_context(what)?;
    ensure!(entries.len() == 1, "{} has {} entries instead of one; remove it", directory.display(), entries.len());
    Ok(entries[0].path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_kept_with_those_they_need() {
        let listed = "kernel/block/virtio_blk.ko:\nkernel/net/virtio_net.ko: kernel/net/failover.ko kernel/virtio/virtio.ko\n\
                      kernel/virtio/virtio-pci.ko.xz: kernel/virtio/virtio.ko\n\
                      kernel/other.ko: kernel/more.ko\nkernel/fs/xfs/xfs.ko:\n";
        let files: Vec<_> = needed(listed, "").unwrap().into_iter().collect();
        assert_eq!(
            files,
            [
                "kernel/block/virtio_blk.ko",
                "kernel/fs/xfs/xfs.ko",
                "kernel/net/failover.ko",
                "kernel/net/virtio_net.ko",
                "kernel/virtio/virtio-pci.ko.xz",
                "kernel/virtio/virtio.ko"
            ]
        );
        let built_in = "kernel/virtio/virtio-pci.ko\nkernel/fs/xfs/xfs.ko\n";
        assert_eq!(needed(listed, built_in).unwrap().len(), 4);
        assert!(needed("kernel/other.ko:\n", built_in).is_err());
    }
}
