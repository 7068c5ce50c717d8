//! No file of the project names a path of the build machine: this workspace, or a user's home.
//!
//! The paths come from the environment of the run: the workspace's location, `HOME` and `CARGO_HOME`. A path with a single component, such
//! as `/root` or `/src`, is exempt: it is the same on many machines, and containers and tests name it on purpose.

use std::env;
use std::path::{Path, PathBuf};

use super::Violation;
use super::source::is_part_of_word;

/// The paths that are specific to this machine.
pub(super) fn own_paths(workspace: &Path) -> Vec<String> {
    let home = env::var_os("HOME").or_else(|| env::var_os("USERPROFILE")).map(PathBuf::from);
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join(".cargo")));
    specific([Some(workspace.to_owned()), workspace.canonicalize().ok(), home, cargo].into_iter().flatten())
}

/// Those of `paths` that identify a machine, as text.
fn specific(paths: impl Iterator<Item = PathBuf>) -> Vec<String> {
    let names = |path: &Path| path.components().filter(|part| matches!(part, std::path::Component::Normal(_))).count();
    let paths = paths.filter(|path| path.is_absolute() && names(path) > 1);
    let mut paths: Vec<String> =
        paths.filter_map(|path| Some(path.components().collect::<PathBuf>().to_str()?.to_owned())).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// Checks that a file names none of these paths, and nothing below them.
pub(super) fn check(file: &str, text: &str, paths: &[String]) -> Vec<Violation> {
    let lines = text.lines().enumerate();
    let found = lines.filter_map(|(number, line)| {
        let path = paths.iter().find(|path| names(line, path))?;
        let what = format!("{path}: a path of the build machine or its user; use a relative or example path");
        Some(Violation { file: file.to_owned(), line: number + 1, what })
    });
    found.collect()
}

/// Whether `line` contains `path` as a whole path or as a path prefix.
fn names(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = &line[..at];
        // After a name or a variable it is the end of another path; a second slash may be that of a URL.
        let begins = before.ends_with("//")
            || !before.ends_with(|c: char| is_part_of_word(c) || matches!(c, '-' | '.' | '/' | '\\' | '}' | ')'));
        let mut after = line[at + path.len()..].chars();
        let ends = match after.next() {
            // A full stop ends a sentence unless a name continues after it.
            Some('.') => !after.next().is_some_and(is_part_of_word),
            Some(c) => !is_part_of_word(c) && c != '-',
            None => true,
        };
        begins && ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<usize> {
        let paths =
            specific(["/home/me", "/srv/build/", "/root", "/", "", "some/where"].map(PathBuf::from).into_iter());
        assert_eq!(paths, ["/home/me", "/srv/build"]);
        check("README.md", text, &paths).iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn paths_of_the_machine_are_rejected() {
        for text in [
            "/home/me",
            "cd /home/me/x",
            "\"/home/me\"",
            "see /home/me.",
            "file:///home/me/x",
            "PATH=/bin:/srv/build/target",
            "(/srv/build)",
        ] {
            assert_eq!(lines(&format!("fine\n{text}\n")), [2], "{text}");
        }
    }

    #[test]
    fn other_paths_are_accepted() {
        for text in [
            "/home/mead",
            "/home/me-too",
            "/home/me.d/x",
            "/mnt/home/me",
            "$root/home/me",
            "${root}/home/me",
            "../home/me",
            "/root/x",
            "/",
            "some/where",
        ] {
            assert_eq!(lines(text), [0; 0], "{text}");
        }
    }
}
