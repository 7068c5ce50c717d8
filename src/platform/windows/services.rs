//! The service control manager: registers services, starts, stops and queries them, and runs this process as one.
//!
//! A service that exits on its own is to be restarted, whatever its reason: the service control manager does that only for a process that
//! died, or that reported an exit code other than 0. So a role reports 0 only if it was stopped on purpose.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use windows_service::service::{
    Service as OpenService, ServiceAccess, ServiceAction, ServiceActionType, ServiceControl, ServiceControlAccept,
    ServiceErrorControl, ServiceExitCode, ServiceFailureActions, ServiceFailureResetPeriod, ServiceInfo,
    ServiceStartType, ServiceState as State, ServiceStatus, ServiceType,
};
use windows_service::service_control_handler::{self, ServiceControlHandlerResult, ServiceStatusHandle};
use windows_service::service_manager::{ServiceManager, ServiceManagerAccess};
use windows_service::{Error, define_windows_service, service_dispatcher};
use windows_sys::Win32::Foundation::{
    ERROR_DEPENDENT_SERVICES_RUNNING, ERROR_INVALID_FUNCTION, ERROR_INVALID_LEVEL, ERROR_INVALID_PARAMETER,
    ERROR_INVALID_SERVICE_CONTROL, ERROR_SERVICE_ALREADY_RUNNING, ERROR_SERVICE_CANNOT_ACCEPT_CTRL,
    ERROR_SERVICE_DOES_NOT_EXIST, ERROR_SERVICE_MARKED_FOR_DELETE, ERROR_SERVICE_NOT_ACTIVE,
    ERROR_SERVICE_REQUEST_TIMEOUT,
};

use super::service_list::Change;
use super::{event_log, exit_event, service_list};
use crate::core::service_manager::Notification;
use crate::platform::{FailureActions, RegisteredService, ServiceDefinition, ServiceRun, ServiceState};

/// The delays before a service that exited is restarted; the last one applies to every further exit.
const RESTART_DELAYS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(10)];
/// After this time without an exit, the first delay applies again.
const RESET_PERIOD: Duration = Duration::from_secs(3600);
/// How long a start may take.
const START_HINT: Duration = Duration::from_secs(60);
/// A stop may take the longest grace period of a sub-agent. Each report announces the next one.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
const STOP_HINT: Duration = Duration::from_secs(30);
/// The account of a service that is given none.
const SYSTEM: &str = "LocalSystem";
/// What a role reports that is to be restarted.
const EXITED_TO_BE_RESTARTED: u32 = 1;

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Winapi(error) => error,
        error => io::Error::other(error),
    }
}

fn has_code(error: &io::Error, codes: &[u32]) -> bool {
    error.raw_os_error().is_some_and(|code| codes.contains(&(code as u32)))
}

fn manager(access: ServiceManagerAccess) -> io::Result<ServiceManager> {
    ServiceManager::local_computer(None::<&str>, ServiceManagerAccess::CONNECT | access).map_err(io_error)
}

