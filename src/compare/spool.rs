//! The reference's logits between its turn and the variants': a file without a name, which is gone with
//! the process however it ends. Only one model is in memory at a time, so its rows must wait somewhere.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::score::Row;
use crate::measure::MeasureError;

/// Bytes left free beside the file.
const MARGIN: u64 = 64 << 20;

/// Rows of logits in the order of the text's positions, with what they were reduced to.
pub(super) struct Spool {
    file: File,
    vocab: usize,
    pub(super) rows: Vec<Row>,
}

impl Spool {
    /// A file for `positions` rows in the first of `directories` that has the room.
    pub(super) fn create(
        directories: &[PathBuf],
        positions: usize,
        vocab: usize,
    ) -> Result<Self, MeasureError> {
        let needed = positions as u64 * vocab as u64 * size_of::<f32>() as u64;
        let mut reasons = Vec::new();
        for directory in directories {
            match make(directory, needed) {
                Ok(file) => return Ok(Self { file, vocab, rows: Vec::with_capacity(positions) }),
                Err(reason) => reasons.push(format!("{}: {reason}", directory.display())),
            }
        }
        Err(MeasureError::Failed(format!(
            "no room for the reference's log-probabilities, {needed} bytes for {positions} positions and {vocab} \
             tokens ({}); lower --chunks",
            reasons.join("; ")
        )))
    }

    /// Appends rows of logits.
    pub(super) fn write(&mut self, logits: &[f32], rows: &[Row]) -> io::Result<()> {
        self.rows.extend_from_slice(rows);
        self.file.write_all(bytemuck::cast_slice(logits))
    }

    /// Back to the first position.
    pub(super) fn rewind(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0)).map(drop)
    }

    /// The next `rows` rows.
    pub(super) fn read(&mut self, rows: usize, logits: &mut Vec<f32>) -> io::Result<()> {
        logits.resize(rows * self.vocab, 0.0);
        self.file.read_exact(bytemuck::cast_slice_mut(logits))
    }
}

fn make(directory: &Path, needed: u64) -> Result<File, String> {
    std::fs::create_dir_all(directory).map_err(|error| error.to_string())?;
    let room = rustix::fs::statvfs(directory).map_err(|error| error.to_string())?;
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    if free < needed.saturating_add(MARGIN) {
        return Err(format!("{free} bytes are free"));
    }
    tempfile::tempfile_in(directory).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::score::row;

    #[test]
    fn rows_come_back_as_they_went_and_no_file_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::create(&[directory.path().to_owned()], 4, 3).unwrap();
        let logits: Vec<f32> = (0..12).map(|i| i as f32 * 0.25).collect();
        let rows: Vec<Row> = logits.chunks(3).map(|logits| row(logits, 1).unwrap()).collect();
        spool.write(&logits[..6], &rows[..2]).unwrap();
        spool.write(&logits[6..], &rows[2..]).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let mut read = Vec::new();
        for _ in 0..2 {
            spool.rewind().unwrap();
            spool.read(3, &mut read).unwrap();
            assert_eq!(read, logits[..9]);
            spool.read(1, &mut read).unwrap();
            assert_eq!(read, logits[9..]);
        }
        assert_eq!(spool.rows, rows);
    }

    #[test]
    fn a_disk_without_room_is_told_and_another_is_tried() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path().to_owned();
        let file = here.join("file");
        std::fs::write(&file, "").unwrap();
        let said = Spool::create(std::slice::from_ref(&here), 1 << 40, 1 << 16).err().unwrap().to_string();
        assert!(said.contains("lower --chunks") && said.contains("bytes are free"), "{said}");
        assert!(Spool::create(&[file.join("below"), here], 1, 1).is_ok());
    }
}
