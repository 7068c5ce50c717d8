//! Which certificates are accepted, and the error texts for rejected ones.
//!
//! The server must always prove in the handshake that it holds the certificate's key, except under [`Trust::Insecure`]. A pin names a
//! public key or one certificate; names and dates of a pinned certificate are not checked, as the pin is stricter.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};

use super::pins::{
    MAX_PINS, PinMatch, Pins, ServerIdentity, accepted_first_contact, accepted_pinned, is_pinned, learn_first_contact,
    learn_pinned,
};
use super::{Fingerprint, key_of};
use crate::store;

/// Larger certificate files are rejected; the whole of Mozilla's list is 220 kB.
const MAX_CA_FILE_BYTES: u64 = 4 << 20;

/// Limit for the certificate's names in an error.
const MAX_NAMES_SHOWN: usize = 10;

/// Which certificates are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Those that the operating system trusts.
    System,
    /// Those issued by the authorities in this PEM file, and the certificates in the file themselves.
    CaFile(PathBuf),
    /// Only certificates that match these pins by certificate or public key, or by a public key in the file `learned` that was announced
    /// under these pins.
    Pin { pins: Vec<Fingerprint>, learned: PathBuf },
    /// For each origin, the key of the first contact and those announced since, stored in the file `pins`, which must exist.
    FirstContact { pins: PathBuf },
    /// Any certificate, and plain http.
    Insecure,
}

impl Trust {
    /// The name in reports, equal to the key in the settings.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Trust::System => "system",
            Trust::CaFile(_) => "caCert",
            Trust::Pin { .. } => "pin",
            Trust::FirstContact { .. } => "firstContact",
            Trust::Insecure => "insecure",
        }
    }
}

/// [`Trust`] with its files loaded.
#[derive(Debug, Clone)]
pub(super) enum LoadedTrust {
    Authorities {
        roots: Arc<RootCertStore>,
        /// The certificates that the operator gave: a server may present one of these as its own.
        given: Arc<Vec<CertificateDer<'static>>>,
    },
    Pins {
        pins: Arc<Vec<Fingerprint>>,
        learned: Arc<PathBuf>,
    },
    FirstContact(Arc<PathBuf>),
    Insecure,
}

impl LoadedTrust {
    pub(super) fn new(trust: &Trust) -> Result<LoadedTrust> {
        Ok(match trust {
            Trust::System => LoadedTrust::system(),
            Trust::CaFile(path) => LoadedTrust::ca_file(path).with_context(|| {
                format!("cannot use {} as the file of trusted certificates (--ca-cert)", path.display())
            })?,
            Trust::Pin { pins, learned } => {
                LoadedTrust::Pins { pins: Arc::new(pins.clone()), learned: Arc::new(learned.clone()) }
            }
            Trust::FirstContact { pins } => LoadedTrust::FirstContact(Arc::new(pins.clone())),
            Trust::Insecure => LoadedTrust::Insecure,
        })
    }

    /// A host without system certificates is not an error here: every server is rejected, with the reason.
    pub(super) fn system() -> LoadedTrust {
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() {
            let reasons: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
            tracing::warn!(reasons = reasons.join("; "), "no trusted certificates found in the operating system");
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(found.certs);
        LoadedTrust::Authorities { roots: Arc::new(roots), given: Arc::default() }
    }

    fn ca_file(path: &Path) -> Result<LoadedTrust> {
        let text = store::read(path, MAX_CA_FILE_BYTES)?.context("the file does not exist")?;
        let given = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| anyhow::anyhow!("the file is not PEM: {error}"))?;
        let mut roots = RootCertStore::empty();
        let (usable, _) = roots.add_parsable_certificates(given.iter().cloned());
        anyhow::ensure!(
            usable > 0,
            "the file contains no usable certificate; it must be PEM (-----BEGIN CERTIFICATE-----)"
        );
        Ok(LoadedTrust::Authorities { roots: Arc::new(roots), given: Arc::new(given) })
    }
}

/// Why a server is not trusted. The text is for the operator and says what to do.
#[derive(Debug, Clone)]
pub struct Distrust {
    /// `https://host:port`
    origin: String,
    presented: Option<Fingerprint>,
    why: DistrustReason,
}

#[derive(Debug, Clone)]
enum DistrustReason {
    UnknownIssuer,
    WrongName {
        presented: Vec<String>,
    },
    /// Seconds since 1970: this host's clock, and the certificate's expiry.
    Expired {
        clock: Option<u64>,
        end: Option<u64>,
    },
    /// The same, with the start of the validity.
    NotYetValid {
        clock: Option<u64>,
        start: Option<u64>,
    },
    NotPinned,
    Changed {
        known: Fingerprint,
    },
    PinsLost {
        pins: PathBuf,
    },
    TooManyPins {
        pins: PathBuf,
    },
    Unusable(String),
}

