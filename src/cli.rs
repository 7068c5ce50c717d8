//! The command line: the names of the program, the subcommands, and the options of the system that aops replaces.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

#[cfg(feature = "documents")]
mod documents;

#[cfg(feature = "gateway")]
use crate::gateway;
use crate::home::{self, Home};
use crate::output::{self, result};
use crate::{control, installation, package, platform, service, spa, spm};

/// The end of the long help, 80 columns wide.
#[cfg(feature = "gateway")]
const FIRST_STEPS: &str = "\
First steps, on one machine and without root:
  aops gateway init --dir ./gw              a key, a certificate, fleet.toml
  aops gateway publish --dir ./gw --self    this program, for hosts to install
  aops gateway run --dir ./gw               and leave it running
  aops install --agent-id 1 --endpoint https://127.0.0.1:8888 \\
    --trusted-key gw/keys/aops.pub --ca-cert gw/tls/cert.pem \\
    --home ./home --service none
  ./home/control status

`aops gateway publish --help` describes how to package a sub-agent.";
#[cfg(not(feature = "gateway"))]
const FIRST_STEPS: &str = "";

/// Installs this host's agents, keeps them running at the right version, and
/// reports their state
///
/// One program, several roles. A host runs the manager (spm) and the watchdog
/// (spa), which `install` sets up; its operator uses `control`; the `gateway`
/// serves packages and the desired state of each host.
///
/// No subcommand is needed if the program is started under the name
/// aops-agent-service*, aops-spm, aops-spa or control, for instance by a link.
#[derive(Debug, Parser)]
#[command(
    name = "aops",
    disable_version_flag = true,
    arg_required_else_help = true,
    max_term_width = 80,
    after_long_help = FIRST_STEPS
)]
struct Cli {
    /// Print the version
    #[arg(short = 'V', long)]
    version: bool,
    /// With --version: also print the build, the platform and the trusted keys
    #[arg(long, requires = "version")]
    verbose: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install this host's manager and watchdog
    Install(Box<service::InstallOptions>),
    /// Commands for this host's operator: status, start, stop, logs ...
    Control {
        #[command(flatten)]
        home: HomeOption,
        #[command(subcommand)]
        command: ControlCommand,
    },
    /// The server: publish packages and the desired state of each host
    #[cfg(feature = "gateway")]
    Gateway {
        #[command(subcommand)]
        command: gateway::GatewayCommand,
    },
    /// The old platform's names for `install` and commands of `control`
    Service {
        #[command(subcommand)]
        command: ServiceCommand,
    },
    /// Run the manager (started by the service manager or `control start`)
    Spm {
        #[command(flatten)]
        home: HomeOption,
        #[command(flatten)]
        options: spm::ManagerOptions,
    },
    /// Run the watchdog (started by the service manager or the manager)
    Spa {
        #[command(flatten)]
        home: HomeOption,
        #[command(flatten)]
        options: spa::WatchdogOptions,
    },
    /// Write shell completions and manual pages into a directory
    #[cfg(feature = "documents")]
    #[command(hide = true)]
    Documents { directory: PathBuf },
}

