//! `gateway init`: creates the directory of a gateway, ready for `publish` and `run`.
//!
//! It creates only missing files: an interrupted init can be repeated, and a second one changes nothing. It never replaces a file: a new
//! signing key or certificate would lock out every host that trusts the old one.

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

/// The arguments of `gateway init`.
#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// A further name or address of the gateway for the
    /// certificate; can be repeated (localhost, 127.0.0.1
    /// and the host's own name are always in it)
    #[arg(long = "name", value_name = "HOST_OR_IP", verbatim_doc_comment)]
    names: Vec<String>,
}

/// The content of a new fleet.toml: all examples are comments, so it orders no sub-agent.
const EXAMPLE_FLEET: &str = include_str!("init/fleet.toml");

/// Whether `init` created a file or kept the existing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InitOutcome {
    Created,
    Kept,
}

impl InitOutcome {
    fn word(self) -> &'static str {
        match self {
            InitOutcome::Created => "created",
            InitOutcome::Kept => "kept   ",
        }
    }
}

pub(super) fn run(args: &InitArgs) -> Result<()> {
    let names = server_names(&args.names)?;
    let directory = GatewayDirectory::new(&args.dir);
    for (path, mode) in directory.directories() {
        if !path.is_dir() {
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
            platform::set_mode(&path, mode).with_context(|| format!("cannot create {}", path.display()))?;
        }
    }
    let key = create_signing_key(&directory)?;
    let certificate = create_certificate(&directory, &names)?;
    let fleet = match directory.fleet().exists() {
        true => InitOutcome::Kept,
        false => {
            // Private: it may contain secrets.
            store::replace(&directory.fleet(), EXAMPLE_FLEET.as_bytes(), Access::Private)?;
            InitOutcome::Created
        }
    };

    let dir = args.dir.display();
    report!(
        "{}  the signing key  {}, {}",
        key.word(),
        directory.public_key().display(),
        directory.signing_key().display()
    );
    report!(
        "{}  the certificate  {}, {}",
        certificate.word(),
        directory.certificate().display(),
        directory.certificate_key().display()
    );
    report!("{}  the fleet        {}", fleet.word(), directory.fleet().display());
    if certificate == InitOutcome::Kept && !args.names.is_empty() {
        report!("         --name has no effect on an existing certificate, which hosts may have pinned");
    }
    let pin = certificate_pin(&directory)?;
    let endpoint = format!("https://{}:8888", args.names.first().map_or_else(own_name, |name| in_brackets(name)));
    report!("\nThe pin of the certificate's public key:\n  {pin}");
    report!("\nNext, here:");
    report!("  aops gateway publish --dir {dir} --self          this executable, for hosts to install");
    report!("  aops gateway publish --dir {dir} DIRECTORY       a sub-agent's package");
    report!("  aops gateway run --dir {dir}");
    report!("  edit {} to order sub-agents", directory.fleet().display());
    report!("\nThen on a host, with this executable and {} copied there:", directory.public_key().display());
    report!("  aops install --agent-id ID --endpoint {endpoint} \\\n    --trusted-key aops.pub --pin {pin}");
    report!("\nor without copying anything, trusting the first download:");
    report!("  curl -kfO {endpoint}/api/download/aops-agent-service-linux-amd64 -H 'x-agent-id: ID'");
    report!("  chmod +x aops-agent-service-linux-amd64");
    report!("  ./aops-agent-service-linux-amd64 --control install --version V --agentId ID --endpoint {endpoint}");
    Ok(())
}

fn create_signing_key(directory: &GatewayDirectory) -> Result<InitOutcome> {
    let (secret, public) = (directory.signing_key(), directory.public_key());
    match (secret.exists(), public.exists()) {
        // A public key without private key: the private key is kept offline.
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
            // The private key first: the public key can be derived from it.
            store::replace(&secret, signer.secret_text()?.as_bytes(), Access::Private)?;
            store::replace(&public, signer.public_text()?.as_bytes(), Access::Public)?;
            Ok(InitOutcome::Created)
        }
    }
}

/// A private key in PEM has about 300 bytes, an RSA key 3 kB.
const MAX_KEY_BYTES: u64 = 64 << 10;

