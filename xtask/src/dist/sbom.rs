//! A software bill of materials of an executable: CycloneDX 1.5, from cargo's metadata and the checksums of the lock file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Target;
use crate::command::{cargo, read};
use crate::workspace;

/// The document, of what the executable for `target` contains: no tests, no build scripts.
pub(super) fn document(target: Target) -> Result<String> {
    let mut command = cargo();
    command.current_dir(workspace::root()).args(["metadata", "--format-version", "1", "--locked", "--filter-platform"]);
    command.arg(target.triple().replace("-win7-", "-pc-"));
    if target.is_agent() {
        command.arg("--no-default-features");
    }
    let metadata: Value = serde_json::from_str(&read(&mut command)?).context("cannot parse cargo's metadata")?;
    let lock = fs::read_to_string(workspace::root().join("Cargo.lock")).context("cannot read Cargo.lock")?;
    let document = bill(&metadata, &checksums(&lock), target)?;
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

/// The checksums of the lock file, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for package in lock.split("[[package]]") {
        let field = |name: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""))?;
            Some(line.trim_end_matches('"').to_owned())
        };
        if let (Some(name), Some(version), Some(checksum)) = (field("name"), field("version"), field("checksum")) {
            found.insert((name, version), checksum);
        }
    }
    found
}

fn bill(metadata: &Value, checksums: &BTreeMap<(String, String), String>, target: Target) -> Result<Value> {
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages: BTreeMap<String, Value> =
        array(&metadata["packages"]).into_iter().map(|package| (text(&package["id"]), package)).collect();
    let nodes: BTreeMap<String, Value> =
        array(&metadata["resolve"]["nodes"]).into_iter().map(|node| (text(&node["id"]), node)).collect();
    let root = packages.iter().find(|(_, package)| package["name"] == "aops").context("cargo knows no package aops")?;
    let linked = |id: &str| -> Vec<String> {
        let is_linked = |dependency: &Value| array(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
        let dependencies = nodes.get(id).map(|node| array(&node["deps"])).unwrap_or_default();
        dependencies
            .iter()
            .filter(|dependency| is_linked(dependency))
            .map(|dependency| text(&dependency["pkg"]))
            .collect()
    };
    let mut reached = BTreeSet::new();
    let mut left = vec![root.0.clone()];
    while let Some(id) = left.pop() {
        if reached.insert(id.clone()) {
            left.extend(linked(&id));
        }
    }
    let reference = |id: &str| {
        let package = &packages[id];
        format!("pkg:cargo/{}@{}", text(&package["name"]), text(&package["version"]))
    };
    let component = |id: &str| {
        let package = &packages[id];
        let (name, version) = (text(&package["name"]), text(&package["version"]));
        let mut component = json!({
            "type": "library", "bom-ref": reference(id), "name": name, "version": version, "purl": reference(id),
            "scope": "required",
        });
        if let Some(checksum) = checksums.get(&(name, version)) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        }
        // Some packages still separate alternatives by a slash.
        let license = text(&package["license"]).replace('/', " OR ");
        if !license.is_empty() {
            component["licenses"] = json!([{"expression": license}]);
        }
        component
    };
    let (os, arch) = target.words();
    let mut own = component(root.0);
    own["type"] = json!("application");
    own["properties"] = json!([{"name": "aops:platform", "value": format!("{os}/{arch}")}]);
    let others = reached.iter().filter(|id| *id != root.0);
    let dependencies = reached.iter().map(|id| {
        let on: BTreeSet<_> = linked(id).iter().map(|id| reference(id)).collect();
        json!({"ref": reference(id), "dependsOn": on})
    });
    Ok(json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": own},
        "components": others.map(|id| component(id)).collect::<Vec<_>>(),
        "dependencies": dependencies.collect::<Vec<_>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bill_lists_what_is_linked_with_checksum_and_licence() {
        let document: Value = serde_json::from_str(&document(Target::LinuxAmd64).unwrap()).unwrap();
        let components = document["components"].as_array().unwrap();
        let find = |name: &str| components.iter().find(|component| component["name"] == name);
        let anyhow = find("anyhow").unwrap();
        assert_eq!(anyhow["hashes"][0]["content"].as_str().unwrap().len(), 64);
        assert_eq!(anyhow["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert!(find("rustix").is_some());
        for absent in ["axum", "windows-sys", "proptest", "aops", "cc"] {
            assert!(find(absent).is_none(), "{absent}");
        }
        assert_eq!(document["metadata"]["component"]["name"], "aops");
        // Every reference names a component.
        let own = &document["metadata"]["component"];
        let known: BTreeSet<_> =
            components.iter().chain([own]).map(|component| component["bom-ref"].as_str().unwrap()).collect();
        for entry in document["dependencies"].as_array().unwrap() {
            assert!(entry["dependsOn"].as_array().unwrap().iter().all(|on| known.contains(on.as_str().unwrap())));
        }
    }

    #[test]
    fn the_bill_of_windows_and_of_the_gateway_differ() {
        let names = |target| -> BTreeSet<String> {
            let document: Value = serde_json::from_str(&document(target).unwrap()).unwrap();
            let components = document["components"].as_array().unwrap();
            components.iter().map(|component| component["name"].as_str().unwrap().to_owned()).collect()
        };
        assert!(names(Target::Windows386).contains("windows-sys"));
        assert!(names(Target::Gateway).contains("axum"));
    }
}
