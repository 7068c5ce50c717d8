//! Replaces files that may be in use.
//!
//! A file that another process has open, for instance a virus scanner, cannot be replaced for a moment: every replacement is retried for
//! [`PATIENCE`]. A running program cannot be replaced at all, but renamed:
//!
//! ```text
//! aops.exe                       before
//! aops.exe.<time>.old            1. moved away: for an instant there is no aops.exe
//! aops.exe                       2. the new file is renamed to it
//! aops.exe.<time>.old            3. removed by a role that starts later, when no process runs it
//! ```
//!
//! One name is replaced at a time, so after a power cut between the first two steps every other name is there, and the role that it starts
//! calls [`complete_replacements`], which renames the file back. The interrupted step is then repeated.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, ERROR_LOCK_VIOLATION, ERROR_SHARING_VIOLATION, ERROR_USER_MAPPED_FILE,
};

use crate::platform::pause;

/// How long a file that is in use is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
const FIRST_RETRY: Duration = Duration::from_millis(5);
const LAST_RETRY: Duration = Duration::from_millis(100);
/// The extension of a file that was moved away.
const AWAY: &str = "old";

/// Whether an operation failed because another process uses the file, or may have failed because of that.
fn is_in_use(error: &io::Error) -> bool {
    const CODES: [u32; 4] =
        [ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION, ERROR_USER_MAPPED_FILE];
    error.raw_os_error().is_some_and(|code| CODES.contains(&(code as u32)))
}

/// Runs an operation on files, and retries it while another process uses one of them, for a limited time.
pub fn while_in_use<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let began = Instant::now();
    let mut delay = FIRST_RETRY;
    loop {
        match attempt() {
            Err(error) if is_in_use(&error) && began.elapsed() < PATIENCE => pause(delay),
            outcome => return outcome,
        }
        delay = (delay * 2).min(LAST_RETRY);
    }
}

/// Renames a file over another one.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    while_in_use(|| fs::rename(from, to))
}

/// Replaces the executable `path` by `new` with a rename. A running executable is moved away first.
pub fn replace_executable(new: &Path, path: &Path) -> io::Result<()> {
    while_in_use(|| match fs::rename(new, path) {
        Err(error) if is_in_use(&error) && path.exists() => {
            let away = away(path);
            fs::rename(path, &away)?;
            fs::rename(new, path).inspect_err(|_| {
                let _ = fs::rename(&away, path);
            })
        }
        outcome => outcome,
    })?;
    // Two names of the same file: renaming one to the other may have done nothing.
    match fs::remove_file(new) {
        Err(error) if is_in_use(&error) => fs::rename(new, away(path)),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes `link` another name of the file `target`, or a copy of it: symbolic links need a privilege on Windows.
pub fn replace_link(target: &Path, link: &Path) -> io::Result<()> {
    let source = link.parent().unwrap_or(Path::new("")).join(target);
    if is_same(&source, link) {
        return Ok(());
    }
    let temporary = link.with_file_name(format!("{}{}", crate::platform::temporary_prefix(), fastrand::u64(..)));
    fs::hard_link(&source, &temporary).or_else(|_| fs::copy(&source, &temporary).map(drop))?;
    replace_executable(&temporary, link)
}

/// Whether two paths are names of the same file.
pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::File::open(path).and_then(|file| super::file_identity(&file)).ok();
    identity(one).is_some_and(|found| identity(other) == Some(found))
}

/// A name beside `path` for a file that is moved away. Later ones are greater.
fn away(path: &Path) -> PathBuf {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}.{now:016x}.{AWAY}"))
}

