//! No modules of a crate import each other, directly or in a circle.
//!
//! The rule: of the children of one parent, each taken together with all files below it, none imports itself through others. The module tree
//! is read from the `mod` declarations, tests left out. Every `use` and every path in the code is then resolved to the file that defines the
//! name, through imports, re-exports and globs, and is one import of that file. A declaration `mod child;`, and a re-export of a name that
//! the file itself does not use, are no imports.
//!
//! A file and its own ancestors may import each other: a parent composes its children and calls them, and defines the types that they share.
//! Nearly every parent of this project does so (`Config` in `config.rs` is filled by `config/keys.rs`); the pair is one module in two files, and
//! is read as one. Through a parent no circle between others can hide: imports of and by a child's descendants count as the child's, so that
//! `a.rs -> b.rs -> a/x.rs` is refused, though `a.rs` and `a/x.rs` may import each other.
//!
//! Not seen: paths in attributes that are texts (`#[serde(with = "…")]`), what macros expand to, and methods, whose types are not named.

mod graph;
mod modules;
mod paths;

use std::collections::BTreeMap;

use super::Violation;
use modules::{Crate, Names};

/// Of each pair of files, so many names are printed.
const MAX_NAMES: usize = 3;

/// Each circle once, at the first line that ties its first file to another. `sources` are the project's Rust files with their texts; the
/// file called `root` is its crate's first.
pub(super) fn check(root: &str, sources: &[(&str, &str)]) -> Vec<Violation> {
    let whole = Crate::read(root, sources);
    let ties: Vec<BTreeMap<usize, Names>> = (0..whole.modules.len()).map(|from| whole.imports(from)).collect();
    let mut violations = Vec::new();
    for parent in 0..whole.modules.len() {
        let families: Vec<Vec<usize>> = whole.children(parent).map(|child| whole.family(child)).collect();
        let place = |module: &usize| families.iter().position(|family| family.contains(module));
        let edges: Vec<Vec<usize>> = families
            .iter()
            .enumerate()
            .map(|(own, family)| {
                let imported = family.iter().flat_map(|from| ties[*from].keys()).filter_map(place);
                imported.filter(|to| *to != own).collect()
            })
            .collect();
        for circle in graph::circles(&edges) {
            let circle: Vec<&Vec<usize>> = circle.iter().map(|place| &families[*place]).collect();
            violations.push(violation(&whole, &ties, &circle));
        }
    }
    violations
}

/// What ties the families of a circle: each pair of files, with the names that the first takes from the second.
fn violation(whole: &Crate, ties: &[BTreeMap<usize, Names>], circle: &[&Vec<usize>]) -> Violation {
    let file = |module: usize| whole.modules[module].file.as_str();
    let mut pairs: Vec<(&str, &str, &Names)> = Vec::new();
    for family in circle {
        for from in *family {
            let outside = ties[*from].iter().filter(|(to, _)| !family.contains(to));
            let inside = outside.filter(|(to, _)| circle.iter().any(|family| family.contains(to)));
            pairs.extend(inside.map(|(to, names)| (file(*from), file(*to), names)));
        }
    }
    pairs.sort_unstable();
    let shown: Vec<String> =
        pairs.iter().map(|(from, to, names)| format!("{from} imports {} of {to}", listed(names))).collect();
    let (first, line) =
        pairs.first().map_or(("", 1), |(from, _, names)| (*from, names.values().min().copied().unwrap_or(1)));
    Violation { file: first.to_owned(), line, what: format!("an import cycle: {}", shown.join("; ")) }
}

/// The first names by their lines.
fn listed(names: &Names) -> String {
    let mut names: Vec<(usize, &str)> = names.iter().map(|(name, line)| (*line, name.as_str())).collect();
    names.sort_unstable();
    let more = names.len().saturating_sub(MAX_NAMES);
    let mut shown: Vec<String> =
        names.iter().take(MAX_NAMES).map(|(line, name)| format!("{name} (line {line})")).collect();
    if more > 0 {
        shown.push(format!("{more} more"));
    }
    shown.join(", ")
}

#[cfg(test)]
mod tests;
