//! `tls/`: the certificate that is served, reloaded when it changes, and the public keys that are announced to hosts.
//!
//! A new pair is served once certificate and key are valid and match; until then the previous pair is served. Connections that used the
//! previous pair are closed after the current request, so hosts see the new certificate with their next heartbeat.
//!
//! Hosts pin the public key, not the certificate: they accept a renewal with the same key. The next key is in `tls/next.pem` and is announced
//! in every answer. The operator changes to it when `gateway status` shows that every host has it.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustls::pki_types::pem::{PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::GatewayDirectory;
use super::depot::FileStamp;
use super::settle::SettledFile;
use crate::core::certificate::{Validity, validity};
use crate::core::protocol::MAX_PINS;
use crate::endpoint::{Fingerprint, end_of, key_of};
use crate::store;

/// A chain of certificates has a few kilobytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The certificate and key for TLS handshakes; `None` until a valid pair is read.
#[derive(Debug)]
pub(super) struct ServedCertificate {
    pair: RwLock<Option<Arc<CertifiedKey>>>,
    /// Increases with every change of the pair.
    revision: watch::Sender<u64>,
}

impl ServedCertificate {
    /// Notifies of changes of the pair.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}

impl ResolvesServerCert for ServedCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.pair.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The status of the certificate, for the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct CertificateStatus {
    /// When the served chain expires, Unix seconds.
    pub(super) end: Option<u64>,
    /// The pin of the served public key.
    pub(super) pin: Option<String>,
    /// The pins of the next public keys.
    pub(super) next: Vec<String>,
}

impl CertificateStatus {
    /// The pins that are announced to hosts: the present one and the next ones.
    pub(super) fn pins(&self) -> Vec<String> {
        self.pin.iter().chain(&self.next).take(MAX_PINS).cloned().collect()
    }

    /// A warning if the certificate expires soon or has expired. `now`: Unix seconds.
    pub(super) fn warning(&self, now: u64) -> Option<String> {
        let end = self.end?;
        let date = jiff::Timestamp::from_second(i64::try_from(end).ok()?).ok()?;
        match validity(end, now) {
            Validity::Long => None,
            Validity::Ending { days } => Some(format!(
                "the certificate expires in {days} days, on {date}; renew it, with the same key (tls/key.pem) if hosts have pinned it"
            )),
            Validity::Ended => Some(format!(
                "the certificate expired on {date}: hosts that have not pinned it reject it; renew it, with the same key (tls/key.pem) if \
                 hosts have pinned it"
            )),
        }
    }
}

/// Watches the files of `tls/`.
pub(super) struct Certificates {
    directory: GatewayDirectory,
    served: Arc<ServedCertificate>,
    pair: WatchedFiles<2>,
    next: WatchedFiles<1>,
    status: CertificateStatus,
}

/// Files that are read together, and why their present content is not in use.
struct WatchedFiles<const N: usize> {
    settling: SettledFile<[Option<FileStamp>; N]>,
    read: Option<[Option<FileStamp>; N]>,
    problem: Option<String>,
}

impl<const N: usize> WatchedFiles<N> {
    fn new(settle: Duration) -> WatchedFiles<N> {
        WatchedFiles { settling: SettledFile::new(settle), read: None, problem: None }
    }

    /// Whether to read the files now. A file that changes while it is read is read again at a later poll.
    fn is_due(&mut self, paths: [&Path; N], at_once: bool) -> bool {
        let stamps = paths.map(|path| std::fs::metadata(path).ok().map(|metadata| FileStamp::of(&metadata)));
        let settled = self.settling.poll(stamps, None, Instant::now()) || at_once;
        if !settled || (self.read == Some(stamps) && !at_once) {
            return false;
        }
        self.read = Some(stamps);
        true
    }
}

impl Certificates {
    /// Reads the files. Without a valid pair every handshake fails until there is one.
    pub(super) fn open(directory: GatewayDirectory, settle: Duration) -> Certificates {
        let served = Arc::new(ServedCertificate { pair: RwLock::new(None), revision: watch::Sender::new(0) });
        let (pair, next) = (WatchedFiles::new(settle), WatchedFiles::new(settle));
        let mut certificates = Certificates { directory, served, pair, next, status: CertificateStatus::default() };
        certificates.poll(true);
        certificates
    }

    pub(super) fn served(&self) -> Arc<ServedCertificate> {
        self.served.clone()
    }

    pub(super) fn status(&self) -> &CertificateStatus {
        &self.status
    }

    /// Why files of `tls/` are not in use.
    pub(super) fn problems(&self) -> impl Iterator<Item = &String> {
        self.pair.problem.iter().chain(&self.next.problem)
    }

