//! Imports go one way: `main -> cli -> personality -> mechanism -> platform`. Every module may use `core`, which is pure.

use super::Violation;
use super::source::{bracketed, code, line, without_tests, words};

const PERSONALITIES: &[&str] = &["control", "gateway", "service", "spa", "spm"];
const MECHANISMS: &[&str] = &[
    "command",
    "config",
    "control_socket",
    "endpoint",
    "fetching",
    "home",
    "host_service",
    "installation",
    "lifecycle",
    "lock",
    "logging",
    "migrations",
    "output",
    "package",
    "process",
    "role",
    "store",
    "uplink",
];
/// The crates that `core` may use besides `std` and itself.
const PURE: &[&str] = &["schemars", "semver", "serde"];
/// The parts of `std` that `core` may not use: effects and the clock.
const IMPURE: &[&str] =
    &["std::env", "std::fs", "std::net", "std::os", "std::process", "std::thread", "Instant::now", "SystemTime::now"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layer {
    Top,
    Personality,
    Mechanism,
    Platform,
    Core,
}

fn layer(module: &str) -> Option<Layer> {
    match module {
        "main" | "cli" => Some(Layer::Top),
        "platform" => Some(Layer::Platform),
        "core" => Some(Layer::Core),
        module if PERSONALITIES.contains(&module) => Some(Layer::Personality),
        module if MECHANISMS.contains(&module) => Some(Layer::Mechanism),
        _ => None,
    }
}

/// The crates that a manifest depends on, as code spells them.
pub(super) fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut inside = false;
    for line in manifest.lines() {
        if let Some(table) = line.trim().strip_prefix('[') {
            inside = table.trim_end_matches(']').ends_with("dependencies");
        } else if inside
            && let Some((name, _)) = line.split_once('=')
            && !name.starts_with([' ', '#'])
        {
            names.push(name.trim().replace('-', "_"));
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// Checks the layering of one file of `src`; tests are exempt.
pub(super) fn check(file: &str, text: &str, dependencies: &[String]) -> Vec<Violation> {
    let Some(path) = file.strip_prefix("src/").and_then(|path| path.strip_suffix(".rs")) else { return Vec::new() };
    let parts: Vec<_> = path.split('/').collect();
    if parts.contains(&"tests") {
        return Vec::new();
    }
    let own = parts[0];
    let code = without_tests(&code(text));
    let mut violations = Vec::new();
    let mut add =
        |at: usize, what: String| violations.push(Violation { file: file.to_owned(), line: line(&code, at), what });
    let Some(from) = layer(own) else {
        add(0, format!("unknown module {own}: add it to its layer in xtask/src/tidy/layers.rs"));
        return violations;
    };
    for (at, module) in uses(&code, parts.len()) {
        if module == own {
            continue;
        }
        // Names that the root re-exports have no layer; there should be none.
        let Some(to) = layer(&module) else { continue };
        if let Some(why) = rejection(from, to) {
            add(at, format!("{own} uses {module}: {why}"));
        }
    }
    if from == Layer::Core {
        for dependency in dependencies.iter().filter(|name| !PURE.contains(&name.as_str())) {
            for at in heads(&code, dependency) {
                add(
                    at,
                    format!("core uses {dependency}: it is pure and imports std, {} and itself only", PURE.join(", ")),
                );
            }
        }
        for effect in IMPURE {
            words(&code, effect).for_each(|at| {
                add(at, format!("core uses {effect}: it is pure; its callers have the effects and pass the time"))
            });
        }
    }
    violations
}

/// The reason why `from` may not use `to`, or `None` if it may. The two are different modules.
fn rejection(from: Layer, to: Layer) -> Option<&'static str> {
    use Layer::*;
    match (from, to) {
        (Top, _) | (Personality, Mechanism | Platform | Core) => None,
        (Mechanism, Mechanism | Platform | Core) | (Platform, Core) => None,
        (Personality, Personality) => Some("personalities do not use each other; move shared code to a mechanism"),
        (Personality, Top) => Some("a personality owns its arguments; the command line composes them"),
        (Mechanism, _) => Some("a mechanism is used by personalities and uses none"),
        (Platform, _) => Some("platform uses core only"),
        (Core, _) => Some("core is pure and uses itself only"),
    }
}

/// The root modules that the code names, with positions: `crate::x`, `crate::{x, y}`, and the `super::` chain that leads to the root from a
/// file at `depth`.
fn uses(code: &str, depth: usize) -> Vec<(usize, String)> {
    let up = "super::".repeat(depth);
    let roots = code.match_indices("crate::").map(|(at, root)| (at, at + root.len()));
    let roots = roots.chain(code.match_indices(&up).map(|(at, root)| (at, at + root.len())));
    let mut found = Vec::new();
    for (at, end) in roots {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[end..];
        match bracketed(rest) {
            Some(group) if rest.starts_with('{') => found.extend(names(group).map(|name| (at, name))),
            _ => found.push((at, word(rest))),
        }
    }
    found
}

/// The first word of each part of a `use` group.
fn names(group: &str) -> impl Iterator<Item = String> + '_ {
    let mut depth = 0_usize;
    let parts = group.split(move |c| {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    parts.map(|part| word(part.trim())).filter(|name| !name.is_empty())
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The positions where `name` is the head of a path.
fn heads<'a>(code: &'a str, name: &'a str) -> impl Iterator<Item = usize> + 'a {
    words(code, name).filter(move |at| {
        let before = code[..*at].trim_end();
        let is_head = !before.ends_with("::") || before.ends_with("use ::");
        let after = &code[at + name.len()..];
        is_head && (after.starts_with("::") || (before.ends_with("use") && after.starts_with(';')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: &str, text: &str) -> Vec<usize> {
        let dependencies = dependencies(
            "[dependencies]\nserde = \"1\"\nserde_json = \"1\"\n[x]\nother = 1\n[dev-dependencies]\nfast-rand = { a = 1 }",
        );
        assert_eq!(dependencies, ["fast_rand", "serde", "serde_json"]);
        let mut lines: Vec<_> = check(file, text, &dependencies).iter().map(|violation| violation.line).collect();
        lines.sort_unstable();
        lines
    }

    #[test]
    fn mechanisms_use_no_personality() {
        let text =
            "use crate::spm::x;\nuse crate::{home::Home, gateway::{a, b}};\nuse crate::store;\nuse super::cli;\n";
        assert_eq!(found("src/lock.rs", text), [1, 2, 4]);
        assert_eq!(found("src/package/fetch.rs", "use super::Keys;\nuse super::super::spm;\nuse super::spm;"), [2]);
    }

    #[test]
    fn personalities_do_not_use_each_other() {
        assert_eq!(
            found("src/spm/agents.rs", "use crate::spm::x;\nuse crate::home;\nfn f() { crate::spa::run() }"),
            [3]
        );
        assert_eq!(found("src/control.rs", "use crate::cli::Command;"), [1]);
        assert_eq!(found("src/cli.rs", "use crate::{spm, spa, control};"), [0; 0]);
        assert_eq!(found("src/main.rs", "mod spm;\nfn f() { crate::spm::main() }"), [0; 0]);
    }

    #[test]
    fn tests_are_exempt() {
        assert_eq!(found("src/spm/tests.rs", "use crate::gateway;"), [0; 0]);
        assert_eq!(found("src/lock.rs", "#[cfg(test)]\nmod tests {\n    use crate::spm;\n}\n"), [0; 0]);
    }

    #[test]
    fn core_is_pure() {
        let text = "use std::collections::BTreeMap;\nuse serde::Serialize;\nuse serde_json::Value;\nuse crate::core::model;\nuse crate::home;\n\
                    fn f() { std::fs::read(x) }\nlet now = Instant::now();\nfast_rand::u64(..);\nlet serde_json = 1;";
        assert_eq!(found("src/core/plan.rs", text), [3, 5, 6, 7, 8]);
        assert_eq!(found("src/platform/unix.rs", "use crate::core::model;\nuse crate::home;"), [2]);
    }

    #[test]
    fn a_module_without_a_layer_is_reported() {
        assert_eq!(found("src/utils.rs", ""), [1]);
    }
}
