//! Malformed archives, built byte by byte, and the table of those that attack an unpacker.
//!
//! Each row is an archive that is complete and readable except for its one defect, with a word of the error. A file `bin/ok` comes first in
//! every tar and zip, so that a rejection would leave it behind if it left anything.

use std::io::Write;

use flate2::Compression;
use flate2::write::{DeflateEncoder, GzEncoder};

/// A name outside every tree, which must never be created.
pub const OUTSIDE: &str = "/aops-attack-outside";

/// One attack.
#[derive(Debug, Clone)]
pub struct Attack {
    pub name: &'static str,
    /// The extension of a package's file name: `tar.zst`, `tar.gz`, `zip`.
    pub packing: &'static str,
    /// The operating system that the package is for.
    pub os: &'static str,
    pub bytes: Vec<u8>,
    /// A word of the error.
    pub refusal: &'static str,
}

/// Every attack.
pub fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (name, tar, refusal) in on_tar() {
        for (packing, bytes) in [("tar.zst", zst(&tar)), ("tar.gz", gz(&tar))] {
            attacks.push(Attack { name, packing, os: "linux", bytes, refusal });
        }
    }
    for (name, bytes, refusal) in on_compression() {
        let packing = if bytes.starts_with(&[0x1f, 0x8b]) { "tar.gz" } else { "tar.zst" };
        attacks.push(Attack { name, packing, os: "linux", bytes, refusal });
    }
    attacks.extend(on_zip().into_iter().map(|(name, bytes, refusal)| Attack {
        name,
        packing: "zip",
        os: "linux",
        bytes,
        refusal,
    }));
    for name in ["nul", "bin/Aux.txt", "com1", "lpt³.x", "name.", "name ", "a:stream", "what?", "a|b", "con/x"] {
        let refusal = "is not a valid file name on windows";
        attacks.push(Attack {
            name: "a name that Windows cannot hold",
            packing: "tar.zst",
            os: "windows",
            bytes: zst(&begun().file(name, b"x").end()),
            refusal,
        });
    }
    attacks.push(Attack {
        name: "a symbolic link for Windows",
        packing: "tar.zst",
        os: "windows",
        bytes: zst(&begun().link("l", "bin/ok").end()),
        refusal: "a service on Windows may not create",
    });
    attacks
}

type Row = (&'static str, Vec<u8>, &'static str);

fn begun() -> Tar {
    Tar::default().file("bin/ok", b"ok")
}

