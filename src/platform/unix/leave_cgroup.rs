//! Moves a role out of the cgroups of its starter: the role must outlive the starter, and the starter's limits do not apply to it.
//!
//! ```text
//! service tracking (v2; name=systemd of v1)   <hierarchy>/<key>/roles    next to the groups of the sub-agents
//! a v1 controller                             its root
//! ```
//!
//! Nothing is left where the starter is already in the root, or in a group of the home. A role leaves a sub-agent's group when it starts
//! ([`super::Groups::leave`]). Where the cgroups are not writable (no root, a read-only mount), the role stays where it was started, which
//! is not an error.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::fs::{Mode, OFlags};

use super::group::{self, Hierarchy};

/// The group of the roles, next to the `agent-<name>` groups.
const ROLES: &str = "roles";

/// Starts a command outside of the cgroups that this process is in. `key` names the home, as for the groups of its sub-agents.
pub fn spawn_outside_groups(command: &mut Command, key: &str) -> io::Result<Child> {
    let memberships = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let location = group::location_name(key);
    let targets: Vec<Vec<CString>> = group::mounted()
        .iter()
        .filter(|found| !has_nothing_to_leave(found, &memberships, &location))
        .map(|found| procs_files(found, &location))
        .collect();
    let in_child = move || {
        for procs_files in &targets {
            // The first group that can be entered.
            let _ = procs_files.iter().any(|file| {
                let opened = rustix::fs::open(file.as_c_str(), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
                opened.is_ok_and(|file| rustix::io::write(&file, b"0").is_ok())
            });
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child and makes raw system calls only; everything that it uses was allocated before the fork.
    unsafe { command.pre_exec(in_child) };
    command.spawn()
}

/// Removes the roles' groups that have no processes, and their parent with the last one.
pub fn remove_role_groups(key: &str) {
    let location = group::location_name(key);
    for group in group::mounted().iter().filter_map(|found| own(found, &location)) {
        let _ = fs::remove_dir(&group);
        let _ = group.parent().map(fs::remove_dir);
    }
}

/// The roles' own group in a hierarchy that tracks services.
fn own(hierarchy: &Hierarchy, location: &str) -> Option<PathBuf> {
    let tracks = hierarchy.options.as_ref().is_none_or(|options| options.iter().any(|option| option == "name=systemd"));
    tracks.then(|| hierarchy.mount.join(location).join(ROLES))
}

/// The `cgroup.procs` files that the child may write itself into, best first.
fn procs_files(hierarchy: &Hierarchy, location: &str) -> Vec<CString> {
    let own = own(hierarchy, location).filter(|group| fs::create_dir_all(group).is_ok());
    let groups = own.into_iter().chain([hierarchy.mount.clone()]);
    groups.filter_map(|group| CString::new(group.join("cgroup.procs").as_os_str().as_bytes()).ok()).collect()
}

/// Whether this process is in the root or in a group of the home, as far as the hierarchy is mounted here (`number:controllers:path`,
/// cgroups(7)).
fn has_nothing_to_leave(hierarchy: &Hierarchy, memberships: &str, location: &str) -> bool {
    let path = memberships.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let is_it = match &hierarchy.options {
            None => controllers.is_empty(),
            Some(options) => controllers.split(',').any(|one| options.iter().any(|option| option == one)),
        };
        is_it.then_some(Path::new(path))
    });
    // A hierarchy that is not listed has nothing to leave.
    path.is_none_or(|path| path == hierarchy.root || path.starts_with(hierarchy.root.join(location)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(options: Option<&[&str]>, root: &str, mount: &Path) -> Hierarchy {
        let options = options.map(|options| options.iter().map(|option| (*option).to_owned()).collect());
        Hierarchy { mount: mount.to_owned(), root: root.into(), options }
    }

    #[test]
    fn no_group_is_left_in_the_root_or_in_a_group_of_the_home() {
        let memberships =
            "9:name=systemd:/system.slice/tool.service\n4:cpu,cpuacct:/\n3:memory:/docker/abc\n0::/k/agent-a\n";
        let has_nothing_to_leave = |options: Option<&[&str]>, root, location| {
            has_nothing_to_leave(&hierarchy(options, root, Path::new("/x")), memberships, location)
        };
        assert!(!has_nothing_to_leave(Some(&["rw", "xattr", "name=systemd"]), "/", "k"));
        assert!(has_nothing_to_leave(Some(&["cpuacct", "cpu"]), "/", "k"));
        // A container sees only its part.
        assert!(has_nothing_to_leave(Some(&["memory"]), "/docker/abc", "k"));
        assert!(!has_nothing_to_leave(Some(&["memory"]), "/", "k"));
        assert!(has_nothing_to_leave(Some(&["freezer"]), "/", "k"));
        assert!(has_nothing_to_leave(None, "/", "k"));
        assert!(!has_nothing_to_leave(None, "/", "k2"), "another home's");
    }

    #[test]
    fn roles_enter_their_group_where_services_are_tracked_and_the_root_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let procs_files = |options: Option<&[&str]>, root: &Path| -> Vec<String> {
            let found = procs_files(&hierarchy(options, "/", root), "k");
            found.into_iter().map(|file| file.into_string().unwrap()).collect()
        };
        let mount = directory.path();
        let at = |path: &str| mount.join(path).display().to_string();
        assert_eq!(procs_files(Some(&["memory"]), mount), [at("cgroup.procs")]);
        for tracks in [None, Some(&["name=systemd"][..])] {
            assert_eq!(procs_files(tracks, mount), [at("k/roles/cgroup.procs"), at("cgroup.procs")]);
        }
        assert_eq!(procs_files(None, Path::new("/nowhere/at/all\0")), Vec::<String>::new());
    }
}
