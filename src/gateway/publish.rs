//! `gateway publish`: a directory or an archive becomes a signed package in the depot.
//!
//! It is looked into, named and signed as a temporary file there, and gets its name last, after its signature, so that a running gateway never
//! sees one without the other. A release once published never changes: the same content again is nothing, another content an error.

mod identity;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use self::identity::{IdentityHints, RequestedIdentity};
use super::keyring::DepotKeys;
use super::{GatewayDirectory, archive, bootstrap, depot};
use crate::core::model::{AgentName, Arch, Binding, MANAGER_PACKAGE, Os, Packing, Release, Version};
use crate::core::names;
use crate::lock;
use crate::output::{message, report};
use crate::package::pack::PackTree;
use crate::package::sign::{Signer, password};
use crate::package::{self, Keys, SignatureStatus, trailer};
use crate::store::{self, Access};

/// How long another publishing is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// The end of the help, 80 columns wide.
const EXAMPLE: &str = "\
A package is a directory, such as hello/ with two files:

  agent.toml    name = \"hello\"
                version = \"1.0\"
                [run]
                command = [\"./hello.sh\", \"--verbose\"]

  hello.sh      the program, executable; it stays in the foreground, and
                what it prints goes to its log

  aops gateway publish --dir DIR hello/

Hosts run it once fleet.toml in DIR says so:

  [agents.hello]
  version = \"1.0\"

A package of the manager (aops-spm, with bin/aops) may change whom hosts
trust, from its commit on:

  keys/NEW.pub            a minisign public key that is trusted, too
  keys/revoked/OLD.pub    one that is not any more, for good: it is refused
                          wherever it comes from, but for an operator's own
                          file in etc/keys of a host

and may bring hosts another gateway, which they keep if the release passes its
trial: etc/endpoint.toml with heartbeatSrv, and caCert (a file of the package)
or pin.

To rotate a key, sign a release that brings the new one with the old key; when
every host runs it, sign one that revokes the old with the new key.";

/// What is published, and as what.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLE)]
pub struct PublishArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of the package, where its agent.toml, its
    /// signature or its file's name does not say it
    #[arg(long, verbatim_doc_comment)]
    name: Option<AgentName>,
    /// Version of the package, likewise
    #[arg(long)]
    version: Option<Version>,
    /// linux or windows, likewise; of a directory: what
    /// this executable was built for
    #[arg(long, verbatim_doc_comment)]
    os: Option<Os>,
    /// amd64, 386 or arm64, likewise
    #[arg(long)]
    arch: Option<Arch>,
    /// A host that has had a package of one epoch refuses
    /// lower ones [default: the highest of that name, or 1]
    #[arg(long, value_name = "N", verbatim_doc_comment)]
    epoch: Option<u64>,
    /// The private key to sign with; the password of one that
    /// has one is asked for, or taken from the environment
    /// variable MINISIGN_PASSWORD [default: keys/aops.key]
    #[arg(long, value_name = "FILE", verbatim_doc_comment)]
    key: Option<PathBuf>,
    /// Publish this very executable: as the manager's
    /// package, and as the bootstrap that hosts fetch
    #[arg(long = "self", conflicts_with_all = ["path", "name", "os", "arch"], verbatim_doc_comment)]
    itself: bool,
    /// A directory, or an archive (tar.zst, tar.gz, zip); a
    /// signature beside it (PATH.minisig) is kept
    #[arg(required_unless_present = "itself", verbatim_doc_comment)]
    path: Option<PathBuf>,
}

pub(super) fn run(args: &PublishArgs) -> Result<()> {
    let place = GatewayDirectory::initialized(&args.dir)?;
    let what = if args.itself {
        ContentSource::itself()?
    } else {
        ContentSource::at(args.path.as_deref().unwrap_or(Path::new("")))?
    };
    let shown = what.shown();
    let published = publish(&place, args, what).with_context(|| format!("cannot publish {shown}"))?;
    let PublishResult { binding, file, fate, notes, bootstrap } = published;
    for note in notes {
        message!("{note}");
    }
    report!("{} {}, epoch {}: {file}", fate, binding.release, binding.epoch);
    if let Some(bootstrap) = bootstrap {
        report!("published the bootstrap: {bootstrap}");
    }
    Ok(())
}