/// `None`: no service has this name.
fn open(name: &str, access: ServiceAccess) -> io::Result<Option<OpenService>> {
    match manager(ServiceManagerAccess::empty())?.open_service(name, access).map_err(io_error) {
        Ok(service) => Ok(Some(service)),
        Err(error) if has_code(&error, &[ERROR_SERVICE_DOES_NOT_EXIST]) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether services can be registered on this host.
pub fn has_service_manager() -> bool {
    manager(ServiceManagerAccess::empty()).is_ok()
}

/// Whether this process may register services.
pub fn can_register_services() -> io::Result<()> {
    manager(ServiceManagerAccess::CREATE_SERVICE).map(drop)
}

/// Registers a service that starts at boot and is restarted when it exits, or updates it.
pub fn register_service(definition: &ServiceDefinition) -> io::Result<()> {
    let info = ServiceInfo {
        name: OsString::from(&definition.name),
        display_name: OsString::from(&definition.display_name),
        service_type: ServiceType::OWN_PROCESS,
        start_type: ServiceStartType::AutoStart,
        error_control: ServiceErrorControl::Normal,
        executable_path: definition.program.clone(),
        launch_arguments: definition.arguments.clone(),
        dependencies: vec![],
        account_name: None,
        account_password: None,
    };
    let service = match open(&definition.name, ServiceAccess::ALL_ACCESS)? {
        Some(service) => {
            service.change_config(&info).map_err(io_error)?;
            // Of a service that somebody else registered under this name.
            let now = service.query_config().map_err(io_error)?;
            let is_system = now.account_name.is_none_or(|account| account.eq_ignore_ascii_case(SYSTEM));
            let account = (!is_system).then_some(SYSTEM);
            let change = Change { account, dependencies: Some(&[]), ..Change::default() };
            service_list::change(&definition.name, &change)?;
            service
        }
        None => {
            let access = ServiceManagerAccess::CREATE_SERVICE;
            manager(access)?.create_service(&info, ServiceAccess::ALL_ACCESS).map_err(io_error)?
        }
    };
    service.set_description(&definition.description).map_err(io_error)?;
    let restart = |delay: &Duration| ServiceAction { action_type: ServiceActionType::Restart, delay: *delay };
    let actions = ServiceFailureActions {
        reset_period: ServiceFailureResetPeriod::After(RESET_PERIOD),
        reboot_msg: None,
        command: None,
        actions: Some(RESTART_DELAYS.iter().map(restart).collect()),
    };
    service.update_failure_actions(actions).map_err(io_error)?;
    service.set_preshutdown_timeout(definition.stop_timeout).map_err(io_error)?;
    event_log::register_source(&definition.name)?;
    unless_unknown(service.set_failure_actions_on_non_crash_failures(true))?;
    // After the services that hosts need to be reachable.
    unless_unknown(service.set_delayed_auto_start(true))
}

/// Tolerates a setting that this system does not know.
fn unless_unknown(outcome: windows_service::Result<()>) -> io::Result<()> {
    match outcome.map_err(io_error) {
        Err(error) if has_code(&error, &[ERROR_INVALID_LEVEL, ERROR_INVALID_PARAMETER, ERROR_INVALID_FUNCTION]) => {
            tracing::debug!(error = %error, "a setting of a service is not supported on this system");
            Ok(())
        }
        outcome => outcome,
    }
}

/// Whether a service is registered with this program and these arguments, and starts at boot.
pub fn is_service_current(definition: &ServiceDefinition) -> io::Result<bool> {
    let Some(service) = open(&definition.name, ServiceAccess::QUERY_CONFIG)? else { return Ok(false) };
    let config = service.query_config().map_err(io_error)?;
    // The system keeps program and arguments as one text.
    let text = config.executable_path.to_string_lossy().into_owned();
    let mut words =
        std::iter::once(definition.program.as_os_str()).chain(definition.arguments.iter().map(|word| &**word));
    Ok(words.all(|word| text.contains(&*word.to_string_lossy())))
}

/// The state of a service; `None`: no service has this name.
pub fn service_state(name: &str) -> io::Result<Option<ServiceState>> {
    let access = ServiceAccess::QUERY_STATUS | ServiceAccess::QUERY_CONFIG;
    let Some(service) = open(name, access)? else { return Ok(None) };
    let status = service.query_status().map_err(io_error)?;
    let run = match status.current_state {
        State::Stopped if status.exit_code == ServiceExitCode::Win32(0) => ServiceRun::Stopped,
        State::Stopped => ServiceRun::Failed,
        State::StartPending | State::StopPending => ServiceRun::Changing,
        _ => ServiceRun::Running,
    };
    let config = service.query_config().map_err(io_error)?;
    Ok(Some(ServiceState {
        run,
        pid: status.process_id.filter(|pid| *pid != 0),
        is_disabled: config.start_type == ServiceStartType::Disabled,
        command: config.executable_path.to_string_lossy().into_owned(),
    }))
}

/// Every service of the host whose registration can be read.
pub fn registered_services() -> io::Result<Vec<RegisteredService>> {
    let services = service_list::names()?;
    let registered = |name: String| {
        let found = registered_service(&name);
        found.inspect_err(|error| tracing::debug!(name, error = %error, "cannot read a service")).ok().flatten()
    };
    Ok(services.into_iter().filter_map(registered).collect())
}

/// How a service is registered; `None`: no service has this name.
pub fn registered_service(name: &str) -> io::Result<Option<RegisteredService>> {
    let access = ServiceAccess::QUERY_CONFIG | ServiceAccess::QUERY_STATUS;
    let Some(service) = open(name, access)? else { return Ok(None) };
    let config = service.query_config().map_err(io_error)?;
    let text = |text: OsString| text.to_string_lossy().into_owned();
    Ok(Some(RegisteredService {
        name: name.to_owned(),
        display_name: text(config.display_name),
        description: service_list::description(name),
        command: text(config.executable_path.into_os_string()),
        service_type: config.service_type.bits(),
        start_type: config.start_type.to_raw(),
        error_control: config.error_control.to_raw(),
        is_delayed: service_list::is_delayed(name),
        dependencies: config.dependencies.iter().map(|needed| text(needed.to_system_identifier())).collect(),
        account: config.account_name.map(text),
        failure: service.get_failure_actions().ok().map(|actions| FailureActions {
            reset_seconds: match actions.reset_period {
                ServiceFailureResetPeriod::Never => None,
                ServiceFailureResetPeriod::After(period) => Some(period.as_secs()),
            },
            reboot_message: actions.reboot_msg.map(text),
            command: actions.command.map(text),
            actions: actions
                .actions
                .unwrap_or_default()
                .iter()
                .map(|action| (action.action_type.to_raw(), action.delay.as_millis() as u64))
                .collect(),
            also_after_errors: service.get_failure_actions_on_non_crash_failures().ok(),
        }),
        is_running: service.query_status().map_err(io_error)?.current_state != State::Stopped,
    }))
}

/// Checks that this process may change, stop and remove a service.
pub fn can_change_service(name: &str) -> io::Result<()> {
    open(name, ServiceAccess::CHANGE_CONFIG | ServiceAccess::STOP | ServiceAccess::DELETE).map(drop)
}

/// Keeps a service from starting; a running one is left as it is.
pub fn disable_service(name: &str) -> io::Result<()> {
    let start_type = Some(ServiceStartType::Disabled.to_raw());
    service_list::change(name, &Change { start_type, ..Change::default() })
}

/// Registers a service as it was recorded, whether or not there is one of its name. Starts nothing. Its account must have no password, unless
/// there is one with this account.
pub fn restore_service(service: &RegisteredService) -> io::Result<()> {
    let now = registered_service(&service.name)?;
    let is_unchanged = now.as_ref().is_some_and(|now| {
        let (start_type, is_running) = (service.start_type, service.is_running);
        RegisteredService { start_type, is_running, ..now.clone() } == *service
    });
    if is_unchanged {
        let start_type = Some(service.start_type);
        return service_list::change(&service.name, &Change { start_type, ..Change::default() });
    }
    if now.is_none() {
        let info = ServiceInfo {
            name: OsString::from(&service.name),
            display_name: OsString::from(&service.display_name),
            service_type: ServiceType::from_bits_retain(service.service_type),
            start_type: ServiceStartType::Disabled,
            error_control: ServiceErrorControl::Normal,
            // Replaced below: these would be quoted.
            executable_path: OsString::from(&service.command).into(),
            launch_arguments: vec![],
            dependencies: vec![],
            account_name: None,
            account_password: None,
        };
        let access = ServiceManagerAccess::CREATE_SERVICE;
        manager(access)?.create_service(&info, ServiceAccess::QUERY_CONFIG).map_err(io_error)?;
    }
    let account = now.as_ref().and_then(|now| now.account.as_deref());
    let shown = now.as_ref().map_or(service.display_name.as_str(), |now| now.display_name.as_str());
    let change = Change {
        service_type: Some(service.service_type),
        start_type: Some(service.start_type),
        error_control: Some(service.error_control),
        command: Some(&service.command),
        dependencies: Some(&service.dependencies),
        account: service.account.as_deref().filter(|wanted| account != Some(wanted)),
        // Wine rejects a shown name that is also the name of a service, even of this one.
        display_name: Some(service.display_name.as_str()).filter(|wanted| *wanted != shown),
    };
    service_list::change(&service.name, &change)?;
    // It can start; the rest must not prevent that. To restart the host after a failure needs a privilege, for example.
    if let Err(error) = restore_further_settings(service) {
        tracing::warn!(service = service.name, error = %error, "a service has its command and its account again, but not its description or recovery; see `sc qfailure`");
    }
    Ok(())
}

fn restore_further_settings(service: &RegisteredService) -> io::Result<()> {
    let access = ServiceAccess::CHANGE_CONFIG | ServiceAccess::START;
    let Some(there) = open(&service.name, access)? else { return Err(missing(&service.name)) };
    there.set_description(service.description.as_deref().unwrap_or_default()).map_err(io_error)?;
    if let Some(is_delayed) = service.is_delayed {
        unless_unknown(there.set_delayed_auto_start(is_delayed))?;
    }
    service.failure.as_ref().map_or(Ok(()), |failure| restore_failure_actions(&there, failure))
}

fn restore_failure_actions(service: &OpenService, failure: &FailureActions) -> io::Result<()> {
    let action = |(kind, delay): &(i32, u64)| {
        let action_type = ServiceActionType::from_raw(*kind).ok()?;
        Some(ServiceAction { action_type, delay: Duration::from_millis(*delay) })
    };
    let period = failure.reset_seconds.map(Duration::from_secs);
    let actions = ServiceFailureActions {
        reset_period: period.map_or(ServiceFailureResetPeriod::Never, ServiceFailureResetPeriod::After),
        // Nothing would mean no change.
        reboot_msg: Some(failure.reboot_message.clone().unwrap_or_default().into()),
        command: Some(failure.command.clone().unwrap_or_default().into()),
        actions: Some(failure.actions.iter().filter_map(action).collect()),
    };
    service.update_failure_actions(actions).map_err(io_error)?;
    match failure.also_after_errors {
        Some(enabled) => unless_unknown(service.set_failure_actions_on_non_crash_failures(enabled)),
        None => Ok(()),
    }
}

/// Starts a service; one that runs is left as it is.
pub fn start_service(name: &str) -> io::Result<()> {
    let Some(service) = open(name, ServiceAccess::START)? else { return Err(missing(name)) };
    match service.start::<&str>(&[]).map_err(io_error) {
        Err(error) if has_code(&error, &[ERROR_SERVICE_ALREADY_RUNNING]) => Ok(()),
        outcome => outcome,
    }
}

/// Has a service stop, without waiting for it; one that is stopped is left as it is.
pub fn stop_service(name: &str) -> io::Result<()> {
    let Some(service) = open(name, ServiceAccess::STOP)? else { return Ok(()) };
    match service.stop().map_err(io_error) {
        Err(error) if has_code(&error, &[ERROR_SERVICE_NOT_ACTIVE]) => Ok(()),
        outcome => outcome.map(drop),
    }
}

/// Whether a service refuses to stop now, and may later: it is changing its state, it does not answer, or another one needs it.
pub fn may_stop_later(error: &io::Error) -> bool {
    const CODES: [u32; 4] = [
        ERROR_DEPENDENT_SERVICES_RUNNING,
        ERROR_SERVICE_CANNOT_ACCEPT_CTRL,
        ERROR_SERVICE_REQUEST_TIMEOUT,
        ERROR_INVALID_SERVICE_CONTROL,
    ];
    has_code(error, &CODES)
}

/// Removes a service. The name is free when no process has the service open any more.
pub fn remove_service(name: &str) -> io::Result<()> {
    event_log::remove_source(name)?;
    let Some(service) = open(name, ServiceAccess::DELETE)? else { return Ok(()) };
    match service.delete().map_err(io_error) {
        Err(error) if has_code(&error, &[ERROR_SERVICE_MARKED_FOR_DELETE]) => Ok(()),
        outcome => outcome,
    }
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("the service {name} does not exist"))
}

// --- This process as a service

/// What a stop of the service does; called once.
type OnStop = Box<dyn FnOnce() + Send>;
/// The role itself.
type Main = Box<dyn FnOnce() -> ExitCode + Send>;

/// What the service's main function needs, which gets no argument of its own.
struct Work {
    name: String,
    on_stop: OnStop,
    main: Main,
    /// The exit codes of a role that was stopped on purpose.
    on_purpose: &'static [u8],
}

/// What this service has reported.
struct Reporter {
    name: String,
    handle: ServiceStatusHandle,
    state: State,
    checkpoint: u32,
    /// The service control manager asked for a stop.
    is_stop_requested: bool,
}

static WORK: Mutex<Option<Work>> = Mutex::new(None);
static REPORTER: Mutex<Option<Reporter>> = Mutex::new(None);
static ENDED_WITH: Mutex<Option<ExitCode>> = Mutex::new(None);

fn locked<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

define_windows_service!(service_main_of_system, service_main);

/// Runs `main` as a service, in another thread, if the service control manager started this process. `on_stop` is called in a thread of
/// its own when the service or the host is stopped; `main` is then expected to return. It returns `on_purpose` if it is not to be restarted.
pub fn run_as_service(
    name: &str,
    on_purpose: &'static [u8],
    on_stop: impl FnOnce() + Send + 'static,
    main: impl FnOnce() -> ExitCode + Send + 'static,
) -> io::Result<ExitCode> {
    let work = Work { name: name.to_owned(), on_stop: Box::new(on_stop), main: Box::new(main), on_purpose };
    *locked(&WORK) = Some(work);
    service_dispatcher::start(name, service_main_of_system).map_err(io_error)?;
    Ok(locked(&ENDED_WITH).take().unwrap_or(ExitCode::FAILURE))
}

/// Whether this process is a service.
pub fn is_service() -> bool {
    locked(&REPORTER).is_some()
}

fn service_main(_arguments: Vec<OsString>) {
    let Some(Work { name, on_stop, main, on_purpose }) = locked(&WORK).take() else { return };
    let (stop, stopped) = mpsc::channel();
    let handler = move |control| match control {
        ServiceControl::Stop | ServiceControl::Preshutdown | ServiceControl::Shutdown => {
            let _ = stop.send(());
            ServiceControlHandlerResult::NoError
        }
        // Users come and go; a service stays.
        ServiceControl::Interrogate | ServiceControl::SessionChange(_) => ServiceControlHandlerResult::NoError,
        _ => ServiceControlHandlerResult::NotImplemented,
    };
    let handle = match service_control_handler::register(&name, handler) {
        Ok(handle) => handle,
        Err(error) => {
            tracing::error!(error = %error, "cannot register with the service control manager");
            return;
        }
    };
    *locked(&REPORTER) = Some(Reporter {
        name: name.clone(),
        handle,
        state: State::StartPending,
        checkpoint: 0,
        is_stop_requested: false,
    });
    report(|reporter| reporter.checkpoint += 1);
    let spawned = std::thread::Builder::new().name("stop".to_owned()).spawn(move || {
        if stopped.recv().is_ok() {
            stop_with_reports(on_stop);
        }
    });
    if let Err(error) = spawned {
        tracing::error!(error = %error, "cannot start the thread that stops the service");
    }
    let code = main();
    let is_on_purpose = on_purpose.iter().any(|number| ExitCode::from(*number) == code) || was_stopped();
    let exit = if is_on_purpose {
        ServiceExitCode::NO_ERROR
    } else {
        ServiceExitCode::ServiceSpecific(EXITED_TO_BE_RESTARTED)
    };
    *locked(&ENDED_WITH) = Some(code);
    let how = if is_on_purpose { "has stopped" } else { "exits and is restarted" };
    let is_failure = !is_on_purpose && code != ExitCode::SUCCESS;
    event_log::log_now(&name, &format!("{name} {how}"), is_failure);
    if let Some(reporter) = &mut *locked(&REPORTER) {
        reporter.state = State::Stopped;
        reporter.send(exit);
    }
}

/// Whether the service was asked to stop.
fn was_stopped() -> bool {
    locked(&REPORTER).as_ref().is_some_and(|reporter| reporter.is_stop_requested)
}

/// Stops the role, and reports while that takes.
fn stop_with_reports(on_stop: OnStop) {
    report(|reporter| {
        reporter.state = State::StopPending;
        reporter.checkpoint = 1;
        reporter.is_stop_requested = true;
    });
    let (done, working) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = working.recv_timeout(REPORT_INTERVAL) {
                report(|reporter| reporter.checkpoint += 1);
            }
        });
        on_stop();
        if let Err(error) = exit_event::request_own() {
            tracing::error!(error = %error, "cannot ask this process to exit");
        }
        drop(done);
    });
}

