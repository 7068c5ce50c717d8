//! What operators write into their settings, and the result.

use std::fs;

use proptest::prelude::*;

use super::*;

const PIN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn config(text: &str) -> Config {
    Config::parse(text).unwrap().config
}

fn rejection(text: &str) -> String {
    format!("{:#}", Config::parse(text).unwrap_err())
}

fn home() -> (tempfile::TempDir, Home) {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::new(directory.path());
    for (path, _) in home.directories() {
        fs::create_dir_all(path).unwrap();
    }
    (directory, home)
}

#[test]
fn every_key_is_read_and_a_bare_number_is_seconds_or_mib() {
    let read = config(
        "heartbeatSrv = [\"https://a:1\", \"https://b:2\"]\nheartbeatInterval = 10\nspmMaxMem = 100\nspaMaxMem = \"1GiB\"\n\
         downloadTimeout = \"2h\"\ncaCert = \"etc/ca.pem\"\nproduct = \"hci\"\nlogMaxSize = \"1MiB\"\nupgradeTrial = \"1m\"\n",
    );
    assert_eq!(read.heartbeat_srv.len(), 2);
    assert_eq!(read.heartbeat_interval, Span(Duration::from_secs(10)));
    assert_eq!(read.spm_max_mem, Size(100 << 20));
    assert_eq!(read.spa_max_mem, Size(1 << 30));
    assert_eq!(read.download_timeout, Span(Duration::from_secs(7_200)));
    assert_eq!(read.certificate, CertificateCheck::Authority("etc/ca.pem".into()));
    assert_eq!(read.product.as_deref(), Some("hci"));
    assert_eq!(read.log_max_size, Size(1 << 20));
    assert_eq!(read.upgrade_trial, Span(Duration::from_secs(60)));

    let srv = "heartbeatSrv = \"https://a:1\"\n";
    assert_eq!(config(srv), Config { heartbeat_srv: vec!["https://a:1".parse().unwrap()], ..Config::default() });
    assert_eq!(config(&format!("{srv}pinFirstContact = true")).certificate, CertificateCheck::FirstContact);
    assert_eq!(config(&format!("{srv}insecure = true")).certificate, CertificateCheck::Unchecked);
    assert_eq!(config(&format!("{srv}insecure = false")).certificate, CertificateCheck::System);
    assert!(
        matches!(config(&format!("{srv}pin = \"{PIN}\"")).certificate, CertificateCheck::Pinned(pins) if pins.len() == 1)
    );
}

