//! Publishing: packing, signatures, and packages that are rejected.

use crate::package::trailer;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clap::Parser;

use super::*;
use crate::gateway::depot::{Index, Scanner};
use crate::gateway::tests::{Bench, native};
use crate::platform;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: PublishArgs,
}

impl Bench {
    fn publish_with(&self, line: &str, path: &Path) -> Result<PublishResult> {
        let mut words = vec!["publish".to_owned(), "--dir".to_owned(), self.dir.path().display().to_string()];
        words.extend(line.split_whitespace().map(ToOwned::to_owned));
        words.push(path.display().to_string());
        let args = Line::try_parse_from(words)?.args;
        publish(&self.directory, &args, ContentSource::at(path)?)
    }

    fn refusal(&self, line: &str, path: &Path) -> String {
        format!("{:#}", self.publish_with(line, path).err().unwrap())
    }

    fn index(&self) -> std::sync::Arc<Index> {
        Scanner::new(self.directory.clone()).scan(true).unwrap()
    }

    fn leftovers(&self) -> usize {
        let names = fs::read_dir(self.directory.depot()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with('.')).count()
    }
}

/// A package with a `control` script.
fn with_control_script(dir: &Path) -> PathBuf {
    let tree = dir.join("older");
    fs::create_dir_all(&tree).unwrap();
    fs::write(tree.join("control"), "#!/bin/sh\n").unwrap();
    platform::set_mode(&tree.join("control"), 0o755).unwrap();
    tree
}

#[test]
fn publishing_again_does_nothing_and_different_content_needs_another_version() {
    let bench = Bench::new();
    let tree = native(&bench.dir.path().join("tree"), "exporter", "1.5.0");
    let first = bench.publish_with("--os linux --arch amd64", &tree).unwrap();
    assert_eq!((first.outcome, first.file.as_str()), ("published", "exporter-1.5.0_linux_amd64.tar.zst"));
    assert_eq!(first.binding.epoch, 1);
    let contents = || fs::read(bench.directory.depot().join("exporter-1.5.0_linux_amd64.tar.zst.minisig")).unwrap();
    let before = contents();
    assert_eq!(bench.publish_with("--os linux --arch amd64", &tree).unwrap().outcome, "already published");
    assert_eq!(contents(), before);

    fs::write(bench.directory.depot().join(".new-interrupted"), "half").unwrap();
    fs::write(tree.join("more"), "x").unwrap();
    assert!(bench.refusal("--os linux --arch amd64", &tree).contains("different content; choose another version"));
    assert_eq!(bench.leftovers(), 0);
    assert_eq!(bench.index().packages(), 1);
}

#[test]
fn an_epoch_stays_until_it_is_raised() {
    let bench = Bench::new();
    let tree = |version: &str| native(&bench.dir.path().join(version), "exporter", version);
    assert_eq!(bench.publish_with("", &tree("1")).unwrap().binding.epoch, 1);
    assert_eq!(bench.publish_with("--epoch 4", &tree("2")).unwrap().binding.epoch, 4);
    assert_eq!(bench.publish_with("", &tree("3")).unwrap().binding.epoch, 4);
    // The same bytes, bound to a higher epoch.
    let again = bench.publish_with("--epoch 4", &tree("1")).unwrap();
    assert_eq!((again.outcome, again.binding.epoch), ("signed again", 4));
    let low = bench.publish_with("--epoch 2", &tree("4")).unwrap();
    assert!(low.notes.iter().any(|note| note.contains("will reject")), "{:?}", low.notes);
    assert_eq!(bench.index().packages(), 4);
}

