//! Starts a sub-agent's program with its directory, environment, log and record.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};

use super::record::{ProcessRecord, RecordHead};
use crate::command;
use crate::config;
use crate::core::env::Env;
use crate::core::manifest::{self, CONTROL_SCRIPT, KillMode, MANIFEST, Manifest};
use crate::core::model::{AgentId, AgentName, Version};
use crate::core::order::Spec;
use crate::core::program::Program;
use crate::core::text::hex;
use crate::home::Home;
use crate::installation::permissions;
use crate::platform::{self, Child, Group, Groups, Launch, ProcessInfo};
use crate::store;

/// A larger manifest is rejected.
const MAX_MANIFEST_BYTES: u64 = 256 << 10;

/// Reads from a release's directory how to run it.
pub fn inspect(home: &Home, name: &AgentName, version: &Version) -> Result<Program> {
    let directory = home.release(name, version);
    let path = directory.join(MANIFEST);
    let Some(bytes) = store::read(&path, MAX_MANIFEST_BYTES)? else {
        if platform::find_program(directory.join(CONTROL_SCRIPT)).is_file() {
            return Ok(Program::Script);
        }
        bail!(
            "cannot run {name} {version}: its package has neither {MANIFEST} nor an executable {CONTROL_SCRIPT} at its root"
        );
    };
    let text = String::from_utf8(bytes).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))?;
    let manifest =
        parse(&text).with_context(|| format!("cannot use {MANIFEST} of {name} {version}; publish a fixed package"))?;
    if manifest.name != *name || manifest.version != *version {
        bail!(
            "cannot run {name} {version}: its {MANIFEST} is for {} {}; publish a fixed package",
            manifest.name,
            manifest.version
        );
    }
    Ok(Program::Native(Box::new(manifest)))
}

/// Parses an `agent.toml`.
pub fn parse(text: &str) -> Result<Manifest> {
    let manifest: Manifest =
        toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", config::wrong_line(text, &error)))?;
    manifest.check().map_err(anyhow::Error::msg)?;
    Ok(manifest)
}

/// The file for a sub-agent's output.
#[derive(Debug)]
pub struct OutputTarget {
    pub file: File,
    /// Why the output is lost instead of written to the log.
    pub lost: Option<String>,
}

/// Everything that a start needs.
#[derive(Debug, Clone)]
pub struct StartSpec {
    pub home: Home,
    pub name: AgentName,
    pub version: Version,
    pub program: Program,
    /// As ordered by the gateway, including variables that may not be set.
    pub spec: Spec,
    pub agent_id: AgentId,
    pub endpoint: String,
    pub restarts: u64,
    /// The location of groups, if the host has one.
    pub groups: Option<Groups>,
}

impl StartSpec {
    pub fn directory(&self) -> PathBuf {
        self.home.release(&self.name, &self.version)
    }

    /// The sub-agent's group; `None`: this host has no groups.
    pub fn group(&self) -> Option<Group> {
        let groups = self.groups.as_ref()?;
        Some(match self.program.kill_mode() {
            KillMode::Tree => groups.group(self.name.as_str()),
            KillMode::Process => groups.main_only(self.name.as_str()),
        })
    }

    /// The name of the group that a child started in.
    pub fn entered(&self, launch: &Launch, child: &Child) -> Option<String> {
        let group = launch.group.as_ref()?.name();
        if !child.grouped {
            tracing::warn!(agent = %self.name, group, "cannot start a sub-agent in its cgroup; its processes are found by session and environment marker");
        }
        child.grouped.then_some(group)
    }

    /// The record of a process that was found.
    pub fn record_of(&self, process: &ProcessInfo) -> ProcessRecord {
        let group = self.group().filter(|group| group.members().is_ok_and(|members| members.contains(&process.pid)));
        let group = group.map(|group| group.name());
        let ProcessInfo { pid, start_time, .. } = *process;
        ProcessRecord { head: self.head(), pid, start_time, group, session: None, ended: None }
    }

    pub fn head(&self) -> RecordHead {
        RecordHead {
            format: 1,
            name: self.name.clone(),
            version: self.version.clone(),
            kind: self.program.kind(),
            env_hash: env_hash(&self.spec.env),
            restarts: self.restarts,
            stop_signal: self.program.stop_signal(),
            grace_seconds: self.program.grace().as_secs(),
            kill_mode: self.program.kill_mode(),
            boot_id: platform::boot_id().to_owned(),
            unseen: false,
        }
    }

    /// Opens the sub-agent's log for appending. A log that cannot be opened (a read-only or full disk) does not prevent the start.
    pub fn output(&self) -> Result<OutputTarget> {
        let log = self.home.agent_log(&self.name);
        let error = match OpenOptions::new().create(true).append(true).open(&log) {
            Ok(file) => return Ok(OutputTarget { file, lost: None }),
            Err(error) => error,
        };
        let why = format!("cannot open the log {}", log.display());
        if platform::is_shortage(&error) {
            // A retry may succeed.
            return Err(error).context(why);
        }
        let file = platform::open_null().context("cannot open the null device")?;
        Ok(OutputTarget { file, lost: Some(format!("{why}: {error}")) })
    }

