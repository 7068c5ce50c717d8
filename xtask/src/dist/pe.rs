//! Checks that a Windows executable runs on Windows 7 and Server 2008 R2: it imports nothing that they lack.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::command::read;

/// Functions that came with later versions of Windows, and that a library may import.
const TOO_NEW: &[&str] = &[
    "ProcessPrng",
    "WaitOnAddress",
    "WakeByAddressSingle",
    "GetSystemTimePreciseAsFileTime",
    "SetThreadDescription",
    "GetTempPath2W",
    "CreateFile2",
    "GetFileInformationByName",
    "SetProcessMitigationPolicy",
];

/// `path`: an executable for this architecture, `amd64` or `386`.
pub(super) fn check(path: &Path, arch: &str) -> Result<()> {
    let shown = read(Command::new("x86_64-w64-mingw32-objdump").arg("-p").arg(path))?;
    check_headers(&shown, arch)
}

/// `headers`: as `objdump -p` prints them.
fn check_headers(headers: &str, arch: &str) -> Result<()> {
    let format = if arch == "amd64" { "pei-x86-64" } else { "pei-i386" };
    ensure!(headers.lines().any(|line| line.ends_with(&format!("file format {format}"))), "it is not for {arch}");
    ensure!(headers.contains("(Windows CUI)"), "it is not a console program");
    for (name, newest) in [("MajorOSystemVersion", 6), ("MajorSubsystemVersion", 6)] {
        let line = headers.lines().find_map(|line| line.strip_prefix(name));
        let version = line.and_then(|rest| rest.trim().parse::<u32>().ok()).unwrap_or(u32::MAX);
        ensure!(version <= newest, "{name} is {version}, newer than Windows 7");
    }
    let has_resources = headers.lines().any(|line| {
        let mut words = line.split_whitespace();
        line.contains("Resource Directory [.rsrc]") && words.nth(3).is_some_and(|size| size.bytes().any(|b| b != b'0'))
    });
    ensure!(has_resources, "it has no manifest and no version: no resources are linked");
    for line in headers.lines() {
        if let Some(library) = line.trim().strip_prefix("DLL Name: ") {
            ensure!(
                !library.starts_with("api-ms-") && library != "bcryptprimitives.dll",
                "it imports {library}, which Windows 7 does not have"
            );
        }
        let name = line.split_whitespace().last().unwrap_or_default();
        ensure!(!TOO_NEW.contains(&name), "it imports {name}, which Windows 7 does not have");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_headers;

    const GOOD: &str = "aops.exe:     file format pei-x86-64\nMajorOSystemVersion\t4\nMajorSubsystemVersion\t5\n\
                        Subsystem\t\t00000003\t(Windows CUI)\n\
                        Entry 2 00000000004d8000 000005c8 Resource Directory [.rsrc]\n\
                        \tDLL Name: KERNEL32.dll\n\t5a  12  CreateFileW\n";

    #[test]
    fn imports_that_windows_7_lacks_are_rejected() {
        check_headers(GOOD, "amd64").unwrap();
        assert!(check_headers(GOOD, "386").is_err());
        for bad in [
            "\tDLL Name: api-ms-win-core-synch-l1-2-0.dll\n",
            "\tDLL Name: bcryptprimitives.dll\n",
            "\t1 2  ProcessPrng\n",
        ] {
            assert!(check_headers(&(GOOD.to_owned() + bad), "amd64").is_err(), "{bad}");
        }
        for (from, to) in [("000005c8", "00000000"), ("Version\t5", "Version\t10"), ("CUI", "GUI")] {
            assert!(check_headers(&GOOD.replace(from, to), "amd64").is_err(), "{to}");
        }
    }
}
