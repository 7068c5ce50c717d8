//! The globs of `fleet.toml`: `*` matches any run of characters, `?` matches one; every other character matches itself.
//!
//! Nothing is compiled, and only the last star is backtracked: a file with many globs needs no memory, and a hostile one no time.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Limit for a glob, characters: no agent id or host name is longer.
const MAX_CHARS: usize = 255;

/// A valid pattern.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Glob(String);

impl Glob {
    /// Whether the pattern matches the whole `text`. ASCII letters match in either case, as in host names.
    pub fn matches(&self, text: &str) -> bool {
        let (pattern, text) = (self.0.as_bytes(), text.as_bytes());
        let (mut at, mut read) = (0, 0);
        // Where to retry if the characters after the last star do not match: the star, and the end of the text that it has matched.
        let mut star: Option<(usize, usize)> = None;
        while read < text.len() {
            match pattern.get(at) {
                Some(b'*') => {
                    star = Some((at, read));
                    at += 1;
                }
                Some(b'?') => {
                    at += 1;
                    read += char_len(text, read);
                }
                Some(byte) if byte.eq_ignore_ascii_case(&text[read]) => {
                    at += 1;
                    read += 1;
                }
                _ => {
                    let Some((place, end)) = star else { return false };
                    star = Some((place, end + 1));
                    at = place + 1;
                    read = end + 1;
                }
            }
        }
        pattern[at..].iter().all(|byte| *byte == b'*')
    }
}

/// Length in bytes of the character at `at`, or of the rest of it (a star may have matched a part of it).
fn char_len(text: &[u8], at: usize) -> usize {
    1 + text[at + 1..].iter().take_while(|byte| **byte & 0xC0 == 0x80).count()
}

impl TryFrom<String> for Glob {
    type Error = String;

    fn try_from(pattern: String) -> Result<Glob, String> {
        if pattern.is_empty() || pattern.chars().count() > MAX_CHARS {
            return Err(format!(
                "cannot use a glob of {} characters: expected 1 to {MAX_CHARS}",
                pattern.chars().count()
            ));
        }
        // Rejected, not matched literally: they are special in other globs, and no name here contains them.
        if let Some(odd) = pattern.chars().find(|c| "[]{}\\!".contains(*c) || c.is_control()) {
            return Err(format!(
                "cannot use {pattern:?} as a glob: {odd:?} is not supported; only * and ? are special"
            ));
        }
        Ok(Glob(pattern))
    }
}

impl From<Glob> for String {
    fn from(glob: Glob) -> String {
        glob.0
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn glob(pattern: &str) -> Glob {
        Glob::try_from(pattern.to_owned()).unwrap()
    }

    #[test]
    fn stars_and_question_marks() {
        for (pattern, text, expected) in [
            ("web-*", "web-1", true),
            ("web-*", "web-", true),
            ("web-*", "WEB-1", true),
            ("web-*", "aweb-1", false),
            ("*", "", true),
            ("?", "", false),
            ("?", "ä", true),
            ("??", "ä", false),
            ("*a*b", "xaxxbb", true),
            ("*a*b", "xaxxbc", false),
            ("54??", "5402", true),
            ("54??", "54021", false),
            ("a.b", "axb", false),
            ("linux", "linux", true),
            ("*?ä*", "xä", true),
        ] {
            assert_eq!(glob(pattern).matches(text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn characters_that_are_special_in_other_globs_are_rejected() {
        for bad in ["", "[ab]", "{a,b}", "a\\*", "!a", "a\nb", &"a".repeat(256)] {
            assert!(Glob::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    /// The definition; obvious, but exponential.
    fn by_definition(pattern: &[char], text: &[char]) -> bool {
        match (pattern.first(), text.first()) {
            (None, None) => true,
            (Some('*'), _) => {
                by_definition(&pattern[1..], text) || (!text.is_empty() && by_definition(pattern, &text[1..]))
            }
            (Some('?'), Some(_)) => by_definition(&pattern[1..], &text[1..]),
            (Some(a), Some(b)) if a == b => by_definition(&pattern[1..], &text[1..]),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn a_match_agrees_with_the_definition(pattern in "[abä*?]{1,8}", text in "[abä]{0,8}") {
            let chars = |s: &str| s.chars().collect::<Vec<_>>();
            prop_assert_eq!(glob(&pattern).matches(&text), by_definition(&chars(&pattern), &chars(&text)));
        }
    }
}