    /// A command that runs a program of this release with its environment, and with its output in the sub-agent's log.
    pub fn command_with_output(&self, program: &str, user: Option<&platform::User>) -> Result<Command> {
        let output = self.output()?.file;
        let errors = output.try_clone().context("cannot duplicate the handle of the log for the error output")?;
        let mut command = self.prepared(program, user)?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        Ok(command)
    }

    /// Fails if another user can replace this release. Applies to a start only: a running process is not affected.
    pub fn check_permissions(&self) -> Result<()> {
        permissions::programs(&self.home, &self.name)
    }

    /// A command that starts the sub-agent: a program of this release with its environment, and with our own streams. Logs what another
    /// user can change in the release.
    pub fn command(&self, program: &str, user: Option<&platform::User>) -> Result<Command> {
        let command = self.prepared(program, user)?;
        if let Err(error) = permissions::program(&self.home, &self.name, &self.version, program) {
            tracing::warn!(agent = %self.name, error = format!("{error:#}"), "another user can change the program of a sub-agent");
        }
        Ok(command)
    }

    /// Fails if another user can replace this release.
    fn prepared(&self, program: &str, user: Option<&platform::User>) -> Result<Command> {
        self.check_permissions()?;
        let mut command = Command::new(platform::find_program(self.directory().join(program)));
        command.current_dir(self.directory()).env_clear();
        command.envs(platform::base_environment(user));
        if let Program::Native(manifest) = &self.program {
            command.envs(&manifest.env);
        }
        command.envs(manifest::admit_env(&self.spec.env, self.program.env_allow()).0);
        command
            .env("AOPS_HOME", self.home.public_path())
            .env("AOPS_AGENT_NAME", self.name.as_str())
            .env("AOPS_AGENT_VERSION", self.version.as_str())
            .env("AOPS_AGENT_ID", self.agent_id.as_str())
            .env("AOPS_ENDPOINT", &self.endpoint);
        if self.program.kill_mode() == KillMode::Process {
            command.env(platform::MAIN_ONLY, "process");
        }
        Ok(command)
    }
}

/// SHA-256 over the gateway's variables, each as `name=value` and a zero byte, in order. For this host's own records, which are private.
pub fn env_hash(env: &Env) -> String {
    hash(&[], env)
}

/// As [`env_hash`], for heartbeats: prefixed by the agent id and the instance id, each with a zero byte. So the hash cannot be looked up in
/// a list of hashes, and two hosts with the same variables have different hashes. With both ids known, values can still be guessed one by
/// one.
pub fn reported_env_hash(agent_id: &AgentId, instance_id: &str, env: &Env) -> String {
    hash(&[agent_id.as_str(), instance_id], env)
}

fn hash(salt: &[&str], env: &Env) -> String {
    let mut hash = Sha256::new();
    for word in salt {
        hash.update(format!("{word}\0"));
    }
    for (name, value) in env {
        hash.update(format!("{name}={}\0", value.reveal()));
    }
    hex(&hash.finalize())
}

/// Starts a native sub-agent in its group, with its output to `output`. Its record is written before its program runs.
pub async fn start_native(start: &StartSpec, manifest: &Manifest, output: File) -> Result<(Child, ProcessRecord)> {
    let Some((program, arguments)) = manifest.run.command.split_first() else { bail!("its command is empty") };
    let user = match &manifest.run.user {
        Some(name) => Some(platform::find_user(name).with_context(|| format!("cannot run as user {name:?}"))?),
        None => None,
    };
    let head = start.head();
    let mut command = start.command(program, user.as_ref())?;
    command.args(arguments);
    if let Some(workdir) = &manifest.run.workdir {
        command.current_dir(start.directory().join(workdir));
    }
    let launch = Launch {
        record: start.home.process_record(&start.name),
        head: head.text_before_pid()?,
        user,
        output,
        group: start.group(),
    };
    let child = match command::unless_busy(|| platform::launch(&command, &launch)).await {
        Ok(child) => child,
        Err(error) => {
            return Err(error).with_context(|| format!("cannot run {}", start.directory().join(program).display()));
        }
    };
    let group = start.entered(&launch, &child);
    let record =
        ProcessRecord { head, pid: child.pid, start_time: child.start_time, group, session: None, ended: None };
    Ok((child, record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::env::EnvValue;
    use crate::core::protocol::document;

    #[test]
    fn the_reported_hash_matches_the_test_vector_of_the_document() {
        let secret = EnvValue::Secret { secret: "s3cret".to_owned() };
        let env = Env::from([("TOKEN".to_owned(), secret), ("GOGC".to_owned(), "50".into())]);
        let instance_id = "6f0d3c5e-2f0a-4b58-9c0e-0a7b1d1f7a11";
        let hash = reported_env_hash(&"5402".parse().unwrap(), instance_id, &env);
        assert_eq!(hash, "dbefcb8cef3e62eb289a782bf320899521f00777a35fba795631949877974db5");
        assert!(document().contains(&hash) && document().contains(instance_id));
        // Another host has another hash, and the hash of the record differs too.
        assert_ne!(hash, reported_env_hash(&"5403".parse().unwrap(), instance_id, &env));
        assert_ne!(hash, env_hash(&env));
    }
}
