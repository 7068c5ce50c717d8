//! The service role: installs aops on a host, registers it with the service manager, and uninstalls it.
//!
//! `install` guarantees:
//! - a failure before the existing installation is stopped changes nothing;
//! - a later failure is rolled back, or its error names the step and what remains to be done;
//! - the command can be repeated at any time.
//!
//! `uninstall` leaves nothing behind.

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
mod packaged;
mod preflight;
mod progress;
mod roles;
mod switch;
mod undo;
mod uninstall;
mod upgrade;

pub use install::install;
pub use legacy_arguments::from_old_arguments;
pub use packaged::{PackagedCommand, packaged};
pub use uninstall::uninstall;

/// Exit code for wrong usage.
const WRONG_USAGE: u8 = 2;

/// Exit code if nothing is installed.
const NOT_INSTALLED: u8 = 4;

/// The end of the help, 80 columns wide.
const EXAMPLES: &str = "\
Examples:
  A new host, with the gateway's public key and certificate copied to it:
    aops install --agent-id 5402 --endpoint https://gateway.example:8888 \\
      --trusted-key aops.pub --ca-cert cert.pem
  In a directory of your own, without root and without a service:
    aops install ... --home ~/aops-home --service none
  Update to the gateway's current version, keeping all settings:
    aops install
  Without a network, from a package and its signature:
    aops install ... --package ./aops-spm-0.1.0_linux_amd64.tar.zst

The command can be repeated at any time; running sub-agents keep running.

As root, only root may have write access to the home and to the directories in
it: a home that others can change is rejected, and its sub-agents are not
started. For a directory above the home, a warning is printed.

The proxy of the environment (https_proxy) is saved in etc/conf.toml, for the
manager and all its downloads.";

/// The options of `aops install`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(disable_version_flag = true, after_long_help = EXAMPLES)]
pub struct InstallOptions {
    /// The identity of this host, as assigned by the platform
    ///
    /// Not needed if aops is installed already, or if an installation of the
    /// old platform is imported (--import).
    #[arg(long, value_name = "ID")]
    pub agent_id: Option<AgentId>,

    /// The gateway, such as `https://gateway.example:8888`
    ///
    /// May be repeated: the endpoints are tried in the order given. Not needed
    /// if aops is installed already, or if an installation of the old platform
    /// is imported (--import).
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

    /// A minisign public key that packages must be signed with
    ///
    /// May be repeated. The installer that a gateway serves contains that
    /// gateway's keys. Keys of an existing installation are kept; one of them
    /// that was revoked is trusted again if it is given here.
    #[arg(long, value_name = "FILE")]
    pub trusted_key: Vec<PathBuf>,

    /// Verify the gateway's certificate with the certificates in this PEM file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pin", "insecure"])]
    pub ca_cert: Option<PathBuf>,

    /// Accept only the gateway's certificate with this SHA-256 fingerprint
    ///
    /// May be repeated. `openssl x509 -noout -fingerprint -sha256 -in CERT`
    /// prints it. The fingerprint of the public key is accepted, too.
    #[arg(long, value_name = "SHA256", conflicts_with = "insecure")]
    pub pin: Vec<Fingerprint>,

    /// Do not verify the gateway's certificate, and allow http://
    #[arg(long)]
    pub insecure: bool,

    /// Pin the gateway's certificate at the first contact
    #[arg(long, hide = true)]
    pub pin_first_contact: bool,

    /// The product that this host is part of: hci and scp start aops by their
    /// own start-up script, generic is any other [default: auto, detect it]
    #[arg(long, value_name = "NAME")]
    pub product: Option<String>,

    /// Install offline from this package, with FILE.minisig beside it
    #[arg(long, value_name = "FILE")]
    pub package: Option<PathBuf>,

    /// Import the settings and the agent id from the old platform's
    /// installation in DIR
    ///
    /// Not needed if DIR is the home: an installation there is detected and
    /// replaced.
    #[arg(long, value_name = "DIR", conflicts_with = "fresh")]
    pub import: Option<PathBuf>,

    /// Keep nothing of an existing installation: no settings, keys, sub-agents
    #[arg(long)]
    pub fresh: bool,
}

/// Whether the roles are registered with the host's service manager.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ServiceChoice {
    /// Register if the host has a service manager and the user is root
    #[default]
    Auto,
    /// Do not register: `control start` starts aops, nothing does at boot
    None,
}

/// What an installation takes from its process, besides the arguments.
#[derive(Debug, Clone)]
pub struct ProcessContext {
    /// The home of this executable, else the one that `AOPS_HOME` names. `--home` overrides it.
    pub home: Option<Home>,
    /// The variable `AOPS_PRODUCT`. `--product` overrides it.
    pub product: Option<String>,
    /// This executable. Its trailer may contain keys.
    pub executable: PathBuf,
}