fn on_tar() -> Vec<Row> {
    let t = begun;
    let deep = format!("{}a", "a/".repeat(600));
    let leaves = "leaves the package";
    vec![
        ("an absolute path", t().file(&format!("{OUTSIDE}/x"), b"x").end(), "absolute"),
        ("a path that goes up", t().file("../outside/x", b"x").end(), "path contains .."),
        ("a path that goes up in the middle", t().file("a/../../outside/x", b"x").end(), "path contains .."),
        ("a path that leads up and down again", t().file("bin/../x", b"x").end(), "path contains .."),
        ("a directory that goes up", t().entry(b'5', "../outside/d/", 0o755, "", b"").end(), "path contains .."),
        ("a backslash", t().file("..\\outside\\x", b"x").end(), "is not a valid file name"),
        ("a control character", t().file("a\nb", b"x").end(), "is not a valid file name"),
        ("an escape to the terminal", t().file("\u{1b}[2J", b"x").end(), "is not a valid file name"),
        ("a NUL in a long name", t().long(b'L', "bin/x\0/../../y").file("x", b"x").end(), "is not a valid file name"),
        ("a NUL in a pax name", t().pax(b'x', &[("path", "x\0y")]).file("x", b"x").end(), "is not a valid file name"),
        ("a name that is not UTF-8", t().raw(b'0', b"\xff\xfe", 0o644, b"", 1, b"x").end(), "not UTF-8"),
        ("an over-long name", t().file(&"a".repeat(256), b"x").end(), "more than 255 bytes"),
        ("an over-long path", t().file(&deep, b"x").end(), "more than 1024 bytes"),
        ("a long name that goes up", t().long(b'L', "../outside/x").file("x", b"x").end(), "path contains .."),
        (
            "a pax name that goes up",
            t().pax(b'x', &[("path", "../outside/x")]).file("x", b"x").end(),
            "path contains ..",
        ),
        (
            "a pax name that is given twice",
            t().pax(b'x', &[("path", "a"), ("path", "b")]).file("x", b"x").end(),
            "twice",
        ),
        ("a pax name for all", t().pax(b'g', &[("path", "a")]).file("x", b"x").end(), "of all following entries"),
        ("a pax size that is none", t().pax(b'x', &[("size", "-1")]).file("x", b"x").end(), "an invalid size"),
        ("a damaged pax header", t().long(b'x', "99 path=x\n").file("x", b"x").end(), "extended header is damaged"),
        ("pax headers without an entry", t().pax(b'x', &[("path", "a")]).end(), "damaged"),
        ("two long names", t().long(b'L', "a").long(b'L', "b").file("x", b"x").end(), "damaged"),
        (
            "a header of a megabyte",
            t().long(b'L', &"a".repeat(1 << 20)).file("x", b"x").end(),
            "header exceeds the limit",
        ),
        ("a link to an absolute path", t().link("x", OUTSIDE).end(), leaves),
        ("a link that goes up", t().link("bin/x", "../../outside").end(), leaves),
        ("a link that goes up behind a name", t().link("x", "bin/../../outside").end(), leaves),
        ("a chain of links that leads out", t().link("b", "bin").link("a", "b/..").link("c", "a/..").end(), leaves),
        ("a pax link that goes up", t().pax(b'x', &[("linkpath", "../outside")]).link("x", "bin").end(), leaves),
        ("a long link that goes up", t().long(b'K', "../outside").link("x", "bin").end(), leaves),
        ("a link with a backslash", t().link("x", "..\\outside").end(), leaves),
        ("a link to nothing", t().link("x", "").end(), "link"),
        ("a link to a name that is too long", t().long(b'K', &"a/".repeat(2100)).link("x", "bin").end(), "too long"),
        ("a file below a link", t().link("x", "bin").file("x/y", b"x").end(), "is not a directory"),
        (
            "a directory below a link",
            t().link("x", "bin").entry(b'5', "x/y/", 0o755, "", b"").end(),
            "is not a directory",
        ),
        ("a link below a link", t().link("x", "bin").link("x/y", "ok").end(), "is not a directory"),
        ("a directory over a link", t().link("x", "bin").entry(b'5', "x/", 0o755, "", b"").end(), "duplicate entry"),
        ("a file over a link", t().link("x", "bin/ok").file("x", b"x").end(), "duplicate entry"),
        ("a link over a directory", t().link("bin", "..").end(), "duplicate entry"),
        ("a file in a file", t().file("bin/ok/x", b"x").end(), "is not a directory"),
        ("a hard link that goes up", t().hard("x", "../outside/victim").end(), "hard link"),
        ("a hard link to an absolute path", t().hard("x", "/etc/passwd").end(), "hard link"),
        ("a hard link to nothing", t().hard("x", "y").end(), "hard link"),
        ("a hard link to itself", t().hard("x", "x").end(), "hard link"),
        ("a hard link to a link", t().link("l", "bin/ok").hard("x", "l").end(), "hard link"),
        ("a hard link through a link", t().link("l", "bin").hard("x", "l/ok").end(), "hard link"),
        ("a hard link to a directory", t().hard("x", "bin").end(), "hard link"),
        ("a hard link with content", t().entry(b'1', "x", 0o644, "bin/ok", b"x").end(), "but is not a file"),
        ("a directory with content", t().entry(b'5', "d/", 0o755, "", b"x").end(), "but is not a file"),
        ("a character device", t().entry(b'3', "x", 0o644, "", b"").end(), "device or a pipe"),
        ("a block device", t().entry(b'4', "x", 0o644, "", b"").end(), "device or a pipe"),
        ("a fifo", t().entry(b'6', "x", 0o644, "", b"").end(), "device or a pipe"),
        ("the name of a volume", t().entry(b'V', "x", 0o644, "", b"").end(), "not a file, directory or link"),
        ("the rest of another volume", t().entry(b'M', "x", 0o644, "", b"").end(), "not a file, directory or link"),
        ("a directory as GNU dumps it", t().entry(b'D', "x", 0o755, "", b"").end(), "not a file, directory or link"),
        ("an unknown type", t().entry(b'Z', "x", 0o644, "", b"").end(), "not a file, directory or link"),
        ("setuid", t().entry(b'0', "x", 0o4755, "", b"x").end(), "setuid"),
        ("setgid", t().entry(b'0', "x", 0o2755, "", b"x").end(), "setgid"),
        ("setuid by a hard link", t().entry(b'1', "x", 0o4755, "bin/ok", b"").end(), "setuid"),
        (
            "capabilities by pax",
            t().pax(b'x', &[("SCHILY.xattr.security.capability", "x")]).file("x", b"x").end(),
            "capabilities",
        ),
        (
            "capabilities for all",
            t().pax(b'g', &[("LIBARCHIVE.xattr.security.capability", "x")]).file("x", b"x").end(),
            "capabilities",
        ),
        ("a sparse file of GNU's", t().raw(b'S', b"x", 0o644, b"", 0, b"").end(), "sparse"),
        ("a sparse file of pax", t().pax(b'x', &[("GNU.sparse.major", "1")]).file("x", b"x").end(), "sparse"),
        ("two files of one name", t().file("./bin/ok", b"x").end(), "duplicate entry"),
        (
            "two directories of one name",
            t().entry(b'5', "d/", 0o755, "", b"").entry(b'5', "d", 0o755, "", b"").end(),
            "duplicate entry",
        ),
        ("two files that differ in case", t().file("bin/OK", b"x").end(), "differ in case"),
        ("two directories that differ in case", t().file("BIN/x", b"x").end(), "differ in case"),
        ("two letters that differ in case", t().file("ä", b"x").file("Ä", b"x").end(), "differ in case"),
        ("the mark of a whole release", t().file(".complete", b"{}").end(), "reserved"),
        ("the mark in another case", t().file("./.Complete", b"{}").end(), "reserved"),
        ("the mark as a directory", t().file(".complete/x", b"x").end(), "reserved"),
        ("a file whose name is a directory's", t().raw(b'0', b"x/", 0o644, b"", 0, b"").end(), "name ends in a slash"),
        ("a bomb of zeros", t().claiming("x", 2 << 30).end(), "bytes"),
        ("sizes that overflow", t().pax(b'x', &[("size", "18446744073709551615")]).file("x", b"x").end(), "damaged"),
        ("global headers without end", global_headers(), "more than 100000 entries"),
        ("roots without end", t().repeat(b'5', "./", 100_001), "more than 100000 entries"),
        ("a file that is cut off", t().claiming("x", 5000).0, "truncated"),
        ("a header that is cut off", t().file("x", b"x").end()[..1300].to_vec(), "damaged"),
        ("a checksum that is wrong", wrong_checksum(), "damaged"),
        ("something behind the end", [t().end(), t().file("x", b"x").end()].concat(), "after its end"),
        ("padding without end", [t().end(), vec![0; 2 << 20]].concat(), "after its end"),
        ("nothing", Tar::default().end(), "empty"),
        ("no bytes at all", Vec::new(), "empty"),
        ("nothing but the root", Tar::default().entry(b'5', "./", 0o755, "", b"").end(), "empty"),
        ("no tar", b"hello, world".repeat(100), "damaged"),
    ]
}

