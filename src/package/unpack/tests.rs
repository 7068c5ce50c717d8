//! Facts about unpacking: what an archive may hold, and what is refused of it.

use std::io::{Cursor, Seek, SeekFrom};

use zip::write::SimpleFileOptions;

use super::*;

/// An entry as it stands in an archive, which no well-meaning builder would write.
#[derive(Clone)]
struct Entry {
    path: String,
    kind: EntryType,
    mode: u32,
    content: Vec<u8>,
    target: String,
}

fn file(path: &str) -> Entry {
    Entry {
        path: path.to_owned(),
        kind: EntryType::Regular,
        mode: 0o644,
        content: b"x".to_vec(),
        target: String::new(),
    }
}

fn directory(path: &str) -> Entry {
    Entry { kind: EntryType::Directory, mode: 0o755, content: Vec::new(), ..file(path) }
}

fn link(path: &str, target: &str) -> Entry {
    Entry { kind: EntryType::Symlink, target: target.to_owned(), content: Vec::new(), ..file(path) }
}

fn hard(path: &str, target: &str) -> Entry {
    Entry { kind: EntryType::Link, ..link(path, target) }
}

fn special(path: &str, kind: EntryType) -> Entry {
    Entry { kind, content: Vec::new(), ..file(path) }
}

fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        for (kind, text) in [(EntryType::GNULongName, &entry.path), (EntryType::GNULongLink, &entry.target)] {
            if text.len() >= 100 {
                let header = header(kind, "././@LongLink", "", 0, text.len() as u64 + 1);
                append(&mut out, &header, &[text.as_bytes(), &[0]].concat());
            }
        }
        let short = |text: &str| text.chars().take(99).collect::<String>();
        let (path, target) = (short(&entry.path), short(&entry.target));
        append(&mut out, &header(entry.kind, &path, &target, entry.mode, entry.content.len() as u64), &entry.content);
    }
    out.extend([0; 1024]);
    out
}

fn header(kind: EntryType, path: &str, target: &str, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..path.len()].copy_from_slice(path.as_bytes());
    gnu.linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_cksum();
    header
}

fn append(out: &mut Vec<u8>, header: &tar::Header, content: &[u8]) {
    out.extend(header.as_bytes());
    out.extend(content);
    out.resize(out.len().next_multiple_of(512), 0);
}

fn zst_of(tar: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(tar, 1).unwrap()
}

fn gz_of(tar: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(tar).unwrap();
    encoder.finish().unwrap()
}

fn zip_of(entries: &[Entry]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for entry in entries {
        let options = SimpleFileOptions::default().unix_permissions(entry.mode);
        match entry.kind {
            EntryType::Directory => writer.add_directory(entry.path.as_str(), options).unwrap(),
            EntryType::Symlink => writer.add_symlink(entry.path.as_str(), entry.target.as_str(), options).unwrap(),
            _ => {
                writer.start_file(entry.path.as_str(), options).unwrap();
                writer.write_all(&entry.content).unwrap();
            }
        }
    }
    writer.finish().unwrap().into_inner()
}

fn unpacked(archive: &[u8], packing: Packing, limits: &Limits) -> (tempfile::TempDir, Result<PathBuf, String>) {
    let staging = tempfile::tempdir().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(archive).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let path = unpack(&mut file, packing, staging.path(), limits).map_err(|error| format!("{error:#}"));
    if path.is_err() {
        assert_eq!(fs::read_dir(staging.path()).unwrap().count(), 0, "something was left in staging");
    }
    (staging, path)
}

fn refused(name: &str, archive: &[u8], packing: Packing, limits: &Limits, word: &str) {
    let (_staging, path) = unpacked(archive, packing, limits);
    let error = path.expect_err(name);
    assert!(error.contains(word), "{name}: {word:?} is not in {error:?}");
}

