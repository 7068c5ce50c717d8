//! A model of the home's file system: which contents and names a power cut would lose now, and which sync has saved the others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::trace::Change;

/// What a power cut can lose.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Item {
    /// Content and metadata of a file, whatever its names.
    Content(usize),
    /// That a name exists and what it leads to, or that it was removed: part of its directory.
    Name(PathBuf),
}

/// The last change of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changed {
    /// The event that changed it.
    pub(super) by: usize,
    pub(super) process: i32,
    pub(super) is_removal: bool,
    /// The sync that saved it; `None`: a power cut may lose it.
    pub(super) saved_by: Option<usize>,
    /// Something depended on it since it was saved.
    pub(super) is_used: bool,
}

/// What became of items that a sync had saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fate {
    /// Changed or removed by an event before anything depended on it.
    Lost { sync: usize, by: usize },
    /// Saved again by a later sync of the same thread before anything depended on it.
    SavedAgain { sync: usize, by: usize },
}

#[derive(Debug, Default)]
pub(super) struct Disk {
    names: BTreeMap<PathBuf, usize>,
    files: usize,
    links: BTreeMap<usize, PathBuf>,
    directories: BTreeSet<usize>,
    items: BTreeMap<Item, Changed>,
    /// Not read by the checker yet.
    fates: Vec<Fate>,
}

/// The items that a sync covers as it begins: what changes later is not saved by it.
pub(super) type Snapshot = Vec<(Item, usize)>;

impl Disk {
    /// The change of an event that has succeeded.
    pub(super) fn apply(&mut self, change: &Change, by: usize, process: i32) {
        let changed = |is_removal| Changed { by, process, is_removal, saved_by: None, is_used: false };
        match change {
            Change::Open { path, creates: true, .. } => {
                let file = self.new_file(path);
                self.change(Item::Content(file), changed(false));
                self.change(Item::Name(path.clone()), changed(false));
            }
            Change::Open { truncates: false, .. } => {}
            // A file without a name is gone with the process.
            Change::Open { path, .. } | Change::Metadata(path) | Change::Write(path) if has_name(path) => {
                let file = self.file(path);
                self.change(Item::Content(file), changed(false));
            }
            Change::Directory(path) => {
                let file = self.new_file(path);
                self.directories.insert(file);
                self.change(Item::Name(path.clone()), changed(false));
            }
            Change::Remove(path) => {
                self.forget(path, by);
                self.change(Item::Name(path.clone()), changed(true));
            }
            Change::Rename { from, to } => {
                let file = self.file(from);
                if from == to || self.names.get(to) == Some(&file) {
                    // rename(2) does nothing if both are links to one file.
                    return;
                }
                self.forget(to, by);
                self.relocate(from, to);
                self.change(Item::Name(from.clone()), changed(true));
                self.change(Item::Name(to.clone()), changed(false));
            }
            Change::Link { from, to } => {
                let file = self.file(from);
                self.names.insert(to.clone(), file);
                self.change(Item::Name(to.clone()), changed(false));
            }
            Change::SymbolicLink { target, to } => {
                let file = self.new_file(to);
                self.links.insert(file, target.clone());
                self.change(Item::Name(to.clone()), changed(false));
            }
            _ => {}
        }
    }

    /// What a sync that begins now will have saved when it ends.
    pub(super) fn covered(&self, sync: &Change) -> Snapshot {
        let covers = |item: &Item| match (sync, item) {
            (Change::SyncFileSystem(_), _) => true,
            (Change::Sync(path), Item::Name(name)) => name.parent() == Some(path),
            (Change::Sync(path), Item::Content(file)) => self.names.get(path) == Some(file),
            _ => false,
        };
        self.items.iter().filter(|(item, _)| covers(item)).map(|(item, changed)| (item.clone(), changed.by)).collect()
    }

    /// A sync that began with this snapshot has ended. Returns the items that it has saved.
    pub(super) fn save(&mut self, snapshot: &Snapshot, sync: usize) -> Vec<Item> {
        let mut saved = Vec::new();
        for (item, by) in snapshot {
            let Some(changed) = self.items.get_mut(item).filter(|changed| changed.by == *by) else { continue };
            if changed.saved_by.is_none() {
                changed.saved_by = Some(sync);
                saved.push(item.clone());
            }
        }
        saved
    }

    /// As [`Disk::save`], of what earlier syncs have saved though nothing depended on it yet. `is_own`: whether a sync is of the same thread.
    pub(super) fn save_again(&mut self, snapshot: &Snapshot, sync: usize, is_own: impl Fn(usize) -> bool) {
        for (item, by) in snapshot {
            let Some(changed) = self.items.get_mut(item).filter(|changed| changed.by == *by) else { continue };
            if let Some(earlier) =
                changed.saved_by.filter(|earlier| *earlier != sync && !changed.is_used && is_own(*earlier))
            {
                changed.saved_by = Some(sync);
                self.fates.push(Fate::SavedAgain { sync: earlier, by: sync });
            }
        }
    }

    /// Nothing depends on this item: it does not count for the sync that has saved it.
    pub(super) fn ignore(&mut self, item: &Item) {
        if let Some(changed) = self.items.get_mut(item) {
            changed.is_used = true;
        }
    }

