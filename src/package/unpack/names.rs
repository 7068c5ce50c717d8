//! The rules for file names and link targets in a package. Pure: every host decides the same about the same package.
//!
//! | rejected | for |
//! |---|---|
//! | absolute paths, `..`, backslashes, control characters (NUL among them), over-long names and paths | every package |
//! | two names that differ in case alone | every package, so that packing on Linux shows it |
//! | devices (`NUL`, `com1.txt`), a dot or a space at the end, any of `< > : " \| ? *` | packages for Windows, which cannot hold them |

use anyhow::{Result, bail, ensure};

use super::UnpackLimits;
use crate::core::model::Os;
use crate::core::names::is_valid_windows_name;

/// Normalizes a path: no `.`, no double slashes; empty for the root itself. Rejects paths that could lead out of the root.
pub(super) fn relative(path: &str, os: Os, limits: &UnpackLimits) -> Result<String> {
    ensure!(!path.starts_with('/'), "the path is absolute");
    ensure!(path.len() <= limits.path, "the path has more than {} bytes", limits.path);
    let mut clean = String::with_capacity(path.len());
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => bail!("the path contains .."),
            _ => {
                ensure!(part.len() <= limits.name, "a name in the path has more than {} bytes", limits.name);
                ensure!(can_be_file_name(part, os), "{part:?} is not a valid file name on {os}");
                if !clean.is_empty() {
                    clean.push('/');
                }
                clean.push_str(part);
            }
        }
    }
    Ok(clean)
}

/// Whether a name without slashes is a valid file name on that system.
fn can_be_file_name(name: &str, os: Os) -> bool {
    // A backslash is a separator on Windows, and unusual in file names elsewhere.
    let harmless = !name.contains(|c: char| c == '\\' || c.is_control());
    harmless
        && match os {
            Os::Linux => true,
            Os::Windows => is_valid_windows_name(name),
        }
}

/// Folds the case of a path as a case-insensitive file system does: each character on its own, as NTFS does.
pub(super) fn fold_into(folded: &mut String, path: &str) {
    folded.clear();
    if path.is_ascii() {
        folded.push_str(path);
        folded.make_ascii_lowercase();
        return;
    }
    folded.extend(path.chars().map(fold));
}

/// Converts to upper and then to lower case: some letters share only the one, and some only the other.
fn fold(c: char) -> char {
    let upper = only(c.to_uppercase()).unwrap_or(c);
    only(upper.to_lowercase()).unwrap_or(upper)
}

fn only(mut letters: impl Iterator<Item = char>) -> Option<char> {
    letters.next().filter(|_| letters.next().is_none())
}

