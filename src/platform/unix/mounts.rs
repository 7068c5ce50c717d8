//! Mount points. A removal never descends into a mount: its content is not ours.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The mount points at or below a directory, as this process sees them (`/proc/self/mountinfo`, proc(5)).
pub fn mounts_in(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = match fs::canonicalize(directory) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut points = mount_points(&fs::read("/proc/self/mountinfo")?);
    points.retain(|point| point.starts_with(&directory));
    Ok(points)
}

/// The fifth field of each line.
fn mount_points(text: &[u8]) -> Vec<PathBuf> {
    let lines = text.split(|byte| *byte == b'\n');
    let fields = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    fields.map(unescaped).collect()
}

/// A path of mountinfo, where space, tab, line feed and backslash are octal escapes.
pub(super) fn unescaped(mut field: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(field.len());
    while let [first, rest @ ..] = field {
        let octal = rest.get(..3).filter(|_| *first == b'\\');
        let number = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(number.unwrap_or(*first));
        field = if number.is_some() { &rest[3..] } else { rest };
    }
    OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        let text =
            b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n36 22 0:5 /x /srv/a\\040home\\134 rw shared:1 - tmpfs t rw\nodd\n";
        assert_eq!(mount_points(text), [PathBuf::from("/"), PathBuf::from("/srv/a home\\")]);
    }

    #[test]
    fn mounts_elsewhere_are_not_listed() {
        assert!(mounts_in(Path::new("/proc")).unwrap().contains(&PathBuf::from("/proc")));
        assert_eq!(mounts_in(tempfile::tempdir().unwrap().path()).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(mounts_in(Path::new("/nowhere")).unwrap(), Vec::<PathBuf>::new());
    }
}
