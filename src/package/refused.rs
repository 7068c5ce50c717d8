//! What tells a package that was refused from one that could not be had: the first is worth an operator's look at who sent it.

use std::fmt;
use std::io::ErrorKind;

use super::{Unavailable, Withdrawn};
use crate::endpoint::{Astray, Distrust};

/// Stands in the chain of an error whose package was looked at and refused: by its signature, by what it was announced as, or by what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the package is refused")
    }
}

/// Whether an error says that somebody or something was looked at and not trusted: a package, a release that was withdrawn, a certificate,
/// a redirect elsewhere.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    let by_source = error.downcast_ref::<Unavailable>().is_some_and(|unavailable| unavailable.refused);
    by_source || error.is::<Refused>() || error.is::<Withdrawn>() || error.is::<Distrust>() || error.is::<Astray>()
}

/// Marks why a package could not be unpacked, unless this host is why.
pub(super) fn by_content(error: anyhow::Error) -> anyhow::Error {
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind));
    match kind {
        None | Some(ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof | ErrorKind::Other) => {
            error.context(Refused)
        }
        Some(_) => error,
    }
}