#[test]
fn an_error_names_the_line_the_key_and_what_is_expected() {
    let srv = "heartbeatSrv = \"https://a:1\"";
    for (text, line, words) in [
        ("\n\nheartbeatSrv = 5", "line 3", &["heartbeatSrv", "endpoint"][..]),
        ("heartbeatSrv = \"ftp://a\"", "line 1", &["heartbeatSrv", "endpoint"]),
        ("heartbeatSrv = []", "line 1", &["heartbeatSrv"]),
        (&format!("{srv}\nheartbeatInterval = \"0s\""), "line 2", &["heartbeatInterval", "from 1s to 1h"]),
        (&format!("{srv}\nheartbeatInterval = \"2h\""), "line 2", &["heartbeatInterval", "from 1s to 1h"]),
        (&format!("{srv}\nspmMaxMem = \"1MiB\""), "line 2", &["spmMaxMem", "from 16MiB"]),
        (&format!("{srv}\nspmMaxMem = 1.5"), "line 2", &["spmMaxMem", "64MiB"]),
        (&format!("{srv}\ninsecure = \"yes\""), "line 2", &["insecure", "true or false"]),
        (&format!("{srv}\npin = \"12\""), "line 2", &["pin", "SHA-256"]),
        (&format!("{srv}\ndownloadStall = \"11m\""), "line 2", &["downloadStall", "from 1s to 10m"]),
        (&format!("{srv}\ndownloadRate = \"1KiB/s\""), "line 2", &["downloadRate", "from 64KiB/s"]),
        (&format!("{srv}\ndownloadRate = 10"), "line 2", &["downloadRate", "10MiB/s"]),
        (&format!("{srv}\nproxy = \"socks5://h:1\""), "line 2", &["proxy", "only http:// and https://"]),
        (&format!("{srv}\nnoProxy = [\"10.0.0.0/99\"]"), "line 2", &["noProxy", "10.0.0.0/8"]),
        (&format!("{srv}\nproduct = "), "line 2", &[]),
        (&format!("{srv}\n{srv}"), "line 2", &["duplicate key"]),
    ] {
        let error = rejection(text);
        assert!(error.contains(line), "{text:?}: {error}");
        for word in words {
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }
    assert!(rejection("spmMaxMem = 64").contains("heartbeatSrv"));
}

#[test]
fn contradictory_trust_is_rejected() {
    let srv = "heartbeatSrv = \"https://a:1\"";
    for pair in [
        "insecure = true\npinFirstContact = true",
        "caCert = \"a\"\ninsecure = true",
        &format!("caCert = \"a\"\npin = \"{PIN}\""),
    ] {
        let error = rejection(&format!("{srv}\n{pair}"));
        assert!(error.contains("at most one of caCert, pin, pinFirstContact and insecure"), "{error}");
    }
    assert!(Config::parse(&format!("{srv}\ncaCert = \"a\"\ninsecure = false")).is_ok());
}

#[test]
fn unknown_keys_are_reported_by_name_and_line() {
    let parsed = Config::parse("heartbeatSrv = \"https://a:1\"\nspmmaxmem = 3\n[later]\nx = 1\n").unwrap();
    let reported: Vec<String> = parsed.unknown.iter().map(ToString::to_string).collect();
    assert_eq!(
        reported,
        ["line 2: unknown key \"spmmaxmem\" (did you mean spmMaxMem?)", "line 3: unknown key \"later\""]
    );
}

#[test]
fn rendered_settings_parse_back() {
    let mut all = config(
        "heartbeatSrv = [\"https://a:1\", \"https://b:2\"]\nheartbeatInterval = 90\nspmMaxMem = 100\nspaMaxMem = 50",
    );
    all.download_timeout = Span(Duration::from_secs(5));
    all.download_stall = Span(Duration::from_secs(7));
    all.download_rate = Some(Size(10 << 20));
    all.proxy = ProxyChoice::Proxy("http://user:p%40ss@proxy.example:3128".parse().unwrap());
    all.no_proxy = Some(vec![".internal".parse().unwrap(), "10.0.0.0/8".parse().unwrap(), "a:5".parse().unwrap()]);
    all.product = Some("scp \"quoted\" \\".to_owned());
    all.log_max_size = Size(1 << 20);
    all.upgrade_trial = Span(Duration::from_secs(5));
    for certificate in [
        CertificateCheck::System,
        CertificateCheck::Authority("etc/ca.pem".into()),
        CertificateCheck::Pinned(vec![PIN.parse().unwrap(), PIN.replace('0', "a").parse().unwrap()]),
        CertificateCheck::FirstContact,
        CertificateCheck::Unchecked,
    ] {
        all.certificate = certificate;
        let text = render(&all);
        assert_eq!(Config::parse(&text).unwrap(), ParsedSettings { config: all.clone(), unknown: vec![] }, "{text}");
        assert!(text.lines().all(|line| line.len() <= 200) && text.starts_with("# Settings"), "{text}");
    }
}

#[test]
fn the_template_shows_the_real_defaults() {
    let text = include_str!("../../assets/conf.toml");
    let mut uncommented = String::new();
    for key in keys::KEYS {
        let shown = text.lines().find(|line| line.starts_with(&format!("#{key} = "))).expect(key);
        // These keys have an example and no default.
        let example = ["caCert", "pin", "downloadRate", "proxy", "noProxy"].contains(key);
        if example && *key != "caCert" && *key != "pin" {
            config(&format!("heartbeatSrv = \"https://a:1\"\n{}", &shown[1..]));
        }
        if !example {
            uncommented.push_str(&format!("{}\n", &shown[1..]));
        }
    }
    let mut shown = config(&uncommented);
    shown.heartbeat_srv.clear();
    shown.product = None;
    assert_eq!(shown, Config::default());
}

#[test]
fn an_edit_keeps_unchanged_values_and_comments() {
    let text = "# mine\nspmMaxMem = 99 # because\nheartbeatSrv = [ # both\n  \"https://a:1\",\n  \"https://b:2\",\n] # list\n\
                pinFirstContact = true\n#heartbeatInterval = \"30s\"\n";
    let old = config(text);
    let mut new = old.clone();
    new.heartbeat_srv = vec!["https://c:3".parse().unwrap()];
    new.certificate = CertificateCheck::Unchecked;
    new.heartbeat_interval = Span(Duration::from_secs(60));
    new.product = Some("hci".to_owned());
    assert_eq!(
        edit(text, &old, &new),
        "# mine\nspmMaxMem = 99 # because\nheartbeatSrv = \"https://c:3\" # list\nheartbeatInterval = \"1m\"\n\
         insecure = true\nproduct = \"hci\"\n"
    );
    assert_eq!(edit(text, &old, &old), text);
}

#[test]
fn with_a_malformed_file_a_start_uses_the_last_good_settings_and_reports_why() {
    let (_directory, home) = home();
    fs::write(home.config(), "heartbeatSrv = \"https://a:1\"\n").unwrap();
    let first = Config::load(&home).unwrap();
    assert!(first.problem.is_none());

    fs::write(home.config(), "heartbeatSrv = \"https://").unwrap();
    let second = Config::load(&home).unwrap();
    assert_eq!(second.config, first.config);
    let problem = format!("{:#}", second.problem.unwrap());
    assert!(problem.contains("conf.toml") && problem.contains("line 1"), "{problem}");

    fs::remove_file(home.config()).unwrap();
    assert!(Config::load(&home).unwrap().problem.is_some());
    fs::remove_file(home.last_good_config()).unwrap();
    assert!(Config::load(&home).is_err());
}

#[test]
fn an_unknown_key_fails_an_install_but_not_a_start() {
    let (_directory, home) = home();
    fs::write(home.config(), "heartbeatSrv = \"https://a:1\"\nnewer = 1\n").unwrap();
    assert_eq!(Config::load(&home).unwrap().unknown.len(), 1);
    let error = format!("{:#}", Config::read_strictly(&home).unwrap_err());
    assert!(error.contains("conf.toml") && error.contains("line 2: unknown key \"newer\""), "{error}");
}

#[test]
fn trust_uses_the_paths_of_the_home() {
    let home = Home::new("/h");
    let with = |certificate| Config { certificate, ..Config::default() }.trust(&home);
    assert_eq!(with(CertificateCheck::Authority("etc/ca.pem".into())), Trust::CaFile(home.ca_file()));
    assert_eq!(with(CertificateCheck::FirstContact), Trust::FirstContact { pins: home.pins() });
}

#[test]
fn the_settings_of_an_old_installation_are_imported() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("etc")).unwrap();
    fs::write(
        directory.path().join("etc/conf.yml"),
        "# old\nheartbeatSrv: https://127.0.0.1:8888\nheartbeatInterval: 60\nspmMaxMem: 200\ndownloadTimeout: 5m\n\
         spaMaxMem: lots\ncpuLimit: 5\n",
    )
    .unwrap();
    fs::write(directory.path().join("agentId"), "not an id\n").unwrap();
    fs::write(directory.path().join("etc/agentId"), "5402204854438\n").unwrap();
    let imported = import::read(directory.path()).unwrap();
    assert_eq!(imported.agent_id, Some("5402204854438".parse().unwrap()));
    let config = imported.config.unwrap();
    assert_eq!(config.heartbeat_srv, ["https://127.0.0.1:8888".parse().unwrap()]);
    assert_eq!(config.heartbeat_interval, Span(Duration::from_secs(60)));
    assert_eq!(config.spm_max_mem, Size(200 << 20));
    assert_eq!(config.spa_max_mem, Config::default().spa_max_mem);
    assert_eq!(imported.warnings.len(), 3, "{:?}", imported.warnings);
    for word in ["cpuLimit", "spaMaxMem", "agentId"] {
        assert!(imported.warnings.iter().any(|warning| warning.contains(word)), "{word}");
    }
}