fn on_compression() -> Vec<Row> {
    let whole = begun().end();
    let mut large = begun().file("big", &vec![1; 20 << 20]).end();
    let mut wide = zstd::stream::write::Encoder::new(Vec::new(), 1).expect("zstd");
    wide.window_log(24).expect("zstd");
    wide.write_all(&large).expect("memory");
    let wide = wide.finish().expect("zstd");
    large.truncate(1 << 20);
    let flipped = |mut bytes: Vec<u8>, at: usize| {
        let at = bytes.len() - at;
        bytes[at] ^= 1;
        bytes
    };
    vec![
        ("a window larger than hosts have memory for", wide, "cannot unpack the package"),
        ("a zstd frame that is cut off", cut(zst(&large), 10), "cannot unpack the package"),
        ("a zstd frame with a wrong checksum", flipped(zst(&whole), 1), "damaged"),
        ("a gzip that is cut off", cut(gz(&large), 10), "cannot unpack the package"),
        ("a gzip with a wrong checksum", flipped(gz(&whole), 5), "damaged"),
        ("a gzip with a wrong length", flipped(gz(&whole), 1), "damaged"),
        ("no zstd", b"hello".to_vec(), "cannot unpack the package"),
        ("something behind a zstd frame", [zst(&whole), b"hello".to_vec()].concat(), "after its end"),
        ("something behind a gzip", [gz(&whole), b"hello".to_vec()].concat(), "after its end"),
        ("an archive in a second zstd frame", [zst(&whole), zst(&whole)].concat(), "after its end"),
        ("an archive in a second member", [gz(&whole), gz(&whole)].concat(), "after its end"),
    ]
}

