//! A virtual machine with a kernel of its own: QEMU without KVM, so it runs on any machine, an order of magnitude slower than this one.
//!
//! ```text
//! this process ── agent.sock ── second serial port ── agent.sh     a command in, its output and exit code out
//!              ── console.log ─ first serial port ─── the kernel's and systemd's messages
//!              ── kill ──────── a power cut: what the guest has not written to its disks is lost
//! guest ──── 10.0.2.2 ───────── loopback of this machine
//! ```
//!
//! QEMU's command line has the machine's directory, and QEMU is killed when the thread that started it ends: no run leaves one behind.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::kernel::Kernel;
use crate::apt;
use crate::command::{say, text};
use crate::wait::try_for;

/// The programs that a machine and its image need.
pub(crate) const NEEDS: &[apt::Need] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("setpriv", "util-linux"),
    ("depmod", "kmod"),
    ("mke2fs", "e2fsprogs"),
    ("debootstrap", "debootstrap"),
];

/// The address of this machine's loopback in the guest.
pub(crate) const HOST_ADDRESS: &str = "10.0.2.2";

/// The deadline for a boot until the agent answers, on a busy machine.
const BOOT: Duration = Duration::from_secs(180);
/// A boot after so many panics of the kernel fails.
const MAX_PANICS: u32 = 3;
/// The deadline for an orderly shutdown.
const SHUTDOWN: Duration = Duration::from_secs(120);
/// The interval in which a wait for the agent checks the machine.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Mitigations, security modules and the audit only cost time. On a busy machine the guest gets too few timer ticks for the kernel's check of them.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet root=/dev/nvme0n1 rw panic=-1 net.ifnames=0 mitigations=off lsm= audit=0 no_timer_check nowatchdog";

/// A drive: a file. It is an NVMe drive, or one of virtio if it is logged.
pub(crate) struct Drive {
    pub(crate) file: PathBuf,
    /// What the guest sees in `/sys/block/nvme*/device/serial`, or of virtio in `/sys/block/vd*/serial`.
    pub(crate) serial: String,
    /// The log of every write and flush (`blklogwrites`), complete after each of them.
    pub(crate) log: Option<PathBuf>,
}

impl Drive {
    pub(crate) fn new(serial: &str, file: &Path) -> Drive {
        Drive { file: file.to_owned(), serial: serial.to_owned(), log: None }
    }
}

/// What a machine is started with.
pub(crate) struct Hardware<'a> {
    pub(crate) kernel: &'a Kernel,
    /// The first one has the root file system; the guest names them `/dev/nvme0n1`, `/dev/nvme1n1`, … in this order, but since Linux 6.2
    /// only their serial numbers are certain.
    pub(crate) drives: &'a [Drive],
    /// Mebibytes.
    pub(crate) memory: usize,
    /// The date and time at the start, as `2006-06-17T16:01:21` (UTC); otherwise this machine's.
    pub(crate) clock: Option<String>,
}

/// What a command in the guest printed, and how it exited.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A running machine. Dropping it kills it.
pub(crate) struct Machine {
    directory: PathBuf,
    qemu: Child,
    agent: BufReader<UnixStream>,
    /// The part of a line that was received.
    partial: Vec<u8>,
    commands: u64,
    booted_in: Duration,
}

impl Machine {
    /// Starts a machine whose console, socket and log are in `directory`, and waits until its agent answers. After a panic of the kernel it
    /// boots again: without KVM, QEMU 7.2 seldom executes code while another processor of the guest patches it.
    pub(crate) fn boot(directory: &Path, hardware: &Hardware<'_>) -> Result<Machine> {
        let mut panics = 0;
        loop {
            let booted = Machine::boot_once(directory, hardware);
            let panicked = booted.is_err() && read_console(directory).contains("Kernel panic");
            if !panicked || panics == MAX_PANICS {
                return booted;
            }
            panics += 1;
            say(&format!(
                "the kernel of a virtual machine panicked; it is booted again ({panics} of at most {MAX_PANICS})"
            ));
        }
    }

