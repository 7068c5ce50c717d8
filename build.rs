//! What an executable knows of its build (`aops --version --verbose`), and the resources of Windows executables.
//!
//! The commit is recorded in optimized builds only: a development build would be compiled again after each commit.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    println!("cargo:rustc-env=AOPS_TARGET={}", variable("TARGET"));
    println!("cargo:rerun-if-env-changed=AOPS_COMMIT");
    let given = variable("AOPS_COMMIT");
    let commit = if !given.is_empty() {
        given
    } else if variable("PROFILE") == "release" {
        commit().unwrap_or_default()
    } else {
        String::new()
    };
    println!("cargo:rustc-env=AOPS_COMMIT={commit}");
    if variable("CARGO_CFG_TARGET_OS") == "windows" {
        resources(&variable("CARGO_CFG_TARGET_ARCH"));
    }
}

/// The commit of the working tree, followed by `+` if it has changes.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    // Written at each commit and checkout.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    println!("cargo:rerun-if-changed={log}");
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() { commit } else { format!("{commit}+") })
}

/// The manifest and the version, compiled by MinGW's `windres`.
fn resources(arch: &str) {
    const MANIFEST: &str = "assets/aops.manifest";
    println!("cargo:rerun-if-changed={MANIFEST}");
    let prefix = if arch == "x86" { "i686" } else { arch };
    let mut resource = winresource::WindowsResource::new();
    resource
        .set_windres_path(&format!("{prefix}-w64-mingw32-windres"))
        .set_ar_path(&format!("{prefix}-w64-mingw32-ar"))
        .set_manifest_file(MANIFEST)
        .set("ProductName", "aops")
        .set("FileDescription", "aops host agent manager")
        .set("InternalName", "aops")
        .set("OriginalFilename", "aops.exe");
    if let Err(error) = resource.compile() {
        println!("cargo:warning=cannot compile the resources of Windows: {error}; install binutils-mingw-w64");
        std::process::exit(1);
    }
}
