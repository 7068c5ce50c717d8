//! The paths in a file's code: `use` declarations, split into single imports, and paths elsewhere.

use std::ops::Range;

use crate::tidy::source::{bracketed, is_part_of_word, words};

/// One name, or glob, of a `use` declaration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Import {
    pub(super) path: Vec<String>,
    /// Its name in this file; `None` for a glob.
    pub(super) name: Option<String>,
    /// Whether other modules can use it.
    pub(super) public: bool,
    pub(super) at: usize,
}

/// A path of two or more segments, or one that begins with an imported name, anywhere in the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mention {
    pub(super) path: Vec<String>,
    pub(super) at: usize,
}

/// `code` with the paths of `pub(in …)` blanked: they restrict visibility and use no name.
pub(super) fn without_restrictions(code: &str) -> String {
    let mut out = code.to_owned();
    for at in words(code, "pub") {
        let after = at + "pub".len();
        if let Some(inside) = bracketed(&code[after..]).filter(|inside| inside.starts_with("in ")) {
            out.replace_range(after..after + inside.len() + 2, &" ".repeat(inside.len() + 2));
        }
    }
    out
}

/// The imports of `code`, and `code` without them.
pub(super) fn imports(code: &str) -> (Vec<Import>, String) {
    let mut found = Vec::new();
    let mut rest = code.to_owned();
    for at in words(code, "use") {
        let before = code[..at].trim_end();
        let visible = before.ends_with("pub") || (before.ends_with(')') && before.contains("pub("));
        // `impl Trait + use<'a>` is not an import.
        let is_item = visible || before.is_empty() || before.ends_with([';', '{', '}', ']']);
        let start = at + "use".len();
        let Some(length) = code[start..].find(';').filter(|_| is_item) else { continue };
        leaves(&code[start..start + length], &[], visible, start, &mut found);
        let blank: String = rest[at..start + length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        rest.replace_range(at..start + length, &blank);
    }
    (found, rest)
}

/// Splits one tree of a `use` declaration. `tree` begins at `start` of the code.
fn leaves(tree: &str, prefix: &[String], public: bool, start: usize, found: &mut Vec<Import>) {
    let text = tree.trim();
    if text.is_empty() {
        return;
    }
    let start = start + (tree.len() - tree.trim_start().len());
    if let Some(group) = text.find('{') {
        let prefix = [prefix, &segments(&text[..group])].concat();
        let Some(inside) = bracketed(&text[group..]) else { return };
        let mut from = 0;
        for part in parts(inside) {
            leaves(part, &prefix, public, start + group + 1 + from, found);
            from += part.len() + 1;
        }
        return;
    }
    let (path, renamed) = match text.split_once(" as ") {
        Some((path, name)) => (path, Some(name.trim())),
        None => (text, None),
    };
    let mut own = segments(path);
    let is_glob = own.pop_if(|last| last == "*").is_some();
    // `use a::{self, b}` names `a` itself.
    if !prefix.is_empty() && own == ["self"] {
        own.clear();
    }
    let path = [prefix, &own].concat();
    let Some(last) = path.last() else { return };
    let name = (!is_glob).then(|| renamed.unwrap_or(last).to_owned());
    found.push(Import { name, path: path.clone(), public, at: start });
}

/// The parts of a group, split at its own commas.
fn parts(group: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    group
        .split(|c| {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            c == ',' && depth == 0
        })
        .collect()
}

fn segments(path: &str) -> Vec<String> {
    path.split("::").map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

/// The paths of code without imports; single names only if `is_known` accepts them.
pub(super) fn mentions(code: &str, is_known: impl Fn(&str) -> bool) -> Vec<Mention> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(first) = code[at..].chars().next() {
        let length = word_length(&code[at..]);
        if length == 0 {
            at += first.len_utf8();
            continue;
        }
        let start = at;
        let mut path = vec![code[at..at + length].to_owned()];
        at += length;
        while let Some(next) = code[at..].strip_prefix("::").map(word_length).filter(|length| *length > 0) {
            path.push(code[at + 2..at + 2 + next].to_owned());
            at += 2 + next;
        }
        let before = code[..start].trim_end();
        let is_head = !before.ends_with("::") && (!before.ends_with('.') || before.ends_with(".."));
        if is_head && !first.is_ascii_digit() && (path.len() > 1 || is_known(&path[0])) {
            found.push(Mention { path, at: start });
        }
    }
    found
}

fn word_length(text: &str) -> usize {
    text.find(|c| !is_part_of_word(c)).unwrap_or(text.len())
}

/// The names of the items that `code` defines outside blocks, without modules.
pub(super) fn items(code: &str) -> Vec<String> {
    const KINDS: &[&str] = &["fn", "struct", "enum", "union", "trait", "type", "const", "static", "macro_rules"];
    const NO_NAMES: &[&str] = &["fn", "mut", "unsafe", "async", "extern"];
    let mut depth = 0_usize;
    let mut found = Vec::new();
    let mut kind = false;
    let mut at = 0;
    while let Some(first) = code[at..].chars().next() {
        let length = word_length(&code[at..]).max(first.len_utf8());
        let word = &code[at..at + length];
        match word {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth = depth.saturating_sub(1),
            _ if depth > 0 => {}
            _ if KINDS.contains(&word) => kind = true,
            _ if kind && is_part_of_word(first) && !NO_NAMES.contains(&word) => {
                found.push(word.to_owned());
                kind = false;
            }
            _ => {}
        }
        at += length;
    }
    found
}

/// The `mod name;` declarations of `code` outside blocks, and the ranges of `mod name { … }` blocks.
pub(super) fn submodules(code: &str) -> (Vec<String>, Vec<Range<usize>>) {
    let (mut files, mut blocks) = (Vec::new(), Vec::new());
    for at in words(code, "mod") {
        let after = at + "mod".len();
        let name = code[after..].trim_start();
        let begin = after + (code[after..].len() - name.len());
        let length = word_length(name);
        let rest = name[length..].trim_start();
        if length > 0 && rest.starts_with(';') && !blocks.iter().any(|block: &Range<usize>| block.contains(&at)) {
            files.push(name[..length].to_owned());
        } else if length > 0
            && let Some(inside) = bracketed(rest).filter(|_| rest.starts_with('{'))
        {
            let open = begin + (name.len() - rest.len());
            blocks.push(open..open + inside.len() + 2);
        }
    }
    (files, blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imported(code: &str) -> Vec<(String, Option<String>, bool)> {
        imports(code).0.into_iter().map(|import| (import.path.join("::"), import.name, import.public)).collect()
    }

    #[test]
    fn groups_are_split_into_single_imports() {
        let found = imported("use super::{a::{self, b as c}, d};\npub(super) use self::x::*;\npub use y::Z;");
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(
            found,
            [
                ("super::a".to_owned(), name("a"), false),
                ("super::a::b".to_owned(), name("c"), false),
                ("super::d".to_owned(), name("d"), false),
                ("self::x".to_owned(), None, true),
                ("y::Z".to_owned(), name("Z"), true),
            ]
        );
    }

    #[test]
    fn an_import_is_found_at_its_own_line() {
        let code = "use super::{\n    a,\n    b::c,\n};\nfn f() -> impl Sized + use<'_> { use crate::d; }";
        let (found, rest) = imports(code);
        let lines: Vec<_> = found.iter().map(|import| code[..import.at].matches('\n').count() + 1).collect();
        assert_eq!(lines, [2, 3, 5]);
        assert_eq!(rest.len(), code.len());
        assert!(!rest.contains("crate::d") && rest.contains("use<'_>"));
    }

    #[test]
    fn paths_are_found_by_their_heads() {
        let known = |name: &str| name == "tree";
        let found = mentions("a.tree; a::b::<c::d>(x.parse::<T>()); ..tree; let n = 1; <T as e::F>::g", known);
        let found: Vec<_> = found.into_iter().map(|mention| mention.path.join("::")).collect();
        assert_eq!(found, ["a::b", "c::d", "tree", "e::F"]);
    }

    #[test]
    fn a_restricted_visibility_is_not_a_use() {
        let code = without_restrictions("pub(in crate::a) fn f(); pub(super) fn g(); pub struct S(crate::b::C);");
        assert!(!code.contains("crate::a") && code.contains("pub(super)") && code.contains("crate::b::C"));
    }

    #[test]
    fn only_items_outside_blocks_are_found() {
        let code = "pub const fn a() { const X: u8 = 1; }\nstatic mut B: u8 = 1;\nimpl D { fn e() {} }\nmacro_rules! m { }\nmod n;";
        assert_eq!(items(code), ["a", "B", "m"]);
        let (files, blocks) = submodules("mod a; pub mod b { mod c; }");
        assert_eq!((files, blocks.len()), (vec!["a".to_owned()], 1));
        assert_eq!(blocks[0], 17..27);
    }
}
