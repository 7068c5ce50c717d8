//! Tests of unpacking: which content is accepted, and which is rejected.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};

use ::zip::write::SimpleFileOptions;
use proptest::prelude::*;

use super::*;
use crate::platform;
use archives::{OUTSIDE, Tar, attacks, gz, zst};

#[path = "../../../tests/support/archives.rs"]
#[allow(dead_code, unreachable_pub, reason = "the suite uses more of it")]
mod archives;

/// A zip as an ordinary packer writes it. A mode with a type other than a file's makes a directory or a link.
fn zip_of(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut writer = ::zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (path, mode, content) in entries {
        let options = SimpleFileOptions::default().unix_permissions(mode & 0o777);
        match mode & 0o170000 {
            0o040000 => writer.add_directory(*path, options).unwrap(),
            0o120000 => writer.add_symlink(*path, std::str::from_utf8(content).unwrap(), options).unwrap(),
            _ => {
                writer.start_file(*path, options).unwrap();
                writer.write_all(content).unwrap();
            }
        }
    }
    writer.finish().unwrap().into_inner()
}

/// A temporary directory with `staging` to unpack in, and files outside of it that must not change.
struct Sandbox(tempfile::TempDir);

impl Sandbox {
    fn new() -> Sandbox {
        let sandbox = Sandbox(tempfile::tempdir().unwrap());
        for (directory, file) in [("staging/outside", "victim"), ("outside", "victim")] {
            fs::create_dir_all(sandbox.0.path().join(directory)).unwrap();
            fs::write(sandbox.0.path().join(directory).join(file), "untouched").unwrap();
        }
        sandbox
    }

    fn staging(&self) -> PathBuf {
        self.0.path().join("staging")
    }

    fn unpack(&self, archive: &[u8], packing: Packing, os: Os, limits: &UnpackLimits) -> Result<PathBuf, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(archive).unwrap();
        unpack(&mut file, packing, os, &self.staging(), limits, &mut |_| Ok(())).map_err(|error| format!("{error:#}"))
    }

    /// Every path with its type, permissions and content.
    fn seen(&self) -> BTreeMap<PathBuf, String> {
        let mut seen = BTreeMap::new();
        let mut rest = vec![self.0.path().to_owned()];
        while let Some(directory) = rest.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                let content =
                    if metadata.is_dir() { String::new() } else { fs::read_to_string(&path).unwrap_or_default() };
                if metadata.is_dir() {
                    rest.push(path.clone());
                }
                seen.insert(path, format!("{:?} {:?} {content}", metadata.file_type(), metadata.permissions()));
            }
        }
        seen
    }
}

fn unpacked(archive: &[u8], packing: Packing) -> (Sandbox, Result<PathBuf, String>) {
    let sandbox = Sandbox::new();
    let root = sandbox.unpack(archive, packing, Os::Linux, &UnpackLimits::default());
    (sandbox, root)
}