impl Distrust {
    pub(super) fn unusable(origin: &str, presented: Option<Fingerprint>, why: impl Into<String>) -> Distrust {
        Distrust { origin: origin.to_owned(), presented, why: DistrustReason::Unusable(why.into()) }
    }
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot trust the certificate of {}", self.origin)?;
        let pin = match self.presented {
            Some(presented) => {
                write!(f, " (public key {presented})")?;
                format!("verify the key with the gateway's operator and give `--pin {presented}`")
            }
            None => "give `--pin SHA256`".to_owned(),
        };
        match &self.why {
            DistrustReason::UnknownIssuer => write!(
                f,
                ": it was not issued by an authority that this host trusts; if it is self-signed, give it with `--ca-cert FILE`, or \
                 {pin}"
            ),
            DistrustReason::WrongName { presented } if presented.is_empty() => write!(
                f,
                ": it contains no host name (no subjectAltName); give the gateway a certificate that names this \
                 host, or {pin}"
            ),
            DistrustReason::WrongName { presented } => write!(
                f,
                ": it is only valid for {}; use an endpoint with one of these names, give the gateway a certificate that names \
                 this one, or {pin}",
                presented.join(", ")
            ),
            DistrustReason::Expired { clock, end } => write!(
                f,
                ": it expired{}; this host's clock says {}. If the clock is right, renew the gateway's certificate, or {pin}; if it is \
                 wrong, set the clock",
                date(*end).map(|end| format!(" on {end}")).unwrap_or_default(),
                date(*clock).unwrap_or_else(|| "an unknown time".to_owned())
            ),
            DistrustReason::NotYetValid { clock, start } => write!(
                f,
                ": it is not valid yet{}; this host's clock says {}; set the clock if it is wrong",
                date(*start).map(|start| format!(", only from {start} on")).unwrap_or_default(),
                date(*clock).unwrap_or_else(|| "an unknown time".to_owned())
            ),
            DistrustReason::NotPinned => {
                write!(
                    f,
                    ": it matches no pin and no public key that the gateway has announced; if the gateway's key was replaced, {pin}"
                )
            }
            DistrustReason::Changed { known } => {
                let new = self.presented.map_or("NEW".to_owned(), |presented| presented.to_string());
                write!(
                    f,
                    ": the public key pinned since the first contact is {known} (in the home's state/pins.json). Either the gateway's \
                     certificate was replaced by one with a different, unannounced key, or the connection is intercepted. Verify the key \
                     with the gateway's operator, then give `--pin {new}`, or install again with `--fresh`"
                )
            }
            DistrustReason::PinsLost { pins } => write!(
                f,
                ": {} is missing, so the key pinned at the first contact is unknown; restore the file from a backup, or {pin}, or write \
                 {{}} into that file to accept the next server that answers",
                pins.display()
            ),
            DistrustReason::TooManyPins { pins } => write!(
                f,
                ": this is a first contact, and {MAX_PINS} servers are pinned already; remove unneeded pins from {}, or {pin}",
                pins.display()
            ),
            DistrustReason::Unusable(why) => write!(f, ": {why}"),
        }
    }
}

impl std::error::Error for Distrust {}

/// Verifies the certificate of one connection.
#[derive(Debug)]
pub(super) struct CertificateVerifier {
    origin: String,
    trust: LoadedTrust,
    provider: Arc<CryptoProvider>,
}

impl CertificateVerifier {
    pub(super) fn new(origin: String, trust: LoadedTrust, provider: Arc<CryptoProvider>) -> CertificateVerifier {
        CertificateVerifier { origin, trust, provider }
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), DistrustReason> {
        match &self.trust {
            LoadedTrust::Insecure => Ok(()),
            LoadedTrust::Pins { pins, learned } => match is_pinned(learned, &self.origin, pins, identity_of(leaf)) {
                true => Ok(()),
                false => Err(DistrustReason::NotPinned),
            },
            LoadedTrust::FirstContact(pins) => {
                check_first_contact(&pins_in(pins)?, pins, &self.origin, identity_of(leaf)).map(drop)
            }
            LoadedTrust::Authorities { roots, given } => {
                let parsed = ParsedCertificate::try_from(leaf).map_err(why)?;
                let algorithms = self.provider.signature_verification_algorithms.all;
                match verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms) {
                    // The operator gave this certificate itself, but it is marked as an authority's, as openssl does by default. Its dates
                    // were checked before that mark.
                    Err(error) if is_authority(&error) && given.iter().any(|known| known == leaf) => {}
                    Err(error) if is_authority(&error) => return Err(DistrustReason::UnknownIssuer),
                    other => other.map_err(why)?,
                }
                verify_server_name(&parsed, name).map_err(why)
            }
        }
    }
}

fn is_authority(error: &rustls::Error) -> bool {
    let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(other))) = error else { return false };
    matches!(other.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
}