#[test]
fn an_old_list_of_endpoints_and_an_empty_file_are_imported() {
    let (config, warnings) = import::parse("heartbeatSrv:\n  - https://a:1\n  - https://b:2\n").unwrap();
    assert_eq!((config.heartbeat_srv.len(), warnings.len()), (2, 0));
    assert_eq!(import::parse("\n").unwrap().0, Config::default());
    assert!(import::parse("heartbeatSrv: [").is_err());
    let nothing = tempfile::tempdir().unwrap();
    assert_eq!(import::read(nothing.path()).unwrap(), import::Imported::default());
}

#[test]
fn the_proxy_of_the_settings_overrides_the_environment_and_its_password_stays_private() {
    let srv = "heartbeatSrv = \"https://a.example:1\"\n";
    let environment = |name: &str| match name {
        "HTTPS_PROXY" => Some("http://theirs:1".to_owned()),
        "NO_PROXY" => Some("b.example".to_owned()),
        _ => None,
    };
    let through = |text: &str, host: &str| {
        let proxies = config(&format!("{srv}{text}")).proxies(environment);
        proxies.of(&format!("https://{host}.example").parse().unwrap()).unwrap().map(ToString::to_string)
    };
    let (theirs, ours) = (Some("http://theirs:1".to_owned()), Some("http://ours:3".to_owned()));
    assert_eq!((through("", "a"), through("", "b")), (theirs.clone(), None));
    assert_eq!(through("proxy = \"none\"", "a"), None);
    let chosen = "proxy = \"http://u:secret@ours:3\"\n";
    assert_eq!((through(chosen, "a"), through(chosen, "b")), (ours.clone(), None));
    let both = format!("{chosen}noProxy = \"a.example, c.example\"");
    assert_eq!((through(&both, "a"), through(&both, "b"), through(&both, "c")), (None, ours, None));
    assert_eq!((through("noProxy = []", "a"), through("noProxy = []", "b")), (theirs.clone(), theirs));

    let settings = config(&format!("{srv}{chosen}"));
    assert_eq!(settings.access(), store::Access::Private);
    assert!(!format!("{settings:?}").contains("secret"), "{settings:?}");
    assert_eq!(config(srv).access(), store::Access::Public);
    let error = rejection(&format!("{srv}proxy = \"socks5://u:secret@h:1\""));
    assert!(!error.contains("secret"), "{error}");
}

