//! No modules of a crate import each other, directly or in a cycle.
//!
//! The rule: no child of a module, taken together with all files below it, imports itself through its siblings. The module tree is read
//! from the `mod` declarations, without tests. Every `use` and every path in the code is resolved to the file that defines the name,
//! through imports, re-exports and globs, and counts as an import of that file. A declaration `mod child;`, and a re-export of a name that
//! the file itself does not use, are not imports.
//!
//! A file and its own ancestors may import each other: a parent composes its children, calls them, and defines the types that they share.
//! Nearly every parent of this project does so (`Config` in `config.rs` is filled by `config/keys.rs`), so parent and child are treated as
//! one module in two files. A parent cannot hide a cycle between other modules: imports of and by a child's descendants count as the
//! child's, so `a.rs -> b.rs -> a/x.rs` is rejected, although `a.rs` and `a/x.rs` may import each other.
//!
//! Not found: paths in attributes that are strings (`#[serde(with = "…")]`), the output of macros, and methods whose types are not named.

mod graph;
mod modules;
mod paths;

use std::collections::BTreeMap;

use super::Violation;
use modules::{Crate, Names};

/// The maximum number of names printed for each pair of files.
const MAX_NAMES: usize = 3;

/// Each cycle once, at the first line that connects its first file to another. `sources` are the project's Rust files with their texts;
/// `root` is the crate's root file.
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
        for cycle in graph::cycles(&edges) {
            let cycle: Vec<&Vec<usize>> = cycle.iter().map(|place| &families[*place]).collect();
            violations.push(violation(&whole, &ties, &cycle));
        }
    }
    violations
}

/// The files of the crate whose root file is `root` that are built without tests.
pub(super) fn built_files(root: &str, sources: &[(&str, &str)]) -> Vec<String> {
    Crate::read(root, sources).modules.into_iter().map(|module| module.file).collect()
}

/// The imports that form a cycle: each pair of files, with the names that the first uses from the second.
fn violation(whole: &Crate, ties: &[BTreeMap<usize, Names>], cycle: &[&Vec<usize>]) -> Violation {
    let file = |module: usize| whole.modules[module].file.as_str();
    let mut pairs: Vec<(&str, &str, &Names)> = Vec::new();
    for family in cycle {
        for from in *family {
            let outside = ties[*from].iter().filter(|(to, _)| !family.contains(to));
            let inside = outside.filter(|(to, _)| cycle.iter().any(|family| family.contains(to)));
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
