//! What can be built: the platforms of hosts, and the executable for servers.

/// A platform, and whether the executable has the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Target {
    /// 64-bit Linux, static, from kernel 3.10 on
    #[value(name = "linux/amd64")]
    LinuxAmd64,
    /// 32-bit Linux, static, from kernel 3.10 on
    #[value(name = "linux/386")]
    Linux386,
    /// 64-bit Windows, from Windows 7 and Server 2008 R2 on
    #[value(name = "windows/amd64")]
    WindowsAmd64,
    /// 32-bit Windows, from Windows 7 on
    #[value(name = "windows/386")]
    Windows386,
    /// 64-bit Linux, static, with the gateway: for servers
    #[value(name = "linux/amd64+gateway")]
    Gateway,
}

impl Target {
    pub(crate) const ALL: [Target; 5] =
        [Target::LinuxAmd64, Target::Linux386, Target::WindowsAmd64, Target::Windows386, Target::Gateway];

    pub(crate) fn triple(self) -> &'static str {
        match self {
            Target::LinuxAmd64 | Target::Gateway => "x86_64-unknown-linux-musl",
            Target::Linux386 => "i686-unknown-linux-musl",
            // Other than the usual targets, these import nothing that Windows 7 lacks.
            Target::WindowsAmd64 => "x86_64-win7-windows-gnu",
            Target::Windows386 => "i686-win7-windows-gnu",
        }
    }

    /// The operating system and the architecture, as package names spell them.
    pub(crate) fn words(self) -> (&'static str, &'static str) {
        match self {
            Target::LinuxAmd64 | Target::Gateway => ("linux", "amd64"),
            Target::Linux386 => ("linux", "386"),
            Target::WindowsAmd64 => ("windows", "amd64"),
            Target::Windows386 => ("windows", "386"),
        }
    }

    pub(super) fn is_windows(self) -> bool {
        self.words().0 == "windows"
    }

    /// Whether it is installed on hosts, and has a package.
    pub(crate) fn is_agent(self) -> bool {
        self != Target::Gateway
    }

    pub(super) fn suffix(self) -> &'static str {
        if self.is_windows() { ".exe" } else { "" }
    }

    /// The file name of the executable.
    pub(crate) fn executable(self) -> String {
        let (os, arch) = self.words();
        let name = if self.is_agent() { "aops" } else { "aops-gateway" };
        format!("{name}-{os}-{arch}{}", self.suffix())
    }

    /// The file name of the installer.
    pub(super) fn bootstrap(self) -> String {
        let (os, arch) = self.words();
        format!("aops-agent-service-{os}-{arch}{}", self.suffix())
    }

    /// The archive formats of its package.
    pub(super) fn packings(self) -> &'static [&'static str] {
        if self.is_windows() { &["tar.zst", "tar.gz", "zip"] } else { &["tar.zst", "tar.gz"] }
    }
}
