//! A trusted home, and each reason not to trust one.

use anyhow::Result;

use super::*;
use crate::home::Home;
use crate::installation::permissions::{
    UnsafeHome, agent, agent_directory, executable, files, home, keys, parents, program, programs,
};
use crate::platform;

fn home_in(directory: &Path) -> Home {
    let home = Home::new(directory.join("home"));
    for (path, mode) in home.directories() {
        fs::create_dir(&path).unwrap();
        platform::set_mode(&path, mode).unwrap();
    }
    home
}

fn rejected(result: Result<()>, words: &[&str]) {
    let error = result.unwrap_err();
    assert!(error.is::<UnsafeHome>());
    let error = error.to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
}

#[test]
fn trusted_owners_are_root_and_the_own_user() {
    for (uid, own, is_untrusted) in
        [(0, 0, false), (1000, 0, true), (0, 1000, false), (1000, 1000, false), (1001, 1000, true)]
    {
        assert_eq!(untrusted_owner(uid, own).is_some(), is_untrusted, "{uid} for {own}");
    }
    assert!(untrusted_owner(1000, 0).unwrap().contains("belongs to the user 1000, who is not root"));
}

#[test]
fn a_writable_directory_above_the_home_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let (open, inner) = (directory.path().join("open"), directory.path().join("open/inner"));
    fs::create_dir_all(&inner).unwrap();
    let at = home_in(&inner);
    let linked = Home::new(directory.path().join("link"));
    platform::make_symlink(Path::new("open/../open/inner/home"), linked.root()).unwrap();
    for mode in [0o777, 0o775, 0o757] {
        platform::set_mode(&open, mode).unwrap();
        let words = [&*open.display().to_string(), &format!("{mode:04o}"), "chmod go-w"];
        rejected(parents(&at), &words);
        rejected(files(&at, None), &words);
        rejected(parents(&linked), &words);
        // A path that does not exist yet would be created there.
        rejected(parents(&Home::new(open.join("none/home"))), &words);
        for at in [&at, &linked] {
            home(at).unwrap();
            keys(at).unwrap();
        }
        platform::set_mode(&open, 0o755).unwrap();
        parents(&at).unwrap();
        parents(&linked).unwrap();
    }
    platform::set_mode(&open, 0o1777).unwrap();
    parents(&at).unwrap();
    parents(&linked).unwrap();
}

#[test]
fn the_directories_of_a_link_and_of_its_target_are_checked() {
    let directory = tempfile::tempdir().unwrap();
    let (open, sound) = (directory.path().join("open"), directory.path().join("sound"));
    for path in [&open, &sound] {
        fs::create_dir(path).unwrap();
    }
    platform::make_symlink(&sound, &open.join("link")).unwrap();
    platform::make_symlink(&open, &sound.join("link")).unwrap();
    platform::set_mode(&open, 0o777).unwrap();
    let way = |path: &Path| weakness_of_parents(Path::new("/"), path).unwrap().map(|(place, _)| place);
    let open_behind_links = fs::canonicalize(&open).unwrap();
    assert_eq!(way(&open.join("link/x")), Some(open_behind_links.clone()));
    assert_eq!(way(&sound.join("link/x")), Some(open_behind_links));
    // The last component is not checked.
    assert_eq!(way(&sound.join("link")), None);
    assert_eq!(way(&sound.join("link/..")), None);
    platform::make_symlink(Path::new("loop"), &sound.join("loop")).unwrap();
    assert!(weakness_of_parents(Path::new("/"), &sound.join("loop/x")).is_err());
}

#[test]
fn an_executable_that_others_can_write_to_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let at = home_in(directory.path());
    fs::write(at.executable(), "").unwrap();
    let link = at.role_link("aops-spm");
    platform::make_symlink(Path::new("aops"), &link).unwrap();
    executable(&at, &link).unwrap();
    for (path, mode) in [(at.executable(), 0o777), (at.bin(), 0o775), (at.root().to_owned(), 0o757)] {
        platform::set_mode(&path, mode).unwrap();
        let words = [&*path.display().to_string(), &format!("{mode:04o}"), "chmod go-w"];
        rejected(home(&at), &words);
        rejected(executable(&at, &link), &words);
        platform::set_mode(&path, 0o755).unwrap();
        executable(&at, &link).unwrap();
        home(&at).unwrap();
    }
    platform::set_mode(&at.cache(), 0o777).unwrap();
    executable(&at, &link).unwrap();
}

#[test]
fn a_program_that_others_can_change_is_reported_and_rejected_outside_its_release() {
    let directory = tempfile::tempdir().unwrap();
    let at = home_in(directory.path());
    let (name, version) = ("demo".parse().unwrap(), "1.0".parse().unwrap());
    let release = at.release(&name, &version);
    fs::create_dir_all(release.join("bin")).unwrap();
    let file = release.join("bin/demo-1.0");
    fs::write(&file, "").unwrap();
    platform::make_symlink(Path::new("demo-1.0"), &release.join("bin/demo")).unwrap();
    let check = || program(&at, &name, &version, "bin/demo");
    check().unwrap();
    let words = ["others can write to it (mode 0777)"];
    for (path, inside) in [
        (&*file, true),
        (&release.join("bin"), true),
        (&release, true),
        (&at.agent(&name), false),
        (&at.agents(), false),
        (at.root(), false),
    ] {
        let good = platform::mode(path).unwrap();
        platform::set_mode(path, 0o777).unwrap();
        rejected(check(), &words);
        match inside {
            true => programs(&at, &name).unwrap(),
            false => rejected(programs(&at, &name), &words),
        }
        platform::set_mode(path, good).unwrap();
        check().unwrap();
        programs(&at, &name).unwrap();
    }
    // A directory to be removed need not be trusted.
    platform::set_mode(&at.agent(&name), 0o777).unwrap();
    agent_directory(&at, &name).unwrap();
    rejected(agent(&at, &name), &["agents/demo", "0777"]);
}

