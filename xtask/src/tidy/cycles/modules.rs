//! The modules of a crate, and the file that each of its paths leads to.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::paths::{self, Import};
use crate::tidy::source::{code, line, without_tests};

/// A path with more hops than this is an import cycle of names.
const MAX_HOPS: usize = 16;

/// The names that one file uses from another, each with the line of its first use.
pub(super) type Names = BTreeMap<String, usize>;

/// The files of a crate that are built without tests; the first is its root.
pub(super) struct Crate {
    pub(super) modules: Vec<Module>,
}

/// One file.
pub(super) struct Module {
    pub(super) file: String,
    parent: usize,
    children: BTreeMap<String, usize>,
    imports: Vec<Import>,
    items: BTreeSet<String>,
    /// The code without its imports.
    code: String,
    /// The blocks of modules inside this file.
    blocks: Vec<Range<usize>>,
}

/// The target of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Module(usize),
    /// An item of that module.
    Item(usize),
}

impl Crate {
    pub(super) fn read(root: &str, sources: &[(&str, &str)]) -> Crate {
        let sources: BTreeMap<&str, &str> = sources.iter().copied().collect();
        let mut modules = Vec::new();
        // The files still to be read: name, directory of the children, parent and module name.
        let directory = root.rsplit_once('/').map_or("", |(directory, _)| directory).to_owned();
        let mut ahead = vec![(root.to_owned(), directory, 0, String::new())];
        while let Some((file, directory, parent, name)) = ahead.pop() {
            let Some(text) = sources.get(file.as_str()) else { continue };
            let own = modules.len();
            let code = paths::without_restrictions(&without_tests(&code(text)));
            let (imports, code) = paths::imports(&code);
            let (children, blocks) = paths::submodules(&code);
            for child in children {
                let below = format!("{directory}/{child}");
                let flat = format!("{below}.rs");
                let file = if sources.contains_key(flat.as_str()) { flat } else { format!("{below}/mod.rs") };
                ahead.push((file, below, own, child));
            }
            let items = paths::items(&code).into_iter().collect();
            modules.push(Module { file, parent, children: BTreeMap::new(), imports, items, code, blocks });
            if own != parent {
                modules[parent].children.insert(name, own);
            }
        }
        Crate { modules }
    }

    /// The modules that `parent` declares, ordered by name.
    pub(super) fn children(&self, parent: usize) -> impl Iterator<Item = usize> {
        self.modules[parent].children.values().copied()
    }

    /// A module and all modules below it.
    pub(super) fn family(&self, module: usize) -> Vec<usize> {
        let mut family = vec![module];
        let mut next = 0;
        while let Some(member) = family.get(next) {
            family.extend(self.modules[*member].children.values());
            next += 1;
        }
        family
    }

    /// Every other file whose names the file `from` uses.
    pub(super) fn imports(&self, from: usize) -> BTreeMap<usize, Names> {
        let module = &self.modules[from];
        let is_bound = |name: &str| module.imports.iter().any(|import| import.name.as_deref() == Some(name));
        let mentions = paths::mentions(&module.code, is_bound);
        let mut found: BTreeMap<usize, Names> = BTreeMap::new();
        let mut add = |to: usize, name: &str, at: usize| {
            if to != from {
                let line = line(&module.code, at);
                found
                    .entry(to)
                    .or_default()
                    .entry(name.to_owned())
                    .and_modify(|first| *first = line.min(*first))
                    .or_insert(line);
            }
        };
        for import in &module.imports {
            let shown = import.path.last().map_or("", String::as_str);
            let Some(path) = self.outside(from, &import.path, import.at) else { continue };
            for target in self.resolve(from, path, 0) {
                match (target, &import.name) {
                    // An import of a module itself: its uses are the paths that begin with it.
                    (Target::Module(_), Some(_)) => {}
                    // All names of a module, unless they are re-exported.
                    (Target::Module(to), None) if !import.public => add(to, "*", import.at),
                    // A re-export that the file does not use itself is not an import of the file.
                    (Target::Item(to), Some(name))
                        if !import.public || mentions.iter().any(|mention| mention.path[0] == *name) =>
                    {
                        add(to, shown, import.at);
                    }
                    _ => {}
                }
            }
        }
        for mention in mentions.iter().filter(|mention| mention.path.len() > 1) {
            let Some(path) = self.outside(from, &mention.path, mention.at) else { continue };
            for target in self.resolve(from, path, 0) {
                if let Target::Item(to) = target {
                    add(to, &mention.path.join("::"), mention.at);
                }
            }
        }
        found
    }

