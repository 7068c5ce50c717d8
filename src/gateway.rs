//! The gateway, the server side on one machine: serves packages, answers heartbeats, and holds the fleet's desired state.
//!
//! All its data is in one directory: the operator's `fleet.toml`, the private keys (`keys/`, `tls/`), the packages on offer (`depot/`), and
//! the gateway's own files (`state/`). Hosts accept only packages with a valid signature: the gateway is not a root of trust.
//!
//! Hosts do not authenticate: an agent id is a name, not a password. Any client that can reach the gateway and knows an agent id can read
//! that host's desired state, secret values included, and can report in its name. It cannot change the desired state of other hosts. A proof of
//! identity in the protocol would not help: a gateway of another vendor could ignore it and send the secrets all the same. The network must
//! let only hosts reach the gateway.
//!
//! ```text
//! <dir>/keys/aops.pub, aops.key     the signing key; further *.pub are trusted too and go into the bootstrap
//!       tls/cert.pem, key.pem       the certificate; hosts pin its public key or trust its issuer
//!           next.pem                the next public keys, announced to hosts
//!       depot/                      <name>-<version>_<os>_<arch>.<packing>, each with .minisig; and the bootstrap executables
//!       fleet.toml                  the desired state, edited by the operator
//!       state/fleet.toml            the last good fleet.toml
//!             fleet-applied         the hash of the fleet.toml that `fleet apply` wrote
//!             lineage               the id of the store that counts the generations
//!             hosts.json            the last report of every host, and the generation sent to it
//!             gateway.json          the state of the running gateway
//!             gateway.lock          held by the running gateway
//!             publish.lock          held while a package is published
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

/// The subcommands of `aops gateway`.
#[derive(Debug, clap::Subcommand)]
pub enum GatewayCommand {
    /// Create the files of a gateway; existing files are kept
    ///
    /// Creates a signing key, a certificate, an empty depot, and a
    /// fleet.toml with examples. Prints the next commands.
    #[command(verbatim_doc_comment)]
    Init(init::InitArgs),
    /// Sign a package and add it to the depot
    ///
    /// The package of a sub-agent has an agent.toml, or an executable
    /// `control`, at its root. A published package never changes: other
    /// content needs another version.
    ///
    /// To keep the private key off the gateway, sign on another machine:
    /// publish accepts an archive with PATH.minisig beside it, and then
    /// needs keys/aops.pub only.
    #[command(verbatim_doc_comment)]
    Publish(publish::PublishArgs),
    /// Check a fleet file and apply it
    #[command(subcommand)]
    Fleet(fleet_apply::FleetCommand),
    /// Serve the depot and answer heartbeats until stopped
    ///
    /// Prints `listening on https://HOST:PORT` when ready. Changes to keys/,
    /// depot/, fleet.toml and tls/ are loaded automatically; fleet.toml and
    /// tls/ two seconds after their last change, or at once upon SIGHUP.
    /// `aops gateway status` shows files that cannot be used. Their previous
    /// content stays in use, and other files are not affected.
    ///
    /// A host that pins the gateway remembers the public key, not the
    /// certificate: it accepts a renewed certificate if the key is the same.
    /// To change the key, put the new key (private or public) or a certificate
    /// for it into tls/next.pem (PEM; at most three): the gateway announces
    /// its public key to hosts. When `aops gateway status` shows no host that
    /// lacks it, replace tls/cert.pem and tls/key.pem, then remove
    /// tls/next.pem.
    ///
    /// Hosts authenticate the gateway, but do not authenticate to it: any
    /// client that can reach the gateway and knows an agent id can read that
    /// host's desired state, secrets in `env` included, and can report in
    /// its name. Let only hosts reach the gateway.
    ///
    /// A secret value (env.TOKEN = { secret = "..." } in fleet.toml) is shown
    /// in no status, log, event or error. It is stored unencrypted in files
    /// that only their owner can read, here and on the host, where root can
    /// read it too. It is encrypted in transit to a host that verifies the
    /// gateway's certificate. Give each sub-agent secrets that grant no more
    /// than it needs.
    #[command(verbatim_doc_comment)]
    Run(serve::RunArgs),
    /// Print the JSON Schema of the protocol
    Schema,
    /// Show the hosts, their sub-agents and the gateway's problems
    Status(status::StatusArgs),
}

/// Runs one subcommand.
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

/// The gateway's directory, and the paths of all its files.
#[derive(Debug, Clone)]
struct GatewayDirectory {
    root: PathBuf,
}

impl GatewayDirectory {
    /// A directory that may be empty or missing.
    fn new(root: &Path) -> GatewayDirectory {
        GatewayDirectory { root: root.to_owned() }
    }

    /// A directory that `gateway init` has created; any other one is an error.
    fn initialized(root: &Path) -> Result<GatewayDirectory> {
        let directory = GatewayDirectory::new(root);
        if !root.is_dir() {
            bail!(
                "cannot find the gateway's directory {0}; create it with `aops gateway init --dir {0}`",
                root.display()
            );
        }
        // One is enough: a missing part, such as a disk that is not mounted, is reported as a problem of that part.
        let parts = [directory.depot(), directory.keys(), directory.tls(), directory.fleet()];
        if !parts.iter().any(|part| part.exists()) {
            bail!("cannot find a gateway in {0}; create one with `aops gateway init --dir {0}`", root.display());
        }
        Ok(directory)
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

    /// The next keys: certificates, public keys or private keys.
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

    /// SHA-256 of the fleet file that `gateway fleet apply` wrote.
    fn applied_fleet(&self) -> PathBuf {
        self.state().join("fleet-applied")
    }

    fn lineage(&self) -> PathBuf {
        self.state().join("lineage")
    }

    fn hosts(&self) -> PathBuf {
        self.state().join("hosts.json")
    }

    fn state_file(&self) -> PathBuf {
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

/// The current time in Unix milliseconds, for generations and display only: the wall clock may step backward.
fn now_millis() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)
}