    /// Polls once, and reads files that have changed and settled; all files if `at_once` is set.
    pub(super) fn poll(&mut self, at_once: bool) {
        let (certificate, key, next) =
            (self.directory.certificate(), self.directory.certificate_key(), self.directory.next_certificate());
        if self.pair.is_due([&certificate, &key], at_once) {
            self.pair.problem = match read_pair(&certificate, &key) {
                Ok(pair) => {
                    self.serve(pair);
                    None
                }
                Err(error) => Some(match self.status.pin {
                    Some(_) => format!("{error:#}; the previous certificate is served"),
                    None => format!("no certificate is served, so no host can connect: {error:#}"),
                }),
            };
        }
        if self.next.is_due([&next], at_once) {
            match read_next_pins(&next) {
                Ok(pins) => {
                    self.next.problem = None;
                    self.status.next = pins;
                }
                Err(error) => self.next.problem = Some(format!("{error:#}; the previous next keys are announced")),
            }
        }
        // A next key that is served now is no longer a next key.
        let CertificateStatus { pin, next, .. } = &mut self.status;
        next.retain(|next| Some(next) != pin.as_ref());
    }

    fn serve(&mut self, pair: CertifiedKey) {
        let mut served = self.served.pair.write().unwrap_or_else(PoisonError::into_inner);
        let is_same = served.as_ref().is_some_and(|served| served.cert == pair.cert);
        self.status.end = end_of(&pair.cert);
        self.status.pin = pair.cert.first().and_then(key_of).map(|pin| pin.to_string());
        *served = Some(Arc::new(pair));
        drop(served);
        if !is_same {
            let (pin, end) = (self.status.pin.as_deref().unwrap_or_default(), self.status.end.unwrap_or(0));
            tracing::info!(pin, end, "serving a certificate");
            self.served.revision.send_modify(|revision| *revision += 1);
        }
    }
}

fn read_pair(certificate: &Path, key: &Path) -> Result<CertifiedKey> {
    let text = read(certificate)?;
    let chain = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("cannot read the certificate {}", certificate.display()))?;
    ensure!(!chain.is_empty(), "{} contains no certificate in PEM", certificate.display());
    let private = PrivateKeyDer::from_pem_slice(&read(key)?)
        .with_context(|| format!("cannot read the private key {}", key.display()))?;
    CertifiedKey::from_der(chain, private, &rustls::crypto::ring::default_provider()).with_context(|| {
        format!("cannot serve the certificate {} with the key {}", certificate.display(), key.display())
    })
}

