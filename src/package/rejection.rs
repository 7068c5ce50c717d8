//! Distinguishes a rejected package, which may point to a problem at its source, from one that is unavailable.

use std::fmt;
use std::io::ErrorKind;

use super::disk_reservation::InsufficientSpace;
use super::progress::DownloadCancelled;
use super::{Unavailable, WithdrawnRelease};
use crate::endpoint::{Distrust, ForeignRedirect};

/// Marks, in an error's chain, that a package was rejected: for its signature, a mismatch with its announcement, or its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackageRejected;

impl fmt::Display for PackageRejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the package is rejected")
    }
}

/// Whether an error is a rejection or a lack of trust: of a package, a withdrawn release, a certificate, or a redirect to another server.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    let by_source = error.downcast_ref::<Unavailable>().is_some_and(|unavailable| unavailable.refused);
    by_source
        || error.is::<PackageRejected>()
        || error.is::<WithdrawnRelease>()
        || error.is::<Distrust>()
        || error.is::<ForeignRedirect>()
}

/// Marks an unpacking error as a rejection, unless its cause is on this host.
pub(super) fn mark_rejected(error: anyhow::Error) -> anyhow::Error {
    if error.chain().any(is_host_failure) { error } else { error.context(PackageRejected) }
}

/// Whether a cause is independent of the package's content: cancellation, lack of disk space, or a failed system call (full disk,
/// unreadable or unwritable disk, too many open files). Archive readers return only their own error kinds, without an OS error number.
fn is_host_failure(cause: &(dyn std::error::Error + 'static)) -> bool {
    let is_system_error = |error: &std::io::Error| {
        error.raw_os_error().is_some()
            || !matches!(
                error.kind(),
                ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof | ErrorKind::Other
            )
    };
    cause.is::<DownloadCancelled>()
        || cause.is::<InsufficientSpace>()
        || cause.downcast_ref().is_some_and(is_system_error)
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn faulty_packages_are_rejections_and_failures_of_this_host_are_not() {
        let os_error = io::Error::from_raw_os_error;
        // As tar wraps an error of its reader.
        let wrapped = |error: io::Error| io::Error::new(error.kind(), error);
        let of_host: Vec<anyhow::Error> = vec![
            // EINVAL (a name that a file system cannot hold), EACCES, ENOMEM, EMFILE, ENOSPC, EROFS, EDQUOT, EIO.
            os_error(22).into(),
            os_error(13).into(),
            os_error(12).into(),
            os_error(24).into(),
            os_error(28).into(),
            os_error(30).into(),
            os_error(122).into(),
            os_error(5).into(),
            anyhow::Error::from(wrapped(os_error(5))).context("its content is damaged"),
            io::Error::from(ErrorKind::StorageFull).into(),
            io::Error::from(ErrorKind::WriteZero).into(),
            DownloadCancelled.into(),
            crate::package::disk_reservation::tests::insufficient_space(),
        ];
        for error in of_host {
            let text = format!("{error:#}");
            let error = mark_rejected(error.context("cannot make the entry").context("cannot unpack it"));
            assert!(!is_refusal(&error), "{text}");
        }
        let of_package: Vec<anyhow::Error> = vec![
            anyhow!("duplicate entry"),
            io::Error::other("corrupt").into(),
            io::Error::new(ErrorKind::InvalidData, "checksum mismatch").into(),
            wrapped(io::Error::new(ErrorKind::InvalidInput, "corrupt deflate stream")).into(),
            io::Error::from(ErrorKind::UnexpectedEof).into(),
        ];
        for error in of_package {
            let text = format!("{error:#}");
            assert!(is_refusal(&mark_rejected(error.context("cannot unpack it"))), "{text}");
        }
        let nothing: anyhow::Result<()> = None.context("it is empty");
        assert!(is_refusal(&mark_rejected(nothing.unwrap_err())));
    }
}