/// The name that a file had before it was moved away.
fn name_before(away: &str) -> Option<&str> {
    let (name, time) = away.strip_suffix(AWAY)?.strip_suffix('.')?.rsplit_once('.')?;
    (time.len() == 16 && time.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(name)
}

/// Restores the names that an interrupted replacement left missing.
pub fn complete_replacements(directory: &Path) -> io::Result<()> {
    for (name, files) in moved_away(directory)? {
        let path = directory.join(name);
        if !path.exists()
            && let Some(last) = files.last()
        {
            fs::rename(last, path)?;
        }
    }
    Ok(())
}

/// Removes files that were moved away, unless a process still runs them.
pub fn remove_replaced(directory: &Path) {
    let moved = moved_away(directory).unwrap_or_default();
    let present = moved.into_iter().filter(|(name, _)| directory.join(name).exists());
    for file in present.flat_map(|(_, files)| files) {
        let _ = fs::remove_file(file);
    }
}

/// The files of a directory that were moved away, by the names that they had before; the oldest first.
fn moved_away(directory: &Path) -> io::Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut moved: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str().and_then(name_before) {
            moved.entry(name.to_owned()).or_default().push(entry.path());
        }
    }
    moved.values_mut().for_each(|files| files.sort());
    Ok(moved)
}

/// Moves every name of the running executable out of `directory`, which is to be removed: a running executable cannot be deleted. They
/// are deleted after this process has exited, or if that cannot be arranged, when Windows starts the next time.
#[allow(clippy::disallowed_methods, reason = "this process is about to exit, and has no other work")]
pub fn leave_directory(directory: &Path) -> io::Result<()> {
    // A directory in which a process works cannot be removed.
    if std::env::current_dir().is_ok_and(|current| current.starts_with(directory)) {
        std::env::set_current_dir(directory.parent().unwrap_or(directory))?;
    }
    let own = super::file_identity(&super::program_of(std::process::id())?)?;
    let is_own = |path: &PathBuf| {
        fs::File::open(path).and_then(|file| super::file_identity(&file)).is_ok_and(|identity| identity == own)
    };
    let mut names = Vec::new();
    for place in [directory.to_owned(), directory.join("bin")] {
        let Ok(entries) = fs::read_dir(place) else { continue };
        names
            .extend(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file() && is_own(path)));
    }
    if names.is_empty() {
        return Ok(());
    }
    let left = left_directory(&names, directory)?;
    if let Err(error) = remove_later(&left) {
        tracing::warn!(directory = %left.display(), error = %error, "cannot arrange the removal of this program; Windows removes it at its next start");
        remove_at_next_start(&left)?;
    }
    Ok(())
}

/// Moves files into a new directory on the same volume, and returns it.
fn left_directory(names: &[PathBuf], directory: &Path) -> io::Result<PathBuf> {
    let unique = format!("aops-{:016x}.{AWAY}", fastrand::u64(..));
    let beside = directory.parent().unwrap_or(directory);
    let mut outcome = Err(io::ErrorKind::NotFound.into());
    for place in [std::env::temp_dir(), beside.to_owned()] {
        let left = place.join(&unique);
        let attempt = || -> io::Result<()> {
            fs::create_dir(&left)?;
            for (number, name) in names.iter().enumerate() {
                fs::rename(name, left.join(format!("{number}.exe")))?;
            }
            Ok(())
        };
        outcome = attempt().map(|()| left.clone());
        if outcome.is_ok() {
            break;
        }
        // The temporary directory may be on another volume.
        let _ = fs::remove_dir(&left);
    }
    outcome
}

/// Starts a command that removes a directory as soon as it can: when this process has exited.
fn remove_later(directory: &Path) -> io::Result<()> {
    use std::os::windows::process::CommandExt;
    // Half a minute, since a virus scanner may hold the files.
    const SCRIPT: &str = "/d /c for /l %i in (1,1,30) do (rmdir /s /q \"%AOPS_REMOVED%\" & ping -n 2 127.0.0.1 >nul )";
    let shell = std::env::var_os("ComSpec").unwrap_or_else(|| "cmd.exe".into());
    let mut command = std::process::Command::new(shell);
    command.raw_arg(SCRIPT).env("AOPS_REMOVED", directory).current_dir(std::env::temp_dir());
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    super::detach_from_caller(&mut command);
    command.spawn().map(drop)
}