#[test]
fn files_that_others_can_write_to_are_reported() {
    let directory = tempfile::tempdir().unwrap();
    let at = home_in(directory.path());
    let (ca, elsewhere) = (at.ca_file(), directory.path().join("elsewhere.pem"));
    let others = [at.config(), at.agent_id(), ca.clone(), at.desired(), at.last_good_config()];
    let trusting = [at.keyring(), at.epochs()];
    for path in others.iter().chain(&trusting).chain([&elsewhere]) {
        fs::write(path, "").unwrap();
        platform::set_mode(path, 0o644).unwrap();
    }
    for (path, reported, rejected) in others
        .iter()
        .map(|path| (path, true, false))
        .chain(trusting.iter().map(|path| (path, false, true)))
        .chain([(&elsewhere, false, false)])
    {
        files(&at, Some(&ca)).unwrap();
        keys(&at).unwrap();
        platform::set_mode(path, 0o664).unwrap();
        let certificates = if *path == elsewhere { &elsewhere } else { &ca };
        assert_eq!(files(&at, Some(certificates)).is_err(), reported, "{}", path.display());
        assert_eq!(keys(&at).is_err(), rejected, "{}", path.display());
        home(&at).unwrap();
        platform::set_mode(path, 0o644).unwrap();
    }
    // An operator's settings may be elsewhere, where no other user can write.
    fs::rename(at.config(), directory.path().join("conf.toml")).unwrap();
    platform::make_symlink(&directory.path().join("conf.toml"), &at.config()).unwrap();
    files(&at, None).unwrap();
    platform::set_mode(&directory.path().join("conf.toml"), 0o666).unwrap();
    rejected(files(&at, None), &["etc/conf.toml", "0666"]);
}

#[test]
fn a_link_instead_of_a_directory_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let at = home_in(directory.path());
    home(&at).unwrap();
    keys(&at).unwrap();
    for (path, _) in at.directories().into_iter().skip(1) {
        let aside = directory.path().join("aside");
        fs::rename(&path, &aside).unwrap();
        platform::make_symlink(&aside, &path).unwrap();
        rejected(home(&at), &[&path.display().to_string(), "symbolic link"]);
        fs::remove_file(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
    }
    home(&at).unwrap();
    fs::remove_dir(at.cache()).unwrap();
    home(&at).unwrap();
    fs::write(at.cache(), "").unwrap();
    rejected(home(&at), &["cache", "not a directory"]);
}

#[test]
fn a_home_behind_a_link_is_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let real = home_in(directory.path());
    let link = directory.path().join("link");
    platform::make_symlink(real.root(), &link).unwrap();
    home(&Home::new(&link)).unwrap();
    home(&Home::new(directory.path().join("nowhere"))).unwrap();
    platform::set_mode(real.root(), 0o777).unwrap();
    rejected(home(&Home::new(&link)), &["/home", "0777", "chmod go-w"]);
    platform::set_mode(real.root(), 0o1777).unwrap();
    home(&Home::new(&link)).unwrap();
    platform::set_mode(&real.etc(), 0o1777).unwrap();
    rejected(home(&Home::new(&link)), &["home/etc", "1777"]);
    platform::set_mode(&real.etc(), 0o755).unwrap();
    platform::set_mode(&real.state(), 0o770).unwrap();
    rejected(home(&Home::new(link)), &["home/state", "0770", "chmod go-w"]);
}

#[test]
fn a_key_is_rejected_if_others_can_write_to_it_or_its_directories() {
    let directory = tempfile::tempdir().unwrap();
    let at = home_in(directory.path());
    let key = at.keys().join("a.pub");
    fs::write(&key, "").unwrap();
    for (path, mode, good) in
        [(&key, 0o664, 0o644), (&key, 0o646, 0o644), (&at.keys(), 0o777, 0o755), (&at.etc(), 0o775, 0o755)]
    {
        platform::set_mode(path, mode).unwrap();
        rejected(keys(&at), &[&path.display().to_string(), &format!("{mode:04o}"), "chmod go-w"]);
        platform::set_mode(path, good).unwrap();
        keys(&at).unwrap();
    }
    let elsewhere = directory.path().join("elsewhere.pub");
    fs::rename(&key, &elsewhere).unwrap();
    platform::make_symlink(&elsewhere, &key).unwrap();
    rejected(keys(&at), &["a.pub", "symbolic link"]);
}

#[test]
fn a_link_instead_of_a_sub_agents_directory_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let at = home_in(directory.path());
    let name = "demo".parse().unwrap();
    agent(&at, &name).unwrap();
    platform::make_symlink(directory.path(), &at.agent(&name)).unwrap();
    rejected(agent(&at, &name), &["agents/demo", "symbolic link"]);
}

#[test]
fn write_permission_is_removed_from_our_directory_only() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, file) = (directory.path().join("ours"), directory.path().join("ours/file"));
    fs::create_dir(&ours).unwrap();
    fs::write(&file, "").unwrap();
    for path in [&ours, &file] {
        platform::set_mode(path, 0o775).unwrap();
    }
    let link = directory.path().join("link");
    platform::make_symlink(&ours, &link).unwrap();
    for other in [&link, &file, &directory.path().join("nothing")] {
        assert!(!deny_write_to_others(other).unwrap(), "{}", other.display());
    }
    assert!(deny_write_to_others(&ours).unwrap());
    assert!(!deny_write_to_others(&ours).unwrap());
    assert_eq!((platform::mode(&ours).unwrap(), platform::mode(&file).unwrap()), (0o755, 0o775));
}
