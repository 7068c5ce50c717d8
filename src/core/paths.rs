//! The paths that a package's manifest names: relative, and inside the release's directory.
//!
//! Archives have their own rule for the names of entries and the targets of links (`package/unpack/names.rs`): entries have `/` between their parts whatever the system, a colon is part of a name on Linux, a link may
//! begin with `..`, and each refusal has its own message. A manifest is written by a person before its system is known, so here both
//! separators count, and a drive or a stream is refused for every system.

/// Whether a relative path can only lead further in.
pub(super) fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with(['/', '\\'])
        && !path.contains(['\0', ':'])
        && path.split(['/', '\\']).all(|part| part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_further_in_whatever_the_system() {
        for bad in ["", "/x", "\\x", "..", "a/..", "a\\..\\b", "../x", "c:x", "a\0"] {
            assert!(!stays_inside(bad), "{bad:?}");
        }
        for good in ["x", "./x", "a/b", "a\\b", "x..y", "..x", "a//b"] {
            assert!(stays_inside(good), "{good:?}");
        }
    }
}
