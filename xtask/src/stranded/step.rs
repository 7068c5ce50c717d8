//! The name of a step: the same in every run, whatever pids, temporary names and versions it had.

use std::fmt;
use std::path::Path;

/// The directories of unfinished downloads and packages.
const UNFINISHED: [&str; 4] = ["cache/", "staging/", ".install/cache/", ".install/staging/"];

/// One step of a run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Step {
    role: String,
    call: &'static str,
    subject: String,
    /// How many steps of the same name there were in this run, with this one.
    number: u32,
}

impl Step {
    pub(super) fn numbered(self, number: u32) -> Step {
        Step { number, ..self }
    }

    /// Whether it only repeats what two steps before it did: nothing reads a half-written download or unpacked file, and a lock file that
    /// exists is opened each time the lock is taken.
    pub(super) fn is_repetition(&self) -> bool {
        let is_in = |directory: &&str| self.subject.starts_with(*directory);
        let fills = self.call.contains("write") && UNFINISHED.iter().any(is_in);
        let locks = self.call.starts_with("open") && is_in(&"run/") && self.subject.ends_with(".lock");
        self.number > 2 && (fills || locks)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {} #{}", self.role, self.call, self.subject, self.number)
    }
}

/// The versions of one run: where from, where to, and the one before.
#[derive(Debug, Clone, Default)]
pub(super) struct Naming {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) older: String,
}

impl Naming {
    /// The step's name; `None` for what does not last: devices, `/proc`, and the logs, which nothing reads.
    pub(super) fn step(&self, home: &Path, role: &str, call: &'static str, subject: &str) -> Option<Step> {
        let subject = match Path::new(subject).strip_prefix(home) {
            Ok(inside) => {
                let inside = inside.display().to_string();
                if inside.starts_with("log/") {
                    return None;
                }
                self.plain(&inside)
            }
            Err(_) if subject.starts_with("/sys/fs/cgroup") => self.plain("cgroup"),
            Err(_) if subject.starts_with('/') && !matches!(call, "execve" | "execveat") => return None,
            Err(_) => self.plain(subject),
        };
        Some(Step { role: self.plain(role), call, subject, number: 1 })
    }

    fn plain(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (version, word) in [(&self.to, "NEW"), (&self.from, "OLD"), (&self.older, "OLDER")] {
            if !version.is_empty() {
                text = text.replace(version.as_str(), word);
            }
        }
        text.split('/').map(temporary).collect::<Vec<_>>().join("/")
    }
}

/// A path's part, with what differs from run to run as `*`.
fn temporary(part: &str) -> String {
    if part.starts_with(".new-") {
        return ".new-*".to_owned();
    }
    let words = part.split_inclusive(['.', '-', '_']);
    words
        .map(|word| {
            let (body, end) = word.find(['.', '-', '_']).map_or((word, ""), |at| word.split_at(at));
            let is_random = body.len() >= 6
                && body.chars().any(|letter| letter.is_ascii_digit() || letter.is_ascii_uppercase())
                && body.chars().all(|letter| letter.is_ascii_alphanumeric());
            let is_number = body.len() >= 2 && body.chars().all(|letter| letter.is_ascii_digit());
            if is_random || is_number { format!("*{end}") } else { word.to_owned() }
        })
        .collect()
}
