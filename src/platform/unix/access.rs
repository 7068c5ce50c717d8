//! Who may change what lies at a path.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::platform::Expected;

/// In a directory with this bit, only the owner of an entry can rename or remove it.
const STICKY: u32 = 0o1000;

/// Why what is at `path` cannot be relied on: it is something else than expected, or somebody besides root and the owner of `home` can
/// change it. `None`: it can be, or nothing is there. No link is followed.
pub fn weakness(path: &Path, expected: Expected, home: &Path) -> io::Result<Option<String>> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    if found.is_symlink() {
        let target = fs::read_link(path)?;
        return Ok(Some(format!("it is a symbolic link to {}; put the real thing in its place", target.display())));
    }
    if expected != Expected::File && !found.is_dir() {
        return Ok(Some("it is no directory".to_owned()));
    }
    if expected == Expected::File && !found.is_file() {
        return Ok(Some("it is no file".to_owned()));
    }
    if expected == Expected::DirectoryOfAny {
        return Ok(None);
    }
    let user = fs::metadata(home)?.uid();
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != 0 && (found.uid() != user || (own != 0 && user != own)) {
        return Ok(Some(format!(
            "it belongs to the user {}, who is neither root nor the home's own; run `chown` on it, if what is in it is yours",
            found.uid()
        )));
    }
    let mode = found.mode() & 0o7777;
    // A home may be a file system of its own, mounted like /tmp: there nobody can touch what is not his, and what was added by others is
    // told by its owner.
    let is_shared_root = path == home && mode & STICKY != 0;
    if mode & 0o022 != 0 && !is_shared_root {
        return Ok(Some(format!(
            "others can write it (mode {mode:04o}); look at what is in it, then run `chmod go-w {}`",
            path.display()
        )));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::*;
    use crate::home::Home;
    use crate::installation::guard::{Unsound, agent, home, keys};
    use crate::platform;

    fn home_in(directory: &Path) -> Home {
        let home = Home::new(directory.join("home"));
        for (path, mode) in home.directories() {
            fs::create_dir(&path).unwrap();
            platform::set_mode(&path, mode).unwrap();
        }
        home
    }

    fn refused(result: Result<()>, words: &[&str]) {
        let error = result.unwrap_err();
        assert!(error.is::<Unsound>());
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    }

    #[test]
    fn a_link_in_the_place_of_any_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = home_in(directory.path());
        home(&at).unwrap();
        keys(&at).unwrap();
        for (path, _) in at.directories().into_iter().skip(1) {
            let aside = directory.path().join("aside");
            fs::rename(&path, &aside).unwrap();
            platform::make_symlink(&aside, &path).unwrap();
            refused(home(&at), &[&path.display().to_string(), "symbolic link"]);
            fs::remove_file(&path).unwrap();
            fs::rename(&aside, &path).unwrap();
        }
        home(&at).unwrap();
        fs::remove_dir(at.cache()).unwrap();
        home(&at).unwrap();
        fs::write(at.cache(), "").unwrap();
        refused(home(&at), &["cache", "no directory"]);
    }

    #[test]
    fn a_home_behind_a_link_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let real = home_in(directory.path());
        let link = directory.path().join("link");
        platform::make_symlink(real.root(), &link).unwrap();
        home(&Home::new(&link)).unwrap();
        home(&Home::new(directory.path().join("nowhere"))).unwrap();
        platform::set_mode(real.root(), 0o777).unwrap();
        refused(home(&Home::new(&link)), &["link", "0777", "chmod go-w"]);
        platform::set_mode(real.root(), 0o1777).unwrap();
        home(&Home::new(&link)).unwrap();
        platform::set_mode(&real.etc(), 0o1777).unwrap();
        refused(home(&Home::new(&link)), &["link/etc", "1777"]);
        platform::set_mode(&real.etc(), 0o755).unwrap();
        platform::set_mode(&real.state(), 0o770).unwrap();
        refused(home(&Home::new(link)), &["link/state", "0770", "chmod go-w"]);
    }

    #[test]
    fn a_key_that_others_can_write_is_refused_with_the_directories_above_it() {
        let directory = tempfile::tempdir().unwrap();
        let at = home_in(directory.path());
        let key = at.keys().join("a.pub");
        fs::write(&key, "").unwrap();
        for (path, mode, good) in
            [(&key, 0o664, 0o644), (&key, 0o646, 0o644), (&at.keys(), 0o777, 0o755), (&at.etc(), 0o775, 0o755)]
        {
            platform::set_mode(path, mode).unwrap();
            refused(keys(&at), &[&path.display().to_string(), &format!("{mode:04o}"), "chmod go-w"]);
            platform::set_mode(path, good).unwrap();
            keys(&at).unwrap();
        }
        let elsewhere = directory.path().join("elsewhere.pub");
        fs::rename(&key, &elsewhere).unwrap();
        platform::make_symlink(&elsewhere, &key).unwrap();
        refused(keys(&at), &["a.pub", "symbolic link"]);
    }

    #[test]
    fn the_directory_of_a_sub_agent_is_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let at = home_in(directory.path());
        let name = "demo".parse().unwrap();
        agent(&at, &name).unwrap();
        platform::make_symlink(directory.path(), &at.agent(&name)).unwrap();
        refused(agent(&at, &name), &["agents/demo", "symbolic link"]);
    }
}