    fn boot_once(directory: &Path, hardware: &Hardware<'_>) -> Result<Machine> {
        let started = Instant::now();
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let socket = directory.join("agent.sock");
        crate::workspace::remove(&socket)?;
        let log = fs::File::create(directory.join("qemu.log")).context("cannot create the log of QEMU")?;
        let mut command = qemu(directory, &socket, hardware)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut qemu = command.spawn().context("cannot start QEMU")?;
        let connected = try_for(BOOT, || match (UnixStream::connect(&socket), qemu.try_wait()) {
            (Ok(stream), _) => Some(Some(stream)),
            (Err(_), Ok(None)) => None,
            _ => Some(None),
        });
        let Some(Some(stream)) = connected else {
            let _ = qemu.kill();
            let _ = qemu.wait();
            bail!("QEMU does not start: {}", fs::read_to_string(directory.join("qemu.log")).unwrap_or_default().trim());
        };
        let mut machine = Machine {
            directory: directory.to_owned(),
            qemu,
            agent: BufReader::new(stream),
            partial: Vec::new(),
            commands: 0,
            booted_in: Duration::ZERO,
        };
        machine.agent.get_ref().set_read_timeout(Some(CHECK_INTERVAL)).context("cannot set a timeout")?;
        machine.answer(0, BOOT).context("the virtual machine does not boot")?;
        machine.booted_in = started.elapsed();
        Ok(machine)
    }

    /// The time from the start until the agent answered.
    pub(crate) fn booted_in(&self) -> Duration {
        self.booted_in
    }

    /// Runs a shell script in the guest.
    pub(crate) fn run(&mut self, script: &str, deadline: Duration) -> Result<Ran> {
        self.send(script)?;
        self.answer(self.commands, deadline).with_context(|| format!("cannot run in the virtual machine: {script}"))
    }

    /// Runs a shell script in the guest; returns its output. An error if it fails.
    pub(crate) fn read(&mut self, script: &str, deadline: Duration) -> Result<String> {
        let ran = self.run(script, deadline)?;
        ensure!(
            ran.code == 0,
            "a command in the virtual machine exited with {}: {script}\n{}{}",
            ran.code,
            ran.stdout,
            ran.stderr
        );
        Ok(ran.stdout)
    }

    /// A power cut: kills QEMU at once.
    pub(crate) fn cut(mut self) -> Result<()> {
        self.qemu.kill().context("cannot kill QEMU")?;
        self.qemu.wait().map(drop).context("cannot wait for QEMU")
    }

    /// An error with the machine's last messages if it has exited.
    pub(crate) fn is_running(&mut self) -> Result<()> {
        let ended = self.qemu.try_wait().context("cannot wait for QEMU")?;
        ensure!(ended.is_none(), "the virtual machine has exited unexpectedly\n{}", self.console());
        Ok(())
    }

    /// Shuts the guest down in order.
    pub(crate) fn power_off(mut self) -> Result<()> {
        self.send("systemctl poweroff")?;
        let ended = try_for(SHUTDOWN, || self.qemu.try_wait().ok().flatten());
        ended.map(drop).with_context(|| format!("the virtual machine does not shut down\n{}", self.console()))
    }

    /// The end of the messages on the console.
    pub(crate) fn console(&self) -> String {
        const LINES: usize = 40;
        let text = read_console(&self.directory);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }

    fn send(&mut self, script: &str) -> Result<()> {
        self.commands += 1;
        let line = format!("{} {}\n", self.commands, BASE64.encode(script.as_bytes()));
        self.agent.get_mut().write_all(line.as_bytes()).context("cannot reach the agent of the virtual machine")
    }