/// What came of it.
struct PublishResult {
    binding: Binding,
    file: String,
    fate: &'static str,
    notes: Vec<String>,
    bootstrap: Option<String>,
}

/// Where the content comes from.
enum ContentSource {
    Directory(PathBuf),
    Archive { path: PathBuf, packing: Packing },
    Itself(PathBuf),
}

impl ContentSource {
    fn at(path: &Path) -> Result<ContentSource> {
        let metadata = fs::metadata(path).with_context(|| format!("cannot publish {}", path.display()))?;
        if metadata.is_dir() {
            return Ok(ContentSource::Directory(path.to_owned()));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match identity::packing_of(&name) {
            Some(packing) => Ok(ContentSource::Archive { path: path.to_owned(), packing }),
            None => bail!(
                "cannot publish {}: expected a directory, or an archive named .tar.zst, .tar.gz or .zip",
                path.display()
            ),
        }
    }

    fn itself() -> Result<ContentSource> {
        Ok(ContentSource::Itself(std::env::current_exe().context("cannot find this executable")?))
    }

    fn shown(&self) -> String {
        let (ContentSource::Directory(path) | ContentSource::Archive { path, .. } | ContentSource::Itself(path)) = self;
        path.display().to_string()
    }

    fn packing(&self) -> Packing {
        match self {
            ContentSource::Archive { packing, .. } => *packing,
            ContentSource::Directory(_) | ContentSource::Itself(_) => Packing::TarZst,
        }
    }

    /// The content as an archive, in a temporary file of the depot.
    fn staged(&self, place: &GatewayDirectory) -> Result<NamedTempFile> {
        let mut staged = tempfile::Builder::new().prefix(".new-").tempfile_in(place.depot())?;
        match self {
            ContentSource::Directory(path) => PackTree::of_directory(path)?.write(staged.as_file_mut())?,
            ContentSource::Archive { path, .. } => {
                std::io::copy(&mut File::open(path)?, staged.as_file_mut())?;
            }
            ContentSource::Itself(path) => {
                // Without the trailer that it has if it is a bootstrap itself: the package is to be the same.
                let mut bare = tempfile::NamedTempFile::new()?;
                let mut executable = File::open(path)?;
                let length = trailer::length_without(&mut executable)?;
                executable.seek(SeekFrom::Start(0))?;
                std::io::copy(&mut std::io::Read::take(executable, length), bare.as_file_mut())?;
                let mut tree = PackTree::default();
                tree.add_executable(archive::manager_path(identity::here().0), bare.path().to_owned());
                tree.write(staged.as_file_mut())?;
            }
        }
        Ok(staged)
    }
}

fn publish(place: &GatewayDirectory, args: &PublishArgs, source: ContentSource) -> Result<PublishResult> {
    let _lock = lock::take(&place.publish_lock(), PATIENCE)?
        .with_context(|| format!("somebody else is publishing into {}", place.depot().display()))?;
    sweep(&place.depot())?;
    let keys = DepotKeys::read(place)?;
    let mut staged = source.staged(place)?;
    let packing = source.packing();
    let contents = archive::contents(staged.as_file_mut(), packing)?;
    let kept = match &source {
        ContentSource::Archive { path, .. } => signature_beside(path)?,
        ContentSource::Directory(_) | ContentSource::Itself(_) => None,
    };

    let mut notes: Vec<String> = keys.problems().iter().map(|problem| format!("warning: {problem}")).collect();
    let release = match &source {
        ContentSource::Itself(_) => {
            let (os, arch) = identity::here();
            let version = args.version.clone().map_or_else(|| env!("CARGO_PKG_VERSION").parse(), Ok)?;
            Release { name: MANAGER_PACKAGE.parse()?, version, os, arch }
        }
        ContentSource::Directory(_) | ContentSource::Archive { .. } => {
            let given = RequestedIdentity {
                name: args.name.clone(),
                version: args.version.clone(),
                os: args.os,
                arch: args.arch,
            };
            let file_name = match &source {
                ContentSource::Archive { path, .. } => path.file_name().map(|name| name.to_string_lossy().into_owned()),
                _ => None,
            };
            let clues = IdentityHints {
                manifest: contents.manifest.as_ref().map(|manifest| (manifest.name.clone(), manifest.version.clone())),
                signed: kept.as_ref().map(|kept| kept.binding.release.clone()),
                file_name,
            };
            let (release, assumed) = identity::settle(given, clues)?;
            notes.extend(assumed);
            release
        }
    };
    archive::check_for(release.os, staged.as_file_mut(), packing)?;
    if release.name.as_str() == MANAGER_PACKAGE {
        let wanted = archive::manager_path(release.os);
        if contents.manager.as_deref() != Some(wanted) {
            bail!("it has no {wanted}, which a package of the manager for {} must have", release.os);
        }
        contents.check_keys(&release.version)?;
    } else {
        names::check(&release).map_err(anyhow::Error::msg)?;
        contents.check_runnable(release.os)?;
    }

    let file = release.file_name(packing);
    let others = depot::published(&place.depot(), &release.name)?;
    if let Some(other) = others.iter().find(|other| other.binding.release == release && other.file != file) {
        bail!("{release} is published already, as {}; give this one another version", other.file);
    }
    let versions = others.iter().map(|other| &other.binding.release.version);
    if let Some(other) = versions.into_iter().find(|other| names::differ_only_in_case(other, &release.version)) {
        bail!(
            "version {other} of {} is published already, and differs from {} in upper and lower case alone: a Windows host cannot \
             keep both; choose another version",
            release.name,
            release.version
        );
    }
    let standing = others.iter().find(|other| other.file == file);
    let highest = others.iter().map(|other| other.binding.epoch).max();
    let epoch = match (&kept, args.epoch) {
        (Some(kept), Some(epoch)) if kept.binding.epoch != epoch => {
            bail!("its signature says epoch {}, not {epoch}", kept.binding.epoch)
        }
        (Some(kept), _) => kept.binding.epoch,
        (None, Some(epoch)) => epoch,
        (None, None) => standing.map(|standing| standing.binding.epoch).or(highest).unwrap_or(1),
    };
    if highest.is_some_and(|highest| epoch < highest) {
        notes.push(format!(
            "warning: epoch {} of {} is published already; hosts that have had it will refuse this package of epoch {epoch}",
            highest.unwrap_or(epoch),
            release.name
        ));
    }
    let binding = Binding { release, epoch };

    let target = place.depot().join(&file);
    // `a-1` 2 and `a` 1-2 would be one file.
    if let Some(other) = depot::binding_of(&target)?.filter(|other| other.release != binding.release) {
        bail!("the file {file} is that of {} already; choose another version", other.release);
    }
    let same = match target.exists() {
        true if !same_content(staged.as_file_mut(), &target)? => {
            bail!("{file} is published already, with another content; choose another version (--version)")
        }
        exists => exists,
    };
    let signed_already = match standing {
        Some(standing) if same && standing.binding == binding => is_signed_so(&target, keys.keys(), kept.as_ref())?,
        _ => false,
    };
    let fate = match signed_already {
        true => "already published",
        false => {
            let signature = match kept {
                Some(kept) => {
                    kept.check(keys.keys(), staged.as_file_mut())?;
                    kept.text
                }
                None => sign(place, args.key.as_deref(), staged.as_file_mut(), &binding)?,
            };
            store::replace(&depot::signature_path(&target), signature.as_bytes(), Access::Public)?;
            if same { "signed anew" } else { "published" }
        }
    };
    let is_manager = binding.release.name.as_str() == MANAGER_PACKAGE;
    let bootstrap = match is_manager {
        true => Some(bootstrap::make(place, &keys, staged.as_file_mut(), packing, &binding.release)?),
        false => None,
    };
    if !same {
        bootstrap::persist(staged, &target, 0o644).with_context(|| format!("cannot write {}", target.display()))?;
    }
    match depot::offered(place, &file, keys.keys()).context("it is in the depot, but a gateway does not offer it")? {
        Some(SignatureStatus::UnknownKey) => notes.push(format!(
            "warning: no key in {} made the signature; hosts must have got that key otherwise, and the bootstrap does not carry it",
            place.keys().display()
        )),
        Some(SignatureStatus::Good | SignatureStatus::Bad(_)) | None => {}
    }
    Ok(PublishResult { binding, file, fate, notes, bootstrap })
}

/// Removes what an interrupted publishing left behind; nobody else is at it while the lock is held.
fn sweep(depot: &Path) -> Result<()> {
    for entry in fs::read_dir(depot).with_context(|| format!("cannot read {}", depot.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".new-")) {
            store::remove(&path)?;
        }
    }
    Ok(())
}

