//! A compiler for musl on 32-bit x86: the machine's gcc with the musl and the gcc libraries of that width, which are only fetched and
//! unpacked. Nothing is installed: Debian's packages for i386 would need a second architecture on the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::apt::Private;
use crate::command::{read, say, text};
use crate::workspace;

/// The suite of the machine's gcc is found by its version.
const SUITES: &[&str] = &["bookworm", "trixie", "bullseye"];

/// The path of a program that compiles and links C like `musl-gcc`, for 32 bits.
pub(super) fn compiler() -> Result<String> {
    let name = "musl-i386";
    let place = workspace::cache_path(name);
    let made = workspace::cached(name, |unfinished| make(unfinished, &place))?;
    Ok(text(&made.join("gcc")))
}

/// `place`: where the finished directory will be.
fn make(unfinished: &Path, place: &Path) -> Result<()> {
    let version = read(Command::new("gcc").arg("-dumpversion"))?;
    let major = version.split('.').next().unwrap_or_default();
    let libraries = format!("lib32gcc-{major}-dev");
    say(&format!("fetching musl and {libraries} for 32-bit x86 (once)"));
    let fetched = SUITES.iter().find_map(|suite| {
        let private = Private::with_i386(suite).ok()?;
        private.versions(&libraries).ok().filter(|versions| !versions.is_empty()).map(|_| private)
    });
    let private = fetched.with_context(|| format!("cannot find {libraries} in Debian's {}", SUITES.join(", ")))?;
    private.unpack(&libraries, unfinished)?;
    private.unpack("musl-dev:i386", unfinished)?;
    let of_gcc = format!("usr/lib/gcc/x86_64-linux-gnu/{major}/32");
    for file in [format!("{of_gcc}/libgcc_eh.a"), "usr/lib/i386-linux-musl/libc.a".to_owned()] {
        ensure!(unfinished.join(&file).is_file(), "the packages have no {file}");
    }
    let (of_gcc, musl) = (text(&place.join(of_gcc)), text(&place.join("usr/lib/i386-linux-musl")));
    let include = text(&place.join("usr/include/i386-linux-musl"));
    // As musl's own `musl-gcc.specs`, for static executables only.
    let specs = format!(
        "%rename cpp_options old_cpp_options\n\n\
         *cpp_options:\n-nostdinc -isystem {include} -isystem include%s %(old_cpp_options)\n\n\
         *cc1:\n%(cc1_cpu) -nostdinc -isystem {include} -isystem include%s\n\n\
         *link_libgcc:\n-L{of_gcc} -L{musl}\n\n\
         *libgcc:\nlibgcc.a%s libgcc_eh.a%s\n\n\
         *startfile:\n{musl}/crt1.o {musl}/crti.o {of_gcc}/crtbeginT.o\n\n\
         *endfile:\n{of_gcc}/crtend.o {musl}/crtn.o\n\n\
         *link:\n-m elf_i386 -static -nostdlib %{{shared:-shared}}\n\n\
         *esp_link:\n\n\n*esp_options:\n\n\n*esp_cpp_options:\n\n\n"
    );
    fs::write(unfinished.join("musl.specs"), specs).context("cannot write the options of gcc")?;
    let script = format!("#!/bin/sh\nexec gcc -m32 -B{of_gcc} -specs={} \"$@\"\n", text(&place.join("musl.specs")));
    let path = unfinished.join("gcc");
    fs::write(&path, script).context("cannot write the compiler's script")?;
    let mut permissions = fs::metadata(&path)?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    fs::set_permissions(&path, permissions).context("cannot make the compiler's script executable")
}