#[test]
fn packages_that_no_host_could_run_are_rejected() {
    let bench = Bench::new();
    let dir = bench.dir.path();
    let tree = with_control_script(dir);
    assert!(bench.refusal("", &tree).contains("--name"));
    assert!(bench.refusal("--name Ctl --version 1", &tree).contains("name of a sub-agent"));
    assert!(bench.refusal("--name ctl --version ../1", &tree).contains("a version"));
    assert!(bench.refusal("--name aops-spm --version 1", &tree).contains("bin/aops"));
    assert_eq!(bench.publish_with("--name ctl --version 1", &tree).unwrap().outcome, "published");
    fs::remove_file(tree.join("control")).unwrap();
    fs::write(tree.join("readme"), "x").unwrap();
    assert!(bench.refusal("--name ctl --version 2", &tree).contains("neither agent.toml nor an executable control"));

    // A script that only Windows can run.
    fs::write(tree.join("control.bat"), "x").unwrap();
    assert!(bench.refusal("--name ctl --version 2 --os linux", &tree).contains("neither agent.toml"));
    assert_eq!(bench.publish_with("--name ctl --version 2 --os windows", &tree).unwrap().outcome, "published");

    let tree = native(&dir.join("native"), "exporter", "1");
    assert!(bench.refusal("--name other", &tree).contains("agent.toml has name exporter, not other"));
    for (command, reason) in
        [("gone", "./gone, which is not in the package"), ("agent.toml", "which is not executable")]
    {
        let manifest = format!("name = \"exporter\"\nversion = \"1\"\n[run]\ncommand = [\"./{command}\"]\n");
        fs::write(tree.join("agent.toml"), manifest).unwrap();
        assert!(bench.refusal("--os linux", &tree).contains(reason));
        assert!(!bench.refusal("--os linux", &tree).contains("TOML"));
    }
    fs::write(tree.join("agent.toml"), "name = \"exporter\"\n[run").unwrap();
    assert!(bench.refusal("", &tree).contains("agent.toml"));
    assert!(bench.refusal("", &dir.join("absent")).contains("cannot publish"));
    assert!(bench.refusal("", &bench.directory.fleet()).contains("tar.zst, .tar.gz or .zip"));
    assert_eq!(bench.leftovers(), 0);
}

fn tar_gz(tree: &Path, archive: &Path) {
    let encoder = flate2::write::GzEncoder::new(File::create(archive).unwrap(), flate2::Compression::fast());
    let mut builder = tar::Builder::new(encoder);
    builder.append_dir_all(".", tree).unwrap();
    builder.into_inner().unwrap().finish().unwrap();
}

#[test]
fn an_archive_keeps_its_packing_and_its_signature() {
    let bench = Bench::new();
    let dir = bench.dir.path();
    let archive = dir.join("ctl-2.0_linux_386.tar.gz");
    tar_gz(&with_control_script(dir), &archive);
    let bytes = fs::read(&archive).unwrap();

    // A signature by the depot's own key.
    let own = Signer::load(&bench.directory.signing_key(), || anyhow::bail!("it has none")).unwrap();
    let sign = |signer: &Signer, binding: &str| {
        let text = signer.sign(&bytes[..], &binding.parse().unwrap()).unwrap();
        fs::write(depot::signature_path(&archive), &text).unwrap();
        text
    };
    sign(&own, "name=other version=2.0 os=linux arch=386 epoch=7");
    assert!(bench.refusal("--name ctl", &archive).contains("its signature has name other, not ctl"));
    let text = sign(&own, "name=ctl version=2.0 os=linux arch=386 epoch=7");
    assert!(bench.refusal("--epoch 8", &archive).contains("epoch 7, not 8"));
    let published = bench.publish_with("", &archive).unwrap();
    assert_eq!((published.file.as_str(), published.binding.epoch), ("ctl-2.0_linux_386.tar.gz", 7));
    assert!(published.notes.is_empty());
    let target = bench.directory.depot().join(&published.file);
    assert_eq!(fs::read(&target).unwrap(), bytes);
    assert_eq!(fs::read_to_string(depot::signature_path(&target)).unwrap(), text);

    // A signature by another key is kept, with a warning. An invalid one, or one of other content, is rejected.
    let text = sign(&Signer::generate().unwrap(), "name=ctl version=2.0 os=linux arch=386 epoch=7");
    let published = bench.publish_with("", &archive).unwrap();
    assert!(published.notes[0].contains("a key that is not in"), "{:?}", published.notes);
    assert_eq!(fs::read_to_string(depot::signature_path(&target)).unwrap(), text);
    assert_eq!(bench.index().packages(), 1);
    fs::write(depot::signature_path(&archive), "nonsense").unwrap();
    assert!(bench.refusal("", &archive).contains("sign the archive again"));
    let other =
        own.sign(&b"other bytes"[..], &"name=ctl version=2.0 os=linux arch=386 epoch=7".parse().unwrap()).unwrap();
    fs::write(depot::signature_path(&archive), other).unwrap();
    assert!(bench.refusal("", &archive).contains("its signature is invalid"));
}

