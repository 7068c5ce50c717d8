//! A minimal Rust lexer that separates code from comments, literals and tests. Line numbers are kept.

/// The code only: comments and string and character literals are blanked.
pub(super) fn code(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    for taken in tokens(source) {
        if is_code(taken) {
            out.push_str(taken);
        } else {
            out.extend(taken.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        }
    }
    out
}

/// The comments and literals only: code is replaced by punctuation, markers of line comments and escaped line ends by white space.
pub(super) fn texts(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    for taken in tokens(source) {
        if taken.starts_with("//") {
            let text = taken.trim_start_matches('/');
            out.push_str("  ");
            out.push_str(text.strip_prefix('!').unwrap_or(text));
        } else if is_code(taken) {
            out.push_str(if taken.trim().is_empty() { taken } else { ";" });
        } else if taken.starts_with('"') {
            out.push_str(&taken.replace("\\\n", " \n").replace("\\n", ";"));
        } else {
            out.push_str(taken);
        }
    }
    out
}

/// Comments and literals whole, code character by character.
fn tokens(source: &str) -> impl Iterator<Item = &str> {
    let mut rest = source;
    let mut previous = None;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        let length = token(rest, previous);
        let (taken, remaining) = rest.split_at(length.clamp(first.len_utf8(), rest.len()));
        previous = if is_code(taken) { taken.chars().next() } else { Some(' ') };
        rest = remaining;
        Some(taken)
    })
}

/// Whether a token of [`token`] is code. Comments and literals are single tokens, code is cut into characters.
fn is_code(taken: &str) -> bool {
    taken.chars().nth(1).is_none()
}

/// The length of the comment or literal at the start of `rest`, or of one character.
fn token(rest: &str, previous: Option<char>) -> usize {
    let one = rest.chars().next().map_or(0, char::len_utf8);
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    let in_word = previous.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if !in_word && let Some(length) = raw_text(rest) {
        return length;
    }
    if rest.starts_with('\'') {
        return character(rest).unwrap_or(one);
    }
    one
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        let here = &rest[at..];
        if here.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += here.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// Up to and including the closing quote; a backslash escapes the next character.
fn quoted(rest: &str, mark: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == mark => return at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}

/// `r"…"`, `br#"…"#`, with any number of `#`.
fn raw_text(rest: &str) -> Option<usize> {
    let prefix = ["r", "br", "cr"]
        .into_iter()
        .find(|prefix| rest.strip_prefix(prefix).is_some_and(|after| after.trim_start_matches('#').starts_with('"')))?;
    let hashes = rest[prefix.len()..].chars().take_while(|c| *c == '#').count();
    let inside = prefix.len() + hashes + 1;
    let closing = format!("\"{}", "#".repeat(hashes));
    Some(rest[inside..].find(&closing).map_or(rest.len(), |at| inside + at + closing.len()))
}

/// A character literal, as opposed to a lifetime.
fn character(rest: &str) -> Option<usize> {
    let mut chars = rest.char_indices().skip(1);
    let (_, first) = chars.next()?;
    if first == '\\' {
        return Some(quoted(rest, '\''));
    }
    let (at, second) = chars.next()?;
    (second == '\'').then_some(at + 1)
}

/// `code` without its test modules: an item after `#[cfg(test)]` is blanked to its end.
pub(super) fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = code.to_owned();
    let mut from = 0;
    while let Some(found) = out[from..].find(MARK) {
        let start = from + found;
        let end = item_end(&out, start + MARK.len());
        let blank: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(start..end, &blank);
        from = start + blank.len();
    }
    out
}

/// The end of the item that begins at `from`: after its block, or after a semicolon that comes before any block.
fn item_end(code: &str, from: usize) -> usize {
    let mut depth = 0_usize;
    for (at, c) in code[from..].char_indices() {
        match c {
            ';' if depth == 0 => return from + at + 1,
            '{' => depth += 1,
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return from + at + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

/// The positions where `word` is a whole word.
pub(super) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !code[..*at].chars().next_back().is_some_and(is_part_of_word)
            && !code[at + word.len()..].chars().next().is_some_and(is_part_of_word)
    })
}

/// Whether a character can be part of an identifier.
pub(super) fn is_part_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The line number, from 1, of a position.
pub(super) fn line(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// The text between the bracket at the start of `code` and its closing bracket.
pub(super) fn bracketed(code: &str) -> Option<&str> {
    let mut depth = 0_usize;
    for (at, c) in code.char_indices() {
        match c {
            '(' | '{' | '[' => depth += 1,
            ')' | '}' | ']' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return code.get(1..at);
                }
            }
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        let table = [
            ("let a = \"x // y\"; // z", "let a = "),
            ("a /* b /* c */ d */ e", "a                   e"),
            ("let s = r#\"unsafe \"quoted\" \"#;", "let s = "),
            ("br\"\\\" + c", " + c"),
            ("let c = '\"'; d('\\'')", "let c = "),
        ];
        for (source, expected) in table {
            let found = code(source);
            assert_eq!(found.len(), source.len(), "{source}");
            assert!(found.contains(expected), "{source}: {found:?}");
            assert!(!found.contains('"') && !found.contains("unsafe") && !found.contains('z'), "{source}: {found:?}");
        }
        assert_eq!(code("fn f<'a>(x: &'a str) {} // it's"), "fn f<'a>(x: &'a str) {}        ");
        assert_eq!(code("let car\"s"), "let car  ");
        assert_eq!(code("\"a\nb\" c").lines().count(), 2);
    }

    #[test]
    fn texts_are_comments_and_literals() {
        let text = texts("//! One\n/// two\nfn f() { g(\"three \\\n    four\"); } // five");
        let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        assert_eq!(words, ["One", "two", "three", "four", "five"]);
        assert_eq!(text.lines().count(), 4);
        assert!(text.contains("One\n   two\n;") && text.contains("three  \n    four"), "{text:?}");
    }

    #[test]
    fn test_modules_are_blanked() {
        let left = without_tests("a\n#[cfg(test)]\nmod tests {\n fn x() { y }\n}\nb\n#[cfg(test)]\nmod more;\nc");
        assert_eq!(left.split_whitespace().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(line(&left, left.find('c').unwrap()), 9);
    }

    #[test]
    fn only_whole_words_are_found() {
        assert_eq!(words("unsafe_code unsafe {}", "unsafe").count(), 1);
        assert_eq!(bracketed("(a(b)c) d"), Some("a(b)c"));
        assert_eq!(bracketed("a"), None);
    }
}
