//! The project uses one term for one thing: terms that were replaced do not come back in identifiers, messages and documents.
//!
//! glossary.txt lists each replaced term with the term to write instead. It has only terms without a legitimate use, so there is no way to
//! exempt a file or a line.

use std::collections::HashMap;

use super::Violation;
use super::source::{code, is_part_of_word, line, texts, words};

const GLOSSARY: &str = include_str!("glossary.txt");

/// A term that is not used.
#[derive(Debug)]
struct Term {
    kind: Kind,
    /// In lower case.
    words: Vec<String>,
    /// What to write instead.
    instead: String,
    /// Longer phrases that are allowed.
    except: Vec<Vec<String>>,
}

/// Where a term is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// In comments, string literals and documents.
    Text,
    /// As a word of an identifier.
    Name,
    /// As the name of a module.
    Module,
}

pub(super) struct Glossary {
    terms: Vec<Term>,
    /// The indices of `terms` by first word.
    by_word: HashMap<String, Vec<usize>>,
}

/// A word of a text, or of an identifier.
struct Word {
    /// In lower case.
    text: String,
    line: usize,
    /// Whether only white space is between this word and the previous one.
    continues: bool,
}

impl Glossary {
    pub(super) fn of_the_project() -> Result<Glossary, String> {
        Glossary::parse(GLOSSARY)
    }

    fn parse(text: &str) -> Result<Glossary, String> {
        let mut terms = Vec::new();
        for (at, row) in text.lines().enumerate() {
            if row.trim().is_empty() || row.starts_with('#') {
                continue;
            }
            let wrong = |why: &str| format!("xtask/src/tidy/glossary.txt:{}: {why}", at + 1);
            let mut columns = row.split('|').map(str::trim);
            let kinds: &[Kind] = match columns.next() {
                Some("text") => &[Kind::Text],
                Some("name") => &[Kind::Name],
                Some("both") => &[Kind::Text, Kind::Name],
                Some("module") => &[Kind::Module],
                _ => return Err(wrong("unknown kind: write text, name, both or module")),
            };
            let phrases = columns.next().map(phrases).unwrap_or_default();
            let instead = columns
                .next()
                .filter(|instead| !instead.is_empty())
                .ok_or_else(|| wrong("no term to write instead"))?;
            let except = columns.next().map(self::phrases).unwrap_or_default();
            if phrases.is_empty() || phrases.iter().any(Vec::is_empty) {
                return Err(wrong("an empty term"));
            }
            for (kind, words) in kinds.iter().flat_map(|kind| phrases.iter().map(move |words| (*kind, words.clone()))) {
                if kind != Kind::Text && words.len() > 1 {
                    return Err(wrong("a name is one word"));
                }
                terms.push(Term { kind, words, instead: instead.to_owned(), except: except.clone() });
            }
        }
        let mut by_word: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, term) in terms.iter().enumerate() {
            by_word.entry(term.words[0].clone()).or_default().push(index);
        }
        Ok(Glossary { terms, by_word })
    }

    /// Checks one file of the project; files that are neither Rust nor a document are not checked.
    pub(super) fn check(&self, file: &str, text: &str) -> Vec<Violation> {
        let mut found = Vec::new();
        if file.ends_with(".rs") {
            let code = code(text);
            found.extend(self.find(Kind::Text, &text_words(&texts(text))));
            found.extend(self.find(Kind::Name, &name_words(&code)));
            found.extend(self.find(Kind::Module, &modules(&code)));
        } else if is_document(file) {
            found.extend(self.find(Kind::Text, &text_words(&document_text(file, text))));
        }
        let violation = |(line, term): (usize, &Term)| Violation {
            file: file.to_owned(),
            line,
            what: format!("\"{}\" is not a term of this project: write {}", term.words.join(" "), term.instead),
        };
        found.into_iter().map(violation).collect()
    }

    /// The lines of `words` that have a term of that kind, with the term.
    fn find(&self, kind: Kind, words: &[Word]) -> Vec<(usize, &Term)> {
        let mut found = Vec::new();
        for (at, word) in words.iter().enumerate() {
            for index in self.by_word.get(&word.text).into_iter().flatten() {
                let term = &self.terms[*index];
                let rest = &words[at..];
                if term.kind == kind
                    && begins_with(rest, &term.words)
                    && !term.except.iter().any(|phrase| begins_with(rest, phrase))
                {
                    found.push((word.line, term));
                }
            }
        }
        found
    }
}

