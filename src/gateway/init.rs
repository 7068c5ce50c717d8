//! `gateway init`: from nothing to a directory that can be published into and served, without overwriting anything.
//!
//! Each thing is made only where it is missing, so that an interrupted init is repeated, and a second one changes nothing. What is there is
//! never replaced: a new signing key or certificate would lock out every host that trusts the old one.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Error, Result, bail};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::GatewayDirectory;
use crate::endpoint::{Fingerprint, key_of};
use crate::output::report;
use crate::package::sign::{Signer, password};
use crate::platform;
use crate::store::{self, Access};

/// Where a gateway is made.
#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// A further name or address of the gateway; may be
    /// given several times (localhost, 127.0.0.1 and the
    /// host's own name are always in the certificate)
    #[arg(long = "name", value_name = "HOST_OR_IP", verbatim_doc_comment)]
    names: Vec<String>,
}

/// What a new fleet.toml says: everything in comments, so that it wants nothing yet.
const EXAMPLE_FLEET: &str = include_str!("init/fleet.toml");

/// What became of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InitOutcome {
    Made,
    Kept,
}

impl InitOutcome {
    fn word(self) -> &'static str {
        match self {
            InitOutcome::Made => "made",
            InitOutcome::Kept => "kept",
        }
    }
}

pub(super) fn run(args: &InitArgs) -> Result<()> {
    let names = server_names(&args.names)?;
    let place = GatewayDirectory::new(&args.dir);
    for (directory, mode) in place.directories() {
        if !directory.is_dir() {
            fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
            platform::set_mode(&directory, mode).with_context(|| format!("cannot make {}", directory.display()))?;
        }
    }
    let key = make_signing_key(&place)?;
    let certificate = make_certificate(&place, &names)?;
    let fleet = match place.fleet().exists() {
        true => InitOutcome::Kept,
        false => {
            // It may hold secrets.
            store::replace(&place.fleet(), EXAMPLE_FLEET.as_bytes(), Access::Private)?;
            InitOutcome::Made
        }
    };

    let dir = args.dir.display();
    report!("{}  the signing key  {}, {}", key.word(), place.public_key().display(), place.signing_key().display());
    report!(
        "{}  the certificate  {}, {}",
        certificate.word(),
        place.certificate().display(),
        place.certificate_key().display()
    );
    report!("{}  the fleet        {}", fleet.word(), place.fleet().display());
    if certificate == InitOutcome::Kept && !args.names.is_empty() {
        report!("      --name is without effect: hosts may know the certificate that is there");
    }
    let pin = certificate_pin(&place)?;
    let endpoint = format!("https://{}:8888", args.names.first().map_or_else(own_name, |name| bracketed(name)));
    report!("\nThe pin of the certificate's public key:\n  {pin}");
    report!("\nNext, here:");
    report!("  aops gateway publish --dir {dir} --self          this executable, for hosts to install");
    report!("  aops gateway publish --dir {dir} DIRECTORY       a sub-agent's package");
    report!("  aops gateway run --dir {dir}");
    report!("  edit {} and name the sub-agents", place.fleet().display());
    report!("\nThen on a host, with the executable and {} copied there:", place.public_key().display());
    report!("  aops install --agent-id ID --endpoint {endpoint} \\\n    --trusted-key aops.pub --pin {pin}");
    report!("\nor with nothing copied, trusting what the first download brings:");
    report!("  curl -kfO {endpoint}/api/download/aops-agent-service-linux-amd64 -H 'x-agent-id: ID'");
    report!("  chmod +x aops-agent-service-linux-amd64");
    report!("  ./aops-agent-service-linux-amd64 --control install --version V --agentId ID --endpoint {endpoint}");
    Ok(())
}

fn make_signing_key(place: &GatewayDirectory) -> Result<InitOutcome> {
    let (secret, public) = (place.signing_key(), place.public_key());
    match (secret.exists(), public.exists()) {
        // A public key alone: the private one lives offline.
        (_, true) => Ok(InitOutcome::Kept),
        (true, false) => {
            store::replace(
                &public,
                Signer::load(&secret, || password(&secret))?.public_text()?.as_bytes(),
                Access::Public,
            )?;
            Ok(InitOutcome::Kept)
        }
        (false, false) => {
            let signer = Signer::generate()?;
            // The private one first: with it the public one can be made again.
            store::replace(&secret, signer.secret_text()?.as_bytes(), Access::Private)?;
            store::replace(&public, signer.public_text()?.as_bytes(), Access::Public)?;
            Ok(InitOutcome::Made)
        }
    }
}

/// A private key in PEM has 300 bytes, one of RSA 3 kB.
const MAX_KEY_BYTES: u64 = 64 << 10;

