//! `gateway fleet apply`: validates a fleet file, shows its changes, and puts it into effect at once.
//!
//! The file passes the same validation as in the running gateway, against the active fleet and the published packages, before anything is
//! replaced. It is written atomically and its hash recorded, so the gateway loads it without waiting for further changes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::fleet_file::{content_hash, parse, read_text};
use super::state::GatewayState;
use super::{GatewayDirectory, depot, hosts};
use crate::core::fleet::{FleetChanges, HostFacts, changes, evaluate};
use crate::output::{message, report};
use crate::store;
use crate::{lock, platform};

/// The timeout for a running gateway to load the file: several of its polls, on a busy machine.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// The interval between two checks of the gateway's state.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The subcommands of `gateway fleet`.
#[derive(Debug, clap::Subcommand)]
pub enum FleetCommand {
    /// Check a fleet file, show its changes, apply it
    ///
    /// FILE is validated like fleet.toml: a rejected file changes nothing.
    /// The command shows the changes for the hosts known now, replaces
    /// fleet.toml atomically, and waits until a running gateway has loaded
    /// it. A sub-agent that is no longer listed stays on its hosts until
    /// removalDelay has passed.
    #[command(verbatim_doc_comment)]
    Apply(ApplyArgs),
}

/// The arguments of `gateway fleet apply`.
#[derive(Debug, clap::Args)]
pub struct ApplyArgs {
    /// The gateway's directory
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The new fleet.toml
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(super) fn run(command: &FleetCommand) -> Result<()> {
    let FleetCommand::Apply(args) = command;
    let directory = GatewayDirectory::initialized(&args.dir)?;
    let shown = args.file.display();
    let text = read_text(&args.file)?.with_context(|| format!("cannot apply {shown}: the file does not exist"))?;
    let fleet = parse(&text).with_context(|| format!("cannot apply {shown}"))?;
    let in_force =
        or_warning(read_text(&directory.last_good_fleet()).and_then(|text| text.map(|text| parse(&text)).transpose()));
    let hosts = or_warning(hosts::load(&directory.hosts()).map(Some)).unwrap_or_default();
    let hosts: Vec<HostFacts> = hosts.iter().map(hosts::Record::facts).collect();
    let published = depot::releases(&directory.depot())?;
    evaluate(&fleet, in_force.as_ref(), &hosts, |name, version| {
        published.iter().any(|(known, of)| known.as_str() == name && of == version)
    })
    .with_context(|| format!("cannot apply {shown}"))?;

    let FleetChanges { lines, hosts: changed } = changes(in_force.as_ref(), &fleet, &hosts);
    report!("{shown} is valid; it changes {changed} of {} hosts", hosts.len());
    for line in lines {
        report!("  {line}");
    }
    let content = content_hash(text.as_bytes());
    // The hash first: the gateway may poll at any moment. The owner and mode of the replaced file: the gateway may run as another user.
    let model = if directory.fleet().exists() { directory.fleet() } else { args.file.clone() };
    store::replace_like(&directory.applied_fleet(), format!("{content}\n").as_bytes(), &model)?;
    store::replace_like(&directory.fleet(), text.as_bytes(), &model)?;
    if !lock::is_held(&directory.lock()) {
        report!("fleet.toml is replaced; it comes into force when the gateway runs");
        return Ok(());
    }
    let generation = wait_until_loaded(&directory, &content)?;
    report!("in effect, as generation {generation}");
    Ok(())
}

/// The content of one of the gateway's state files; an unreadable file is a warning, as for the gateway itself.
fn or_warning<T>(loaded: Result<Option<T>>) -> Option<T> {
    loaded.unwrap_or_else(|error| {
        message!("warning: cannot read the gateway's state, so the changes shown are incomplete: {error:#}");
        None
    })
}

/// Waits until the running gateway has put the file into effect, and returns its generation.
fn wait_until_loaded(directory: &GatewayDirectory, content: &str) -> Result<u64> {
    let started = Instant::now();
    loop {
        let fleet = store::load::<GatewayState>(&directory.state_file()).ok().flatten().map(|state| state.fleet);
        let error = match fleet {
            Some(fleet) if fleet.content.as_deref() == Some(content) && fleet.error.is_none() => {
                return fleet.generation.context("the gateway does not report the generation");
            }
            Some(fleet) => fleet.error,
            None => None,
        };
        if started.elapsed() > LOAD_TIMEOUT {
            let why = error.unwrap_or_else(|| {
                format!("it has not loaded the file within {LOAD_TIMEOUT:?}; see its log and `aops gateway status`")
            });
            bail!("fleet.toml is replaced, but the running gateway has not put it into effect: {why}");
        }
        platform::pause(POLL_INTERVAL);
    }
}
