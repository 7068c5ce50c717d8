//! Starts a sub-agent's program: its directory, its environment, its log, its record.

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

/// A manifest is refused beyond this.
const MAX_MANIFEST_BYTES: u64 = 256 << 10;

/// What a release's directory says about how it is run.
pub fn inspect(home: &Home, name: &AgentName, version: &Version) -> Result<Program> {
    let directory = home.release(name, version);
    let path = directory.join(MANIFEST);
    let Some(bytes) = store::read(&path, MAX_MANIFEST_BYTES)? else {
        if directory.join(CONTROL_SCRIPT).is_file() {
            return Ok(Program::Script);
        }
        bail!(
            "cannot run {name} {version}: its package has neither {MANIFEST} nor an executable {CONTROL_SCRIPT} at its root"
        );
    };
    let text = String::from_utf8(bytes).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))?;
    let manifest =
        parse(&text).with_context(|| format!("cannot use {MANIFEST} of {name} {version}; publish a mended package"))?;
    if manifest.name != *name || manifest.version != *version {
        bail!("cannot run {name} {version}: its {MANIFEST} says that it is {} {}", manifest.name, manifest.version);
    }
    Ok(Program::Native(Box::new(manifest)))
}

/// Reads the text of an `agent.toml`.
pub fn parse(text: &str) -> Result<Manifest> {
    let manifest: Manifest =
        toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", config::wrong_line(text, &error)))?;
    manifest.check().map_err(anyhow::Error::msg)?;
    Ok(manifest)
}

/// Where a sub-agent's output goes.
#[derive(Debug)]
pub struct OutputTarget {
    pub file: File,
    /// Why it does not go into its log, and is lost.
    pub lost: Option<String>,
}

/// All that a start needs to know.
#[derive(Debug, Clone)]
pub struct StartSpec {
    pub home: Home,
    pub name: AgentName,
    pub version: Version,
    pub program: Program,
    /// As the gateway ordered it, with variables that may not be set.
    pub spec: Spec,
    pub agent_id: AgentId,
    pub endpoint: String,
    pub restarts: u64,
    /// Where its process tree is held together.
    pub groups: Option<Groups>,
}

impl StartSpec {
    pub fn directory(&self) -> PathBuf {
        self.home.release(&self.name, &self.version)
    }

    /// The sub-agent's group; `None` where none can be had.
    pub fn group(&self) -> Option<Group> {
        let groups = self.groups.as_ref()?;
        Some(match self.program.kill_mode() {
            KillMode::Tree => groups.group(self.name.as_str()),
            KillMode::Process => groups.apart(self.name.as_str()),
        })
    }

    /// The name of the group that a child began in.
    pub fn entered(&self, launch: &Launch, child: &Child) -> Option<String> {
        let group = launch.group.as_ref()?.name();
        if !child.grouped {
            tracing::warn!(agent = %self.name, group, "a sub-agent's group cannot be entered; session and mark stand in");
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

    /// The sub-agent's log, to be written behind what is there. A log that cannot be opened (on a read-only disk, or a full one) keeps nothing
    /// from being started.
    pub fn output(&self) -> Result<OutputTarget> {
        let log = self.home.agent_log(&self.name);
        let error = match OpenOptions::new().create(true).append(true).open(&log) {
            Ok(file) => return Ok(OutputTarget { file, lost: None }),
            Err(error) => error,
        };
        let why = format!("cannot open the log {}", log.display());
        if platform::is_shortage(&error) {
            // The next try may find what is missing now.
            return Err(error).context(why);
        }
        let file = platform::open_null().context("cannot open the null device")?;
        Ok(OutputTarget { file, lost: Some(format!("{why}: {error}")) })
    }

    /// A command that runs a program of this release with its environment, its output in the sub-agent's log.
    pub fn command_with_output(&self, program: &str, user: Option<&platform::User>) -> Result<Command> {
        let output = self.output()?.file;
        let errors = output.try_clone().context("cannot open the log twice")?;
        let mut command = self.prepared(program, user)?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        Ok(command)
    }

    /// Whether it may be started: nobody else can put another release in the place of this one. What runs already is none the worse for it.
    pub fn sound(&self) -> Result<()> {
        permissions::programs(&self.home, &self.name)
    }

    /// A command that starts the sub-agent, by a program of this release with its environment, and with our own streams. Told is what
    /// somebody else could change in the release.
    pub fn command(&self, program: &str, user: Option<&platform::User>) -> Result<Command> {
        let command = self.prepared(program, user)?;
        if let Err(error) = permissions::program(&self.home, &self.name, &self.version, program) {
            tracing::warn!(agent = %self.name, error = format!("{error:#}"), "somebody else could change what is started");
        }
        Ok(command)
    }

    /// Refused where somebody else could put another release in the place of this one.
    fn prepared(&self, program: &str, user: Option<&platform::User>) -> Result<Command> {
        self.sound()?;
        let mut command = Command::new(self.directory().join(program));
        command.current_dir(self.directory()).env_clear();
        command.envs(platform::base_environment(user));
        if let Program::Native(manifest) = &self.program {
            command.envs(&manifest.env);
        }
        command.envs(manifest::admit_env(&self.spec.env, self.program.env_allow()).0);
        command
            .env("AOPS_HOME", self.home.known_as())
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

/// SHA-256 over a gateway's variables, each as `name=value` and a zero byte, in order. For this host's own records, which are private.
pub fn env_hash(env: &Env) -> String {
    hash(&[], env)
}

/// As [`env_hash`], as heartbeats tell it: behind the agent id and the instance id, each with a zero byte. What one host was told cannot be
/// looked up in a list of hashes, and two hosts that were told the same do not show it. Who knows both ids can still try values one by one.
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

/// Starts a native sub-agent in its group, its output into `output`. Its record is in place when its program runs.
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
    fn the_hash_in_a_heartbeat_is_that_of_the_documents_test_vector() {
        let secret = EnvValue::Secret { secret: "s3cret".to_owned() };
        let env = Env::from([("TOKEN".to_owned(), secret), ("GOGC".to_owned(), "50".into())]);
        let instance_id = "6f0d3c5e-2f0a-4b58-9c0e-0a7b1d1f7a11";
        let hash = reported_env_hash(&"5402".parse().unwrap(), instance_id, &env);
        assert_eq!(hash, "dbefcb8cef3e62eb289a782bf320899521f00777a35fba795631949877974db5");
        assert!(document().contains(&hash) && document().contains(instance_id));
        // Another host, another hash; and it is not the one that is compared here.
        assert_ne!(hash, reported_env_hash(&"5403".parse().unwrap(), instance_id, &env));
        assert_ne!(hash, env_hash(&env));
    }
}