#[test]
fn a_signature_that_hosts_would_reject_is_not_published() {
    let bench = Bench::new();
    let archive = bench.dir.path().join("ctl-2.0_linux_386.tar.gz");
    tar_gz(&with_control_script(bench.dir.path()), &archive);
    let bytes = fs::read(&archive).unwrap();
    let signature = |signer: &Signer| {
        signer.sign(&bytes[..], &"name=ctl version=2.0 os=linux arch=386 epoch=7".parse().unwrap()).unwrap()
    };
    let put = |text: &str| fs::write(depot::signature_path(&archive), text).unwrap();
    let own = signature(&Signer::load(&bench.directory.signing_key(), || anyhow::bail!("it has none")).unwrap());

    // A file larger than hosts read.
    let padding = package::MAX_SIGNATURE_BYTES as usize + 1 - own.len();
    put(&format!("{own}{}", "\n".repeat(padding)));
    assert!(bench.refusal("", &archive).contains("4096"), "{}", bench.refusal("", &archive));

    // The legacy kind, by the depot's own key and by another one.
    let legacy = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(ToOwned::to_owned).collect();
        let mut blob = BASE64_STANDARD.decode(&lines[1]).unwrap();
        blob[1] = b'd';
        lines[1] = BASE64_STANDARD.encode(blob);
        lines.join("\n")
    };
    for text in [&own, &signature(&Signer::generate().unwrap())] {
        put(&legacy(text));
        assert!(bench.refusal("", &archive).contains("legacy format"));
    }

    // One without a valid trusted comment.
    put(&own.replace("epoch=7", "epoch=seven"));
    assert!(bench.refusal("", &archive).contains("does not name the package"));
    assert_eq!((bench.leftovers(), bench.index().packages()), (0, 0));

    put(&format!("{own}{}", "\n".repeat(padding - 1)));
    assert_eq!(bench.publish_with("", &archive).unwrap().outcome, "published");
    assert_eq!(bench.index().packages(), 1);
}

#[test]
fn without_the_private_key_only_signed_archives_can_be_published() {
    let bench = Bench::new();
    let tree = native(&bench.dir.path().join("tree"), "exporter", "1");
    fs::remove_file(bench.directory.signing_key()).unwrap();
    assert!(bench.refusal("", &tree).contains("--key"));
}

