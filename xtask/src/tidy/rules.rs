//! The top-level layout, and rules for each Rust file.

use super::Violation;
use super::source::{bracketed, code, line, words};

/// The allowed top-level entries, in addition to dotfiles.
const TOP: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "src",
    "rpm",
    "assets",
    "xtask",
    "tests",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "build.rs",
    "clippy.toml",
    "deny.toml",
    "rustfmt.toml",
];

/// Finds top-level entries outside the fixed layout.
pub(super) fn misplaced(files: &[&str]) -> Vec<Violation> {
    let mut odd: Vec<_> = files.iter().filter_map(|file| file.split('/').next()).collect();
    odd.dedup();
    odd.retain(|top| !TOP.contains(top) && !top.starts_with('.'));
    odd.iter()
        .map(|top| {
            violation(top, 1, "a top-level entry outside the fixed layout; move it below one of the existing entries")
        })
        .collect()
}

/// The rules for one Rust file.
pub(super) fn of_source(file: &str, text: &str) -> Vec<Violation> {
    let code = code(text);
    let mut violations = Vec::new();
    if !text.starts_with("//!") {
        violations.push(violation(
            file,
            1,
            "the file does not start with `//!`: say why it exists, what it promises and what it refuses",
        ));
    }
    let mut add = |at: usize, what: &str| violations.push(violation(file, line(&code, at), what));
    if !is_platform(file) {
        for at in system_conditions(&code) {
            add(
                at,
                "a `cfg` on the operating system outside `platform`: make it a function there, one for each system",
            );
        }
        for at in words(&code, "unsafe") {
            add(at, "`unsafe` outside `platform`: call the system's interfaces there");
        }
    }
    if file != "src/platform.rs" {
        for at in words(&code, "thread::sleep") {
            add(at, "`thread::sleep`: wait for the event itself, with a deadline");
        }
    }
    if file.starts_with("tests/") {
        for at in words(&code, "time::sleep") {
            add(at, "a test that sleeps: wait for the event itself, with a deadline");
        }
    }
    for (pattern, what) in [
        ("#[ignore", "an ignored test: assert the present behaviour with a FIXME, or remove the test"),
        ("todo!", "`todo!`: return an error with a message"),
        ("unimplemented!", "`unimplemented!`: return an error with a message"),
    ] {
        code.match_indices(pattern).for_each(|(at, _)| add(at, what));
    }
    violations
}

fn is_platform(file: &str) -> bool {
    file == "src/platform.rs" || file.starts_with("src/platform/")
}

/// The positions where `cfg`, `cfg!` or `cfg_attr` test the operating system.
fn system_conditions(code: &str) -> Vec<usize> {
    let places =
        ["cfg", "cfg_attr"].into_iter().flat_map(|word| words(code, word).map(move |at| (at, at + word.len())));
    let asks = |(_, end): &(usize, usize)| {
        let inside = bracketed(code[*end..].trim_start_matches('!')).unwrap_or_default();
        ["unix", "windows", "target_os", "target_family"].iter().any(|system| words(inside, system).next().is_some())
    };
    places.filter(asks).map(|(at, _)| at).collect()
}

fn violation(file: &str, line: usize, what: &str) -> Violation {
    Violation { file: file.to_owned(), line, what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(file: &str, text: &str) -> Vec<usize> {
        let mut lines: Vec<_> = of_source(file, text).iter().map(|violation| violation.line).collect();
        lines.sort_unstable();
        lines
    }

    #[test]
    fn a_file_without_a_head_is_rejected() {
        assert_eq!(lines("src/a.rs", "// why\n"), [1]);
        assert_eq!(lines("src/a.rs", "//! Why.\n"), [0; 0]);
    }

    #[test]
    fn operating_system_conditions_are_allowed_only_in_platform() {
        let text = "//!\n#[cfg(unix)]\nfn a() {}\nif cfg!(all(test, target_os = \"linux\")) {}\n#[cfg_attr(\n  windows, allow(x))]\n\
                    #[cfg(feature = \"unix\")]\n// cfg(unix)\n";
        assert_eq!(lines("src/a.rs", text), [2, 4, 5]);
        assert_eq!(lines("tests/suite/a.rs", text), [2, 4, 5]);
        assert_eq!(lines("src/platform/unix.rs", text), [0; 0]);
        assert_eq!(lines("src/a.rs", "//!\n#![deny(unsafe_code)]\nunsafe { x() }"), [3]);
    }

    #[test]
    fn sleeping_and_ignored_tests_are_rejected() {
        assert_eq!(lines("tests/a.rs", "//!\nstd::thread::sleep(x);\ntokio::time::sleep(x);"), [2, 3]);
        assert_eq!(
            lines("src/a.rs", "//!\nthread::sleep(x);\ntokio::time::sleep(x);\n#[ignore = \"\"]\ntodo!()"),
            [2, 4, 5]
        );
        assert_eq!(lines("src/platform.rs", "//!\nthread::sleep(x);"), [0; 0]);
    }

    #[test]
    fn unknown_top_level_entries_are_rejected() {
        let odd = misplaced(&["Cargo.toml", ".ci/run", "docs/a.md", "docs/b.md", "src/main.rs"]);
        assert_eq!(odd.iter().map(|violation| violation.file.as_str()).collect::<Vec<_>>(), ["docs"]);
    }
}
