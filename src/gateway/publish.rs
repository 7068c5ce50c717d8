//! `gateway publish`: adds a directory or an archive to the depot as a signed package.
//!
//! The package is checked and signed as a temporary file in the depot. It is renamed last, after its signature is written, so a running gateway
//! never sees a package without signature. A published release never changes: publishing the same content again does nothing, other content is
//! an error.

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

/// The timeout for another `publish` to finish.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// The end of the help, 80 columns wide.
const HELP: &str = "\
A package is a directory, such as hello/ with two files:

  agent.toml    name = \"hello\"
                version = \"1.0\"
                [run]
                command = [\"./hello.sh\", \"--verbose\"]

  hello.sh      the program, executable; it stays in the foreground, and
                its output goes to its log

  aops gateway publish --dir DIR hello/

Hosts run it once fleet.toml in DIR lists it:

  [agents.hello]
  version = \"1.0\"

All keys of agent.toml except name, version and command are optional:

  [run]
  command = [\"./hello.sh\"]   relative to the package, and its arguments
  workdir = \".\"              relative to the package
  user = \"nobody\"            [default: the manager's user]
  stopSignal = \"TERM\"        TERM, INT, QUIT, HUP, USR1, USR2 or KILL
  gracePeriod = \"10s\"        from the stop signal to the kill; at most 10m
  restart = \"always\"         always, on-failure or never
  killMode = \"tree\"          tree, or process: stop the main process only
  probation = \"10s\"          a new release that fails during this time is
                             rolled back (at least startPeriod, at most 10m)
  envAllow = [\"PYTHONPATH\"]  variables that fleet.toml may set although they
                             change how programs are loaded

  [health]                   exactly one of http, tcp and exec
  http = \"http://127.0.0.1:9100/\"   healthy: status 2xx or 3xx
  tcp = \"127.0.0.1:9100\"            healthy: the connection is accepted
  exec = [\"bin/check\"]              healthy: exit code 0
  interval = \"10s\"           from the end of a check to the next
  timeout = \"5s\"             of one check
  failures = 3               consecutive failures until a restart
  startPeriod = \"30s\"        failures do not count; ends with the first
                             success

  [env]
  NAME = \"value\"

A check does not verify an https certificate, follow redirects or use a proxy.
The program of exec is part of the package and runs like the sub-agent; at the
timeout it is killed with all processes that it started.

Instead of agent.toml, a package can have an executable `control` script that
supports start, stop and status. status prints `started` or `stoped` and runs
every 30 seconds. If it prints `stoped`, or three times does not answer within
10 seconds, the sub-agent is restarted. The manager recognizes the program's
process by its cgroup and by a variable in its environment. If it can have
neither, because `su - USER` starts it or because it writes a process title over
its environment, the script must also support `pid`, which prints the process
id. If status prints `started` but the process is not found,
it is not started a second time, and only the script can stop it.

A package of the manager (aops-spm, with bin/aops) can change the keys that
hosts trust, once its release is committed:

  keys/NEW.pub            a minisign public key that hosts trust, too
  keys/revoked/OLD.pub    a key that hosts do not trust any more, unless an
                          operator puts it into etc/keys of the host, or
                          gives it again with --trusted-key

It can also move hosts to another gateway, which they keep if the release passes
its trial. For this, it contains etc/endpoint.toml with heartbeatSrv (the URL of
that gateway), and with caCert (the path of a PEM file in the package) or pin
(the SHA-256 fingerprint of its certificate or public key).

To rotate a key, sign a release that contains the new key with the old key; when
every host runs it, sign a release that revokes the old key with the new key. A
host that was away meanwhile rejects the second release until it runs the first:
order that one for it by a rule in fleet.toml.";

/// The arguments of `gateway publish`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct PublishArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of the package, if it is not in its agent.toml,
    /// its signature or its file name
    #[arg(long, verbatim_doc_comment)]
    name: Option<AgentName>,
    /// Version of the package, if none of these names it
    #[arg(long)]
    version: Option<Version>,
    /// linux or windows, if none of these names it
    /// [default for a directory: the system of this
    /// executable]
    #[arg(long, verbatim_doc_comment)]
    os: Option<Os>,
    /// amd64, 386 or arm64, if none of these names it
    #[arg(long)]
    arch: Option<Arch>,
    /// Epoch of the package. Raise it to withdraw older
    /// releases: a host on which a release of epoch N has
    /// passed its probation or trial rejects releases of
    /// that package with a lower epoch [default: the
    /// highest epoch of that package, or 1]
    #[arg(long, value_name = "N", verbatim_doc_comment)]
    epoch: Option<u64>,
    /// The private key to sign with; its password, if any,
    /// is taken from the environment variable
    /// MINISIGN_PASSWORD or prompted for [default:
    /// keys/aops.key]
    #[arg(long, value_name = "FILE", verbatim_doc_comment)]
    key: Option<PathBuf>,
    /// Publish this executable: as the package of the
    /// manager and as the bootstrap that new hosts download
    #[arg(long = "self", conflicts_with_all = ["path", "name", "os", "arch"], verbatim_doc_comment)]
    itself: bool,
    /// A directory, or an archive (tar.zst, tar.gz, zip); an
    /// existing signature PATH.minisig is used
    #[arg(required_unless_present = "itself", verbatim_doc_comment)]
    path: Option<PathBuf>,
}

pub(super) fn run(args: &PublishArgs) -> Result<()> {
    let directory = GatewayDirectory::initialized(&args.dir)?;
    let source = if args.itself {
        ContentSource::this_executable()?
    } else {
        ContentSource::at(args.path.as_deref().unwrap_or(Path::new("")))?
    };
    let shown = source.shown();
    let published = publish(&directory, args, source).with_context(|| format!("cannot publish {shown}"))?;
    let PublishResult { binding, file, outcome, notes, bootstrap } = published;
    for note in notes {
        message!("{note}");
    }
    report!("{} {}, epoch {}: {file}", outcome, binding.release, binding.epoch);
    if let Some(bootstrap) = bootstrap {
        report!("published the bootstrap: {bootstrap}");
    }
    Ok(())
}

/// The result of publishing.
struct PublishResult {
    binding: Binding,
    file: String,
    outcome: &'static str,
    notes: Vec<String>,
    bootstrap: Option<String>,
}

/// The source of the content.
enum ContentSource {
    Directory(PathBuf),
    Archive { path: PathBuf, packing: Packing },
    ThisExecutable(PathBuf),
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

    fn this_executable() -> Result<ContentSource> {
        Ok(ContentSource::ThisExecutable(std::env::current_exe().context("cannot find this executable")?))
    }

    fn shown(&self) -> String {
        let (ContentSource::Directory(path)
        | ContentSource::Archive { path, .. }
        | ContentSource::ThisExecutable(path)) = self;
        path.display().to_string()
    }

    fn packing(&self) -> Packing {
        match self {
            ContentSource::Archive { packing, .. } => *packing,
            ContentSource::Directory(_) | ContentSource::ThisExecutable(_) => Packing::TarZst,
        }
    }

    /// Writes the content as an archive to a temporary file in the depot.
    fn staged(&self, directory: &GatewayDirectory) -> Result<NamedTempFile> {
        let mut staged = tempfile::Builder::new().prefix(".new-").tempfile_in(directory.depot())?;
        match self {
            ContentSource::Directory(path) => PackTree::of_directory(path)?.write(staged.as_file_mut())?,
            ContentSource::Archive { path, .. } => {
                std::io::copy(&mut File::open(path)?, staged.as_file_mut())?;
            }
            ContentSource::ThisExecutable(path) => {
                // Without the trailer of a bootstrap: the package must not depend on how this executable was installed.
                let mut bare = tempfile::NamedTempFile::new()?;
                let mut executable = File::open(path)?;
                let length = trailer::length_without(&mut executable)?;
                executable.seek(SeekFrom::Start(0))?;
                std::io::copy(&mut std::io::Read::take(executable, length), bare.as_file_mut())?;
                let mut tree = PackTree::default();
                tree.add_executable(archive::manager_path(identity::own_system().0), bare.path().to_owned());
                tree.write(staged.as_file_mut())?;
            }
        }
        Ok(staged)
    }
}

fn publish(directory: &GatewayDirectory, args: &PublishArgs, source: ContentSource) -> Result<PublishResult> {
    let _lock = lock::take(&directory.publish_lock(), LOCK_TIMEOUT)?
        .with_context(|| format!("another publish is running in {}; try again later", directory.depot().display()))?;
    remove_leftovers(&directory.depot())?;
    let keys = DepotKeys::read(directory)?;
    let mut staged = source.staged(directory)?;
    let packing = source.packing();
    let contents = archive::contents(staged.as_file_mut(), packing)?;
    let supplied = match &source {
        ContentSource::Archive { path, .. } => supplied_signature(path)?,
        ContentSource::Directory(_) | ContentSource::ThisExecutable(_) => None,
    };

    let mut notes: Vec<String> = keys.problems().iter().map(|problem| format!("warning: {problem}")).collect();
    let release = match &source {
        ContentSource::ThisExecutable(_) => {
            let (os, arch) = identity::own_system();
            let version = args.version.clone().map_or_else(|| env!("CARGO_PKG_VERSION").parse(), Ok)?;
            Release { name: MANAGER_PACKAGE.parse()?, version, os, arch }
        }
        ContentSource::Directory(_) | ContentSource::Archive { .. } => {
            let requested = RequestedIdentity {
                name: args.name.clone(),
                version: args.version.clone(),
                os: args.os,
                arch: args.arch,
            };
            let file_name = match &source {
                ContentSource::Archive { path, .. } => path.file_name().map(|name| name.to_string_lossy().into_owned()),
                _ => None,
            };
            let hints = IdentityHints {
                manifest: contents.manifest.as_ref().map(|manifest| (manifest.name.clone(), manifest.version.clone())),
                signed: supplied.as_ref().map(|supplied| supplied.binding.release.clone()),
                file_name,
            };
            let (release, assumed) = identity::resolve(requested, hints)?;
            notes.extend(assumed);
            release
        }
    };
    archive::check_for(release.os, staged.as_file_mut(), packing)?;
    if release.name.as_str() == MANAGER_PACKAGE {
        let required = archive::manager_path(release.os);
        if contents.manager.as_deref() != Some(required) {
            bail!("it has no {required}, which a package of the manager for {} needs", release.os);
        }
        contents.check_keys(&release.version)?;
    } else {
        names::check(&release).map_err(anyhow::Error::msg)?;
        contents.check_runnable(release.os)?;
    }

    let file = release.file_name(packing);
    let others = depot::published(&directory.depot(), &release.name)?;
    if let Some(other) = others.iter().find(|other| other.binding.release == release && other.file != file) {
        bail!("{release} is published already, as {}; choose another version", other.file);
    }
    let versions = others.iter().map(|other| &other.binding.release.version);
    if let Some(other) = versions.into_iter().find(|other| names::differ_only_in_case(other, &release.version)) {
        bail!(
            "version {other} of {} is published already and differs from {} only in upper and lower case, so a Windows host cannot \
             keep both; choose another version",
            release.name,
            release.version
        );
    }
    let existing = others.iter().find(|other| other.file == file);
    let highest = others.iter().map(|other| other.binding.epoch).max();
    let epoch = match (&supplied, args.epoch) {
        (Some(supplied), Some(epoch)) if supplied.binding.epoch != epoch => {
            bail!("its signature is for epoch {}, not {epoch}", supplied.binding.epoch)
        }
        (Some(supplied), _) => supplied.binding.epoch,
        (None, Some(epoch)) => epoch,
        (None, None) => existing.map(|existing| existing.binding.epoch).or(highest).unwrap_or(1),
    };
    if highest.is_some_and(|highest| epoch < highest) {
        notes.push(format!(
            "warning: epoch {} of {} is published already; hosts that have had it will reject this package of epoch {epoch}",
            highest.unwrap_or(epoch),
            release.name
        ));
    }
    let binding = Binding { release, epoch };

    let target = directory.depot().join(&file);
    // `a-1` 2 and `a` 1-2 have the same file name.
    if let Some(other) = depot::binding_of(&target)?.filter(|other| other.release != binding.release) {
        bail!("the file name {file} is already used by {}; choose another version", other.release);
    }
    let same = match target.exists() {
        true if !same_content(staged.as_file_mut(), &target)? => {
            bail!("{file} is published already with different content; choose another version (--version)")
        }
        exists => exists,
    };
    let signed_already = match existing {
        Some(existing) if same && existing.binding == binding => {
            has_valid_signature(&target, keys.keys(), supplied.as_ref())?
        }
        _ => false,
    };
    let outcome = match signed_already {
        true => "already published",
        false => {
            let signature = match supplied {
                Some(supplied) => {
                    supplied.check(keys.keys(), staged.as_file_mut())?;
                    supplied.text
                }
                None => sign(directory, args.key.as_deref(), staged.as_file_mut(), &binding)?,
            };
            store::replace(&depot::signature_path(&target), signature.as_bytes(), Access::Public)?;
            if same { "signed again" } else { "published" }
        }
    };
    let is_manager = binding.release.name.as_str() == MANAGER_PACKAGE;
    let bootstrap = match is_manager {
        true => Some(bootstrap::create(directory, &keys, staged.as_file_mut(), packing, &binding.release)?),
        false => None,
    };
    if !same {
        bootstrap::persist(staged, &target, 0o644).with_context(|| format!("cannot write {}", target.display()))?;
    }
    match depot::offered(directory, &file, keys.keys()).context("it is in the depot, but the gateway cannot offer it")? {
        Some(SignatureStatus::UnknownKey) => notes.push(format!(
            "warning: the signature is by a key that is not in {}; hosts need that key from elsewhere, as the bootstrap does not contain it",
            directory.keys().display()
        )),
        Some(SignatureStatus::Good | SignatureStatus::Bad(_)) | None => {}
    }
    Ok(PublishResult { binding, file, outcome, notes, bootstrap })
}

/// Removes temporary files of an interrupted publish. The caller holds the lock.
fn remove_leftovers(depot: &Path) -> Result<()> {
    for entry in fs::read_dir(depot).with_context(|| format!("cannot read {}", depot.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".new-")) {
            store::remove(&path)?;
        }
    }
    Ok(())
}

fn sign(directory: &GatewayDirectory, key: Option<&Path>, package: &mut File, binding: &Binding) -> Result<String> {
    let default = directory.signing_key();
    let key = key.unwrap_or(&default);
    if !key.exists() {
        bail!("there is no signing key {}; name one with --key, or put a signature beside the archive", key.display());
    }
    let signer = Signer::load(key, || password(key))?;
    package.seek(SeekFrom::Start(0))?;
    signer.sign(package, binding)
}

/// The signature beside an archive.
struct SuppliedSignature {
    text: String,
    binding: Binding,
}

fn supplied_signature(archive: &Path) -> Result<Option<SuppliedSignature>> {
    let path = depot::signature_path(archive);
    let Some(bytes) = store::read(&path, package::MAX_SIGNATURE_BYTES)? else { return Ok(None) };
    let attempt = || -> Result<SuppliedSignature> {
        let text = String::from_utf8(bytes).context("it is not text")?;
        let binding = package::binding_of(&text)?;
        Ok(SuppliedSignature { text, binding })
    };
    attempt().map(Some).with_context(|| {
        format!("cannot use the signature {}; sign the archive again, or remove the signature", path.display())
    })
}

impl SuppliedSignature {
    /// Verifies it with the depot's keys. A signature by another key is accepted: hosts may trust that key.
    fn check(&self, keys: &Keys, package: &mut File) -> Result<()> {
        match package::check_signature(package, &self.text, keys)?.0 {
            SignatureStatus::Good | SignatureStatus::UnknownKey => Ok(()),
            SignatureStatus::Bad(why) => bail!("its signature is invalid: {why}"),
        }
    }
}

/// Whether the published file has a valid signature, and the same one as the archive if that has one.
fn has_valid_signature(file: &Path, keys: &Keys, supplied: Option<&SuppliedSignature>) -> Result<bool> {
    let Some((status, text)) = depot::signature_status(file, keys)? else { return Ok(false) };
    Ok(match supplied {
        Some(supplied) => supplied.text == text && !matches!(status, SignatureStatus::Bad(_)),
        None => status == SignatureStatus::Good,
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