#[derive(Debug, Clone, Args)]
struct HomeOption {
    /// The installation directory [default: the one that holds this program,
    /// else AOPS_HOME, else the platform's default]
    #[arg(long, value_name = "DIR", global = true)]
    home: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum ControlCommand {
    #[command(flatten)]
    Verb(control::ControlAction),
    /// Remove the installation: services, processes and files
    Uninstall {
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
enum ServiceCommand {
    /// Install this host's manager and watchdog
    Install(Box<service::InstallOptions>),
    #[command(flatten)]
    Verb(ServiceVerb),
}

#[derive(Debug, Subcommand)]
enum ServiceVerb {
    /// Run by the scripts of a package (rpm, deb) of this home
    #[command(hide = true)]
    Packaged {
        #[command(flatten)]
        home: HomeOption,
        #[command(subcommand)]
        command: service::PackagedCommand,
    },
    /// Remove the installation: services, processes and files
    Uninstall {
        #[command(flatten)]
        home: HomeOption,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
    /// Start the manager and the watchdog, and with them the sub-agents
    Start {
        #[command(flatten)]
        home: HomeOption,
    },
    /// Stop every sub-agent, the manager and the watchdog
    Stop {
        #[command(flatten)]
        home: HomeOption,
    },
    /// Restart the manager and the watchdog; the sub-agents keep running
    Restart {
        #[command(flatten)]
        home: HomeOption,
    },
    /// Show the manager, the watchdog, the gateway and every sub-agent
    Status {
        #[command(flatten)]
        home: HomeOption,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
}

/// Runs a command line: the program's name, then its arguments.
pub fn run(arguments: impl Iterator<Item = OsString>) -> Result<ExitCode> {
    let arguments: Vec<OsString> = arguments.collect();
    let normal = match normalize(&arguments) {
        Ok(normal) => normal,
        Err(wrong) => {
            let error = Cli::command().error(clap::error::ErrorKind::InvalidValue, wrong);
            return Ok(output::parser_exit(&error));
        }
    };
    let cli = match Cli::command().try_get_matches_from(&normal).and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return Ok(output::parser_exit(&error)),
    };
    if cli.version {
        return print_version(cli.verbose);
    }
    let Some(command) = cli.command else {
        let error = Cli::command().error(clap::error::ErrorKind::MissingSubcommand, "a subcommand is required");
        return Ok(output::parser_exit(&error));
    };
    match command {
        Command::Install(options) | Command::Service { command: ServiceCommand::Install(options) } => {
            service::install(&options, &process_context())
        }
        Command::Control { home, command: ControlCommand::Verb(verb) } => control::main(&home.find(), &verb),
        Command::Control { home, command: ControlCommand::Uninstall { yes } } => service::uninstall(&home.find(), yes),
        Command::Service { command: ServiceCommand::Verb(verb) } => run_service(verb),
        #[cfg(feature = "gateway")]
        Command::Gateway { command } => gateway::main(command),
        Command::Spm { home, options } => spm::main(&home.find(), &options),
        Command::Spa { home, options } => spa::main(&home.find(), &options),
        #[cfg(feature = "documents")]
        Command::Documents { directory } => documents::write(Cli::command(), &directory),
    }
}

/// The executable, the home and the product that this process has without any option.
fn process_context() -> service::ProcessContext {
    let executable = platform::own_executable();
    let own = executable.as_deref().and_then(own_home);
    let named = || std::env::var_os("AOPS_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    service::ProcessContext {
        home: own.or_else(named).map(Home::new),
        product: std::env::var("AOPS_PRODUCT").ok().filter(|product| !product.is_empty()),
        executable: executable.unwrap_or_default(),
    }
}

fn run_service(verb: ServiceVerb) -> Result<ExitCode> {
    match verb {
        ServiceVerb::Packaged { home, command } => service::packaged(&home.find(), command),
        ServiceVerb::Uninstall { home, yes } => service::uninstall(&home.find(), yes),
        ServiceVerb::Start { home } => control::main(&home.find(), &control::ControlAction::Start),
        ServiceVerb::Stop { home } => control::main(&home.find(), &control::ControlAction::Stop),
        ServiceVerb::Restart { home } => control::main(&home.find(), &control::ControlAction::Restart { agent: None }),
        ServiceVerb::Status { home, json } => {
            control::main(&home.find(), &control::ControlAction::Status { json, history: false })
        }
    }
}

impl HomeOption {
    /// `--home`, else the home that holds this program, else `AOPS_HOME`, else the platform's default.
    fn find(&self) -> Home {
        let root = self
            .home
            .clone()
            .or_else(|| own_home(&platform::own_executable()?))
            .or_else(|| std::env::var_os("AOPS_HOME").filter(|home| !home.is_empty()).map(PathBuf::from))
            .unwrap_or_else(home::default_root);
        Home::new(root)
    }
}

/// The home of a program in its `bin`; `None`: the program is not in a home.
fn own_home(executable: &Path) -> Option<PathBuf> {
    let bin = executable.parent().filter(|bin| bin.file_name() == Some(OsStr::new("bin")))?;
    let root = bin.parent()?;
    let home = Home::new(root);
    (home.agent_id().is_file() || home.package_record().is_file()).then(|| root.to_owned())
}

/// Translates the program's name and the old options to subcommands of `aops`. The error is a usage error.
fn normalize(arguments: &[OsString]) -> Result<Vec<OsString>, String> {
    let name = arguments.first().map(|program| stem(program)).unwrap_or_default();
    let rest = arguments.get(1..).unwrap_or_default();
    let program = OsString::from("aops");
    let with = |role: &[&str], rest: &[OsString]| -> Vec<OsString> {
        [program.clone()].into_iter().chain(role.iter().map(OsString::from)).chain(rest.iter().cloned()).collect()
    };
    if let Some(translated) = service::from_old_arguments(rest) {
        return translated.map(|translated: Vec<OsString>| with(&["service"], &translated));
    }
    let asks_version = rest.first().is_some_and(|first| first == "--version" || first == "-V");
    let role: &[&str] = match name.as_str() {
        _ if asks_version => &[],
        "aops-spm" => &["spm"],
        "aops-spa" => &["spa"],
        "control" => &["control"],
        name if name.starts_with("aops-agent-service") => &["service"],
        #[cfg(feature = "gateway")]
        name if name.starts_with("aops-gateway") && !names_a_command(rest) => &["gateway"],
        _ => &[],
    };
    Ok(with(role, rest))
}

/// Whether the first argument is a subcommand of `aops`; none of the gateway's has the same name.
#[cfg(feature = "gateway")]
fn names_a_command(arguments: &[OsString]) -> bool {
    let first = arguments.first().and_then(|first| first.to_str()).unwrap_or_default();
    Cli::command().get_subcommands().any(|command| command.get_name() == first)
}

/// The program's name without its directory and `.exe`.
fn stem(program: &OsStr) -> String {
    let name = Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned();
    match name.len().checked_sub(4).and_then(|at| name.split_at_checked(at)) {
        Some((stem, extension)) if extension.eq_ignore_ascii_case(".exe") => stem.to_owned(),
        _ => name,
    }
}

fn print_version(verbose: bool) -> Result<ExitCode> {
    result!("aops {}", env!("CARGO_PKG_VERSION"));
    let home = HomeOption { home: None }.find();
    if let Ok(Some(manager)) = installation::ManagerRecord::load(&home) {
        result!("installed in {}: release {}", home.root().display(), manager.version);
    }
    if verbose {
        let commit = Some(env!("AOPS_COMMIT")).filter(|commit| !commit.is_empty());
        result!("commit: {}", commit.unwrap_or("not recorded (a development build)"));
        result!("platform: {}/{} ({})", platform::OS, platform::ARCH, env!("AOPS_TARGET"));
        result!("features: {}", if cfg!(feature = "gateway") { "gateway" } else { "none" });
        let keys = |source: &str, keys: &package::Keys| {
            for key in keys.ids() {
                result!("trusted key {key} ({source})");
            }
        };
        keys("built in", &package::Keys::baked_in()?);
        if let Some(executable) = platform::own_executable() {
            for text in package::trailer::read(&executable)?.unwrap_or_default() {
                keys("carried by this executable", &package::Keys::parse(&text)?);
            }
        }
        if home.keys().is_dir() {
            keys("etc/keys", &package::Keys::load(&home.keys())?);
        }
        if let Ok(ring) = installation::keyring::Keyring::load(&home) {
            ring.described().for_each(|line| result!("{line}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(line: &str) -> String {
        let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let normal = normalize(&arguments).unwrap();
        normal.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_program_name_selects_the_role() {
        assert_eq!(normal("/opt/aops/bin/aops-spm --home /x"), "aops spm --home /x");
        assert_eq!(normal("aops-spa"), "aops spa");
        assert_eq!(normal("./control status"), "aops control status");
        assert_eq!(normal("control.exe status"), "aops control status");
        assert_eq!(normal("AOPS-SPM.EXE"), "aops");
        assert_eq!(normal("aops-spm.EXE"), "aops spm");
        assert_eq!(normal("aops-agent-service-linux-amd64 install"), "aops service install");
        assert_eq!(normal("aops-agent-service install"), "aops service install");
        #[cfg(feature = "gateway")]
        {
            assert_eq!(normal("./aops-gateway-linux-amd64 init"), "aops gateway init");
            assert_eq!(normal("aops-gateway gateway init"), "aops gateway init");
            assert_eq!(normal("aops-gateway install"), "aops install");
        }
        assert_eq!(normal("aops control status"), "aops control status");
        assert_eq!(normal("renamed control status"), "aops control status");
        assert_eq!(normal("aops-spm --version"), "aops --version");
    }

    #[test]
    fn every_help_fits_80_columns_and_describes_its_command() {
        fn check(command: &mut clap::Command, path: &str) {
            let help = command.render_long_help().to_string();
            for line in help.lines() {
                assert!(line.chars().count() <= 80, "{path}: {line}");
            }
            assert!(command.get_about().is_some() || path == "aops", "{path} has no description");
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                assert!(argument.get_help().is_some(), "{path} {}", argument.get_id());
            }
            for inner in command.get_subcommands_mut().filter(|inner| !inner.is_hide_set()) {
                let path = format!("{path} {}", inner.get_name());
                check(inner, &path);
            }
        }
        let mut command = Cli::command();
        command.build();
        check(&mut command, "aops");
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
