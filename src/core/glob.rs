//! The globs of `fleet.toml`: `*` stands for any run of characters, `?` for one; everything else stands for itself.
//!
//! Nothing is compiled and nothing backtracks more than one star, so that a file full of globs costs no memory and a hostile one no time.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Beyond this a glob is a mistake: no agent id or host name is as long.
const MAX_CHARS: usize = 255;

/// A pattern that is known to be one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Glob(String);

impl Glob {
    /// Whether the whole of `text` is what the pattern says. ASCII letters count the same in either case: host names do.
    pub fn matches(&self, text: &str) -> bool {
        let (pattern, text) = (self.0.as_bytes(), text.as_bytes());
        let (mut at, mut read) = (0, 0);
        // Where to try again when the characters after the last star do not fit: the star, and how much it has taken.
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
                    let Some((place, taken)) = star else { return false };
                    star = Some((place, taken + 1));
                    at = place + 1;
                    read = taken + 1;
                }
            }
        }
        pattern[at..].iter().all(|byte| *byte == b'*')
    }
}

/// Length of the character that begins at `at`, or 1 within one (a star may have taken a part of it).
fn char_len(text: &[u8], at: usize) -> usize {
    1 + text[at + 1..].iter().take_while(|byte| **byte & 0xC0 == 0x80).count()
}

impl TryFrom<String> for Glob {
    type Error = String;

    fn try_from(pattern: String) -> Result<Glob, String> {
        if pattern.is_empty() || pattern.chars().count() > MAX_CHARS {
            return Err(format!("cannot take a glob of {} characters: expected 1 to {MAX_CHARS}", pattern.len()));
        }
        // Refused instead of taken literally, for they have a meaning elsewhere and no place in what is matched here.
        if let Some(odd) = pattern.chars().find(|c| "[]{}\\!".contains(*c) || c.is_control()) {
            return Err(format!(
                "cannot take {pattern:?} as a glob: {odd:?} is not supported, only * and ? are special"
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
    fn what_is_special_elsewhere_is_refused_here() {
        for bad in ["", "[ab]", "{a,b}", "a\\*", "!a", "a\nb", &"a".repeat(256)] {
            assert!(Glob::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    /// The definition, exponential and obvious.
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
        fn it_means_what_the_definition_says(pattern in "[abä*?]{1,8}", text in "[abä]{0,8}") {
            let chars = |s: &str| s.chars().collect::<Vec<_>>();
            prop_assert_eq!(glob(&pattern).matches(&text), by_definition(&chars(&pattern), &chars(&text)));
        }
    }
}
