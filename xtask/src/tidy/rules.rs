//! What stands where, and what no Rust file has.

use super::Violation;
use super::source::{bracketed, code, line, words};

/// What may stand at the top, besides dotfiles.
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

/// Top-level entries beyond the fixed layout.
pub(super) fn misplaced(files: &[&str]) -> Vec<Violation> {
    let mut odd: Vec<_> = files.iter().filter_map(|file| file.split('/').next()).collect();
    odd.dedup();
    odd.retain(|top| !TOP.contains(top) && !top.starts_with('.'));
    odd.iter().map(|top| violation(top, 1, "a top-level entry beyond the fixed layout")).collect()
}

/// The rules for one Rust file.
pub(super) fn of_source(file: &str, text: &str) -> Vec<Violation> {
    let code = code(text);
    let mut violations = Vec::new();
    if !text.starts_with("//!") {
        violations.push(violation(
            file,
            1,
            "the file does not open with `//!`: say why it exists, what it promises and refuses",
        ));
    }
    let mut add = |at: usize, what: &str| violations.push(violation(file, line(&code, at), what));
    if !is_platform(file) {
        for at in system_conditions(&code) {
            add(at, "a condition on the system outside `platform`: make it a function there, one for each system");
        }
        for at in words(&code, "unsafe") {
            add(at, "`unsafe` outside `platform`: the system's interfaces are called there and nowhere else");
        }
    }
    if file != "src/platform.rs" {
        for at in words(&code, "thread::sleep") {
            add(at, "`thread::sleep`: wait for the thing itself, with a deadline");
        }
    }
    if file.starts_with("tests/") {
        for at in words(&code, "time::sleep") {
            add(at, "a test that sleeps: wait for the thing itself, with a deadline");
        }
    }
    for (pattern, what) in [
        ("#[ignore", "an ignored test: assert what is there, with a FIXME, or remove it"),
        ("todo!", "`todo!`: not there yet is an error with words"),
        ("unimplemented!", "`unimplemented!`: not there yet is an error with words"),
    ] {
        code.match_indices(pattern).for_each(|(at, _)| add(at, what));
    }
    violations
}

fn is_platform(file: &str) -> bool {
    file == "src/platform.rs" || file.starts_with("src/platform/")
}

/// Where `cfg`, `cfg!` or `cfg_attr` ask for the operating system.
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
    fn a_file_says_why_it_exists() {
        assert_eq!(lines("src/a.rs", "// why\n"), [1]);
        assert_eq!(lines("src/a.rs", "//! Why.\n"), [0; 0]);
    }

    #[test]
    fn the_system_is_asked_for_in_platform_alone() {
        let text = "//!\n#[cfg(unix)]\nfn a() {}\nif cfg!(all(test, target_os = \"linux\")) {}\n#[cfg_attr(\n  windows, allow(x))]\n\
                    #[cfg(feature = \"unix\")]\n// cfg(unix)\n";
        assert_eq!(lines("src/a.rs", text), [2, 4, 5]);
        assert_eq!(lines("tests/suite/a.rs", text), [2, 4, 5]);
        assert_eq!(lines("src/platform/unix.rs", text), [0; 0]);
        assert_eq!(lines("src/a.rs", "//!\n#![deny(unsafe_code)]\nunsafe { x() }"), [3]);
    }

    #[test]
    fn tests_neither_sleep_nor_are_ignored() {
        assert_eq!(lines("tests/a.rs", "//!\nstd::thread::sleep(x);\ntokio::time::sleep(x);"), [2, 3]);
        assert_eq!(
            lines("src/a.rs", "//!\nthread::sleep(x);\ntokio::time::sleep(x);\n#[ignore = \"\"]\ntodo!()"),
            [2, 4, 5]
        );
        assert_eq!(lines("src/platform.rs", "//!\nthread::sleep(x);"), [0; 0]);
    }

    #[test]
    fn the_layout_is_fixed() {
        let odd = misplaced(&["Cargo.toml", ".ci/run", "docs/a.md", "docs/b.md", "src/main.rs"]);
        assert_eq!(odd.iter().map(|violation| violation.file.as_str()).collect::<Vec<_>>(), ["docs"]);
    }
}
