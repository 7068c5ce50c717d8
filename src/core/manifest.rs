//! `agent.toml`: what a native sub-agent's package says about itself.
//!
//! Unknown keys are refused, so that a package that relies on something this version does not do is not run as if it did.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::env::{Env, MAX_NAME_BYTES};
use super::health::HealthSpec;
use super::model::{AgentName, Version};
use super::paths::stays_inside;
use super::units::Span;

/// The file's name, at the root of a package.
pub const MANIFEST: &str = "agent.toml";
/// The executable at the root of a package of the older kind: `start`, `stop`, `status`, perhaps `pid`.
pub const CONTROL_SCRIPT: &str = "control";

const DEFAULT_GRACE: Duration = Duration::from_secs(10);
/// The stop of a whole home waits for the slowest sub-agent, and the shutdown of the host for that.
const LONGEST_GRACE: Duration = Duration::from_secs(600);
/// An upgrade comes to its end within a quarter of an hour.
const LONGEST_PROBATION: Duration = Duration::from_secs(600);

/// A native sub-agent's manifest.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Manifest {
    pub name: AgentName,
    pub version: Version,
    pub run: RunSection,
    /// Absent: that its process runs is all that is asked of it.
    #[serde(default)]
    pub health: Option<HealthSpec>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// How the sub-agent is run and stopped.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RunSection {
    /// The program, relative to the release's directory, and its arguments.
    pub command: Vec<String>,
    /// Whom it runs as; absent: whoever the manager runs as.
    #[serde(default)]
    pub user: Option<String>,
    /// Relative to the release's directory; absent: that directory.
    #[serde(default)]
    pub workdir: Option<String>,
    #[serde(default)]
    pub stop_signal: StopSignal,
    /// From the stop signal to the kill.
    #[serde(default)]
    pub grace_period: Option<Span>,
    #[serde(default)]
    pub restart: Restart,
    #[serde(default)]
    pub kill_mode: KillMode,
    /// A new release has to run for so long before it is committed.
    #[serde(default)]
    pub probation: Option<Span>,
    /// Variables that the gateway may set although they are refused otherwise.
    #[serde(default)]
    pub env_allow: Vec<String>,
}

impl RunSection {
    pub fn grace(&self) -> Duration {
        self.grace_period.map_or(DEFAULT_GRACE, |span| span.0)
    }
}

impl Manifest {
    /// What serde cannot say: the command is there and stays inside the release.
    pub fn check(&self) -> Result<(), String> {
        let Some(program) = self.run.command.first() else {
            return Err("[run] command is empty: give the program, relative to the package, and its arguments".into());
        };
        for (key, path) in [("command", Some(program)), ("workdir", self.run.workdir.as_ref())] {
            if let Some(path) = path
                && !stays_inside(path)
            {
                return Err(format!("[run] {key} {path:?} is not a path inside the package"));
            }
        }
        if self.run.grace() > LONGEST_GRACE {
            return Err(format!("[run] gracePeriod is longer than {} minutes", LONGEST_GRACE.as_secs() / 60));
        }
        if self.run.probation.is_some_and(|probation| probation.0 > LONGEST_PROBATION) {
            return Err(format!("[run] probation is longer than {} minutes", LONGEST_PROBATION.as_secs() / 60));
        }
        if let Some(name) = self.env.keys().find(|name| !is_variable_name(name)) {
            return Err(format!("[env] {name:?} is not the name of a variable"));
        }
        Ok(())
    }
}

/// Whether a name can stand left of the `=` of an environment.
pub fn is_variable_name(name: &str) -> bool {
    name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The signal that asks a sub-agent to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum StopSignal {
    #[default]
    Term,
    Int,
    Quit,
    Hup,
    Usr1,
    Usr2,
    Kill,
}

/// When a sub-agent that ended by itself is started again. To be unhealthy for too long is a failure; with `never`, it is shown and the
/// sub-agent left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    #[default]
    Always,
    OnFailure,
    Never,
}

/// What a stop ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KillMode {
    /// The whole tree of processes.
    #[default]
    Tree,
    /// The main process alone: what it launched is somebody else's.
    Process,
}