/// Has Windows remove a directory and its files before anything uses them at its next start.
fn remove_at_next_start(directory: &Path) -> io::Result<()> {
    use std::os::windows::ffi::OsStrExt;
    use windows_sys::Win32::Storage::FileSystem::{MOVEFILE_DELAY_UNTIL_REBOOT, MoveFileExW};
    let files = fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.path()));
    for path in files.chain([directory.to_owned()]) {
        let path: Vec<u16> = path.as_os_str().encode_wide().chain([0]).collect();
        // SAFETY: the path ends in a zero and outlives the call.
        if unsafe { MoveFileExW(path.as_ptr(), std::ptr::null(), MOVEFILE_DELAY_UNTIL_REBOOT) } == 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::windows::fs::OpenOptionsExt;

    use super::*;
    use crate::platform::start_time;
    use crate::platform::testing::{self, OtherProcess};

    const RUNNING: &str = "platform::windows::replace::tests::a_running_program";

    /// Blocks until it is killed.
    #[test]
    fn a_running_program() {
        if testing::part(RUNNING).is_some() {
            testing::report("ready");
            testing::block();
        }
    }

    fn running(app: &Path) -> OtherProcess {
        fs::copy(std::env::current_exe().unwrap(), app).unwrap();
        let running = OtherProcess::start_from(app, RUNNING, "");
        assert_eq!(running.line(), "ready");
        running
    }

    fn sweep(directory: &Path) {
        complete_replacements(directory).unwrap();
        remove_replaced(directory);
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_executable_is_replaced_while_it_runs() {
        let directory = tempfile::tempdir().unwrap();
        let (app, new) = (directory.path().join("app.exe"), directory.path().join("new.exe"));
        let mut running = running(&app);
        for content in ["first", "second"] {
            fs::write(&new, content).unwrap();
            replace_executable(&new, &app).unwrap();
            assert_eq!(fs::read_to_string(&app).unwrap(), content);
            assert!(start_time(running.pid()).is_some() && !new.exists());
        }
        sweep(directory.path());
        assert_eq!(names(directory.path()).len(), 2, "a running program was removed");
        running.kill();
        sweep(directory.path());
        assert_eq!(names(directory.path()), ["app.exe"]);
    }

    #[test]
    fn a_second_name_is_replaced_while_the_program_runs_under_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut running = running(&path("aops.exe"));
        fs::write(path("other.exe"), "other").unwrap();
        for _ in 0..2 {
            replace_link(Path::new("aops.exe"), &path("spa.exe")).unwrap();
            assert_eq!(fs::read(path("spa.exe")).unwrap(), fs::read(path("aops.exe")).unwrap());
            replace_link(Path::new("other.exe"), &path("spa.exe")).unwrap();
            assert_eq!(fs::read_to_string(path("spa.exe")).unwrap(), "other");
        }
        running.kill();
        sweep(directory.path());
        assert_eq!(names(directory.path()), ["aops.exe", "other.exe", "spa.exe"]);
    }

    #[test]
    fn a_name_that_an_interrupted_replacement_left_missing_is_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let app = directory.path().join("app.exe");
        for content in ["older", "newer"] {
            fs::write(&app, content).unwrap();
            fs::rename(&app, away(&app)).unwrap();
        }
        fs::write(directory.path().join("mine.old"), "").unwrap();
        sweep(directory.path());
        assert_eq!(fs::read_to_string(&app).unwrap(), "newer");
        assert_eq!(names(directory.path()), ["app.exe", "mine.old"]);
    }

    #[test]
    fn a_file_that_is_open_for_a_moment_is_replaced_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let (state, new) = (directory.path().join("state.json"), directory.path().join("new"));
        fs::write(&state, "old").unwrap();
        fs::write(&new, "new").unwrap();
        // As a scanner opens it: nobody may write, rename or delete it.
        let scanner: File = fs::OpenOptions::new().read(true).share_mode(1).open(&state).unwrap();
        let scan = std::thread::spawn(move || {
            pause(Duration::from_millis(300));
            drop(scanner);
        });
        rename(&new, &state).unwrap();
        scan.join().unwrap();
        assert_eq!(fs::read_to_string(&state).unwrap(), "new");
    }

    #[test]
    fn a_file_that_stays_open_is_an_error_and_keeps_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let (state, new) = (directory.path().join("state.json"), directory.path().join("new"));
        fs::write(&state, "old").unwrap();
        fs::write(&new, "new").unwrap();
        let _open = fs::OpenOptions::new().read(true).share_mode(1).open(&state).unwrap();
        assert!(is_in_use(&rename(&new, &state).unwrap_err()));
        assert_eq!(fs::read_to_string(&state).unwrap(), "old");
    }
}
