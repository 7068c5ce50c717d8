//! The basic values of the system as types that hold valid values only.
//!
//! A value is parsed once, where it enters the program, and is safe to use from then on: an [`AgentName`] or a [`Version`] cannot leave the
//! directory that it is joined to, and a [`Digest`] is always 64 lower-case hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::text::hex;

/// The name of the manager's own package.
pub const MANAGER_PACKAGE: &str = "aops-spm";

/// Why a value was rejected: the expected format, and the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidValue {
    what: &'static str,
    expected: &'static str,
    got: String,
}

impl InvalidValue {
    pub(super) fn new(what: &'static str, expected: &'static str, got: &str) -> InvalidValue {
        InvalidValue { what, expected, got: got.to_owned() }
    }
}

impl fmt::Display for InvalidValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: String = self.got.chars().take(80).collect();
        write!(f, "cannot use {shown:?} as {}: expected {}", self.what, self.expected)
    }
}

impl std::error::Error for InvalidValue {}

/// Defines a string type that is validated by `FromStr`, `TryFrom<String>` and serde. The pattern states the same rule in the protocol's
/// schema.
macro_rules! validated_string {
    ($(#[$doc:meta])* $name:ident, $what:literal, $expected:literal, $pattern:literal, $accepts:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "gateway", derive(schemars::JsonSchema), schemars(extend("pattern" = $pattern)))]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidValue;

            fn try_from(value: String) -> Result<Self, InvalidValue> {
                let accepts: fn(&str) -> bool = $accepts;
                if accepts(&value) { Ok(Self(value)) } else { Err(InvalidValue { what: $what, expected: $expected, got: value }) }
            }
        }

        impl FromStr for $name {
            type Err = InvalidValue;

            fn from_str(value: &str) -> Result<Self, InvalidValue> {
                Self::try_from(value.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

validated_string!(
    /// The name of a sub-agent, and of its package: `[a-z0-9][a-z0-9._-]{0,63}`.
    AgentName,
    "the name of a sub-agent",
    "1 to 64 of a-z 0-9 . _ - beginning with a letter or digit",
    "^[a-z0-9][a-z0-9._-]{0,63}$",
    |s| is_made_of(s, 64, |c| c.is_ascii_lowercase() || c.is_ascii_digit(), |c| {
        c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-')
    })
);

validated_string!(
    /// A version: `[A-Za-z0-9][A-Za-z0-9.+-]{0,63}`. It need not be semver. Versions are compared for equality, and ordered only if both
    /// are semver.
    Version,
    "a version",
    "1 to 64 of A-Z a-z 0-9 . + - beginning with a letter or digit",
    "^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$",
    |s| is_made_of(s, 64, |c| c.is_ascii_alphanumeric(), |c| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-'))
);

validated_string!(
    /// The id given to a host at install: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
    AgentId,
    "an agent id",
    "1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    |s| is_made_of(s, 64, |c| c.is_ascii_alphanumeric(), |c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
);

validated_string!(
    /// A SHA-256 in 64 lower-case hexadecimal digits.
    Digest,
    "a SHA-256",
    "64 lower-case hexadecimal digits",
    "^[0-9a-f]{64}$",
    |s| s.len() == 64 && s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
);

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Digest {
        Digest(hex(&bytes))
    }
}

fn is_made_of(s: &str, max: usize, first: fn(char) -> bool, rest: fn(char) -> bool) -> bool {
    s.len() <= max && s.chars().next().is_some_and(first) && s.chars().all(rest)
}

impl Version {
    /// The order of two versions; `None` unless both are semver.
    pub fn order(&self, other: &Version) -> Option<std::cmp::Ordering> {
        let ours = semver::Version::parse(&self.0).ok()?;
        let theirs = semver::Version::parse(&other.0).ok()?;
        Some(ours.cmp(&theirs))
    }
}

/// Defines an enum of fixed values with `Display`, `FromStr` and serde in the same spelling.
macro_rules! string_enum {
    ($(#[$doc:meta])* $name:ident, $what:literal, $expected:literal { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "gateway", derive(schemars::JsonSchema))]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant),+ }

        impl $name {
            #[cfg_attr(not(feature = "gateway"), allow(dead_code, reason = "only the gateway iterates over some of them"))]
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = InvalidValue;

            fn from_str(value: &str) -> Result<Self, InvalidValue> {
                match value {
                    $($text => Ok($name::$variant),)+
                    _ => Err(InvalidValue { what: $what, expected: $expected, got: value.to_owned() }),
                }
            }
        }
    };
}

string_enum!(
    /// The operating system that a package is for.
    Os, "an operating system", "linux or windows" { Linux = "linux", Windows = "windows" }
);

string_enum!(
    /// The processor architecture that a package is for.
    Arch, "an architecture", "amd64, 386 or arm64" { Amd64 = "amd64", I386 = "386", Arm64 = "arm64" }
);

string_enum!(
    /// The archive format of a package; also its file extension.
    Packing, "an archive format", "tar.zst, tar.gz or zip" { TarZst = "tar.zst", TarGz = "tar.gz", Zip = "zip" }
);

/// The contents of a package, as stated by its file name and its signed comment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Release {
    pub name: AgentName,
    pub version: Version,
    pub os: Os,
    pub arch: Arch,
}

impl Release {
    /// `{name}-{version}_{os}_{arch}.{packing}`.
    pub fn file_name(&self, packing: Packing) -> String {
        format!("{}-{}_{}_{}.{packing}", self.name, self.version, self.os, self.arch)
    }

    /// The archive format of a file name; `None`: it is not a file of this release.
    pub fn packing_of(&self, file: &str) -> Option<Packing> {
        Packing::ALL.iter().copied().find(|packing| self.file_name(*packing) == file)
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} for {}/{}", self.name, self.version, self.os, self.arch)
    }
}

/// The release that a signature binds a package to, from its trusted comment `name=… version=… os=… arch=… epoch=…`.
///
/// The signature covers this comment and not the file name, so the comment decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub release: Release,
    /// Only grows: a host that has committed a package with this epoch rejects lower epochs of the same name.
    pub epoch: u64,
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Release { name, version, os, arch } = &self.release;
        write!(f, "name={name} version={version} os={os} arch={arch} epoch={}", self.epoch)
    }
}

impl FromStr for Binding {
    type Err = InvalidValue;

    /// Each of the five fields exactly once, in any order. Other fields are ignored; later versions may define them.
    fn from_str(comment: &str) -> Result<Self, InvalidValue> {
        let invalid = || InvalidValue {
            what: "a package's signed comment",
            expected: "name=… version=… os=… arch=… epoch=…, each once",
            got: comment.to_owned(),
        };
        let field = |key: &str| {
            let mut values = comment.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            match (values.next(), values.next()) {
                (Some(value), None) => Ok(value),
                _ => Err(invalid()),
            }
        };
        Ok(Binding {
            release: Release {
                name: field("name")?.parse()?,
                version: field("version")?.parse()?,
                os: field("os")?.parse()?,
                arch: field("arch")?.parse()?,
            },
            epoch: field("epoch")?.parse().map_err(|_| invalid())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_and_versions_cannot_leave_their_directory() {
        for bad in ["", ".", "..", "../x", "a/b", "a\\b", "-x", ".x", "A", "a b", "a\0", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<AgentName>().is_err(), "{bad:?}");
        }
        for bad in ["", ".", "..", "1/2", "1_2", "-1", "+1", "1 2", &"1".repeat(65)] {
            assert!(bad.parse::<Version>().is_err(), "{bad:?}");
        }
        for good in ["node-exporter", "a", "0x", "a._-b", &"a".repeat(64)] {
            assert!(good.parse::<AgentName>().is_ok(), "{good:?}");
        }
        for good in ["1.2.3", "c57f6a1d", "1.0.0-rc.1+build", "V2"] {
            assert!(good.parse::<Version>().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn only_semver_versions_are_ordered() {
        let v = |s: &str| s.parse::<Version>().unwrap();
        assert_eq!(v("1.2.0").order(&v("1.10.0")), Some(std::cmp::Ordering::Less));
        assert_eq!(v("c57f6a1d").order(&v("1.0.0")), None);
        assert_eq!(v("c57f6a1d").order(&v("c57f6a1d")), None);
    }

    #[test]
    fn a_binding_parses_back_and_duplicate_fields_are_rejected() {
        let text = "name=node-exporter version=1.5.0 os=linux arch=amd64 epoch=7";
        let binding: Binding = text.parse().unwrap();
        assert_eq!(binding.to_string(), text);
        assert!(format!("{text} name=other").parse::<Binding>().is_err());
        assert!("name=x version=1 os=linux arch=amd64".parse::<Binding>().is_err());
        assert!(format!("{text} note=later").parse::<Binding>().is_ok());
    }

    #[test]
    fn the_archive_format_follows_from_the_file_name() {
        let release = Release {
            name: "a-b".parse().unwrap(),
            version: "1.0-2".parse().unwrap(),
            os: Os::Linux,
            arch: Arch::I386,
        };
        assert_eq!(release.file_name(Packing::TarGz), "a-b-1.0-2_linux_386.tar.gz");
        assert_eq!(release.packing_of("a-b-1.0-2_linux_386.zip"), Some(Packing::Zip));
        assert_eq!(release.packing_of("a-b-1.0_linux_386.zip"), None);
    }

    proptest! {
        /// A valid comment binds to exactly one release.
        #[test]
        fn a_binding_has_the_values_of_its_comment(words in prop::collection::vec("(name|version|os|arch|epoch|x)=(a|1|linux|windows|386|amd64)", 0..8)) {
            let comment = words.join(" ");
            if let Ok(binding) = comment.parse::<Binding>() {
                prop_assert_eq!(binding.to_string().parse::<Binding>(), Ok(binding.clone()));
                for field in binding.to_string().split(' ') {
                    let key = field.split('=').next().unwrap();
                    let said: Vec<_> = words.iter().filter(|word| word.starts_with(&format!("{key}="))).collect();
                    prop_assert_eq!(said, [field]);
                }
            }
        }

        /// Names and versions are single path components, whatever the input.
        #[test]
        fn names_and_versions_are_single_path_components(text in "[a-zA-Z0-9._+/\\\\ -]{0,8}") {
            let words = [
                text.parse::<AgentName>().map(String::from),
                text.parse::<Version>().map(String::from),
                text.parse::<AgentId>().map(String::from),
            ];
            for word in words.into_iter().flatten() {
                prop_assert_eq!(&word, &text);
                prop_assert!(!word.starts_with(['.', '-', '+']) && !word.contains(['/', '\\', ' ']));
            }
        }
    }
}
