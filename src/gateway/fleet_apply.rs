//! `gateway fleet apply`: a fleet file is checked, what it changes is shown, and it is put in force at once.
//!
//! It is checked as the running gateway checks it, against what is in force and what is published, before anything is replaced. The file is
//! put in place whole, and so known to be: the gateway does not wait for it to stand still.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::fleet_file::{content_of, parse, read_text};
use super::state::GatewayState;
use super::{GatewayDirectory, depot, hosts};
use crate::core::fleet::{FleetChanges, HostFacts, changes, evaluate};
use crate::output::{message, report};
use crate::store;
use crate::{lock, platform};

/// For a running gateway to take the file: some of its looks, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at how the gateway stands.
const LOOK: Duration = Duration::from_millis(100);

/// What can be done with the fleet file.
#[derive(Debug, clap::Subcommand)]
pub enum FleetCommand {
    /// Check a fleet file, show what it changes, put it in force
    ///
    /// FILE is checked as the gateway checks fleet.toml: a file that is
    /// refused changes nothing. What it changes is shown for the hosts
    /// known now. Then it replaces fleet.toml in one step, and a running
    /// gateway takes it at once. Hosts keep sub-agents that are no longer
    /// listed for removalDelay all the same.
    #[command(verbatim_doc_comment)]
    Apply(ApplyArgs),
}

/// Which file, of which gateway.
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
    let place = GatewayDirectory::initialized(&args.dir)?;
    let shown = args.file.display();
    let text = read_text(&args.file)?.with_context(|| format!("cannot apply {shown}: there is no such file"))?;
    let fleet = parse(&text).with_context(|| format!("cannot apply {shown}"))?;
    let in_force =
        or_nothing(read_text(&place.last_good_fleet()).and_then(|text| text.map(|text| parse(&text)).transpose()));
    let hosts = or_nothing(hosts::load(&place.hosts()).map(Some)).unwrap_or_default();
    let hosts: Vec<HostFacts> = hosts.iter().map(hosts::Record::facts).collect();
    let published = depot::releases(&place.depot())?;
    evaluate(&fleet, in_force.as_ref(), &hosts, |name, version| {
        published.iter().any(|(known, of)| known.as_str() == name && of == version)
    })
    .with_context(|| format!("cannot apply {shown}"))?;

    let FleetChanges { lines, hosts: touched } = changes(in_force.as_ref(), &fleet, &hosts);
    report!("{shown} is good; it changes {touched} of {} hosts", hosts.len());
    for line in lines {
        report!("  {line}");
    }
    let content = content_of(text.as_bytes());
    // First: the gateway may look at any moment.
    // The gateway may run as another user, who can read the file that is replaced.
    let model = if place.fleet().exists() { place.fleet() } else { args.file.clone() };
    store::replace_like(&place.applied_fleet(), format!("{content}\n").as_bytes(), &model)?;
    store::replace_like(&place.fleet(), text.as_bytes(), &model)?;
    if !lock::is_held(&place.lock()) {
        report!("fleet.toml is replaced; it is in force when the gateway runs");
        return Ok(());
    }
    let generation = taken(&place, &content)?;
    report!("in force, as generation {generation}");
    Ok(())
}

/// What the gateway keeps for itself; where it cannot be read, the gateway does without it, and its status says so.
fn or_nothing<T>(kept: Result<Option<T>>) -> Option<T> {
    kept.unwrap_or_else(|error| {
        message!("warning: the changes are shown without what is in force now, which cannot be read: {error:#}");
        None
    })
}

/// Waits until the running gateway has the file in force, and gives its generation.
fn taken(place: &GatewayDirectory, content: &str) -> Result<u64> {
    let started = Instant::now();
    loop {
        let fleet = store::load::<GatewayState>(&place.standing()).ok().flatten().map(|state| state.fleet);
        let error = match fleet {
            Some(fleet) if fleet.content.as_deref() == Some(content) && fleet.error.is_none() => {
                return fleet.generation.context("the gateway does not say which generation it is");
            }
            Some(fleet) => fleet.error,
            None => None,
        };
        if started.elapsed() > PATIENCE {
            let why = error.unwrap_or_else(|| {
                format!("it did not load the file within {PATIENCE:?}; see its log and `aops gateway status`")
            });
            bail!("fleet.toml is replaced, but the running gateway has not put it in force: {why}");
        }
        platform::pause(LOOK);
    }
}