/// Variables that change what a program loads, which program runs, or whether it checks whom it talks to; the gateway's environment is not signed, so it may not set them.
const REFUSED: &[&str] = &[
    "BASH_ENV",
    "ENV",
    "PATH",
    "IFS",
    "SHELLOPTS",
    "BASHOPTS",
    "PS4",
    "PERL5LIB",
    "PERLLIB",
    "PERL5OPT",
    "RUBYLIB",
    "RUBYOPT",
    "NODE_OPTIONS",
    "NODE_PATH",
    "CLASSPATH",
    "JAVA_TOOL_OPTIONS",
    "_JAVA_OPTIONS",
    "JDK_JAVA_OPTIONS",
    "GCONV_PATH",
    "GIO_MODULE_DIR",
    "GETCONF_DIR",
    "HOSTALIASES",
    "LOCPATH",
    "NLSPATH",
    "RESOLV_HOST_CONF",
    "TMPDIR",
    "COMSPEC",
    "PATHEXT",
    "SYSTEMROOT",
    "WINDIR",
    // Orders, code and configuration of tools that scripts call.
    "TAR_OPTIONS",
    "LESSOPEN",
    "LESSCLOSE",
    "PHPRC",
    "PHP_INI_SCAN_DIR",
    "PSMODULEPATH",
    "CURL_HOME",
    "WGETRC",
    "SYSTEM_WGETRC",
    // Whether it trusts anybody, and who hears along.
    "NODE_TLS_REJECT_UNAUTHORIZED",
    "SSLKEYLOGFILE",
];
const REFUSED_PREFIXES: &[&str] = &[
    "LD_",
    "DYLD_",
    "PYTHON",
    "GLIBC_",
    "MALLOC_",
    "BASH_FUNC_",
    "AOPS_",
    "COR_",
    "CORECLR_",
    "COMPLUS_",
    "DOTNET_",
    "OPENSSL_",
    "LUA_",
    "ERL_",
    "GIT_",
];

/// Splits the gateway's variables into those that a package lets it set and the names of the others: what chooses the code that runs, and
/// what no program could be started with.
pub fn admit_env<'a>(wanted: &'a Env, allowed: &[String]) -> (BTreeMap<&'a str, &'a str>, Vec<&'a str>) {
    let refused = |name: &str, value: &str| {
        let upper = name.to_ascii_uppercase();
        let dangerous =
            REFUSED.contains(&upper.as_str()) || REFUSED_PREFIXES.iter().any(|prefix| upper.starts_with(prefix));
        let ours = upper.starts_with("AOPS_");
        let is_none = !is_variable_name(name) || name.len() > MAX_NAME_BYTES || value.contains('\0');
        is_none || (dangerous && (ours || !allowed.iter().any(|allowed| allowed == name)))
    };
    let pairs = wanted.iter().map(|(name, value)| (name.as_str(), value.reveal()));
    let (names, admitted): (Vec<_>, Vec<_>) = pairs.partition(|(name, value)| refused(name, value));
    (admitted.into_iter().collect(), names.into_iter().map(|(name, _)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::env::EnvValue;

    fn manifest(command: &str, workdir: Option<&str>) -> Manifest {
        Manifest {
            name: "a".parse().unwrap(),
            version: "1".parse().unwrap(),
            run: RunSection {
                command: vec![command.into()],
                user: None,
                workdir: workdir.map(Into::into),
                stop_signal: StopSignal::Term,
                grace_period: None,
                restart: Restart::Always,
                kill_mode: KillMode::Tree,
                probation: None,
                env_allow: vec![],
            },
            health: None,
            env: BTreeMap::new(),
        }
    }

    #[test]
    fn a_command_stays_inside_its_package() {
        for bad in ["", "/bin/sh", "../x", "a/../../x", "..", "C:\\x", "\\x"] {
            assert!(manifest(bad, None).check().is_err(), "{bad:?}");
            assert!(manifest("bin/x", Some(bad)).check().is_err(), "{bad:?}");
        }
        assert!(manifest("bin/x", Some("var")).check().is_ok());
        assert!(manifest("./x..y", None).check().is_ok());
    }

    #[test]
    fn the_gateway_cannot_choose_what_a_program_loads() {
        let wanted: Env = ["LD_PRELOAD", "PATH", "PYTHONPATH", "AOPS_HOME", "ld_audit", "a b", "GOGC", "BASH_ENV"]
            .into_iter()
            .map(|name| (name.to_owned(), "x".into()))
            .collect();
        let (admitted, refused) = admit_env(&wanted, &["PYTHONPATH".into(), "AOPS_HOME".into()]);
        assert_eq!(admitted.keys().copied().collect::<Vec<_>>(), ["GOGC", "PYTHONPATH"]);
        assert_eq!(refused.len(), 6);
    }

    #[test]
    fn what_no_program_could_be_started_with_is_left_out() {
        let wanted: Env = [
            ("", "x".to_owned()),
            ("A=B", "x".to_owned()),
            ("A\0B", "x".to_owned()),
            (&"A".repeat(MAX_NAME_BYTES + 1), "x".to_owned()),
            ("ZERO", "a\0b".to_owned()),
            ("GOOD", "a=b\n".to_owned()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), EnvValue::Plain(value)))
        .collect();
        let (admitted, refused) = admit_env(&wanted, &["ZERO".into(), "A=B".into()]);
        assert_eq!(admitted, BTreeMap::from([("GOOD", "a=b\n")]));
        assert_eq!(refused.len(), 5);
    }
}
