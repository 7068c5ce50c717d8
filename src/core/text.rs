//! Sanitizes texts of others before they are stored, sent or shown: limited in length, on one line, and without characters that control a
//! terminal. Also formats bytes as hexadecimal digits.

/// Limit for a stored message or error, bytes.
pub const MAX_MESSAGE_BYTES: usize = 1 << 10;

/// Marks the end of a truncated text.
const CUT: char = '…';

/// Truncates a text to `most` bytes, and replaces line breaks, control characters and changes of writing direction by spaces.
pub fn cut(text: &str, most: usize) -> String {
    let is_whole = text.len() <= most;
    let room = if is_whole { most } else { most.saturating_sub(CUT.len_utf8()) };
    let mut kept = String::with_capacity(text.len().min(most));
    for c in text.chars() {
        let c = if is_harmful(c) { ' ' } else { c };
        if kept.len() + c.len_utf8() > room {
            break;
        }
        kept.push(c);
    }
    if !is_whole {
        kept.push(CUT);
    }
    kept
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Control characters, line breaks, and characters that change the writing direction.
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{061c}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_truncated_between_characters_and_marked() {
        assert_eq!(cut("whole", 5), "whole");
        assert_eq!(cut("too long", 6), "too…");
        assert_eq!(cut("äöüß", 7), "äö…");
        for most in 3..20 {
            assert!(cut(&"ü".repeat(100), most).len() <= most);
        }
    }

    #[test]
    fn bytes_are_two_digits_each() {
        assert_eq!(hex(&[0, 10, 255]), "000aff");
    }

    #[test]
    fn control_characters_are_replaced() {
        assert_eq!(cut("a\x1b[2Jb\r\nc\u{9b}d\u{202e}e\0", 100), "a [2Jb  c d e ");
    }
}
