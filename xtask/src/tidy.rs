//! `cargo xtask tidy`: the project rules that the compiler does not check. Prints each violation as `file:line: what and why`.

mod cycles;
mod glossary;
mod layers;
mod machine;
mod rules;
mod source;
mod types;

use std::fmt;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{read, say};
use crate::workspace;

/// The root file of each crate that is checked for import cycles.
const ROOTS: &[&str] = &["src/main.rs", "xtask/src/main.rs"];

/// The root file of the crate whose types have unique names.
const PROGRAM: &str = "src/main.rs";

/// A violation of a project rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Violation {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

#[allow(clippy::print_stdout, reason = "the violations are this task's output")]
pub(crate) fn run() -> Result<()> {
    let root = workspace::root();
    // Uncommitted files count; ignored and deleted files do not.
    let list = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let listed =
        read(Command::new("git").current_dir(&root).args(list)).context("cannot list the files of the project")?;
    let mut files: Vec<_> = listed.lines().filter(|file| root.join(file).is_file()).collect();
    files.sort_unstable();
    files.dedup();
    let manifest = fs::read_to_string(root.join("Cargo.toml")).context("cannot read Cargo.toml")?;
    let dependencies = layers::dependencies(&manifest);
    let own_paths = machine::own_paths(&root);

    let glossary = glossary::Glossary::of_the_project().map_err(anyhow::Error::msg)?;

    let mut violations = rules::misplaced(&files);
    let mut sources = Vec::new();
    for file in &files {
        let bytes = fs::read(root.join(file)).with_context(|| format!("cannot read {file}"))?;
        let Ok(text) = String::from_utf8(bytes) else { continue };
        violations.extend(machine::check(file, &text, &own_paths));
        violations.extend(glossary.check(file, &text));
        if file.ends_with(".rs") {
            violations.extend(rules::of_source(file, &text));
            violations.extend(layers::check(file, &text, &dependencies));
            sources.push((*file, text));
        }
    }
    let sources: Vec<_> = sources.iter().map(|(file, text)| (*file, text.as_str())).collect();
    for root in ROOTS {
        violations.extend(cycles::check(root, &sources));
    }
    let built = cycles::built_files(PROGRAM, &sources);
    let built: Vec<_> = sources.iter().filter(|(file, _)| built.iter().any(|name| name == file)).copied().collect();
    violations.extend(types::check(&built));
    violations.sort();
    violations.dedup();
    for violation in &violations {
        println!("{violation}");
    }
    if !violations.is_empty() {
        bail!("{} violations of the project rules", violations.len());
    }
    say(&format!("tidy: {} files follow the project rules", files.len()));
    Ok(())
}
