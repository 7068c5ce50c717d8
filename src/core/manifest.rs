//! `agent.toml`: the manifest of a native sub-agent's package.
//!
//! Unknown keys are rejected: a package that relies on a feature that this version does not have must not run without it.

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
/// The executable at the root of a package of the older kind. It supports `start`, `stop`, `status`, and perhaps `pid`.
pub const CONTROL_SCRIPT: &str = "control";

const DEFAULT_GRACE_PERIOD: Duration = Duration::from_secs(10);
/// Limit of `gracePeriod`: the stop of a home waits for the slowest sub-agent, and the shutdown of the host waits for that stop.
const MAX_GRACE_PERIOD: Duration = Duration::from_secs(600);
/// Limit of `probation`: an upgrade completes within 15 minutes.
const MAX_PROBATION: Duration = Duration::from_secs(600);

/// A native sub-agent's manifest.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Manifest {
    pub name: AgentName,
    pub version: Version,
    pub run: RunSection,
    /// Absent: it is healthy while its process runs.
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
    /// The user that it runs as; absent: the manager's.
    #[serde(default)]
    pub user: Option<String>,
    /// Relative to the release's directory; absent: that directory.
    #[serde(default)]
    pub workdir: Option<String>,
    #[serde(default)]
    pub stop_signal: StopSignal,
    /// Time from the stop signal to the kill.
    #[serde(default)]
    pub grace_period: Option<Span>,
    #[serde(default)]
    pub restart: Restart,
    #[serde(default)]
    pub kill_mode: KillMode,
    /// Time that a new release must run before it is committed.
    #[serde(default)]
    pub probation: Option<Span>,
    /// Environment variables that the gateway may set although they are refused by default.
    #[serde(default)]
    pub env_allow: Vec<String>,
}

impl RunSection {
    pub fn grace(&self) -> Duration {
        self.grace_period.map_or(DEFAULT_GRACE_PERIOD, |span| span.0)
    }
}

impl Manifest {
    /// Checks what serde cannot: that paths stay inside the package, and that values are within their limits.
    pub fn check(&self) -> Result<(), String> {
        let Some(program) = self.run.command.first() else {
            return Err("[run] command is empty: set the program, relative to the package, and its arguments".into());
        };
        for (key, path) in [("command", Some(program)), ("workdir", self.run.workdir.as_ref())] {
            if let Some(path) = path
                && !stays_inside(path)
            {
                return Err(format!("[run] {key} {path:?} is not a path inside the package"));
            }
        }
        if self.run.grace() > MAX_GRACE_PERIOD {
            return Err(format!("[run] gracePeriod is longer than {} minutes", MAX_GRACE_PERIOD.as_secs() / 60));
        }
        if self.run.probation.is_some_and(|probation| probation.0 > MAX_PROBATION) {
            return Err(format!("[run] probation is longer than {} minutes", MAX_PROBATION.as_secs() / 60));
        }
        if let Some(name) = self.env.keys().find(|name| !is_variable_name(name)) {
            return Err(format!("[env] {name:?} is not a valid name of an environment variable"));
        }
        Ok(())
    }
}

/// Whether this is a valid name of an environment variable.
pub fn is_variable_name(name: &str) -> bool {
    name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The signal that stops a sub-agent.
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

/// When a sub-agent that exited is restarted. Repeated failures of its health check count as a failure; with `never`, they are shown and
/// the sub-agent keeps running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    #[default]
    Always,
    OnFailure,
    Never,
}

/// What a stop kills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KillMode {
    /// The whole process tree.
    #[default]
    Tree,
    /// The main process only: the programs that it started belong to the customer.
    Process,
}

/// Variables that change which code a program loads, which program runs, or whether it verifies its peers. The environment from the gateway
/// is not signed, so it may not set them.
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
    // Options, code and configuration of tools that scripts call.
    "TAR_OPTIONS",
    "LESSOPEN",
    "LESSCLOSE",
    "PHPRC",
    "PHP_INI_SCAN_DIR",
    "PSMODULEPATH",
    "CURL_HOME",
    "WGETRC",
    "SYSTEM_WGETRC",
    // Disable certificate checks, or reveal session keys.
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

/// Splits the gateway's variables into those that may be set, and the names of the refused ones: variables that choose the code that runs
/// and that the package does not allow, and invalid ones.
pub fn admit_env<'a>(wanted: &'a Env, allowed: &[String]) -> (BTreeMap<&'a str, &'a str>, Vec<&'a str>) {
    let refused = |name: &str, value: &str| {
        let upper = name.to_ascii_uppercase();
        let dangerous =
            REFUSED.contains(&upper.as_str()) || REFUSED_PREFIXES.iter().any(|prefix| upper.starts_with(prefix));
        let ours = upper.starts_with("AOPS_");
        let is_invalid = !is_variable_name(name) || name.len() > MAX_NAME_BYTES || value.contains('\0');
        is_invalid || (dangerous && (ours || !allowed.iter().any(|allowed| allowed == name)))
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
    fn the_gateway_cannot_choose_the_code_that_a_program_loads() {
        let wanted: Env = ["LD_PRELOAD", "PATH", "PYTHONPATH", "AOPS_HOME", "ld_audit", "a b", "GOGC", "BASH_ENV"]
            .into_iter()
            .map(|name| (name.to_owned(), "x".into()))
            .collect();
        let (admitted, refused) = admit_env(&wanted, &["PYTHONPATH".into(), "AOPS_HOME".into()]);
        assert_eq!(admitted.keys().copied().collect::<Vec<_>>(), ["GOGC", "PYTHONPATH"]);
        assert_eq!(refused.len(), 6);
    }

    #[test]
    fn invalid_variables_are_refused() {
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
