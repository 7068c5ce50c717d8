//! Small example trees: which are rejected, and with which message.

use super::*;

fn found(sources: &[(&str, &str)]) -> Vec<String> {
    check("src/main.rs", sources).iter().map(ToString::to_string).collect()
}

/// Two files below a root that declares them.
fn pair(a: &str, b: &str) -> Vec<String> {
    found(&[("src/main.rs", "mod a;\nmod b;"), ("src/a.rs", a), ("src/b.rs", b)])
}

#[test]
fn a_cycle_is_reported_once_with_its_imports() {
    let sources = [
        ("src/main.rs", "mod a; mod b; mod c; mod d;"),
        ("src/a.rs", "use crate::b::{X, Y};\n"),
        ("src/b.rs", "pub struct X;\npub struct Y;\nfn f() {\n    super::c::g(super::c::g());\n}"),
        ("src/c.rs", "use super::a;\nuse super::d;\npub fn g() { a::h() }"),
        ("src/d.rs", "pub fn i() {}"),
    ];
    assert_eq!(
        found(&sources),
        [
            "src/a.rs:1: an import cycle: src/a.rs imports X (line 1), Y (line 1) of src/b.rs; src/b.rs imports super::c::g (line 4) \
             of src/c.rs; src/c.rs imports a::h (line 3) of src/a.rs"
        ]
    );
    let cut: Vec<_> = sources.iter().map(|(file, text)| (*file, text.replace("a::h()", ""))).collect();
    let cut: Vec<_> = cut.iter().map(|(file, text)| (*file, text.as_str())).collect();
    assert_eq!(found(&cut), [""; 0]);
}

#[test]
fn every_form_of_import_is_found() {
    let back = "use crate::a::A;";
    for there in [
        "use crate::b::B;",
        "use super::b::{self, B};",
        "use super::{b::{B}};",
        "use crate::b::*;",
        "use crate::b; fn f() { b::g() }",
        "use crate::{b as other}; fn f() { other::g() }",
        "fn f() { use super::b; b::g() }",
        "fn f() { crate::b::g() }",
        "fn f(x: super::b::B) {}",
        "pub(super) use crate::b::B; fn f(x: B) {}",
        "mod inner { use super::super::b::B; }",
        "macro_rules! m { () => { $crate::b::g() } }",
    ] {
        assert_eq!(pair(there, back).len(), 1, "{there}");
    }
}

#[test]
fn code_that_imports_nothing_makes_no_cycle() {
    let back = "use crate::a::A;";
    for there in [
        "use crate::b;",
        "pub use crate::b::B;",
        "pub(in crate::b) struct A;",
        "// crate::b::g()\nconst A: &str = \"crate::b\";",
        "#[cfg(test)]\nmod tests { use crate::b::B; }",
        "#[cfg(test)]\nfn f() { crate::b::g() }",
        "mod inner { use super::b::B; }",
        "use std::b::B;",
        "fn f() { x.b::<u8>() }",
    ] {
        assert_eq!(pair(there, back), [""; 0], "{there}");
    }
    // Test files are declared for tests only.
    let sources = [
        ("src/main.rs", "mod a; #[cfg(test)] mod tests;"),
        ("src/a.rs", "use crate::tests::x;"),
        ("src/tests.rs", "use crate::a::A;"),
    ];
    assert_eq!(found(&sources), [""; 0]);
}

#[test]
fn a_parent_and_its_children_may_import_each_other() {
    let sources = [
        ("src/main.rs", "mod a;"),
        ("src/a.rs", "mod x; mod y;\npub struct A;\nfn f() { x::g(); y::h() }"),
        ("src/a/x.rs", "use super::A;\nuse super::y::h;"),
        ("src/a/y.rs", "use crate::a::A;"),
    ];
    assert_eq!(found(&sources), [""; 0]);
}

#[test]
fn a_re_exported_name_counts_for_the_file_that_defines_it() {
    // `B` is reached through the parent, which only re-exports it.
    let sources = [
        ("src/main.rs", "mod a;"),
        ("src/a.rs", "mod x; mod y;\npub use x::X;\npub use y::*;"),
        ("src/a/x.rs", "use super::Y;\npub struct X;"),
        ("src/a/y.rs", "use super::X;\npub struct Y;"),
    ];
    assert_eq!(
        found(&sources),
        [
            "src/a/x.rs:1: an import cycle: src/a/x.rs imports Y (line 1) of src/a/y.rs; src/a/y.rs imports X (line 1) of src/a/x.rs"
        ]
    );
}

#[test]
fn a_cycle_through_a_child_is_found() {
    let sources = [
        ("src/main.rs", "mod a; mod b;"),
        ("src/a.rs", "mod x;\nuse crate::b::B;\npub struct A;"),
        ("src/a/x.rs", "use super::A;\npub fn g() {}"),
        ("src/b.rs", "pub struct B;\nfn f() { crate::a::x::g() }"),
    ];
    assert_eq!(
        found(&sources),
        [
            "src/a.rs:2: an import cycle: src/a.rs imports B (line 2) of src/b.rs; src/b.rs imports crate::a::x::g (line 2) of src/a/x.rs"
        ]
    );
}

#[test]
fn cyclic_imports_of_names_terminate() {
    assert_eq!(pair("pub use crate::b::*; use semver::semver;", "pub use crate::a::*; use crate::a::X;"), [""; 0]);
}