fn on_zip() -> Vec<Row> {
    let ok = || vec![Zipped::file("bin/ok", b"ok")];
    let with = |more: Zipped| zip(&[ok(), vec![more]].concat());
    let file = |name: &str| Zipped::file(name, b"content");
    let typed = |mode: u32| Zipped { attributes: mode << 16, ..file("x") };
    // In a zip with the single file `only`, so that the first header of each kind is that file's.
    let patched = |signature: &[u8; 4], at: usize, bytes: &[u8]| patch(zip(&[file("only")]), signature, at, bytes);
    let (local, central, end) = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06");
    let contradicts = "contradicts the central directory";
    let mut bomb = Zipped::file("x", &vec![0; 1 << 20]);
    bomb.claimed = Some(2 << 30);
    let link =
        |name: &str, target: &str| Zipped { attributes: 0o120777 << 16, ..Zipped::file(name, target.as_bytes()) };
    vec![
        ("an absolute path", with(file(&format!("{OUTSIDE}/x"))), "absolute"),
        ("a path that goes up", with(file("a/../../outside/x")), "path contains .."),
        ("a backslash", with(file("..\\outside\\x")), "is not a valid file name"),
        ("a NUL", with(file("x\0.txt")), "is not a valid file name"),
        ("a name that is not UTF-8", with(Zipped { name: b"\xff".to_vec(), ..file("x") }), "not UTF-8"),
        ("a link that goes up", with(link("bin/x", "../../outside")), "leaves the package"),
        ("a link to an absolute path", with(link("x", OUTSIDE)), "leaves the package"),
        ("a link to a name that is too long", with(link("x", &"a".repeat(5000))), "too long"),
        ("a link that is longer than it says", with(Zipped { claimed: Some(2), ..link("x", "bin/ok") }), "longer than"),
        ("a file below a link", zip(&[ok(), vec![link("x", "bin"), file("x/y")]].concat()), "is not a directory"),
        ("a device", with(typed(0o020644)), "device or a pipe"),
        ("a fifo", with(typed(0o010644)), "device or a pipe"),
        ("setuid", with(typed(0o104755)), "setuid"),
        ("setgid", with(typed(0o102755)), "setgid"),
        ("two files of one name", with(file("bin/ok")), "duplicate entry"),
        ("two files that differ in case", with(file("Bin/ok")), "differ in case"),
        ("the mark of a whole release", with(file(".complete")), "reserved"),
        ("a directory with content", with(Zipped { attributes: 0o040755 << 16, ..file("d/") }), "but is not a file"),
        ("a bomb of zeros", with(bomb), "bytes"),
        ("a file that is longer than it says", with(Zipped { claimed: Some(3), ..file("x") }), "longer than"),
        ("a file that is shorter than it says", with(Zipped { claimed: Some(300), ..file("x") }), "shorter than"),
        ("another name in the local header", patched(local, 30, b"evil"), contradicts),
        ("another method in the local header", patched(local, 8, &[0, 0]), contradicts),
        ("another size in the local header", patched(local, 22, &[1, 0, 0, 0]), contradicts),
        ("another checksum in the local header", patched(local, 14, &[1, 2, 3, 4]), contradicts),
        ("other flags in the local header", patched(local, 6, &[8, 0]), contradicts),
        ("a wrong checksum", with(Zipped { crc: Some(1), ..file("x") }), "checksum"),
        ("encryption", with(Zipped { flags: 1, ..file("x") }), "encrypted"),
        ("a method that is not deflate", with(Zipped { method: 93, ..file("x") }), "compressed with method 93"),
        ("deflate that is none", patched(local, 34, &[0xff, 0xff, 0xff]), "content is damaged"),
        ("a local header that is not there", patched(central, 42, &[1, 0, 0, 0]), contradicts),
        ("a local header behind the end", patched(central, 42, &[0, 0, 1, 0]), "truncated"),
        ("two entries that share bytes", shared(), "share bytes"),
        ("more entries than there are", patched(end, 8, &[2, 0, 2, 0]), "but its end record says"),
        ("fewer entries than there are", patch(with(file("x")), end, 8, &[1, 0, 1, 0]), "but its end record says"),
        ("several volumes", patched(end, 4, &[1, 0]), "several volumes"),
        ("a zip64 count", patched(end, 8, &[0xff; 4]), "zip64"),
        ("a zip64 size", patched(central, 24, &[0xff; 4]), "zip64"),
        ("a zip64 end", zip64_end(), "zip64"),
        ("a directory somewhere else", patched(end, 16, &[0; 4]), "not where the end record says"),
        ("a directory that is damaged", patched(central, 0, b"PKPK"), "directory is damaged"),
        ("something before it", [b"#!/bin/sh\n".to_vec(), with(file("x"))].concat(), "not where the end record says"),
        ("something behind it", [with(file("x")), b"hello".to_vec()].concat(), "not a zip archive"),
        ("no zip", b"hello".to_vec(), "not a zip archive"),
        ("no bytes at all", Vec::new(), "not a zip archive"),
        ("nothing", zip(&[]), "empty"),
    ]
}