/// Whether a symbolic link at `path` can only lead to a path below the root.
///
/// `..` is allowed at the start of the target alone, where it is relative to real directories. After a name, which may itself be a link,
/// `..` would lead up from that link's target. So every link leads from a real directory of the tree downwards by names alone, and the
/// same holds for links among those names.
pub(in super::super) fn link_stays_inside(path: &str, target: &str, os: Os) -> bool {
    if target.is_empty() || target.starts_with('/') {
        return false;
    }
    let depth = path.matches('/').count();
    let mut up = 0;
    let mut named = false;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." if named => return false,
            ".." => up += 1,
            part if !can_be_file_name(part, os) => return false,
            _ => named = true,
        }
    }
    up <= depth
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn links_stay_inside_whatever_they_pass_through() {
        for (path, target, inside) in [
            ("x", "y", true),
            ("x", "./y/z", true),
            ("a/x", "../y", true),
            ("a/b/x", "../../y", true),
            ("a/b/x", "../../../y", false),
            ("x", "..", false),
            ("x", "y/..", false),
            ("a/x", "y/../z", false),
            ("a/x", ".././../y", false),
            ("x", "/y", false),
            ("x", "", false),
            ("x", "..\\y", false),
            ("x", "a\nb", false),
        ] {
            assert_eq!(link_stays_inside(path, target, Os::Linux), inside, "{path} -> {target}");
        }
        assert!(link_stays_inside("x", "c:y", Os::Linux) && !link_stays_inside("x", "c:y", Os::Windows));
    }

    #[test]
    fn invalid_file_names_are_rejected_for_each_system() {
        for bad in [
            "NUL",
            "nul.txt",
            "con",
            "Aux.tar.gz",
            "com1",
            "LPT9.log",
            "com¹",
            "CONIN$",
            "nul .x",
            "a.",
            "a ",
            "a:b",
            "c:",
            "a*",
            "a?",
            "\"",
            "<",
            ">",
            "|",
        ] {
            assert!(!can_be_file_name(bad, Os::Windows), "{bad:?}");
            assert!(can_be_file_name(bad, Os::Linux), "{bad:?}");
        }
        for bad in ["a\\b", "a\0", "\u{7f}", "a\n", "\u{85}"] {
            assert!(!can_be_file_name(bad, Os::Windows) && !can_be_file_name(bad, Os::Linux), "{bad:?}");
        }
        for good in ["null", "com", "com10", "COMA", "console", "a b", ".a", "lpt", "ä€", "aux2"] {
            assert!(can_be_file_name(good, Os::Windows) && can_be_file_name(good, Os::Linux), "{good:?}");
        }
        assert!(!can_be_file_name(&"€".repeat(256), Os::Windows));
    }

    #[test]
    fn case_folding_matches_case_insensitive_file_systems() {
        let folded = |text: &str| {
            let mut folded = String::new();
            fold_into(&mut folded, text);
            folded
        };
        for (one, other) in [("Bin/RUN", "bin/run"), ("É", "é"), ("Σ", "ς"), ("ſ", "S"), ("K", "k"), ("ǅ", "ǆ")]
        {
            assert_eq!(folded(one), folded(other), "{one} {other}");
        }
        assert_ne!(folded("a/b"), folded("ab"));
        assert_ne!(folded("straße"), folded("strasse"));
    }

    proptest! {
        /// An accepted path is below the root, is accepted again unchanged, and has no special components.
        #[test]
        fn an_accepted_path_stays_below_the_root(path in "[a-zA-Z0-9./\\\\: \u{0}-\u{1f}é]{0,40}") {
            for os in [Os::Linux, Os::Windows] {
                let limits = UnpackLimits::default();
                if let Ok(clean) = relative(&path, os, &limits) {
                    prop_assert_eq!(&relative(&clean, os, &limits).unwrap(), &clean);
                    prop_assert!(!clean.starts_with('/') && !clean.ends_with('/') && !clean.contains("//"));
                    prop_assert!(clean.split('/').all(|part| part != ".." && part != "."));
                }
            }
        }

        /// Following any accepted links from any path ends below the root.
        #[test]
        fn no_chain_of_links_leads_out(
            links in prop::collection::vec(("[ab](/[ab]){0,3}", "(\\.\\./|\\./){0,3}[ab.]{0,2}(/[ab.]{1,2}){0,3}"), 1..8),
            start in "[ab](/[ab]){0,4}",
        ) {
            let made: Vec<_> = links.iter().filter(|(path, target)| link_stays_inside(path, target, Os::Linux)).collect();
            // Resolve the path as a kernel does; leaving the root is an error here.
            let mut here: Vec<String> = Vec::new();
            let mut rest: Vec<String> = start.split('/').rev().map(str::to_owned).collect();
            for _ in 0..200 {
                let Some(part) = rest.pop() else { break };
                match part.as_str() {
                    "" | "." => {}
                    ".." => prop_assert!(here.pop().is_some(), "{links:?} lead out of the root from {start}"),
                    _ => {
                        here.push(part);
                        let path = here.join("/");
                        // Links are created in real directories only.
                        if let Some((_, target)) = made.iter().find(|(link, _)| *link == path) {
                            here.pop();
                            rest.extend(target.split('/').rev().map(str::to_owned));
                        }
                    }
                }
            }
        }
    }
}