/// Comma-separated phrases as words.
fn phrases(column: &str) -> Vec<Vec<String>> {
    column.split(',').map(|phrase| phrase.split_whitespace().map(str::to_lowercase).collect()).collect()
}

fn begins_with(words: &[Word], phrase: &[String]) -> bool {
    words.len() >= phrase.len()
        && words
            .iter()
            .zip(phrase)
            .enumerate()
            .all(|(at, (word, part))| word.text == *part && (at == 0 || word.continues))
}

/// Whether a file is read by users, and checked as text.
fn is_document(file: &str) -> bool {
    let asset = file.strip_prefix("assets/").is_some_and(|name| name.ends_with(".md") || name.ends_with(".toml"));
    asset || matches!(file, "README.md" | "CHANGELOG.md")
}

/// A document without the markers of comment lines, so that a phrase may continue on the next line.
fn document_text(file: &str, text: &str) -> String {
    if !file.ends_with(".toml") {
        return text.to_owned();
    }
    let unmarked = |line: &str| {
        let comment = line.trim_start();
        let indent = line.len() - comment.len();
        match comment.strip_prefix('#') {
            Some(text) => format!("{}{text}", " ".repeat(indent + 1)),
            None => line.to_owned(),
        }
    };
    text.lines().map(|line| unmarked(line) + "\n").collect()
}

/// The words of a text. Punctuation separates phrases; a hyphen or an apostrophe between letters is part of the word.
fn text_words(text: &str) -> Vec<Word> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = without_code_spans(line);
        let chars: Vec<char> = line.chars().collect();
        let joins = |at: usize| {
            matches!(chars[at], '-' | '\'' | '’')
                && at.checked_sub(1).is_some_and(|before| is_part_of_word(chars[before]))
                && chars.get(at + 1).is_some_and(|c| is_part_of_word(*c))
        };
        push_words(&mut found, at + 1, &chars, |at| is_part_of_word(chars[at]) || joins(at));
    }
    for word in &mut found {
        if let Some(owner) = word.text.strip_suffix("'s").or_else(|| word.text.strip_suffix("’s")) {
            word.text = owner.to_owned();
        }
    }
    found
}

/// Adds the words of a line. `is_word` says which characters are part of one.
fn push_words(found: &mut Vec<Word>, line: usize, chars: &[char], is_word: impl Fn(usize) -> bool) {
    // Only white space since the last word, which may be on an earlier line.
    let mut continues = !found.last().is_some_and(|last| last.text.is_empty());
    let mut at = 0;
    while at < chars.len() {
        if is_word(at) {
            let end = (at..chars.len()).find(|end| !is_word(*end)).unwrap_or(chars.len());
            let text = chars[at..end].iter().collect::<String>().to_lowercase();
            found.push(Word { text, line, continues });
            continues = true;
            at = end;
        } else {
            continues &= chars[at].is_whitespace();
            at += 1;
        }
    }
    if !continues {
        // An empty word ends the phrase at the end of the line.
        found.push(Word { text: String::new(), line, continues: false });
    }
}

/// A line with the text between single backticks replaced by punctuation.
fn without_code_spans(line: &str) -> String {
    let parts: Vec<&str> = line.split('`').collect();
    if parts.len().is_multiple_of(2) || line.contains("```") {
        return line.to_owned();
    }
    parts.iter().enumerate().map(|(at, part)| if at % 2 == 0 { (*part).to_owned() } else { "`".to_owned() }).collect()
}

/// Splits all identifiers into words: `answer_knock` and `AnswerKnock` give `answer` and `knock`.
fn name_words(code: &str) -> Vec<Word> {
    let mut found = Vec::new();
    for (at, text) in code.lines().enumerate() {
        for name in text.split(|c| !is_part_of_word(c)) {
            let mut word = String::new();
            let mut push = |word: &mut String| {
                if !word.is_empty() {
                    found.push(Word { text: std::mem::take(word).to_lowercase(), line: at + 1, continues: false });
                }
            };
            let mut previous = None;
            for c in name.chars() {
                let starts = c == '_'
                    || (c.is_uppercase() && previous.is_some_and(|p: char| p.is_lowercase() || p.is_numeric()));
                if starts {
                    push(&mut word);
                }
                if c != '_' {
                    word.push(c);
                }
                previous = Some(c);
            }
            push(&mut word);
        }
    }
    found
}