#[test]
fn every_kind_of_archive_makes_the_same_tree() {
    let mut program = file("./bin/run");
    program.mode = 0o700;
    program.content = vec![7; 200_000];
    let long = format!("share/{}/{}", "a".repeat(120), "b".repeat(255));
    let entries = [directory("./"), directory("bin/"), program, file(&long), link("current", "./bin/run")];
    let archives = [
        (Packing::TarZst, zst_of(&tar_of(&entries))),
        (Packing::TarGz, gz_of(&tar_of(&entries))),
        (Packing::Zip, zip_of(&entries[1..])),
    ];
    for (packing, archive) in archives {
        let (_staging, root) = unpacked(&archive, packing, &Limits::default());
        let root = root.unwrap();
        assert_eq!(fs::read(root.join("bin/run")).unwrap(), vec![7; 200_000], "{packing}");
        assert_eq!(fs::read(root.join(&long)).unwrap(), b"x");
        assert_eq!(fs::read_link(root.join("current")).unwrap(), Path::new("./bin/run"));
        let mode = |path: &str| platform::mode(&root.join(path)).unwrap();
        assert_eq!([mode(""), mode("bin"), mode("bin/run"), mode(&long)], [0o755, 0o755, 0o755, 0o644], "{packing}");
    }
}

#[test]
fn whatever_could_lie_elsewhere_is_refused() {
    let mut setuid = file("x");
    setuid.mode = 0o4755;
    let mut setgid = file("x");
    setgid.mode = 0o2755;
    let rows: Vec<(&str, Vec<Entry>, &str)> = vec![
        ("absolute path", vec![file("/etc/x")], "absolute"),
        ("path that goes up", vec![file("a/../../x")], "goes up"),
        ("directory that goes up", vec![directory("../x/")], "goes up"),
        ("backslash", vec![file("a\\..\\x")], "cannot be the name of a file"),
        ("control character", vec![file("a\nb")], "cannot be the name of a file"),
        ("long name", vec![file(&"a".repeat(256))], "more than 255 bytes"),
        ("long path", vec![file(&format!("{}a", "a/".repeat(600)))], "more than 1024 bytes"),
        ("absolute link", vec![link("x", "/etc/passwd")], "leaves the package"),
        ("link that goes up", vec![link("a/x", "../../y")], "leaves the package"),
        ("link up from a link", vec![link("a/b/c", "../.."), link("x", "a/b/c/../y")], "leaves the package"),
        ("link to nothing", vec![link("x", "")], "link"),
        ("write through a link", vec![directory("d/"), link("x", "d"), file("x/y")], "which is no directory"),
        ("directory through a link", vec![directory("d/"), link("x", "d"), directory("x/y/")], "which is no directory"),
        ("directory over a link", vec![directory("d/"), link("x", "d"), directory("x/")], "two of it"),
        ("file over a link", vec![file("d"), link("x", "d"), file("x")], "two of it"),
        ("file in a file", vec![file("x"), file("x/y")], "which is no directory"),
        ("hard link that goes up", vec![hard("x", "../y")], "hard link"),
        ("absolute hard link", vec![hard("x", "/etc/passwd")], "hard link"),
        ("hard link to nothing", vec![hard("x", "y")], "hard link"),
        ("hard link to a link", vec![file("f"), link("l", "f"), hard("x", "l")], "hard link"),
        ("character device", vec![special("x", EntryType::Char)], "device or a pipe"),
        ("block device", vec![special("x", EntryType::Block)], "device or a pipe"),
        ("fifo", vec![special("x", EntryType::Fifo)], "device or a pipe"),
        ("name of the volume", vec![special("x", EntryType::new(b'V'))], "neither file"),
        ("setuid", vec![setuid], "setuid"),
        ("setgid", vec![setgid], "setuid or setgid"),
        ("two files", vec![file("x"), file("./x")], "two of it"),
        ("two directories", vec![directory("x/"), directory("x/")], "two of it"),
        ("mark of a whole release", vec![file(".complete")], "reserved"),
        ("nothing", vec![], "empty"),
        ("nothing but the root", vec![directory("./")], "empty"),
    ];
    for (name, entries, word) in rows {
        refused(name, &zst_of(&tar_of(&entries)), Packing::TarZst, &Limits::default(), word);
    }
}

