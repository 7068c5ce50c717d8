//! Reads a certificate's public key and expiry.

use rustls::pki_types::CertificateDer;
use rustls::server::ParsedCertificate;
use x509_cert::der::Decode;

use super::Fingerprint;

/// The SHA-256 of the certificate's public key (its SubjectPublicKeyInfo), which is what pins store; `None` if it cannot be parsed.
pub fn key_of(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    Some(Fingerprint::of(parsed.subject_public_key_info().as_ref()))
}

/// The earliest expiry in a chain, seconds since 1970; `None` if no certificate can be parsed.
pub fn end_of(chain: &[CertificateDer<'_>]) -> Option<u64> {
    let end = |certificate: &CertificateDer<'_>| {
        let read = x509_cert::Certificate::from_der(certificate).ok()?;
        Some(read.tbs_certificate().validity().not_after.to_unix_duration().as_secs())
    };
    chain.iter().filter_map(end).min()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{issued, self_signed};
    use super::*;

    #[test]
    fn a_chain_expires_with_its_first_certificate_to_expire() {
        let of = |year| self_signed(&["a"], |params| params.not_after = rcgen::date_time_ymd(year, 1, 1)).certificate;
        let (sooner, later) = (of(2040), of(2060));
        assert_eq!(end_of(&[later.clone(), sooner]), Some(2_208_988_800));
        assert_eq!(end_of(&[later]), Some(2_840_140_800));
        assert_eq!(end_of(&[CertificateDer::from(vec![1, 2, 3])]), None);
    }

    #[test]
    fn certificates_with_the_same_key_have_the_same_key_fingerprint() {
        let key = rcgen::KeyPair::generate().unwrap();
        let of = |name: &str| super::super::testing::self_signed_by(&key, &[name], |_| {}).certificate;
        assert_eq!(key_of(&of("a")), key_of(&of("b")));
        assert_ne!(key_of(&of("a")), key_of(&issued(&["a"]).1.certificate));
        assert_eq!(key_of(&CertificateDer::from(vec![1])), None);
    }
}