/// The names of the modules that `code` declares.
fn modules(code: &str) -> Vec<Word> {
    let name = |at: usize| {
        let rest = code[at + "mod".len()..].trim_start();
        let text: String = rest.chars().take_while(|c| is_part_of_word(*c)).collect();
        Word { text, line: line(code, at), continues: false }
    };
    words(code, "mod").map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "# A comment.\n\
        text | red fox, crimson fox | fox | red fox terrier\n\
        both | hound, hounds | dog\n\
        module | den | burrow\n";

    fn found(file: &str, text: &str) -> Vec<(usize, String)> {
        let glossary = Glossary::parse(SMALL).unwrap();
        let quoted = |what: &str| what.split('"').nth(1).unwrap_or_default().to_owned();
        glossary.check(file, text).iter().map(|violation| (violation.line, quoted(&violation.what))).collect()
    }

    fn one(line: usize, term: &str) -> Vec<(usize, String)> {
        vec![(line, term.to_owned())]
    }

    #[test]
    fn phrases_are_found_in_comments_string_literals_and_documents() {
        assert_eq!(found("a.rs", "//! The Red fox.\n"), one(1, "red fox"));
        assert_eq!(found("a.rs", "fn f() {\n    // a crimson fox's tail\n}"), one(2, "crimson fox"));
        assert_eq!(found("a.rs", "let a = \"red fox {name}\";"), one(1, "red fox"));
        assert_eq!(found("README.md", "a\n- red fox\n"), one(2, "red fox"));
        assert_eq!(found("assets/conf.toml", "# a red fox\na = 1\n"), one(1, "red fox"));
    }

    #[test]
    fn a_phrase_may_continue_on_the_next_line() {
        assert_eq!(found("a.rs", "    /// a red\n    /// fox\n"), one(1, "red fox"));
        assert_eq!(found("a.rs", "bail!(\"a red \\\n    fox\")"), one(1, "red fox"));
        assert_eq!(found("README.md", "a red\nfox"), one(1, "red fox"));
        assert_eq!(found("assets/conf.toml", "# a red\n# fox\n"), one(1, "red fox"));
    }

    #[test]
    fn other_texts_are_accepted() {
        for text in [
            "// a red, fox",
            "// red.\n// Fox",
            "// a red\nfox();",
            "f(\"red\", \"fox\")",
            "// a red fox terrier",
            "// a red foxglove, a bored fox, a red-fox",
            "// the command `red fox`",
            "let red = fox; let red_fox = 1;",
        ] {
            assert_eq!(found("a.rs", text), [], "{text}");
        }
        for file in ["tests/data/README.md", "a.c", "assets/a.service"] {
            assert_eq!(found(file, "red fox"), [], "{file}");
        }
    }

    #[test]
    fn names_are_found_by_their_words() {
        for code in ["fn hound() {}", "fn a_hound_b() {}", "struct MyHound;", "const HOUND: u8 = 1;", "x.hound()"] {
            assert_eq!(found("a.rs", code), one(1, "hound"), "{code}");
        }
        for code in ["fn greyhound() {}", "struct Houndsman;", "fn a() { b(\"the_hound\") }"] {
            assert_eq!(found("a.rs", code), [], "{code}");
        }
        assert_eq!(found("a.rs", "// two hounds"), one(1, "hounds"));
    }

    #[test]
    fn modules_are_found_by_their_whole_names() {
        assert_eq!(found("a.rs", "mod a;\npub(super) mod den;"), one(2, "den"));
        assert_eq!(found("a.rs", "mod den_of; fn den() {}"), []);
    }

    #[test]
    fn invalid_rows_are_rejected() {
        for row in ["prose | a | b", "text | a", "text | a |", "text | | b", "text | a, | b", "name | a b | c"] {
            assert!(Glossary::parse(row).is_err(), "{row}");
        }
    }

    #[test]
    fn every_term_of_the_project_is_found() {
        let glossary = Glossary::of_the_project().unwrap();
        assert!(glossary.terms.len() > 100);
        for term in &glossary.terms {
            let phrase = term.words.join(" ");
            let text = match term.kind {
                Kind::Text => format!("// {phrase}\n"),
                Kind::Name => format!("fn {phrase}() {{}}\n"),
                Kind::Module => format!("mod {phrase};\n"),
            };
            assert!(glossary.check("a.rs", &text).iter().any(|found| found.what.contains(&phrase)), "{phrase}");
        }
    }
}
