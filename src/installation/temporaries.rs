//! The temporary files that killed processes left in a home.
//!
//! A process that replaces a file writes `.new-<pid>-<start time>-<random>` beside it and renames it. A kill or a power cut in between leaves the
//! temporary file, and nothing reads or replaces it later. The files of an upgrade that is over, and executables that were replaced while
//! they ran, are removed, too.

use std::fs::{self, DirEntry};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::home::Home;
use crate::installation::{executable, permissions, upgrade};
use crate::{platform, store};

/// A replacement takes less time. An older temporary file is stale even if its name does not identify its creator.
const MAX_AGE: Duration = Duration::from_secs(3600);

/// Removes the temporary files whose processes have exited, and logs a warning for each that cannot be removed.
pub fn sweep(home: &Home) {
    // An unsafe home may contain symbolic links to files of other users.
    if permissions::home(home).is_err() {
        return;
    }
    let sub_agents = fs::read_dir(home.agents()).into_iter().flatten().flatten().map(|entry| entry.path());
    let directories: Vec<PathBuf> = home.directories().into_iter().map(|(path, _)| path).chain(sub_agents).collect();
    for entry in directories.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten() {
        if is_stale(&entry)
            && let Err(error) = store::remove(&entry.path())
        {
            tracing::warn!(error = format!("{error:#}"), "cannot remove a file that a killed process left");
        }
    }
    upgrade::sweep(home);
    executable::remove_replaced(home);
}

fn is_stale(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let Some(name) = name.to_str().filter(|name| name.starts_with(platform::TEMPORARY_PREFIX)) else { return false };
    if entry.file_type().map_or(true, |kind| kind.is_dir()) {
        return false;
    }
    let owner = platform::temporary_owner(name);
    let has_exited = owner.is_some_and(|(pid, start_time)| !platform::is_alive(pid, start_time));
    let modified = entry.metadata().and_then(|metadata| metadata.modified()).ok();
    let age = modified.and_then(|modified| SystemTime::now().duration_since(modified).ok());
    has_exited || age.is_some_and(|age| age > MAX_AGE)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn files_of_exited_processes_and_old_ones_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path());
        let release = home.agents().join("a/1");
        fs::create_dir_all(&release).unwrap();
        home.directories().iter().for_each(|(path, _)| fs::create_dir_all(path).unwrap());
        // No system has so many processes.
        let exited = format!("{}-7", u32::MAX - 1);
        let own = platform::temporary_prefix();
        // Another process had this pid before the host was restarted.
        let (pid, start_time) = platform::temporary_owner(&format!("{own}Ab3")).unwrap();
        let earlier = format!("{pid}-{}", start_time + 1);
        let file = |path: PathBuf| {
            fs::write(&path, "half").unwrap();
            path
        };
        let stale = [
            file(home.state().join(format!(".new-{exited}-Ab3"))),
            file(home.state().join(format!(".new-{earlier}-Ab3"))),
            file(home.bin().join(format!(".new-{exited}-7"))),
            file(home.agents().join(format!("a/.new-{exited}-7"))),
            file(home.root().join(".new-Ab3xyZ")),
        ];
        let an_hour_ago = SystemTime::now() - MAX_AGE - Duration::from_secs(1);
        fs::File::options().write(true).open(&stale[4]).unwrap().set_modified(an_hour_ago).unwrap();
        let kept = [
            file(home.state().join(format!("{own}Ab3"))),
            file(home.state().join(".new-Ab3xyZ")),
            file(home.state().join("releases.json")),
            file(release.join(format!(".new-{exited}-7"))),
        ];
        sweep(&home);
        let exist = |paths: &[PathBuf]| paths.iter().map(|path: &PathBuf| Path::exists(path)).collect::<Vec<_>>();
        assert_eq!(exist(&stale), [false; 5]);
        assert_eq!(exist(&kept), [true; 4]);
    }
}