/// Changes what was reported, unless the service has ended, and reports it if it has changed.
fn report(change: impl FnOnce(&mut Reporter)) {
    if let Some(reporter) = &mut *locked(&REPORTER)
        && reporter.state != State::Stopped
    {
        let before = (reporter.state, reporter.checkpoint);
        change(reporter);
        if (reporter.state, reporter.checkpoint) != before {
            reporter.send(ServiceExitCode::NO_ERROR);
        }
    }
}

impl Reporter {
    fn send(&self, exit_code: ServiceExitCode) {
        let is_pending = matches!(self.state, State::StartPending | State::StopPending);
        let controls_accepted = if self.state == State::Running {
            ServiceControlAccept::STOP | ServiceControlAccept::PRESHUTDOWN | ServiceControlAccept::SESSION_CHANGE
        } else {
            ServiceControlAccept::empty()
        };
        let wait_hint = match self.state {
            State::StartPending => START_HINT,
            State::StopPending => STOP_HINT,
            _ => Duration::ZERO,
        };
        let status = ServiceStatus {
            service_type: ServiceType::OWN_PROCESS,
            current_state: self.state,
            controls_accepted,
            exit_code,
            checkpoint: if is_pending { self.checkpoint } else { 0 },
            wait_hint,
            process_id: None,
        };
        if let Err(error) = self.handle.set_service_status(status) {
            tracing::warn!(error = %error, "cannot report the state of this service");
        }
    }
}

/// Logs a milestone in the event log of Windows, if this process is a service.
pub fn log_milestone(text: &str, is_failure: bool) {
    if let Some(reporter) = &*locked(&REPORTER) {
        event_log::log(&reporter.name, text, is_failure);
    }
}

/// Reports the state of a role to the service control manager; nothing if this process is not a service.
pub fn notify(notice: Notification) {
    report(|reporter| match (notice, reporter.state) {
        (Notification::Ready, State::StartPending) => {
            event_log::log(&reporter.name, &format!("{} has started", reporter.name), false);
            reporter.state = State::Running;
        }
        (Notification::Stopping, State::StartPending | State::Running) => {
            reporter.state = State::StopPending;
            reporter.checkpoint = 1;
        }
        (_, State::StartPending | State::StopPending) => reporter.checkpoint += 1,
        _ => {}
    });
}