/// The pins of a file of certificates, public keys and private keys; none if the file does not exist.
fn read_next_pins(path: &Path) -> Result<Vec<String>> {
    let Some(text) = store::read(path, MAX_FILE_BYTES)? else { return Ok(Vec::new()) };
    let attempt = || -> Result<Vec<String>> {
        let mut pins = Vec::new();
        for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(&text) {
            let (kind, der) = section.context("it is not PEM")?;
            let pin = match kind {
                SectionKind::Certificate => {
                    key_of(&CertificateDer::from(der)).context("it contains an invalid certificate")?
                }
                SectionKind::PublicKey => Fingerprint::of(&der),
                _ => {
                    let key = PrivateKeyDer::from_pem(kind, der)
                        .context("it contains something other than keys and certificates")?;
                    let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
                    Fingerprint::of(&key.public_key().context("it contains a private key without a public key")?)
                }
            };
            let pin = pin.to_string();
            if !pins.contains(&pin) {
                pins.push(pin);
            }
        }
        match pins.len() {
            0 => bail!("it contains no certificate and no key in PEM"),
            count if count >= MAX_PINS => bail!("it contains {count} keys; at most {} can be announced", MAX_PINS - 1),
            _ => Ok(pins),
        }
    };
    attempt().with_context(|| format!("cannot read the next keys in {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    store::read(path, MAX_FILE_BYTES)?.with_context(|| format!("the file {} does not exist", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::endpoint::testing::{TestIdentity, self_signed, self_signed_by};

    struct Bench {
        _dir: tempfile::TempDir,
        directory: GatewayDirectory,
        certificates: Certificates,
    }

    impl Bench {
        fn new(key: &rcgen::KeyPair) -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let directory = GatewayDirectory::new(dir.path());
            fs::create_dir(directory.tls()).unwrap();
            fs::write(directory.certificate_key(), key.serialize_pem()).unwrap();
            fs::write(directory.certificate(), of(key).pem).unwrap();
            let certificates = Certificates::open(directory.clone(), Duration::ZERO);
            Bench { _dir: dir, directory, certificates }
        }

        fn write(&mut self, path: &Path, text: &str) {
            store::replace(path, text.as_bytes(), store::Access::Private).unwrap();
            self.certificates.poll(false);
            self.certificates.poll(false);
        }

        fn served(&self) -> Option<CertificateDer<'static>> {
            self.certificates.served.pair.read().unwrap().as_ref().map(|pair| pair.cert[0].clone())
        }

        fn problems(&self) -> String {
            self.certificates.problems().cloned().collect::<Vec<_>>().join("; ")
        }
    }

    fn of(key: &rcgen::KeyPair) -> TestIdentity {
        self_signed_by(key, &["gw"], |_| {})
    }

    #[test]
    fn a_new_pair_is_served_once_it_is_valid_and_matches() {
        let (first, second) = (rcgen::KeyPair::generate().unwrap(), rcgen::KeyPair::generate().unwrap());
        let mut bench = Bench::new(&first);
        let before = bench.served().unwrap();
        let changes = bench.certificates.served().changes();
        let (certificate, key) = (bench.directory.certificate(), bench.directory.certificate_key());
        let renewed = of(&second);
        for bad in
            [&renewed.pem, "", &renewed.pem[..200], "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            bench.write(&certificate, bad);
            assert_eq!(bench.served().as_ref(), Some(&before), "{bad}");
            assert!(bench.problems().contains("the previous certificate is served"), "{}", bench.problems());
        }
        bench.write(&certificate, &renewed.pem);
        assert!(!changes.has_changed().unwrap());
        bench.write(&key, &second.serialize_pem());
        assert_eq!((bench.served(), bench.problems().as_str()), (Some(renewed.certificate), ""));
        assert!(changes.has_changed().unwrap());
        fs::remove_file(&key).unwrap();
        bench.certificates.poll(true);
        assert!(bench.problems().contains("does not exist"), "{}", bench.problems());
    }

    #[test]
    fn the_first_valid_certificate_is_served() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut bench = Bench::new(&key);
        fs::write(bench.directory.certificate(), "").unwrap();
        bench.certificates = Certificates::open(bench.directory.clone(), Duration::ZERO);
        assert!(bench.served().is_none() && bench.problems().contains("no certificate is served"));
        let path = bench.directory.certificate();
        bench.write(&path, &of(&key).pem);
        assert!(bench.served().is_some() && bench.problems().is_empty());
    }

    #[test]
    fn next_keys_are_read_from_certificates_and_keys() {
        let mut bench = Bench::new(&rcgen::KeyPair::generate().unwrap());
        let next = bench.directory.next_certificate();
        let keys = [(); 4].map(|()| rcgen::KeyPair::generate().unwrap());
        let pin = |key: &rcgen::KeyPair| key_of(&of(key).certificate).unwrap().to_string();
        let text = of(&keys[0]).pem + &keys[1].serialize_pem() + &keys[2].public_key_pem() + &keys[1].serialize_pem();
        bench.write(&next, &text);
        let expected: Vec<String> = keys[..3].iter().map(pin).collect();
        assert_eq!((&bench.certificates.status().next, bench.problems().as_str()), (&expected, ""));
        let pins = bench.certificates.status().pins();
        assert_eq!((pins.len(), &pins[1..]), (4, &expected[..]));
        for bad in ["what", &(text + &keys[3].serialize_pem())] {
            bench.write(&next, bad);
            assert!(bench.problems().contains("next.pem"), "{}", bench.problems());
            assert_eq!(bench.certificates.status().next, expected);
        }
        // Once it is served, it is not a next key any more.
        bench.write(&next, &of(&keys[0]).pem);
        let paths = [bench.directory.certificate(), bench.directory.certificate_key()];
        bench.write(&paths[0], &of(&keys[0]).pem);
        bench.write(&paths[1], &keys[0].serialize_pem());
        assert_eq!(bench.certificates.status().pins(), [pin(&keys[0])]);
        fs::remove_file(&next).unwrap();
        bench.certificates.poll(false);
        assert_eq!((bench.problems().as_str(), bench.certificates.status().next.len()), ("", 0));
    }

    #[test]
    fn a_certificate_that_expires_soon_is_a_warning() {
        let end = |end| CertificateStatus { end: Some(end), ..CertificateStatus::default() };
        let now = 1_800_000_000;
        assert_eq!(end(now + 22 * 86_400).warning(now), None);
        assert!(end(now + 3 * 86_400).warning(now).unwrap().contains("expires in 3 days, on 2027-01-18"));
        assert!(end(now - 1).warning(now).unwrap().contains("expired on"));
        let generated = self_signed(&["a"], |_| {});
        assert!(end(end_of(&[generated.certificate]).unwrap()).warning(now).is_none());
    }
}