#[test]
fn every_archive_format_gives_the_same_tree() {
    let long = format!("share/{}/{}", "a".repeat(120), "b".repeat(255));
    let program = vec![7; 200_000];
    let tar = |first: Tar| {
        let tar = first.entry(b'5', "bin/", 0o700, "", b"").entry(b'0', "./bin/run", 0o700, "", &program);
        tar.file(&long, b"x").link("current", "./bin/run").link("share/up", "../bin/run").end()
    };
    let gnu = tar(Tar::default().entry(b'5', "./", 0o2755, "", b""));
    let pax = tar(Tar::default().pax(b'g', &[("comment", "made by hand")]).pax(b'x', &[("mtime", "1.5")]));
    let zip = zip_of(&[
        ("bin/", 0o040700, b""),
        ("bin/run", 0o100700, &program),
        (&long, 0o100644, b"x"),
        ("current", 0o120777, b"./bin/run"),
        ("share/up", 0o120777, b"../bin/run"),
    ]);
    let archives = [
        (Packing::TarZst, zst(&gnu)),
        (Packing::TarGz, gz(&gnu)),
        (Packing::TarZst, zst(&pax)),
        (Packing::TarGz, [gz(&pax[..1000]), gz(b""), gz(&pax[1000..])].concat()),
        (Packing::TarZst, [zst(&pax[..1000]), zst(b""), zst(&pax[1000..])].concat()),
        (Packing::Zip, zip),
    ];
    for (packing, archive) in archives {
        let (_place, root) = unpacked(&archive, packing);
        let root = root.unwrap();
        assert_eq!(fs::read(root.join("bin/run")).unwrap(), program, "{packing}");
        assert_eq!(fs::read(root.join(&long)).unwrap(), b"x");
        assert_eq!(fs::read_link(root.join("current")).unwrap(), Path::new("./bin/run"));
        assert_eq!(fs::read(root.join("share/up")).unwrap(), program);
        let mode = |path: &str| platform::mode(&root.join(path)).unwrap();
        assert_eq!([mode(""), mode("bin"), mode("bin/run"), mode(&long)], [0o755, 0o755, 0o755, 0o644], "{packing}");
    }
}

