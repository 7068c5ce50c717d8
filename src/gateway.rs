//! The gateway: serves packages, answers heartbeats, and holds the fleet's desired state; the server side on one machine.
//!
//! Its directory is all that it has: what an operator edits (`fleet.toml`), what he guards (`keys/`, `tls/`), what is offered (`depot/`), and
//! what it writes itself (`state/`). It commands hosts only within what the depot's signatures say: it is no root of trust.
//!
//! Hosts do not prove who they are: an agent id is a name, not a password. Whoever can reach the gateway and knows one is told what that host
//! is told, secret values included, and can report in its name; what others are told he cannot change. The protocol has no room for a proof
//! that the gateways of others could ignore without giving the secret away all the same, so it is the network's to let only hosts in.
//!
//! ```text
//! <dir>/keys/aops.pub, aops.key     the signing key; further *.pub are trusted too and go into the bootstrap
//!       tls/cert.pem, key.pem       the certificate, whose public key hosts pin, or whose issuer they trust
//!           next.pem                the public keys that come next, announced to hosts
//!       depot/                      <name>-<version>_<os>_<arch>.<packing>, each with .minisig; and the bootstrap executables
//!       fleet.toml                  the desired state, the operator's
//!       state/fleet.toml            the last good one
//!             fleet-applied         which fleet.toml was put in place whole
//!             lineage               names the store that counts the generations
//!             hosts.json            what every host said last, and what it was told
//!             gateway.json          how the running gateway stands
//!             gateway.lock          held by the running gateway
//!             publish.lock          held while something is published
//! ```

mod archive;
mod bootstrap;
mod certificate;
mod depot;
mod download;
mod fleet_apply;
mod fleet_file;
mod hosts;
mod http_error;
mod init;
mod keyring;
mod parts;
mod publish;
mod routes;
mod schema;
mod serve;
mod settle;
mod shared;
mod state;
mod status;
#[cfg(test)]
mod tests;
mod watch;
mod write_behind;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::logging;

/// What the gateway can be asked to do.
#[derive(Debug, clap::Subcommand)]
pub enum GatewayCommand {
    /// Make what a gateway needs; what is there already is kept
    ///
    /// A signing key, a certificate, an empty depot, and a fleet.toml
    /// with examples. Prints what to do next.
    #[command(verbatim_doc_comment)]
    Init(init::InitArgs),
    /// Sign a package and put it into the depot
    ///
    /// A sub-agent's package has an agent.toml, or an executable `control`,
    /// at its root. What is published never changes: another content needs
    /// another version.
    #[command(verbatim_doc_comment)]
    Publish(publish::PublishArgs),
    /// Check a fleet file and put it in force
    #[command(subcommand)]
    Fleet(fleet_apply::FleetCommand),
    /// Serve the depot and answer heartbeats until stopped
    ///
    /// Prints `listening on https://HOST:PORT` when ready. keys/, depot/,
    /// fleet.toml and tls/ are read again when they have changed; fleet.toml
    /// and tls/ once they have stood still for two seconds, or at once upon
    /// SIGHUP. What cannot be used is shown by `aops gateway status`, what
    /// was good before stays in use, and the other parts are not affected.
    ///
    /// Hosts that pin the certificate pin its public key: renew it with the
    /// same key. For another key, put that key, or a certificate for it,
    /// into tls/next.pem (PEM; three at most): it is announced to hosts.
    /// Replace tls/cert.pem and tls/key.pem when `aops gateway status` shows
    /// no host that lacks it, then remove tls/next.pem.
    ///
    /// Hosts check who the gateway is, but do not prove who they are:
    /// whoever can reach the gateway and knows an agent id is told what
    /// that host is told, secrets in `env` included, and can report in its
    /// name. Let nobody but hosts reach it.
    #[command(verbatim_doc_comment)]
    Run(serve::RunArgs),
    /// Print the JSON Schema of the protocol
    Schema,
    /// Show the hosts, what they run, and how fleet.toml stands
    Status(status::StatusArgs),
}

/// Carries out one command.
pub fn main(command: GatewayCommand) -> Result<ExitCode> {
    match command {
        GatewayCommand::Init(args) => init::run(&args)?,
        GatewayCommand::Publish(args) => publish::run(&args)?,
        GatewayCommand::Fleet(command) => fleet_apply::run(&command)?,
        GatewayCommand::Run(args) => {
            logging::to_stderr();
            serve::run(&args)?;
        }
        GatewayCommand::Schema => schema::print()?,
        GatewayCommand::Status(args) => status::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A gateway's directory: every path of it comes from here.
#[derive(Debug, Clone)]
struct GatewayDirectory {
    root: PathBuf,
}

impl GatewayDirectory {
    /// A directory that may have nothing in it yet.
    fn new(root: &Path) -> GatewayDirectory {
        GatewayDirectory { root: root.to_owned() }
    }

    /// A directory that `init` has been at.
    fn initialized(root: &Path) -> Result<GatewayDirectory> {
        let place = GatewayDirectory::new(root);
        if !root.is_dir() {
            bail!(
                "cannot find the gateway's directory {0}; make it with `aops gateway init --dir {0}`",
                root.display()
            );
        }
        // Any of them: one that is missing, as on a disk that is not mounted, is a problem of its own part.
        let parts = [place.depot(), place.keys(), place.tls(), place.fleet()];
        if !parts.iter().any(|part| part.exists()) {
            bail!("cannot find a gateway in {0}; make one with `aops gateway init --dir {0}`", root.display());
        }
        Ok(place)
    }

    fn keys(&self) -> PathBuf {
        self.root.join("keys")
    }

    fn public_key(&self) -> PathBuf {
        self.keys().join("aops.pub")
    }

    fn signing_key(&self) -> PathBuf {
        self.keys().join("aops.key")
    }

    fn tls(&self) -> PathBuf {
        self.root.join("tls")
    }

    fn certificate(&self) -> PathBuf {
        self.tls().join("cert.pem")
    }

    fn certificate_key(&self) -> PathBuf {
        self.tls().join("key.pem")
    }

    /// The keys that come next: certificates, public keys or private keys.
    fn next_certificate(&self) -> PathBuf {
        self.tls().join("next.pem")
    }

    fn depot(&self) -> PathBuf {
        self.root.join("depot")
    }

    fn fleet(&self) -> PathBuf {
        self.root.join("fleet.toml")
    }

    fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    fn last_good_fleet(&self) -> PathBuf {
        self.state().join("fleet.toml")
    }

    /// SHA-256 of the fleet file that `gateway fleet apply` put in place whole.
    fn applied_fleet(&self) -> PathBuf {
        self.state().join("fleet-applied")
    }

    fn lineage(&self) -> PathBuf {
        self.state().join("lineage")
    }

    fn hosts(&self) -> PathBuf {
        self.state().join("hosts.json")
    }

    fn standing(&self) -> PathBuf {
        self.state().join("gateway.json")
    }

    fn lock(&self) -> PathBuf {
        self.state().join("gateway.lock")
    }

    fn publish_lock(&self) -> PathBuf {
        self.state().join("publish.lock")
    }

    /// The directories with their Unix modes.
    fn directories(&self) -> Vec<(PathBuf, u32)> {
        vec![
            (self.root.clone(), 0o755),
            (self.keys(), 0o700),
            (self.tls(), 0o700),
            (self.depot(), 0o755),
            (self.state(), 0o700),
        ]
    }
}

/// Unix milliseconds now. For generations and display: the wall clock may step backward.
fn now_millis() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)
}
