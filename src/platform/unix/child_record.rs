//! Writes the record of a sub-agent's process, in the child between fork and exec: nothing is allocated and no lock is taken.

use std::ffi::CString;
use std::io::IoSlice;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::process::parse_stat;

/// Start time of the calling process; `None`: /proc is not mounted.
pub(super) fn own_start_time() -> Option<u64> {
    let stat = rustix::fs::open(c"/proc/self/stat", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = [0_u8; 1024];
    let length = rustix::io::read(&stat, &mut text).ok()?;
    Some(parse_stat(&text[..length])?.start_time)
}

/// Writes the record of the calling process.
///
/// The text is written to the spare file, which is then exchanged with the record. Some file systems flush a file to the disk when it is
/// renamed over another (ext4: 0.6 ms instead of 0.1), which a record does not need.
pub(super) fn write_record(
    spare: &CString,
    record: &CString,
    head: &[u8],
    start_time: u64,
    group: Option<&[u8]>,
) -> rustix::io::Result<()> {
    let pid = rustix::process::getpid().as_raw_nonzero().get() as u64;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(spare.as_c_str(), flags, Mode::from_raw_mode(0o600))?;
    let (mut pid_digits, mut time_digits) = ([0; 20], [0; 20]);
    let parts: [&[u8]; 7] = [
        head,
        digits(pid, &mut pid_digits),
        b",\"startTime\":",
        digits(start_time, &mut time_digits),
        if group.is_some() { b",\"group\":" } else { b"" },
        group.unwrap_or_default(),
        b"}\n",
    ];
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let written = rustix::io::writev(&file, &parts.map(IoSlice::new))?;
    if written != length {
        return Err(Errno::NOSPC);
    }
    rustix::fs::ftruncate(&file, length as u64)?;
    let (spare, record) = (spare.as_c_str(), record.as_c_str());
    match rustix::fs::renameat_with(CWD, spare, CWD, record, RenameFlags::EXCHANGE) {
        // There is no previous record, or the kernel (before Linux 3.15) or the file system cannot exchange files.
        Err(_) => rustix::fs::rename(spare, record),
        done => done,
    }
}

/// Formats a number in decimal, without allocating.
fn digits(mut value: u64, buffer: &mut [u8; 20]) -> &[u8] {
    let mut at = buffer.len();
    loop {
        at -= 1;
        buffer[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            return &buffer[at..];
        }
    }
}