/// Each attack is rejected as a whole, and for its own reason.
#[test]
fn attacks_are_refused_and_leave_nothing_behind() {
    let mut attacks = attacks();
    assert!(attacks.len() > 200, "{}", attacks.len());
    // Some attacks start with a valid link, which needs a system with symbolic links.
    attacks.retain(|attack| platform::OS == Os::Linux || !attack.name.contains("link") || attack.os == "windows");
    let mut wrong = Vec::new();
    for attack in attacks {
        let sandbox = Sandbox::new();
        let before = sandbox.seen();
        let (packing, os) = (attack.packing.parse().unwrap(), attack.os.parse().unwrap());
        let problem = match sandbox.unpack(&attack.bytes, packing, os, &UnpackLimits::default()) {
            Ok(_) => Some("it is taken".to_owned()),
            Err(error) if !error.contains(attack.refusal) => Some(format!("{error:?} without {:?}", attack.refusal)),
            Err(_) if sandbox.seen() != before => Some(format!("left {:?}", sandbox.seen())),
            Err(_) if Path::new(OUTSIDE).exists() => Some("wrote outside".to_owned()),
            Err(_) => None,
        };
        wrong.extend(problem.map(|problem| format!("{} in a {}: {problem}", attack.name, attack.packing)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[cfg(feature = "gateway")]
#[test]
fn packages_are_checked_before_publication_as_by_a_host() {
    let inspected = |bytes: &[u8], packing: &str, os: &str| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let mut seen = Vec::new();
        let result = inspect(&mut file, packing.parse().unwrap(), os.parse().unwrap(), &mut |entry| {
            seen.push((entry.path.to_owned(), entry.executable));
            Ok(())
        });
        result.map(|()| seen).map_err(|error| format!("{error:#}"))
    };
    let tar = Tar::default().file("big", &[7; 200_000]).entry(b'0', "bin/run", 0o755, "", b"x").link("l", "bin/run");
    let expected = [("big", false), ("bin/run", true), ("l", true)].map(|(path, runs)| (path.to_owned(), runs));
    assert_eq!(inspected(&zst(&tar.end()), "tar.zst", "linux").unwrap(), expected);
    for attack in attacks() {
        let result = inspected(&attack.bytes, attack.packing, attack.os);
        assert!(result.is_err(), "{} in a {} would be published", attack.name, attack.packing);
    }
}

#[test]
fn unusual_but_valid_archives_are_accepted() {
    for (name, tar) in [
        ("links to links", Tar::default().file("f", b"x").link("a", "b").link("b", "f").link("d/c", "../a").end()),
        ("a hard link to a hard link", Tar::default().file("f", b"x").hard("a", "f").hard("b", "./a").end()),
        ("a name with a colon", Tar::default().file("man/Foo::Bar.3", b"x").end()),
        ("an end of one block", {
            let mut tar = Tar::default().file("f", b"x").0;
            tar.extend([0; 512]);
            tar
        }),
        ("no end", Tar::default().file("f", b"x").0),
        ("padding", [Tar::default().file("f", b"x").end(), vec![0; 1 << 18]].concat()),
        ("an attribute of SELinux", Tar::default().pax(b'x', &[("RHT.security.selinux", "x")]).file("f", b"x").end()),
        ("a directory behind its file", Tar::default().file("d/f", b"x").entry(b'5', "d/", 0o755, "", b"").end()),
        ("a dot in front and slashes", Tar::default().file(".//d//./f", b"x").end()),
        ("an older header", Tar::default().raw(0, b"f", 0o644, b"", 1, b"x").end()),
    ] {
        let (_place, root) = unpacked(&zst(&tar), Packing::TarZst);
        assert!(root.is_ok(), "{name}: {root:?}");
    }
    let stored = archives::Zipped { method: 0, attributes: 0, ..archives::Zipped::file("f", b"") };
    let (_place, root) = unpacked(&archives::zip(&[stored]), Packing::Zip);
    assert!(root.unwrap().join("f").is_file());
}

#[test]
fn limits_hold_for_entries_and_bytes() {
    let limits = UnpackLimits { entries: 3, bytes: 10_000, ..UnpackLimits::default() };
    let big = || Tar::default().file("big", &[0; 10_000]);
    let tars = [
        (Tar::default().file("a", b"").file("b", b"").file("c", b"").file("d", b"").end(), "more than 3 entries"),
        (Tar::default().file("a/b/c/d", b"").end(), "more than 3 entries"),
        (big().file("a", b"x").end(), "more than 10000 bytes"),
    ];
    let zips = [
        (zip_of(&[("a", 0o644, b""), ("b", 0o644, b""), ("c", 0o644, b""), ("d", 0o644, b"")]), "more than 3 entries"),
        (zip_of(&[("a/b/c/d", 0o644, b"")]), "more than 3 entries"),
        (zip_of(&[("big", 0o644, &[0; 10_000]), ("a", 0o644, b"x")]), "more than 10000 bytes"),
    ];
    let tars = tars.into_iter().map(|(tar, word)| (Packing::TarZst, zst(&tar), word));
    for (packing, archive, word) in tars.chain(zips.map(|(zip, word)| (Packing::Zip, zip, word))) {
        let error = Sandbox::new().unpack(&archive, packing, Os::Linux, &limits).unwrap_err();
        assert!(error.contains(word), "{packing}: {word:?} is not in {error:?}");
    }
    let whole = zst(&big().entry(b'5', "d/", 0o755, "", b"").end());
    Sandbox::new().unpack(&whole, Packing::TarZst, Os::Linux, &limits).unwrap();
}

#[test]
fn a_zip_with_an_oversized_directory_is_rejected() {
    let names: Vec<String> =
        (0..4200).map(|number| format!("{}/{number}", vec!["x".repeat(245); 4].join("/"))).collect();
    let zip = |count: usize| {
        let entries: Vec<_> = names[..count].iter().map(|name| (name.as_str(), 0o644, &b""[..])).collect();
        unpacked(&zip_of(&entries), Packing::Zip).1
    };
    let error = zip(4200).unwrap_err();
    assert!(error.contains("more than 4194304 bytes; pack it as tar.zst"), "{error}");
    zip(3800).unwrap();
}

#[test]
fn a_decompression_bomb_is_rejected() {
    let zeros = vec![0; 1 << 20];
    let bomb = zst(&Tar::default().file("x", &zeros).end());
    let limits = UnpackLimits { bytes: u64::MAX, ..UnpackLimits::default() }.of(bomb.len() as u64);
    assert_eq!(limits.bytes, FREE_BYTES + 100 * bomb.len() as u64);
    assert_eq!(UnpackLimits::default().of(1 << 40).bytes, UnpackLimits::default().bytes);
    let error = Sandbox::new().unpack(
        &archives::zst(&bomb_of(200 << 20)),
        Packing::TarZst,
        Os::Linux,
        &UnpackLimits::default(),
    );
    assert!(error.unwrap_err().contains("all files together have more than"), "a bomb is taken");
}

fn bomb_of(bytes: usize) -> Vec<u8> {
    Tar::default().file("x", &vec![0; bytes]).end()
}

#[test]
fn a_release_inherits_no_mode_bits_of_its_parent_directory() {
    let sandbox = Sandbox::new();
    platform::set_mode(&sandbox.staging(), 0o2755).unwrap();
    let tar = Tar::default().file("d/e/f", b"x").entry(b'0', "d/run", 0o755, "", b"x").end();
    let root = sandbox.unpack(&zst(&tar), Packing::TarZst, Os::Linux, &UnpackLimits::default()).unwrap();
    let mode = |path: &str| platform::mode(&root.join(path)).unwrap();
    assert_eq!([mode(""), mode("d"), mode("d/e"), mode("d/e/f"), mode("d/run")], [0o755, 0o755, 0o755, 0o644, 0o755]);
}

/// An entry of any kind, with names and targets from a small set, so that they collide.
fn any_entry() -> impl Strategy<Value = (u8, String, String)> {
    let name = "(\\./|/|\\.\\./)?[aAb](/[aAb.]{1,2}){0,3}/?";
    (prop::sample::select(b"0125".to_vec()), name.prop_map(String::from), "(\\.\\./){0,3}[aAb.]{0,2}(/[ab.]{1,2}){0,2}")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// For any archive: either every path of the tree resolves below its root, or nothing is left.
    #[test]
    fn nothing_is_created_outside_of_the_tree(entries in prop::collection::vec(any_entry(), 1..12)) {
        let mut tar = Tar::default();
        for (kind, path, target) in &entries {
            let content: &[u8] = if *kind == b'0' { b"x" } else { b"" };
            tar = tar.entry(*kind, path, 0o644, target, content);
        }
        let sandbox = Sandbox::new();
        let before = sandbox.seen();
        match sandbox.unpack(&zst(&tar.end()), Packing::TarZst, Os::Linux, &UnpackLimits::default()) {
            Err(_) => prop_assert_eq!(sandbox.seen(), before),
            Ok(root) => {
                for path in sandbox.seen().into_keys().filter(|path| !before.contains_key(path)) {
                    prop_assert!(path.starts_with(&root), "{path:?}");
                    if let Ok(real) = path.canonicalize() {
                        prop_assert!(real.starts_with(root.canonicalize().unwrap()), "{path:?} leads to {real:?}");
                    }
                }
                fs::remove_dir_all(&root).unwrap();
                prop_assert_eq!(sandbox.seen(), before);
            }
        }
    }

    /// Damage of any kind is an error or harmless, never a panic.

    #[test]
    fn damaged_archives_leave_nothing(kind in 0..3_usize, at in any::<prop::sample::Index>(), byte: u8, cut: bool) {
        let tar = Tar::default().file("bin/run", &[7; 3000]).link("l", "bin/run").pax(b'x', &[("path", "y")]).file("x", b"x");
        let (packing, mut bytes) = match kind {
            0 => (Packing::TarZst, zst(&tar.end())),
            1 => (Packing::TarGz, gz(&tar.end())),
            _ => (Packing::Zip, zip_of(&[("bin/run", 0o755, &[7; 3000]), ("l", 0o120777, b"bin/run")])),
        };
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] = byte }
        let sandbox = Sandbox::new();
        let before = sandbox.seen();
        if sandbox.unpack(&bytes, packing, Os::Linux, &UnpackLimits::default()).is_err() {
            prop_assert_eq!(sandbox.seen(), before);
        }
    }
}