fn any_config() -> impl Strategy<Value = Config> {
    let endpoints =
        prop::collection::vec(prop::sample::select(vec!["https://a:1", "https://[::1]:8888", "https://b/x"]), 1..4);
    let certificate = prop_oneof![
        Just(CertificateCheck::System),
        "[a-z]([a-z\"'\\\\ #]{0,10}[a-z#])?".prop_map(|path| CertificateCheck::Authority(path.into())),
        Just(CertificateCheck::Pinned(vec![PIN.parse().unwrap()])),
        Just(CertificateCheck::FirstContact),
        Just(CertificateCheck::Unchecked),
    ];
    let product = prop::option::of(prop::sample::select(vec!["generic", "hci", "scp"]));
    (endpoints, 1..3600_u64, 16..2048_u64, 16..2048_u64, 1..86_400_u64, certificate, product).prop_map(
        |(endpoints, interval, spm, spa, timeout, certificate, product)| Config {
            heartbeat_srv: endpoints.iter().map(|endpoint| endpoint.parse().unwrap()).collect(),
            heartbeat_interval: Span(Duration::from_secs(interval)),
            spm_max_mem: Size(spm << 20),
            spa_max_mem: Size(spa << 20),
            download_timeout: Span(Duration::from_secs(timeout)),
            certificate,
            product: product.map(str::to_owned),
            ..Config::default()
        },
    )
}

proptest! {
    /// Any settings parse back after they were written into a new file or an operator's.
    #[test]
    fn written_settings_parse_back(old in any_config(), new in any_config()) {
        let text = render(&old);
        prop_assert_eq!(&config(&text), &old);
        prop_assert_eq!(&edit(&text, &old, &old), &text);
        prop_assert_eq!(config(&edit(&text, &old, &new)), new);
    }

    /// Damage is an error or changes a setting, and every unknown key is reported with an existing line.
    #[test]
    fn unknown_keys_of_damaged_settings_have_an_existing_line(old in any_config(), at in any::<prop::sample::Index>(), damage in "[ -~\n]{0,3}") {
        let mut text = render(&old);
        let at = at.index(text.len());
        prop_assume!(text.is_char_boundary(at));
        text.insert_str(at, &damage);
        if let Ok(parsed) = Config::parse(&text) {
            let lines = text.lines().count();
            prop_assert!(parsed.unknown.iter().all(|unknown| (1..=lines).contains(&unknown.line)), "{:?}", parsed.unknown);
        }
    }
}
