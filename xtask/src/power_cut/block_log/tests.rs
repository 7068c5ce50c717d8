//! Synthetic logs: their layout, their ends, and the disks that are rebuilt from them.

use std::fs;

use tempfile::TempDir;

use super::*;

/// A log in the making.
struct Synthetic {
    directory: TempDir,
    sector: usize,
    count: u64,
    bytes: Vec<u8>,
}

impl Synthetic {
    fn new(sector: usize) -> Synthetic {
        Synthetic { directory: tempfile::tempdir().unwrap(), sector, count: 0, bytes: vec![0; sector] }
    }

    fn entry(&mut self, first: u64, sectors: u64, flags: u64, data: &[u8]) {
        let mut entry = Vec::new();
        let length = if flags & MARK != 0 { data.len() as u64 } else { 0 };
        for field in [first, sectors, flags, length] {
            entry.extend_from_slice(&field.to_le_bytes());
        }
        entry.resize(self.sector, 0);
        entry.extend_from_slice(data);
        entry.resize(entry.len().next_multiple_of(self.sector), 0);
        self.bytes.extend_from_slice(&entry);
        self.count += 1;
    }

    /// Writes sectors that are filled with `byte`.
    fn write(&mut self, first: u64, sectors: u64, byte: u8, flags: u64) {
        self.entry(first, sectors, flags, &vec![byte; sectors as usize * self.sector]);
    }

    fn flush(&mut self) {
        self.entry(0, 0, FLUSH, &[]);
    }

    fn open(&mut self) -> Result<BlockLog> {
        let head = [MAGIC, VERSION, self.count].map(u64::to_le_bytes).concat();
        self.bytes[..24].copy_from_slice(&head);
        self.bytes[24..28].copy_from_slice(&(self.sector as u32).to_le_bytes());
        let path = self.directory.path().join("log");
        fs::write(&path, &self.bytes).unwrap();
        BlockLog::open(&path)
    }
}

/// The first byte of each sector of a disk after a cut.
fn disk(log: &BlockLog, sector: usize, cut: &Cut) -> Vec<u8> {
    let image = tempfile::tempfile().unwrap();
    image.set_len(16 * sector as u64).unwrap();
    log.apply_cut(0, cut, &image).unwrap();
    let mut bytes = vec![0; 16 * sector];
    image.read_exact_at(&mut bytes, 0).unwrap();
    bytes.chunks(sector).map(|sector| sector[0]).collect()
}

fn whole(entries: usize) -> Cut {
    Cut { covered: entries, completed: entries, lost: BTreeMap::new() }
}

fn lost(covered: usize, completed: usize, lost: &[(usize, Loss)]) -> Cut {
    Cut { covered, completed, lost: lost.iter().cloned().collect() }
}

#[test]
fn sectors_of_512_and_4096_bytes_are_read_alike() {
    for sector in [512, 4096] {
        let mut log = Synthetic::new(sector);
        log.write(3, 2, 7, 0);
        log.flush();
        log.write(4, 1, 8, FUA);
        log.entry(3, 1, DISCARD, &[]);
        log.entry(0, 0, MARK, b"a mark");
        log.write(0, 1, 9, FLUSH);
        let log = log.open().unwrap();
        let size = sector as u64;
        let kinds: Vec<_> = log.entries().iter().map(|entry| (entry.flushes, entry.change)).collect();
        let write = |first: u64, sectors, at: u64, durable| Change::Write {
            offset: first * size,
            length: sectors * size,
            data: at * size,
            durable,
        };
        assert_eq!(
            kinds,
            [
                (false, write(3, 2, 2, false)),
                (true, Change::None),
                (false, write(4, 1, 6, true)),
                (false, Change::Discard { offset: 3 * size, length: size }),
                (false, Change::None),
                (true, write(0, 1, 11, false)),
            ]
        );
        assert_eq!(disk(&log, sector, &whole(3))[..6], [0, 0, 0, 7, 8, 0]);
        assert_eq!(disk(&log, sector, &whole(6))[..6], [9, 0, 0, 0, 8, 0]);
    }
}

