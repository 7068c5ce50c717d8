//! The products that hosts belong to, as data: how each is recognized, and its settings (`assets/products.toml`).

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::{home, platform};

const DATA: &str = include_str!("../../assets/products.toml");

/// Bytes of a marker's file that are read.
const MAX_MARKER_BYTES: u64 = 64 << 10;

/// A product.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Product {
    pub name: String,
    pub service: ServiceRegistration,
    /// The default home; `None`: the default of the system.
    home: Option<PathBuf>,
    boot: String,
    #[serde(default)]
    markers: Vec<ProductMarker>,
}

/// Whether the roles are registered with a service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceRegistration {
    /// If the host has one.
    Auto,
    None,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProductMarker {
    file: PathBuf,
    contains: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProductData {
    product: Vec<Product>,
}

impl Product {
    pub fn home(&self) -> PathBuf {
        self.home.clone().unwrap_or_else(home::default_root)
    }

    /// Advice for an operator on how to start the home at boot, where no service manager does.
    pub fn boot_advice(&self, control: &Path) -> String {
        self.boot.replace("{example}", platform::START_AT_BOOT).replace("{control}", &control.display().to_string())
    }
}

/// The product with the given name, or, for `None` and `auto`, the one whose markers are found on this host.
pub fn choose(name: Option<&str>) -> Result<Product> {
    choose_from(products()?, name, Path::new("/"))
}

fn products() -> Result<Vec<Product>> {
    let data: ProductData = toml::from_str(DATA).context("cannot read the list of products")?;
    Ok(data.product)
}

fn choose_from(products: Vec<Product>, name: Option<&str>, root: &Path) -> Result<Product> {
    let chosen = match name {
        Some(name) if name != "auto" => name.to_owned(),
        _ => {
            let found = products.iter().find(|product| product.markers.iter().any(|marker| marker.matches(root)));
            found.map_or_else(|| "generic".to_owned(), |product| product.name.clone())
        }
    };
    let known: Vec<String> = products.iter().map(|product| product.name.clone()).collect();
    match products.into_iter().find(|product| product.name == chosen) {
        Some(product) => Ok(product),
        None => bail!("cannot use {chosen:?} as a product: expected auto, {}", known.join(", ")),
    }
}

impl ProductMarker {
    /// `root` replaces `/`.
    fn matches(&self, root: &Path) -> bool {
        let path = root.join(self.file.strip_prefix("/").unwrap_or(&self.file));
        let Some(text) = &self.contains else { return path.exists() };
        let mut content = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_MARKER_BYTES).read_to_end(&mut content));
        read.is_ok() && String::from_utf8_lossy(&content).contains(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_products_are_complete_and_have_no_markers_yet() {
        let products = products().unwrap();
        let names: Vec<&str> = products.iter().map(|product| product.name.as_str()).collect();
        assert_eq!(names, ["generic", "hci", "scp"]);
        assert!(products.iter().all(|product| product.markers.is_empty() && product.boot.contains("{control}")));
        assert_eq!(choose(None).unwrap().name, "generic");
        assert_eq!(choose(Some("auto")).unwrap().name, "generic");
        assert_eq!(choose(Some("hci")).unwrap().service, ServiceRegistration::None);
        assert!(choose(Some("other")).unwrap_err().to_string().contains("generic, hci, scp"));
    }

    #[test]
    fn a_marker_recognizes_a_product_by_a_file_or_by_its_content() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/release"), "NAME=example B\n").unwrap();
        let with = |markers: &str| {
            let data: ProductData = toml::from_str(&DATA.replacen(
                "run `{control} start`\"\nmarkers = []",
                &format!("run `{{control}} start`\"\nmarkers = {markers}"),
                1,
            ))
            .unwrap();
            choose_from(data.product, None, root.path()).unwrap().name
        };
        assert_eq!(with("[{ file = \"/etc/release\" }]"), "hci");
        assert_eq!(with("[{ file = \"/etc/release\", contains = \"example B\" }]"), "hci");
        assert_eq!(with("[{ file = \"/etc/release\", contains = \"example C\" }, { file = \"/none\" }]"), "generic");
    }
}
