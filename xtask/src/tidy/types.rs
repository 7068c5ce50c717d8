//! One name, one type: no two types of the program have the same name.
//!
//! A reader who meets `Verdict` must not have to find out which one it is. Types of tests are exempt, and so are associated types and the
//! twins of `platform/unix` and `platform/windows`, of which a build has one.

use std::collections::BTreeMap;

use super::Violation;
use super::source::{code, is_part_of_word, line, without_tests, words};

/// Checks the files of one crate that are built without tests. `sources` are their names and texts.
pub(super) fn check(sources: &[(&str, &str)]) -> Vec<Violation> {
    let mut defined: BTreeMap<String, Vec<(&str, usize)>> = BTreeMap::new();
    for (file, text) in sources {
        for (name, line) in types(&without_tests(&code(text))) {
            defined.entry(name).or_default().push((file, line));
        }
    }
    let mut violations = Vec::new();
    for (name, places) in &defined {
        for (at, (file, line)) in places.iter().enumerate() {
            if let Some((first, first_line)) = places[..at].iter().find(|(other, _)| !are_twins(file, other)) {
                let what = format!(
                    "the type {name} has the name of a type in {first}:{first_line}: give each a name that says which one it is"
                );
                violations.push(Violation { file: (*file).to_owned(), line: *line, what });
            }
        }
    }
    violations
}

/// The types that `code` defines, with their lines. A `type` inside a block is an associated type, and left out.
fn types(code: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for keyword in ["struct", "enum", "trait", "type"] {
        for at in words(code, keyword) {
            let rest = code[at + keyword.len()..].trim_start();
            let name: String = rest.chars().take_while(|c| is_part_of_word(*c)).collect();
            if name.chars().next().is_some_and(char::is_uppercase) && (keyword != "type" || depth(&code[..at]) == 0) {
                found.push((name, line(code, at)));
            }
        }
    }
    found
}

/// The number of blocks that are open at the end of `code`.
fn depth(code: &str) -> usize {
    code.matches('{').count().saturating_sub(code.matches('}').count())
}

/// Whether one file is for Unix alone and the other for Windows alone.
fn are_twins(file: &str, other: &str) -> bool {
    let side = |file: &str| {
        let below = file.strip_prefix("src/platform/")?;
        ["unix", "windows"].into_iter().find(|side| below.split(['/', '.']).next() == Some(*side))
    };
    matches!((side(file), side(other)), (Some(one), Some(two)) if one != two)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(sources: &[(&str, &str)]) -> Vec<String> {
        check(sources).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_second_type_of_the_same_name_is_reported_with_the_first() {
        let found = found(&[
            ("src/a.rs", "pub struct Order;\n"),
            ("src/b.rs", "\npub(crate) enum Order { A }\n"),
            ("src/c.rs", "fn f() {\n    trait Order {}\n}\ntype Other = u8;\n"),
            ("src/d.rs", "mod inner { pub struct Other; }"),
        ]);
        let why = "give each a name that says which one it is";
        assert_eq!(
            found,
            [
                format!("src/b.rs:2: the type Order has the name of a type in src/a.rs:1: {why}"),
                format!("src/c.rs:2: the type Order has the name of a type in src/a.rs:1: {why}"),
                format!("src/d.rs:1: the type Other has the name of a type in src/c.rs:4: {why}"),
            ]
        );
    }

    #[test]
    fn associated_types_tests_and_uses_are_exempt() {
        let implementation = "impl FromStr for A {\n    type Err = String;\n}\n";
        assert_eq!(found(&[("src/a.rs", implementation), ("src/b.rs", implementation)]), [""; 0]);
        let test = "#[cfg(test)]\nmod tests {\n    struct Order;\n}\n";
        assert_eq!(found(&[("src/a.rs", "struct Order;"), ("src/b.rs", test)]), [""; 0]);
        let uses = "// struct Order\nuse a::Order;\nimpl Order {}\nconst A: &str = \"enum Order\";";
        assert_eq!(found(&[("src/a.rs", "struct Order;"), ("src/b.rs", uses)]), [""; 0]);
    }

    #[test]
    fn only_the_twins_of_platform_share_a_name() {
        let both = |one, two| found(&[(one, "struct Child;"), (two, "struct Child;")]).len();
        assert_eq!(both("src/platform/unix/launch.rs", "src/platform/windows/launch.rs"), 0);
        assert_eq!(both("src/platform/unix.rs", "src/platform/windows.rs"), 0);
        assert_eq!(both("src/platform/unix/a.rs", "src/platform/unix/b.rs"), 1);
        assert_eq!(both("src/platform.rs", "src/platform/unix.rs"), 1);
        assert_eq!(both("src/spm.rs", "src/platform/unix.rs"), 1);
    }
}
