//! What tells a package that was refused from one that could not be had: the first is worth an operator's look at who sent it.

use std::fmt;
use std::io::ErrorKind;

use super::disk_reservation::InsufficientSpace;
use super::progress::DownloadCancelled;
use super::{Unavailable, WithdrawnRelease};
use crate::endpoint::{Distrust, ForeignRedirect};

/// Stands in the chain of an error whose package was looked at and refused: by its signature, by what it was announced as, or by what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackageRejected;

impl fmt::Display for PackageRejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the package is refused")
    }
}

/// Whether an error says that somebody or something was looked at and not trusted: a package, a release that was withdrawn, a certificate,
/// a redirect elsewhere.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    let by_source = error.downcast_ref::<Unavailable>().is_some_and(|unavailable| unavailable.refused);
    by_source
        || error.is::<PackageRejected>()
        || error.is::<WithdrawnRelease>()
        || error.is::<Distrust>()
        || error.is::<ForeignRedirect>()
}

/// Marks why a package could not be unpacked, unless this host is why.
pub(super) fn by_content(error: anyhow::Error) -> anyhow::Error {
    if error.chain().any(is_of_host) { error } else { error.context(PackageRejected) }
}

/// Whether a cause has nothing to do with what is in a package: it is not wanted any more, there is no room for it, or the system failed us
/// (a full disk, one that cannot be read or written, too many open files). What makes sense of an archive has errors of its own kinds only,
/// and no number of the system's.
fn is_of_host(cause: &(dyn std::error::Error + 'static)) -> bool {
    let of_system = |error: &std::io::Error| {
        error.raw_os_error().is_some()
            || !matches!(
                error.kind(),
                ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof | ErrorKind::Other
            )
    };
    cause.is::<DownloadCancelled>() || cause.is::<InsufficientSpace>() || cause.downcast_ref().is_some_and(of_system)
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn what_fails_on_this_host_is_not_refused_and_what_is_wrong_with_a_package_is() {
        let numbered = io::Error::from_raw_os_error;
        // As tar passes on what it could not read.
        let wrapped = |error: io::Error| io::Error::new(error.kind(), error);
        let of_host: Vec<anyhow::Error> = vec![
            // Access, memory, too many open files, no space, read-only, quota, an input or output error, and what a file system may say of
            // a name that it cannot hold.
            numbered(22).into(),
            numbered(13).into(),
            numbered(12).into(),
            numbered(24).into(),
            numbered(28).into(),
            numbered(30).into(),
            numbered(122).into(),
            numbered(5).into(),
            anyhow::Error::from(wrapped(numbered(5))).context("its content is damaged"),
            io::Error::from(ErrorKind::StorageFull).into(),
            io::Error::from(ErrorKind::WriteZero).into(),
            DownloadCancelled.into(),
            crate::package::disk_reservation::tests::short(),
        ];
        for error in of_host {
            let told = format!("{error:#}");
            let error = by_content(error.context("cannot make the entry").context("cannot unpack it"));
            assert!(!is_refusal(&error), "{told}");
        }
        let of_package: Vec<anyhow::Error> = vec![
            anyhow!("there are two of it"),
            io::Error::other("corrupt").into(),
            io::Error::new(ErrorKind::InvalidData, "its checksum is another").into(),
            wrapped(io::Error::new(ErrorKind::InvalidInput, "corrupt deflate stream")).into(),
            io::Error::from(ErrorKind::UnexpectedEof).into(),
        ];
        for error in of_package {
            let told = format!("{error:#}");
            assert!(is_refusal(&by_content(error.context("cannot unpack it"))), "{told}");
        }
        let nothing: anyhow::Result<()> = None.context("it is empty");
        assert!(is_refusal(&by_content(nothing.unwrap_err())));
    }
}