#[test]
fn a_package_of_the_manager_creates_the_bootstrap_with_the_depots_keys() {
    let bench = Bench::new();
    let tree = bench.dir.path().join("spm");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::write(tree.join("bin/aops"), "the executable").unwrap();
    platform::set_mode(&tree.join("bin/aops"), 0o755).unwrap();
    let line = "--name aops-spm --version 9 --os linux --arch 386";
    let name = bench.publish_with(line, &tree).unwrap().bootstrap.unwrap();
    assert_eq!(name, "aops-agent-service-linux-386");
    let path = bench.directory.depot().join(&name);
    let mut file = File::open(&path).unwrap();
    assert_eq!(trailer::length_without(&mut file).unwrap(), "the executable".len() as u64);
    let bytes = fs::read(&path).unwrap();
    assert!(bytes.starts_with(b"the executable{"));
    let key = fs::read_to_string(bench.directory.public_key()).unwrap();
    let base64 = key.lines().nth(1).unwrap();
    assert!(bytes.windows(base64.len()).any(|window| window == base64.as_bytes()));
    assert!(platform::is_executable(&path));
    // A package with keys that hosts would reject is rejected here, also as an archive.
    fs::create_dir_all(tree.join("keys/revoked")).unwrap();
    let archive = bench.dir.path().join("spm.tar.gz");
    let line_of = |version: &str| format!("--name aops-spm --version {version} --os linux --arch 386");
    for (bad, words) in
        [("no key", "is not a minisign public key"), ("", "it is empty"), (key.as_str(), "both brings and revokes")]
    {
        for name in ["keys/1.pub", "keys/revoked/1.pub"] {
            fs::write(tree.join(name), bad).unwrap();
        }
        tar_gz(&tree, &archive);
        for path in [&archive, &tree] {
            let refusal = bench.refusal(&line_of("10"), path);
            assert!(refusal.contains(words), "{refusal}");
        }
    }
    fs::remove_dir_all(tree.join("keys")).unwrap();
    let odd = bench.directory.keys().join("odd.pub");
    fs::write(&odd, format!("{key}something else\n")).unwrap();
    let published = bench.publish_with(&line_of("11"), &tree).unwrap();
    assert!(published.notes[0].contains("keys/odd.pub is not used"), "{:?}", published.notes);
    fs::remove_file(odd).unwrap();
    // Publishing again restores a bootstrap that was removed.
    fs::remove_file(&path).unwrap();
    assert_eq!(bench.publish_with(line, &tree).unwrap().outcome, "already published");
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn a_tampered_or_misnamed_file_is_not_offered_and_the_reason_is_reported() {
    let bench = Bench::new();
    let tree = native(&bench.dir.path().join("tree"), "exporter", "1");
    let file = bench.publish_with("--os linux --arch amd64", &tree).unwrap().file;
    let depot = bench.directory.depot();
    let mut scanner = Scanner::new(bench.directory.clone());
    let index = scanner.scan(true).unwrap();
    assert_eq!((index.packages(), index.problems().len()), (1, 0));
    assert!(scanner.scan(true).is_none(), "nothing has changed");

    let mut bytes = fs::read(depot.join(&file)).unwrap();
    fs::copy(depot.join(&file), depot.join("exporter-2_linux_amd64.tar.zst")).unwrap();
    fs::copy(depot.join(format!("{file}.minisig")), depot.join("exporter-2_linux_amd64.tar.zst.minisig")).unwrap();
    fs::write(depot.join("note.txt"), "x").unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(depot.join(&file), &bytes).unwrap();
    assert!(scanner.scan(false).is_none(), "it may still be written to");
    let index = scanner.scan(false).unwrap();
    assert_eq!(index.packages(), 0);
    let why = |name: &str| index.problems()[name].clone();
    assert!(why(&file).contains("its signature is invalid"));
    assert!(why("exporter-2_linux_amd64.tar.zst").contains("is for exporter 1"));
    assert!(why("note.txt").contains("no signature"));
    assert!(index.file("note.txt").is_none() && index.file(&file).is_none());
}

#[test]
fn packages_that_no_host_would_unpack_are_rejected() {
    let bench = Bench::new();
    let tree = |name: &str| with_control_script(&bench.dir.path().join(name));
    let (in_case, through, windows, large) = (tree("case"), tree("through"), tree("windows"), tree("large"));
    for name in ["read.me", "READ.me"] {
        fs::write(in_case.join(name), "x").unwrap();
    }
    platform::make_symlink(Path::new("bin/../control"), &through.join("link")).unwrap();
    fs::write(windows.join("control.exe"), "MZ").unwrap();
    fs::write(windows.join("a:b"), "x").unwrap();
    // The reader skips no content, whatever its size.
    fs::write(large.join("data"), vec![7; 300_000]).unwrap();
    for (tree, os, word) in [
        (&in_case, "linux", "differ in case"),
        (&through, "linux", "leaves the package"),
        (&windows, "windows", "is not a valid file name on windows"),
    ] {
        let refusal = bench.refusal(&format!("--name a --version 1 --os {os} --arch amd64"), tree);
        assert!(refusal.contains(word), "{refusal}");
    }
    assert_eq!((bench.leftovers(), bench.index().packages()), (0, 0));
    for (version, os, tree) in [("1", "linux", &windows), ("2", "linux", &large)] {
        let line = format!("--name a --version {version} --os {os} --arch amd64");
        assert_eq!(bench.publish_with(&line, tree).unwrap().outcome, "published");
    }
}

#[test]
fn ambiguous_names_and_versions_are_rejected() {
    let bench = Bench::new();
    let tree = |version: &str| native(&bench.dir.path().join(version), "exporter", version);
    for version in ["current", "Current"] {
        let refusal = bench.refusal("--os linux --arch amd64", &tree(version));
        assert!(refusal.contains(&format!("the version {version} is reserved")), "{refusal}");
    }
    for version in ["con", "1."] {
        let refusal = bench.refusal("--os windows --arch amd64", &tree(version));
        assert!(refusal.contains("cannot be the name of a directory on Windows"), "{refusal}");
    }
    bench.publish_with("--os linux --arch amd64", &tree("1.0A")).unwrap();
    let refusal = bench.refusal("--os linux --arch amd64", &tree("1.0a"));
    assert!(refusal.contains("version 1.0A of exporter is published already"), "{refusal}");
    // Two releases would have the same file name.
    let tree = with_control_script(bench.dir.path());
    bench.publish_with("--name a --version 1-2 --os linux --arch amd64", &tree).unwrap();
    let refusal = bench.refusal("--name a-1 --version 2 --os linux --arch amd64", &tree);
    assert!(refusal.contains("is already used by a 1-2 for linux/amd64"), "{refusal}");
    assert_eq!(bench.index().packages(), 2);
}