fn global_headers() -> Vec<u8> {
    let one = Tar::default().pax(b'g', &[("comment", "x")]).0;
    let mut bytes = begun().0;
    for _ in 0..100_001 {
        bytes.extend(&one);
    }
    Tar(bytes).end()
}

fn wrong_checksum() -> Vec<u8> {
    let mut bytes = begun().end();
    bytes[0] ^= 1;
    bytes
}

/// Two entries of the directory with the same content.
fn shared() -> Vec<u8> {
    let one = zip(&[Zipped::file("only", b"content")]);
    let at = find(&one, b"PK\x01\x02");
    let end = find(&one, b"PK\x05\x06");
    let directory = &one[at..end];
    let bytes = [&one[..at], directory, directory, &one[end..]].concat();
    let bytes = patch(bytes, b"PK\x05\x06", 8, &[2, 0, 2, 0]);
    patch(bytes, b"PK\x05\x06", 12, &(2 * directory.len() as u32).to_le_bytes())
}

/// The locator of a zip64 end record, which some readers follow and others ignore.
fn zip64_end() -> Vec<u8> {
    let one = zip(&[Zipped::file("only", b"content")]);
    let end = find(&one, b"PK\x05\x06");
    let locator = [&b"PK\x06\x07"[..], &[0; 16]].concat();
    [&one[..end], &locator, &one[end..]].concat()
}

fn cut(mut bytes: Vec<u8>, by: usize) -> Vec<u8> {
    bytes.truncate(bytes.len() - by);
    bytes
}

/// A tar archive that grows entry by entry.
#[derive(Debug, Clone, Default)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    /// A regular file with mode 0644.
    pub fn file(self, path: &str, content: &[u8]) -> Tar {
        self.entry(b'0', path, 0o644, "", content)
    }

    /// A symbolic link.
    pub fn link(self, path: &str, target: &str) -> Tar {
        self.entry(b'2', path, 0o777, target, b"")
    }

    /// A hard link.
    pub fn hard(self, path: &str, target: &str) -> Tar {
        self.entry(b'1', path, 0o644, target, b"")
    }

    /// An entry of any type; a name that is too long for the header precedes it, as GNU tar does.
    pub fn entry(mut self, kind: u8, path: &str, mode: u32, target: &str, content: &[u8]) -> Tar {
        for (kind, text) in [(b'L', path), (b'K', target)] {
            if text.len() > 100 {
                self = self.long(kind, &format!("{text}\0"));
            }
        }
        let short = |text: &str| text.as_bytes()[..text.len().min(100)].to_vec();
        self.raw(kind, &short(path), mode, &short(target), content.len() as u64, content)
    }

    /// A raw header, and the content after it.
    pub fn raw(mut self, kind: u8, path: &[u8], mode: u32, target: &[u8], size: u64, content: &[u8]) -> Tar {
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, path);
        put(100, format!("{mode:07o}").as_bytes());
        put(108, b"0000000\x000000000\0");
        put(124, format!("{size:011o}").as_bytes());
        put(136, b"00000000000\0        ");
        put(156, &[kind]);
        put(157, target);
        put(257, b"ustar  \0");
        if kind == b'S' {
            // A hole of a gigabyte up to the end of the file.
            put(386, b"07777777777\x0000000000000\0");
            put(483, b"07777777777\0");
        }
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(header);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A long name (`L`), a long link (`K`), or another header that describes the next entry.
    pub fn long(self, kind: u8, text: &str) -> Tar {
        self.raw(kind, b"././@LongLink", 0o644, b"", text.len() as u64, text.as_bytes())
    }

    /// A pax header: for the next entry (`x`) or for all that follow (`g`).
    pub fn pax(self, kind: u8, records: &[(&str, &str)]) -> Tar {
        let mut text = String::new();
        for (key, value) in records {
            let rest = format!(" {key}={value}\n");
            let mut length = rest.len() + 1;
            while length != rest.len() + length.to_string().len() {
                length += 1;
            }
            text.push_str(&format!("{length}{rest}"));
        }
        self.long(kind, &text)
    }

    /// A file with less content than its header says.
    fn claiming(self, path: &str, size: u64) -> Tar {
        self.raw(b'0', path.as_bytes(), 0o644, b"", size, b"short")
    }

    fn repeat(self, kind: u8, path: &str, times: usize) -> Vec<u8> {
        let one = Tar::default().entry(kind, path, 0o755, "", b"").0;
        let mut bytes = self.0;
        (0..times).for_each(|_| bytes.extend(&one));
        Tar(bytes).end()
    }

    /// With the two blocks at the end of an archive.
    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// One frame of zstd, with its checksum.
