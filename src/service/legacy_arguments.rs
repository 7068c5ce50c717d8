//! The command line of the old system, which its platform prints and scripts use:
//! `aops-agent-service-linux-amd64 --control install --version V --agentId ID --endpoint URL`.
//!
//! It is translated to the subcommands and options of `aops service`, which report any other error in it. Its users download the
//! executable with `curl -k` and cannot verify a certificate, so an installation pins that of the first contact. The old `uninstall` did
//! not ask for confirmation, so the translation passes `--yes`.

use std::ffi::{OsStr, OsString};

/// The values of `--control`.
const VERBS: &str = "install, uninstall, start, stop, restart or status";

/// Translates `args`, without the program's name, to arguments of `aops service`; `None`: they are not in the old spelling. The error is a
/// usage error.
pub fn from_old_arguments(args: &[OsString]) -> Option<Result<Vec<OsString>, String>> {
    args.iter().any(|arg| option(arg).is_some_and(|(name, _)| name == "control")).then(|| translate(args))
}

fn translate(args: &[OsString]) -> Result<Vec<OsString>, String> {
    let mut verb: Option<String> = None;
    let mut rest = Vec::new();
    let mut trust_given = false;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let Some((name, inline)) = option(arg) else {
            rest.push(arg.clone());
            continue;
        };
        let new = match name {
            "control" => None,
            "agentId" | "agent-id" => Some("--agent-id"),
            "endpoint" => Some("--endpoint"),
            "version" => Some("--version"),
            _ => {
                trust_given |= matches!(name, "ca-cert" | "pin" | "insecure");
                rest.push(arg.clone());
                continue;
            }
        };
        let value = match inline {
            Some(value) => Some(value),
            // The next option is not a value.
            None if args.as_slice().first().is_some_and(|next| option(next).is_none()) => args.next().cloned(),
            None => None,
        };
        let value = value.filter(|value| !value.is_empty());
        match (new, value) {
            (None, Some(_)) if verb.is_some() => return Err("--control can be given only once".to_owned()),
            (None, Some(value)) => verb = Some(value.to_string_lossy().into_owned()),
            (None, None) => return Err(format!("--control needs a value: {VERBS}")),
            (Some(new), Some(value)) => rest.extend([new.into(), value]),
            (Some(new), None) => return Err(format!("{new} needs a value")),
        }
    }
    let verb = verb.ok_or_else(|| format!("--control needs a value: {VERBS}"))?;
    let mut new: Vec<OsString> = match verb.as_str() {
        "install" if !trust_given => vec!["install".into(), "--pin-first-contact".into()],
        "uninstall" => vec!["uninstall".into(), "--yes".into()],
        "install" | "start" | "stop" | "restart" | "status" => vec![verb.clone().into()],
        other => return Err(format!("invalid value {other:?} for --control: expected {VERBS}")),
    };
    if verb != "install" {
        remove_install_options(&mut rest);
    }
    new.extend(rest);
    Ok(new)
}

/// Removes the options of `install`: scripts give the same options to every verb.
fn remove_install_options(rest: &mut Vec<OsString>) {
    let mut kept = Vec::new();
    let mut args = rest.drain(..);
    while let Some(arg) = args.next() {
        if arg == "--agent-id" || arg == "--endpoint" || arg == "--version" {
            args.next();
        } else {
            kept.push(arg);
        }
    }
    drop(args);
    *rest = kept;
}

/// The name of an option, which has one or two dashes, and the value after its `=`.
fn option(arg: &OsStr) -> Option<(&str, Option<OsString>)> {
    let text = arg.to_str()?;
    let text = text.strip_prefix("--").or_else(|| text.strip_prefix('-'))?;
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.into())),
        None => (text, None),
    };
    name.starts_with(|first: char| first.is_ascii_alphabetic()).then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(line: &str) -> Option<Result<String, String>> {
        let args: Vec<OsString> = line.split_whitespace().map(Into::into).collect();
        from_old_arguments(&args)
            .map(|result| result.map(|args| args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ")))
    }

    #[test]
    fn the_old_command_line_is_translated() {
        for (old, new) in [
            (
                "--control install --version c57f6a1d --agentId 5402204854438 --endpoint https://127.0.0.1:8888",
                "install --pin-first-contact --version c57f6a1d --agent-id 5402204854438 --endpoint https://127.0.0.1:8888",
            ),
            (
                "--control=install --version=c57f6a1d --agentId=1 --endpoint=https://h:1/x=y",
                "install --pin-first-contact --version c57f6a1d --agent-id 1 --endpoint https://h:1/x=y",
            ),
            (
                "-control install -version V -agentId 1 -endpoint https://h",
                "install --pin-first-contact --version V --agent-id 1 --endpoint https://h",
            ),
            (
                "--endpoint https://h --agentId 1 --control install",
                "install --pin-first-contact --endpoint https://h --agent-id 1",
            ),
            (
                "--control install --agentId 1 --endpoint https://h --home /srv/a --service none --ca-cert ca.pem",
                "install --agent-id 1 --endpoint https://h --home /srv/a --service none --ca-cert ca.pem",
            ),
            ("--control install --pin=00 --agentId 1", "install --pin=00 --agent-id 1"),
            ("--control install --insecure --agentId 1", "install --insecure --agent-id 1"),
            ("--control start", "start"),
            ("--control stop", "stop"),
            ("-control=restart", "restart"),
            ("--control status --home /srv/a", "status --home /srv/a"),
            ("--control uninstall", "uninstall --yes"),
            ("--control stop --agentId 1 --version V --home /srv/a", "stop --home /srv/a"),
        ] {
            assert_eq!(translated(old).expect(old), Ok(new.to_owned()), "{old}");
        }
    }

    #[test]
    fn errors_of_the_old_command_line_are_reported() {
        for (old, words) in [
            ("--control", "--control needs a value: install"),
            ("--control=", "--control needs a value"),
            ("--control --version V", "--control needs a value"),
            ("--control remove", "\"remove\""),
            ("--control start --control stop", "only once"),
            ("--control install --version --agentId 1", "--version needs a value"),
            ("--control install --agentId", "--agent-id needs a value"),
        ] {
            let error = translated(old).expect(old).expect_err(old);
            assert!(error.contains(words), "{old}: {error}");
        }
    }

    #[test]
    fn the_new_command_line_is_not_translated() {
        for new in [
            "",
            "--version",
            "install --agent-id 1 --endpoint https://h",
            "control status",
            "status --json",
            "-- control",
        ] {
            assert_eq!(translated(new), None, "{new}");
        }
    }
}