    /// A path relative to the file: inside a module's block, the `super` that lead out of the block are removed. `None` if the path stays
    /// in the file.
    fn outside<'a>(&self, from: usize, path: &'a [String], at: usize) -> Option<&'a [String]> {
        let depth = self.modules[from].blocks.iter().filter(|block| block.contains(&at)).count();
        let up = path.iter().take_while(|part| *part == "super").count();
        match up {
            0 => Some(path),
            up if up < depth => None,
            _ => Some(&path[depth..]),
        }
    }

    /// What `path` leads to from the module `from`; empty unless it is a module or import of this crate.
    fn resolve(&self, from: usize, path: &[String], hops: usize) -> Vec<Target> {
        let Some(head) = path.first() else { return vec![] };
        let module = &self.modules[from];
        match head.as_str() {
            "crate" => self.at(0, &path[1..], hops),
            "self" => self.at(from, &path[1..], hops),
            "super" => self.at(module.parent, &path[1..], hops),
            "Self" => vec![],
            name if module.children.contains_key(name) || module.binds(name) => self.at(from, path, hops),
            name if !module.items.contains(name) => self.by_globs(from, path, hops),
            _ => vec![],
        }
    }

    /// What `path` leads to from the module `module`, seen from outside.
    fn at(&self, module: usize, path: &[String], hops: usize) -> Vec<Target> {
        let Some((first, rest)) = path.split_first() else { return vec![Target::Module(module)] };
        let here = &self.modules[module];
        if hops > MAX_HOPS {
            return vec![];
        }
        if first == "super" {
            return self.at(here.parent, rest, hops + 1);
        }
        let mut found = Vec::new();
        if let Some(child) = here.children.get(first) {
            if !rest.is_empty() {
                return self.at(*child, rest, hops + 1);
            }
            found.push(Target::Module(*child));
        }
        for import in here.imports.iter().filter(|import| import.name.as_ref() == Some(first)) {
            found.extend(self.resolve(module, &import.path, hops + 1).into_iter().flat_map(|target| match target {
                Target::Module(to) => self.at(to, rest, hops + 1),
                item => vec![item],
            }));
        }
        if here.items.contains(first) {
            found.push(Target::Item(module));
        } else if found.is_empty() && !here.binds(first) {
            found = self.by_globs(module, path, hops);
            if found.is_empty() {
                // Probably defined by a macro.
                found.push(Target::Item(module));
            }
        }
        found.dedup();
        found
    }

    /// What `path` leads to through the globs of `module`.
    fn by_globs(&self, module: usize, path: &[String], hops: usize) -> Vec<Target> {
        if hops > MAX_HOPS {
            return vec![];
        }
        let globs = self.modules[module].imports.iter().filter(|import| import.name.is_none());
        let behind = globs.flat_map(|glob| self.resolve(module, &glob.path, hops + 1));
        let mut found = Vec::new();
        for target in behind {
            let Target::Module(to) = target else { continue };
            let there = &self.modules[to];
            if there.items.contains(&path[0]) || there.children.contains_key(&path[0]) || there.passes_on(&path[0]) {
                found.extend(self.at(to, path, hops + 1));
            } else if to != module {
                found.extend(self.by_globs(to, path, hops + 1));
            }
        }
        found
    }
}

impl Module {
    /// Whether an import defines that name.
    fn binds(&self, name: &str) -> bool {
        self.imports.iter().any(|import| import.name.as_deref() == Some(name))
    }

    /// Whether other modules can use an import of that name.
    fn passes_on(&self, name: &str) -> bool {
        self.imports.iter().any(|import| import.public && import.name.as_deref() == Some(name))
    }
}