fn sign(place: &GatewayDirectory, key: Option<&Path>, package: &mut File, binding: &Binding) -> Result<String> {
    let default = place.signing_key();
    let key = key.unwrap_or(&default);
    if !key.exists() {
        bail!(
            "there is no signing key {}; give one with --key, or put the signature that was made elsewhere beside the archive",
            key.display()
        );
    }
    let signer = Signer::load(key, || password(key))?;
    package.seek(SeekFrom::Start(0))?;
    signer.sign(package, binding)
}

/// A signature that came with an archive.
struct SuppliedSignature {
    text: String,
    binding: Binding,
}

fn signature_beside(archive: &Path) -> Result<Option<SuppliedSignature>> {
    let path = depot::signature_path(archive);
    let Some(bytes) = store::read(&path, package::MAX_SIGNATURE_BYTES)? else { return Ok(None) };
    let attempt = || -> Result<SuppliedSignature> {
        let text = String::from_utf8(bytes).context("it is no text")?;
        let binding = package::binding_of(&text)?;
        Ok(SuppliedSignature { text, binding })
    };
    attempt()
        .map(Some)
        .with_context(|| format!("cannot keep the signature {}; sign it anew, or remove it", path.display()))
}

impl SuppliedSignature {
    /// Verifies it by the depot's keys; one of a key that is not there is kept, for hosts may know it.
    fn check(&self, keys: &Keys, package: &mut File) -> Result<()> {
        match package::judge(package, &self.text, keys)?.0 {
            SignatureStatus::Good | SignatureStatus::UnknownKey => Ok(()),
            SignatureStatus::Bad(why) => bail!("the signature that came with it is not of these bytes: {why}"),
        }
    }
}

/// Whether the file's own signature stands, and is the one that came with the archive where one did.
fn is_signed_so(file: &Path, keys: &Keys, kept: Option<&SuppliedSignature>) -> Result<bool> {
    let Some((verdict, text)) = depot::verdict_on(file, keys)? else { return Ok(false) };
    Ok(match kept {
        Some(kept) => kept.text == text && !matches!(verdict, SignatureStatus::Bad(_)),
        None => verdict == SignatureStatus::Good,
    })
}

fn same_content(staged: &mut File, published: &Path) -> Result<bool> {
    if staged.metadata()?.len() != fs::metadata(published)?.len() {
        return Ok(false);
    }
    Ok(package::sha256_of(staged)? == package::sha256_of(&mut File::open(published)?)?)
}

#[cfg(test)]
mod tests;