    fn answer(&mut self, number: u64, deadline: Duration) -> Result<Ran> {
        let started = Instant::now();
        loop {
            // The newline is kept: it distinguishes a complete line from a part of one.
            match self.agent.by_ref().read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("the virtual machine has ended\n{}", self.console()),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = String::from_utf8_lossy(&std::mem::take(&mut self.partial)).into_owned();
                    if let Some(ran) = parse(&line, number)? {
                        return Ok(ran);
                    }
                }
                Ok(_) => (),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => (),
                Err(error) => return Err(error).context("cannot read from the virtual machine's agent"),
            }
            ensure!(started.elapsed() < deadline, "no answer in {deadline:?}\n{}", self.console());
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn read_console(directory: &Path) -> String {
    let text = fs::read(directory.join("console.log")).unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}

/// The answer to command `number`, or `None` if the line is something else, such as the answer to an abandoned command.
fn parse(line: &str, number: u64) -> Result<Option<Ran>> {
    let words: Vec<_> = line.split_whitespace().collect();
    let ["=", its_number, code, stdout, stderr] = words[..] else { return Ok(None) };
    if its_number.parse() != Ok(number) {
        return Ok(None);
    }
    let decoded = |field: &str| -> Result<String> {
        let bytes = BASE64.decode(field.trim_start_matches(':')).context("the agent's answer is not base64")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let code = code.parse().context("the agent's answer has no exit code")?;
    Ok(Some(Ran { code, stdout: decoded(stdout)?, stderr: decoded(stderr)? }))
}

fn qemu(directory: &Path, socket: &Path, hardware: &Hardware<'_>) -> Result<Command> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    command.args(["-accel", "tcg", "-cpu", "qemu64,+rdrand", "-smp", "2"]);
    command.arg("-m").arg(hardware.memory.to_string());
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&hardware.kernel.image).args(["-append", KERNEL_ARGUMENTS]);
    let console = directory.join("console.log");
    command.arg("-chardev").arg(format!("file,id=console,path={}", text(&console)));
    command.arg("-chardev").arg(format!("socket,id=agent,path={},server=on,wait=off", text(socket)));
    command.args(["-serial", "chardev:console", "-serial", "chardev:agent"]);
    command.args(["-netdev", "user,id=network", "-device", "virtio-net-pci,netdev=network,romfile="]);
    if let Some(clock) = &hardware.clock {
        command.arg("-rtc").arg(format!("base={clock}"));
    }
    for (number, drive) in hardware.drives.iter().enumerate() {
        let file = format!("driver=file,discard=unmap,filename={},node-name=file{number}", text(&drive.file));
        command.args(["-blockdev", &file]);
        let mut node = format!("file{number}");
        if let Some(log) = &drive.log {
            fs::File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
            command.arg("-blockdev").arg(format!("driver=file,filename={},node-name=log{number}", text(log)));
            let mut logged =
                format!("driver=blklogwrites,discard=unmap,file={node},log=log{number},node-name=logged{number}");
            // Otherwise a killed machine's log counts fewer writes than it has.
            let _ = write!(logged, ",log-super-update-interval=1");
            command.args(["-blockdev", &logged]);
            node = format!("logged{number}");
        }
        // QEMU's NVMe ignores the flag FUA of a write; with virtio, the guest flushes after it, and the log has that.
        let device = if drive.log.is_some() { "virtio-blk-pci" } else { "nvme" };
        command.arg("-device").arg(format!("{device},drive={node},serial={}", drive.serial));
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_output_and_exit_code() {
        let line = format!("= 7 3 :{} :\n", BASE64.encode(b"so it is\n"));
        let ran = parse(&line, 7).unwrap().unwrap();
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (3, "so it is\n", ""));
    }

    #[test]
    fn other_lines_are_no_answer() {
        assert!(parse("= 6 0 : :\n", 7).unwrap().is_none());
        assert!(parse("login:\n", 7).unwrap().is_none());
        assert!(parse("= 7 0 :?? :\n", 7).is_err());
    }
}