#[test]
fn what_a_cut_lost_is_not_on_the_disk() {
    let mut log = Synthetic::new(512);
    log.write(0, 1, 1, 0);
    log.flush();
    log.write(1, 1, 2, 0);
    log.write(0, 1, 3, 0);
    log.entry(0, 1, DISCARD, &[]);
    log.write(2, 1, 4, 0);
    let log = log.open().unwrap();
    assert_eq!(disk(&log, 512, &lost(2, 6, &[]))[..3], [0, 2, 4]);
    // The discard alone is lost: the write before it is seen.
    assert_eq!(disk(&log, 512, &lost(2, 6, &[(4, Loss::Whole)]))[..3], [3, 2, 4]);
    assert_eq!(disk(&log, 512, &lost(2, 5, &[(3, Loss::Whole), (4, Loss::Whole)]))[..3], [1, 2, 0]);
    assert_eq!(disk(&log, 512, &lost(2, 3, &[(2, Loss::Whole)]))[..3], [1, 0, 0]);
}

#[test]
fn a_write_can_lose_some_of_its_blocks() {
    let mut log = Synthetic::new(4096);
    log.write(1, 3, 5, 0);
    let log = log.open().unwrap();
    let cut = lost(0, 1, &[(0, Loss::Blocks([0, 2].into()))]);
    assert_eq!(disk(&log, 4096, &cut)[..5], [0, 0, 5, 0, 0]);
    assert_eq!(cut.to_string(), "entries 0 to 0 whole, of those to 1 lost: 0 (blocks {0, 2})");
}

#[test]
fn an_image_that_has_the_first_entries_gets_the_rest() {
    let mut log = Synthetic::new(512);
    (0..5).for_each(|sector| log.write(sector, 1, 1 + sector as u8, 0));
    let log = log.open().unwrap();
    let image = tempfile::tempfile().unwrap();
    image.set_len(16 * 512).unwrap();
    log.apply(0..2, &image).unwrap();
    log.apply_cut(2, &whole(4), &image).unwrap();
    let byte = |sector: u64| {
        let mut byte = [0];
        image.read_exact_at(&mut byte, sector * 512).unwrap();
        byte[0]
    };
    assert_eq!([0, 1, 2, 3, 4].map(byte), [1, 2, 3, 4, 0]);
    assert!(log.apply(4..6, &image).is_err());
}

#[test]
fn a_torn_end_is_left_out() {
    let mut log = Synthetic::new(512);
    log.write(0, 1, 1, 0);
    log.write(1, 4, 2, 0);
    assert_eq!(log.open().unwrap().entries().len(), 2);
    // Its data is incomplete.
    log.bytes.truncate(log.bytes.len() - 512);
    assert_eq!(log.open().unwrap().entries().len(), 1);
    // Its fields are incomplete.
    log.bytes.truncate(3 * 512 + 8);
    assert_eq!(log.open().unwrap().entries().len(), 1);
    // It was counted, and not written before a later one.
    log.bytes.truncate(3 * 512);
    log.bytes.resize(4 * 512, 0);
    assert_eq!(log.open().unwrap().entries().len(), 1);
}

#[test]
fn entries_that_are_not_counted_are_no_part_of_the_log() {
    let mut log = Synthetic::new(512);
    log.write(0, 1, 1, 0);
    log.write(1, 1, 2, 0);
    log.count = 1;
    assert_eq!(log.open().unwrap().entries().len(), 1);
}

#[test]
fn what_is_no_log_is_an_error() {
    let error = |log: &mut Synthetic| format!("{:#}", log.open().map(|_| ()).unwrap_err());
    let mut flags = Synthetic::new(512);
    flags.entry(0, 1, 16, &[0; 512]);
    assert!(error(&mut flags).contains("unknown flags 0x10"));
    let directory = tempfile::tempdir().unwrap();
    for (content, why) in [(vec![], "it has no head"), (vec![0; 512], "does not begin as a log")] {
        let path = directory.path().join("none");
        fs::write(&path, content).unwrap();
        let error = format!("{:#}", BlockLog::open(&path).map(|_| ()).unwrap_err());
        assert!(error.contains(why), "{error}");
    }
    let mut sector = Synthetic::new(512);
    sector.sector = 500;
    assert!(error(&mut sector).contains("sectors have 500 bytes"));
}
