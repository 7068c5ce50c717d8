//! The service role: brings an installation onto a host, into its service manager, and off it again.
//!
//! `install` promises that a failure before the older installation was stopped leaves everything as it was, byte for byte; that a later
//! one is undone, or says which step it was; and that repeating the command is always safe. `uninstall` leaves nothing behind.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::core::model::{AgentId, Version};
use crate::endpoint::{Endpoint, Fingerprint};
use crate::home::Home;

mod fetch;
mod first_contact;
mod home_selection;
mod install;
mod install_root;
mod leftovers;
mod legacy;
mod legacy_arguments;
mod preflight;
mod progress;
mod roles;
mod switch;
mod undo;
mod uninstall;
mod upgrade;

pub use install::install;
pub use legacy_arguments::old_spelling;
pub use uninstall::uninstall;

/// Wrong usage, as opposed to a failure.
const WRONG_USAGE: u8 = 2;

/// Nothing is installed where something should be.
const NOT_INSTALLED: u8 = 4;

/// The end of the help, 80 columns wide.
const EXAMPLES: &str = "\
Examples:
  A new host, with the gateway's public key and certificate copied to it:
    aops install --agent-id 5402 --endpoint https://gateway.example:8888 \\
      --trusted-key aops.pub --ca-cert cert.pem
  To try it out, in a directory of one's own, without root or a service:
    aops install ... --home ~/aops-home --service none
  Again, to get the gateway's current version; all that was told is kept:
    aops install
  Without a network, from a package and its signature:
    aops install ... --package ./aops-spm-0.1.0_linux_amd64.tar.zst

It can be repeated at any time: sub-agents that run go on running.";

/// What `aops install` is told.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(disable_version_flag = true, after_long_help = EXAMPLES)]
pub struct InstallOptions {
    /// The identity of this host, as the platform gave it
    ///
    /// May be left out where an installation stands already, or an old one is
    /// taken over.
    #[arg(long, value_name = "ID")]
    pub agent_id: Option<AgentId>,

    /// The gateway, such as https://gateway.example:8888
    ///
    /// May be repeated: the endpoints are tried in the order given. May be left
    /// out where an installation stands already, or an old one is taken over.
    #[arg(long, value_name = "URL")]
    pub endpoint: Vec<Endpoint>,

    /// The version to install [default: the gateway's current one]
    #[arg(long, value_name = "V")]
    pub version: Option<Version>,

    /// Where to install [default: /opt/aops, on Windows %ProgramFiles%\aops]
    #[arg(long, value_name = "DIR")]
    pub home: Option<PathBuf>,

    /// Whether to register with the host's service manager
    #[arg(long, value_name = "WHICH", value_enum, default_value_t)]
    pub service: ServiceChoice,

    /// A minisign public key that packages are to be signed by
    ///
    /// May be repeated. An executable that a gateway serves for installing
    /// brings that gateway's keys with it; keys of an older installation stay.
    #[arg(long, value_name = "FILE")]
    pub trusted_key: Vec<PathBuf>,

    /// Check the gateway's certificate by the authorities in this PEM file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pin", "insecure"])]
    pub ca_cert: Option<PathBuf>,

    /// Accept the gateway's certificate by its SHA-256 alone
    ///
    /// May be repeated. `openssl x509 -noout -fingerprint -sha256 -in CERT`
    /// prints it; that of the public key will do, too.
    #[arg(long, value_name = "SHA256", conflicts_with = "insecure")]
    pub pin: Vec<Fingerprint>,

    /// Do not check the gateway's certificate, and allow http://
    #[arg(long)]
    pub insecure: bool,

    /// Accept the certificate of the first contact, and no other later
    #[arg(long, hide = true)]
    pub pin_first_contact: bool,

    /// The product that this host belongs to: auto, generic, hci or scp
    /// [default: auto]
    #[arg(long, value_name = "NAME")]
    pub product: Option<String>,

    /// Install from this package (and FILE.minisig beside it), offline
    #[arg(long, value_name = "FILE")]
    pub package: Option<PathBuf>,

    /// Take over the settings and the agent id of an old installation in DIR
    ///
    /// Not needed where it stands in the home: then it is found, and replaced.
    #[arg(long, value_name = "DIR", conflicts_with = "fresh")]
    pub import: Option<PathBuf>,

    /// Keep nothing of an older installation: no settings, keys or sub-agents
    #[arg(long)]
    pub fresh: bool,
}

/// Whether the roles are registered with the host's service manager.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ServiceChoice {
    /// With a service manager, where there is one and this is run as root
    #[default]
    Auto,
    /// Without: `control start` starts it, nothing does so at boot
    None,
}

/// What the process brings, besides its arguments.
#[derive(Debug, Clone)]
pub struct ProcessContext {
    /// The home that this executable belongs to, or that `AOPS_HOME` names. `--home` wins over it.
    pub home: Option<Home>,
    /// The variable `AOPS_PRODUCT`. `--product` wins over it.
    pub product: Option<String>,
    /// This executable, whose trailer may bring keys.
    pub executable: PathBuf,
}