fn create_certificate(directory: &GatewayDirectory, names: &[String]) -> Result<InitOutcome> {
    if directory.certificate().exists() && directory.certificate_key().exists() {
        return Ok(InitOutcome::Kept);
    }
    if directory.certificate().exists() {
        bail!(
            "cannot find the key of the certificate {}: restore {}, or remove the certificate to create a new one",
            directory.certificate().display(),
            directory.certificate_key().display()
        );
    }
    let attempt = || -> Result<String> {
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name.push(DnType::CommonName, "aops gateway");
        // Valid from 1975 to 4096, rcgen's default: hosts with a wrong clock must accept it, and nobody renews it.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        // Not a CA: it must not be able to sign other certificates.
        params.is_ca = IsCa::ExplicitNoCa;
        let path = directory.certificate_key();
        // A key without certificate is the operator's, or is from an interrupted init. Hosts may have pinned it.
        let key =
            match store::read(&path, MAX_KEY_BYTES)? {
                Some(text) => String::from_utf8(text)
                    .map_err(Error::from)
                    .and_then(|text| Ok(KeyPair::from_pem(&text)?))
                    .with_context(|| format!("{} is not a valid private key in PEM; move it away", path.display()))?,
                None => {
                    let key = KeyPair::generate()?;
                    store::replace(&path, key.serialize_pem().as_bytes(), Access::Private)?;
                    key
                }
            };
        Ok(params.self_signed(&key)?.pem())
    };
    let certificate = attempt().context("cannot create a certificate")?;
    store::replace(&directory.certificate(), certificate.as_bytes(), Access::Public)?;
    Ok(InitOutcome::Created)
}

/// The names in the certificate: those given, and the local ones.
fn server_names(given: &[String]) -> Result<Vec<String>> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let own = own_name();
    if is_name(&own) {
        names.push(own);
    }
    for name in given {
        if !is_name(name) && name.parse::<IpAddr>().is_err() {
            bail!("cannot use {name:?} as a name of the gateway: expected a host name or an IP address, without port");
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

fn in_brackets(name: &str) -> String {
    if name.contains(':') { format!("[{name}]") } else { name.to_owned() }
}

/// The pin of the certificate's public key, as in `install --pin`.
fn certificate_pin(directory: &GatewayDirectory) -> Result<Fingerprint> {
    let path = directory.certificate();
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
        let directory = GatewayDirectory::new(&root);
        run(&args(&root, &["gateway.example", "10.0.0.1", "::1"])).unwrap();
        let files = [
            directory.public_key(),
            directory.signing_key(),
            directory.certificate(),
            directory.certificate_key(),
            directory.fleet(),
        ];
        let contents = || files.iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>();
        let before = contents();
        run(&args(&root, &["other.example"])).unwrap();
        assert_eq!(contents(), before);
    }

    #[test]
    fn an_interrupted_init_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let directory = GatewayDirectory::new(dir.path());
        run(&args(dir.path(), &[])).unwrap();
        let public = fs::read(directory.public_key()).unwrap();
        fs::remove_file(directory.public_key()).unwrap();
        fs::remove_file(directory.certificate()).unwrap();
        run(&args(dir.path(), &[])).unwrap();
        assert_eq!(fs::read(directory.public_key()).unwrap(), public);
        assert!(directory.certificate().exists());
    }

    #[test]
    fn an_existing_key_is_kept_and_gets_a_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let directory = GatewayDirectory::new(dir.path());
        run(&args(dir.path(), &[])).unwrap();
        let key = fs::read(directory.certificate_key()).unwrap();
        let public = || {
            let der = CertificateDer::from_pem_file(directory.certificate()).unwrap();
            let own = KeyPair::from_pem(&String::from_utf8(key.clone()).unwrap()).unwrap();
            der.windows(own.public_key_raw().len()).any(|window| window == own.public_key_raw())
        };
        assert!(public());
        fs::remove_file(directory.certificate()).unwrap();
        run(&args(dir.path(), &[])).unwrap();
        assert_eq!(fs::read(directory.certificate_key()).unwrap(), key);
        assert!(public());

        fs::remove_file(directory.certificate()).unwrap();
        fs::write(directory.certificate_key(), "not a key").unwrap();
        let error = format!("{:#}", run(&args(dir.path(), &[])).unwrap_err());
        assert!(error.contains("not a valid private key in PEM") && error.contains("move it away"), "{error}");
        assert_eq!(fs::read_to_string(directory.certificate_key()).unwrap(), "not a key");
    }

    #[test]
    fn the_example_orders_nothing_and_is_valid_without_the_comment_marks() {
        let fleet: crate::core::fleet::Fleet = toml::from_str(EXAMPLE_FLEET).unwrap();
        assert!(fleet.names().is_empty() && fleet.manager.is_none());
        // With the comment marks removed, the example is valid too.
        let uncommented: String = EXAMPLE_FLEET
            .lines()
            .map(|line| line.strip_prefix("#: ").map_or(String::new(), ToOwned::to_owned) + "\n")
            .collect();
        let fleet: crate::core::fleet::Fleet = toml::from_str(&uncommented).unwrap();
        assert_eq!(fleet.names().len(), 1);
        assert_eq!(fleet.rules.len(), 1);
    }

    #[test]
    fn invalid_names_are_rejected() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", "https://a", "a:8888", "a b", "ä"] {
            assert!(run(&args(&dir.path().join("x"), &[bad])).is_err(), "{bad:?}");
        }
        assert!(!dir.path().join("x").exists());
    }
}