fn why(error: rustls::Error) -> DistrustReason {
    match error {
        rustls::Error::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => DistrustReason::UnknownIssuer,
            CertificateError::NotValidForName => DistrustReason::WrongName { presented: Vec::new() },
            CertificateError::NotValidForNameContext { presented, .. } => DistrustReason::WrongName {
                presented: presented.iter().take(MAX_NAMES_SHOWN).map(|name| bare_name(name)).collect(),
            },
            CertificateError::ExpiredContext { time, not_after } => {
                DistrustReason::Expired { clock: Some(time.as_secs()), end: Some(not_after.as_secs()) }
            }
            CertificateError::Expired => DistrustReason::Expired { clock: None, end: None },
            CertificateError::NotValidYetContext { time, not_before } => {
                DistrustReason::NotYetValid { clock: Some(time.as_secs()), start: Some(not_before.as_secs()) }
            }
            CertificateError::NotValidYet => DistrustReason::NotYetValid { clock: None, start: None },
            other => DistrustReason::Unusable(other.to_string()),
        },
        other => DistrustReason::Unusable(other.to_string()),
    }
}

/// Seconds since 1970 as RFC 3339, UTC.
fn date(seconds: Option<u64>) -> Option<String> {
    let timestamp = jiff::Timestamp::from_second(i64::try_from(seconds?).ok()?).ok()?;
    Some(timestamp.to_string())
}

/// Extracts `gw.example` from `DnsName("gw.example")`, without control characters.
fn bare_name(presented: &str) -> String {
    let inner = presented.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(presented);
    inner.trim_matches('"').chars().filter(|c| !c.is_control()).take(255).collect()
}

impl ServerCertVerifier for CertificateVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(leaf, intermediates, name, now).map(|()| ServerCertVerified::assertion()).map_err(|why| {
            let presented = Some(identity_of(leaf).pin());
            let distrust = Distrust { origin: self.origin.clone(), presented, why };
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(distrust))))
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if matches!(self.trust, LoadedTrust::Insecure) {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if matches!(self.trust, LoadedTrust::Insecure) {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Serializes updates of the pin files.
static UPDATES: Mutex<()> = Mutex::new(());

/// The identity in a server's certificate.
pub(super) fn identity_of(leaf: &CertificateDer<'_>) -> ServerIdentity {
    ServerIdentity { certificate: Fingerprint::of(leaf), key: key_of(leaf) }
}

impl LoadedTrust {
    /// Records the presented and the announced keys of a connection that passed this verification.
    pub(super) fn learn(&self, origin: &str, identity: ServerIdentity, announced: &[Fingerprint]) -> Result<()> {
        let _guard = UPDATES.lock().unwrap_or_else(PoisonError::into_inner);
        match self {
            LoadedTrust::Pins { pins, learned } => learn_pinned(learned, origin, pins, identity, announced),
            LoadedTrust::FirstContact(pins) => learn_first_contact(pins, origin, identity, announced),
            LoadedTrust::Authorities { .. } | LoadedTrust::Insecure => Ok(()),
        }
    }

    /// The pins that are accepted for an origin; empty if its certificate is not verified by pins.
    pub(super) fn accepted(&self, origin: &str) -> Vec<Fingerprint> {
        match self {
            LoadedTrust::Pins { pins, learned } => accepted_pinned(learned, origin, pins),
            LoadedTrust::FirstContact(pins) => accepted_first_contact(pins, origin),
            LoadedTrust::Authorities { .. } | LoadedTrust::Insecure => Vec::new(),
        }
    }
}

/// Pins `identity` for `origin` after a successful handshake, if nothing is pinned yet. Returns whether this was the first contact.
pub(super) fn pin_first_contact(path: &Path, origin: &str, identity: ServerIdentity) -> Result<bool> {
    // Concurrent first contacts: the second thread must see the pin of the first.
    let _guard = UPDATES.lock().unwrap_or_else(PoisonError::into_inner);

    let distrusted = |why| Distrust { origin: origin.to_owned(), presented: Some(identity.pin()), why };
    let mut pins = pins_in(path).map_err(distrusted)?;
    if check_first_contact(&pins, path, origin, identity).map_err(distrusted)? {
        pins.add(origin, identity);
        pins.save(path)?;
        return Ok(true);
    }
    Ok(false)
}

fn pins_in(path: &Path) -> Result<Pins, DistrustReason> {
    match Pins::load(path) {
        Ok(Some(pins)) => Ok(pins),
        Ok(None) => Err(DistrustReason::PinsLost { pins: path.to_owned() }),
        Err(error) => Err(DistrustReason::Unusable(format!("{error:#}"))),
    }
}

/// Returns whether this is the first contact; an error if the key is not the pinned one.
fn check_first_contact(
    pins: &Pins,
    path: &Path,
    origin: &str,
    identity: ServerIdentity,
) -> Result<bool, DistrustReason> {
    match pins.check(origin, identity) {
        PinMatch::Known => Ok(false),
        PinMatch::First => Ok(true),
        PinMatch::Changed { known } => Err(DistrustReason::Changed { known }),
        PinMatch::Full => Err(DistrustReason::TooManyPins { pins: path.to_owned() }),
    }
}
