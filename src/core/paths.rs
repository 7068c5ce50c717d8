//! The paths in a package's manifest: relative, and inside the release's directory.
//!
//! Archives have their own rules for entries and link targets (`package/unpack/names.rs`): entries use `/` on every system, a colon is part
//! of a name on Linux, a link target may begin with `..`, and each rejection has its own message. A manifest is written by a person and for
//! any system, so here both separators count, and a drive or a stream is rejected on every system.

/// Whether a path is relative and cannot leave its directory.
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
    fn a_path_that_can_leave_its_directory_is_rejected_on_every_system() {
        for bad in ["", "/x", "\\x", "..", "a/..", "a\\..\\b", "../x", "c:x", "a\0"] {
            assert!(!stays_inside(bad), "{bad:?}");
        }
        for good in ["x", "./x", "a/b", "a\\b", "x..y", "..x", "a//b"] {
            assert!(stays_inside(good), "{good:?}");
        }
    }
}