fn make_certificate(place: &GatewayDirectory, names: &[String]) -> Result<InitOutcome> {
    if place.certificate().exists() && place.certificate_key().exists() {
        return Ok(InitOutcome::Kept);
    }
    if place.certificate().exists() {
        bail!(
            "cannot find the key of the certificate {}: restore {}, or remove the certificate to have a new one",
            place.certificate().display(),
            place.certificate_key().display()
        );
    }
    let attempt = || -> Result<String> {
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name.push(DnType::CommonName, "aops gateway");
        // Valid from 1975 to 4096, as rcgen makes them: hosts with a wrong clock must get in, and nobody is there to renew it.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        // Not a CA: it is trusted as itself, and can vouch for no other.
        params.is_ca = IsCa::ExplicitNoCa;
        let path = place.certificate_key();
        // A key alone is the operator's, or was left by one that was interrupted: hosts may know it already.
        let key = match store::read(&path, MAX_KEY_BYTES)? {
            Some(text) => String::from_utf8(text)
                .map_err(Error::from)
                .and_then(|text| Ok(KeyPair::from_pem(&text)?))
                .with_context(|| {
                format!("{} is no private key in PEM that can be used; move it away", path.display())
            })?,
            None => {
                let key = KeyPair::generate()?;
                store::replace(&path, key.serialize_pem().as_bytes(), Access::Private)?;
                key
            }
        };
        Ok(params.self_signed(&key)?.pem())
    };
    let certificate = attempt().context("cannot make a certificate")?;
    store::replace(&place.certificate(), certificate.as_bytes(), Access::Public)?;
    Ok(InitOutcome::Made)
}

/// The names in the certificate: those given, and those that always lead here.
fn server_names(given: &[String]) -> Result<Vec<String>> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let own = own_name();
    if is_name(&own) {
        names.push(own);
    }
    for name in given {
        if !is_name(name) && name.parse::<IpAddr>().is_err() {
            bail!(
                "cannot take {name:?} as a name of the gateway: expected a host's name or an IP address, without port"
            );
        }
        names.push(name.clone());
    }
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.to_ascii_lowercase()));
    Ok(names)
}

fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn own_name() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

fn bracketed(name: &str) -> String {
    if name.contains(':') { format!("[{name}]") } else { name.to_owned() }
}

/// The certificate's public key, as `install --pin` takes it.
fn certificate_pin(place: &GatewayDirectory) -> Result<Fingerprint> {
    let path = place.certificate();
    let der = CertificateDer::from_pem_file(&path).with_context(|| format!("cannot read {}", path.display()))?;
    key_of(&der).with_context(|| format!("cannot read the public key in {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(dir: &std::path::Path, names: &[&str]) -> InitArgs {
        InitArgs { dir: dir.to_owned(), names: names.iter().map(|name| (*name).to_owned()).collect() }
    }

    #[test]
    fn a_second_init_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("gw");
        let place = GatewayDirectory::new(&root);
        run(&args(&root, &["gateway.example", "10.0.0.1", "::1"])).unwrap();
        let files =
            [place.public_key(), place.signing_key(), place.certificate(), place.certificate_key(), place.fleet()];
        let contents = || files.iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>();
        let before = contents();
        run(&args(&root, &["other.example"])).unwrap();
        assert_eq!(contents(), before);
    }

    #[test]
    fn an_interrupted_init_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let place = GatewayDirectory::new(dir.path());
        run(&args(dir.path(), &[])).unwrap();
        let public = fs::read(place.public_key()).unwrap();
        fs::remove_file(place.public_key()).unwrap();
        fs::remove_file(place.certificate()).unwrap();
        run(&args(dir.path(), &[])).unwrap();
        assert_eq!(fs::read(place.public_key()).unwrap(), public);
        assert!(place.certificate().exists());
    }

    #[test]
    fn a_key_that_is_there_is_kept_and_has_a_certificate_made_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let place = GatewayDirectory::new(dir.path());
        run(&args(dir.path(), &[])).unwrap();
        let key = fs::read(place.certificate_key()).unwrap();
        let public = || {
            let der = CertificateDer::from_pem_file(place.certificate()).unwrap();
            let own = KeyPair::from_pem(&String::from_utf8(key.clone()).unwrap()).unwrap();
            der.windows(own.public_key_raw().len()).any(|window| window == own.public_key_raw())
        };
        assert!(public());
        fs::remove_file(place.certificate()).unwrap();
        run(&args(dir.path(), &[])).unwrap();
        assert_eq!(fs::read(place.certificate_key()).unwrap(), key);
        assert!(public());

        fs::remove_file(place.certificate()).unwrap();
        fs::write(place.certificate_key(), "not a key").unwrap();
        let error = format!("{:#}", run(&args(dir.path(), &[])).unwrap_err());
        assert!(error.contains("no private key in PEM") && error.contains("move it away"), "{error}");
        assert_eq!(fs::read_to_string(place.certificate_key()).unwrap(), "not a key");
    }

    #[test]
    fn the_example_is_a_fleet_that_wants_nothing_and_shows_what_is_allowed() {
        let fleet: crate::core::fleet::Fleet = toml::from_str(EXAMPLE_FLEET).unwrap();
        assert!(fleet.names().is_empty() && fleet.manager.is_none());
        // With the comments taken off, every line of the example is right too.
        let uncommented: String = EXAMPLE_FLEET
            .lines()
            .map(|line| line.strip_prefix("#: ").map_or(String::new(), ToOwned::to_owned) + "\n")
            .collect();
        let fleet: crate::core::fleet::Fleet = toml::from_str(&uncommented).unwrap();
        assert_eq!(fleet.names().len(), 1);
        assert_eq!(fleet.rules.len(), 1);
    }

    #[test]
    fn names_that_no_certificate_can_hold_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", "https://a", "a:8888", "a b", "ä"] {
            assert!(run(&args(&dir.path().join("x"), &[bad])).is_err(), "{bad:?}");
        }
        assert!(!dir.path().join("x").exists());
    }
}