    pub(super) fn take_fates(&mut self) -> Vec<Fate> {
        std::mem::take(&mut self.fates)
    }

    /// The last change of an item, if it was changed at all.
    pub(super) fn changed(&self, item: &Item) -> Option<&Changed> {
        self.items.get(item)
    }

    /// Something depends on the item. Returns the sync that has saved it, if it is the first thing that depends on it.
    pub(super) fn depend(&mut self, item: &Item) -> Option<usize> {
        let changed = self.items.get_mut(item)?;
        let first = !std::mem::replace(&mut changed.is_used, changed.saved_by.is_some());
        changed.saved_by.filter(|_| first)
    }

    pub(super) fn exists(&self, path: &Path) -> bool {
        self.names.contains_key(path)
    }

    /// Whether a file is a directory that was created in this recording.
    pub(super) fn is_directory(&self, file: usize) -> bool {
        self.directories.contains(&file)
    }

    pub(super) fn content_of(&self, path: &Path) -> Option<Item> {
        self.names.get(path).map(|file| Item::Content(*file))
    }

    /// The target of a symbolic link that was created in this recording, as an absolute path.
    pub(super) fn target(&self, link: &Path, at: &Path) -> Option<PathBuf> {
        let target = self.links.get(self.names.get(link)?)?;
        Some(at.parent().unwrap_or(Path::new("/")).join(target))
    }

    /// Every item in a directory, except for one name.
    pub(super) fn items_in(&self, directory: &Path, except: &Path) -> Vec<Item> {
        let inside = |path: &Path| path.starts_with(directory) && path != directory && path != except;
        let contents = self.names.iter().filter(|(path, _)| inside(path)).map(|(_, file)| Item::Content(*file));
        let names = self.items.keys().filter(|item| matches!(item, Item::Name(path) if inside(path))).cloned();
        contents.chain(names).filter(|item| self.items.contains_key(item)).collect()
    }

    /// Every item that was changed and not saved.
    pub(super) fn unsaved(&self) -> impl Iterator<Item = (&Item, &Changed)> {
        self.items.iter().filter(|(_, changed)| changed.saved_by.is_none())
    }

    /// The names of a file.
    pub(super) fn names_of(&self, file: usize) -> impl Iterator<Item = &Path> {
        self.names.iter().filter(move |(_, other)| **other == file).map(|(path, _)| path.as_path())
    }

    fn new_file(&mut self, path: &Path) -> usize {
        self.files += 1;
        self.names.insert(path.to_owned(), self.files);
        self.files
    }

    /// The file of a name; one that is older than the recording is saved.
    fn file(&mut self, path: &Path) -> usize {
        match self.names.get(path) {
            Some(file) => *file,
            None => self.new_file(path),
        }
    }

    fn change(&mut self, item: Item, changed: Changed) {
        let by = changed.by;
        let before = self.items.insert(item, changed);
        self.fates.extend(before.as_ref().and_then(|before| lost(before, by)));
    }

    /// A name goes, with everything below it.
    fn forget(&mut self, path: &Path, by: usize) {
        let gone: Vec<_> = self.below(path);
        for name in gone {
            let Some(file) = self.names.remove(&name) else { continue };
            let before = self.items.remove(&Item::Name(name));
            self.fates.extend(before.as_ref().and_then(|before| lost(before, by)));
            if self.names_of(file).next().is_none() {
                let before = self.items.remove(&Item::Content(file));
                self.fates.extend(before.as_ref().and_then(|before| lost(before, by)));
            }
        }
        // Removals below it are moot.
        let below = |item: &Item| matches!(item, Item::Name(name) if name.starts_with(path));
        let first = Item::Name(path.to_owned());
        let gone: Vec<_> =
            self.items.range(first..).map(|(item, _)| item).take_while(|item| below(item)).cloned().collect();
        for item in gone {
            self.items.remove(&item);
        }
    }

    fn relocate(&mut self, from: &Path, to: &Path) {
        for name in self.below(from) {
            let new = match name.strip_prefix(from) {
                Ok(below) if below.as_os_str().is_empty() => to.to_owned(),
                Ok(below) => to.join(below),
                Err(_) => continue,
            };
            if let Some(file) = self.names.remove(&name) {
                self.names.insert(new.clone(), file);
            }
            // Names inside a directory move with it; its own is a new one.
            if let Some(changed) = self.items.remove(&Item::Name(name.clone())).filter(|_| name != from) {
                self.items.insert(Item::Name(new), changed);
            }
        }
    }

    fn below(&self, path: &Path) -> Vec<PathBuf> {
        let names = self.names.range(path.to_owned()..).map(|(name, _)| name);
        names.take_while(|name| name.starts_with(path)).cloned().collect()
    }
}

/// Whether a descriptor's path is still that of its file.
pub(super) fn has_name(path: &Path) -> bool {
    !path.to_string_lossy().ends_with(" (deleted)")
}

fn lost(changed: &Changed, by: usize) -> Option<Fate> {
    let sync = changed.saved_by.filter(|_| !changed.is_used)?;
    Some(Fate::Lost { sync, by })
}