pub fn zst(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).expect("zstd");
    encoder.include_checksum(true).expect("zstd");
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

/// One member of gzip.
pub fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

/// An entry of a zip archive.
#[derive(Debug, Clone)]
pub struct Zipped {
    pub name: Vec<u8>,
    pub content: Vec<u8>,
    pub method: u16,
    pub flags: u16,
    /// Unix's mode in the upper half.
    pub attributes: u32,
    /// A wrong size, if any.
    pub claimed: Option<u32>,
    /// A wrong checksum, if any.
    pub crc: Option<u32>,
}

impl Zipped {
    /// A regular file with mode 0644.
    pub fn file(name: &str, content: &[u8]) -> Zipped {
        Zipped {
            name: name.as_bytes().to_vec(),
            content: content.to_vec(),
            method: 8,
            flags: 0,
            attributes: 0o100644 << 16,
            claimed: None,
            crc: None,
        }
    }
}

/// A zip archive.
pub fn zip(entries: &[Zipped]) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&entry.content).expect("memory");
        let packed = if entry.method == 0 { entry.content.clone() } else { encoder.finish().expect("memory") };
        let mut crc = flate2::Crc::new();
        crc.update(&entry.content);
        let mut shared = Vec::new();
        shared.extend(20_u16.to_le_bytes());
        shared.extend(entry.flags.to_le_bytes());
        shared.extend(entry.method.to_le_bytes());
        // 1980-01-01
        shared.extend([0, 0, 0x21, 0]);
        shared.extend(entry.crc.unwrap_or(crc.sum()).to_le_bytes());
        shared.extend((packed.len() as u32).to_le_bytes());
        shared.extend(entry.claimed.unwrap_or(entry.content.len() as u32).to_le_bytes());
        shared.extend((entry.name.len() as u16).to_le_bytes());
        shared.extend([0; 2]);
        directory.extend(b"PK\x01\x02\x14\x03");
        directory.extend(&shared);
        // No comment, the first volume, no internal attributes.
        directory.extend([0; 6]);
        directory.extend(entry.attributes.to_le_bytes());
        directory.extend((bytes.len() as u32).to_le_bytes());
        directory.extend(&entry.name);
        bytes.extend(b"PK\x03\x04");
        bytes.extend(&shared);
        bytes.extend(&entry.name);
        bytes.extend(packed);
    }
    let begin = bytes.len() as u32;
    bytes.extend(&directory);
    let count = (entries.len() as u16).to_le_bytes();
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend([count, count].concat());
    bytes.extend((directory.len() as u32).to_le_bytes());
    bytes.extend(begin.to_le_bytes());
    bytes.extend([0; 2]);
    bytes
}

/// Overwrites bytes of the first header with that signature.
fn patch(mut bytes: Vec<u8>, signature: &[u8; 4], at: usize, with: &[u8]) -> Vec<u8> {
    let at = find(&bytes, signature) + at;
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

fn find(bytes: &[u8], signature: &[u8; 4]) -> usize {
    bytes.windows(4).position(|four| four == signature).expect("it has such a header")
}