#[test]
fn a_zip_is_looked_at_as_closely() {
    let typed = |mode: u32| {
        // The type bits stand in the central directory, where no writer lets one put a device.
        let mut bytes = zip_of(&[file("xyz")]);
        let at = bytes.windows(4).position(|four| four == b"PK\x01\x02").unwrap() + 38;
        bytes[at..at + 4].copy_from_slice(&(mode << 16).to_le_bytes());
        bytes
    };
    let rows = [
        ("absolute path", zip_of(&[file("/etc/x")]), "absolute"),
        ("path that goes up", zip_of(&[file("a/../../x")]), "goes up"),
        ("link that goes up", zip_of(&[link("a/x", "../../y")]), "leaves the package"),
        ("write through a link", zip_of(&[directory("d"), link("x", "d"), file("x/y")]), "which is no directory"),
        ("device", typed(0o020644), "device or a pipe"),
        ("not a zip", b"hello".to_vec(), "not a zip archive"),
        (
            "two files",
            zip_of(&[file("aaa"), file("bbb")]).iter().map(|b| if *b == b'b' { b'a' } else { *b }).collect(),
            "two",
        ),
    ];
    for (name, archive, word) in rows {
        refused(name, &archive, Packing::Zip, &Limits::default(), word);
    }
    // The crate that reads zips drops these bits by itself.
    let (_staging, root) = unpacked(&typed(0o106755), Packing::Zip, &Limits::default());
    assert_eq!(platform::mode(&root.unwrap().join("xyz")).unwrap(), 0o755);
}

#[test]
fn limits_hold_for_entries_and_bytes() {
    let mut big = file("big");
    big.content = vec![0; 10_000];
    let limits = Limits { entries: 3, bytes: 10_000, ..Limits::default() };
    let rows = [
        ("entries", vec![file("a"), file("b"), file("c"), file("d")], "more than 3 entries"),
        ("implied directories", vec![file("a/b/c/d")], "more than 3 entries"),
        ("bytes", vec![big.clone(), file("a")], "more than 10000 bytes"),
    ];
    for (name, entries, word) in rows {
        refused(name, &zst_of(&tar_of(&entries)), Packing::TarZst, &limits, word);
        refused(name, &zip_of(&entries), Packing::Zip, &limits, word);
    }
    let (_staging, root) = unpacked(&zst_of(&tar_of(&[big, directory("d/")])), Packing::TarZst, &limits);
    root.unwrap();
}

#[test]
fn a_name_of_gigabytes_is_not_read() {
    let mut tar = Vec::new();
    append(&mut tar, &header(EntryType::GNULongName, "././@LongLink", "", 0, 64 << 20), &vec![b'a'; 64 << 20]);
    tar.extend(tar_of(&[file("x")]));
    refused("long name", &zst_of(&tar), Packing::TarZst, &Limits::default(), "larger than any name needs");
}

#[test]
fn a_window_larger_than_hosts_have_memory_for_is_refused() {
    let tar = tar_of(&[Entry { content: vec![1; 20 << 20], ..file("x") }]);
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(24).unwrap();
    encoder.write_all(&tar).unwrap();
    refused("window", &encoder.finish().unwrap(), Packing::TarZst, &Limits::default(), "cannot unpack it");
}

#[test]
fn damaged_archives_are_refused() {
    let tar = tar_of(&[Entry { content: vec![1; 5000], ..file("x") }]);
    refused("cut tar", &zst_of(&tar[..2000]), Packing::TarZst, &Limits::default(), "cannot unpack it");
    let zst = zst_of(&tar);
    refused("cut zstd", &zst[..zst.len() - 10], Packing::TarZst, &Limits::default(), "cannot unpack it");
    refused("no zstd", b"hello", Packing::TarZst, &Limits::default(), "cannot unpack it");
    refused("no gzip", b"hello", Packing::TarGz, &Limits::default(), "cannot unpack it");
}

#[test]
fn links_stay_inside_whatever_they_pass_through() {
    for (path, target, inside) in [
        ("x", "y", true),
        ("x", "./y/z", true),
        ("a/x", "../y", true),
        ("a/b/x", "../../y", true),
        ("a/b/x", "../../../y", false),
        ("x", "..", false),
        ("x", "y/..", false),
        ("a/x", "y/../z", false),
        ("a/x", ".././../y", false),
        ("x", "/y", false),
        ("x", "", false),
        ("x", "..\\y", false),
    ] {
        assert_eq!(stays_inside(path, target), inside, "{path} -> {target}");
    }
}
