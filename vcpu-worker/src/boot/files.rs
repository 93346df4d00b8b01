//! Files of the host that are booted from.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::error::BootError;

/// An open regular file with its size.
#[derive(Debug)]
pub(super) struct BootFile {
    /// "kernel" or "initrd".
    pub what: &'static str,
    path: PathBuf,
    /// The file.
    pub file: File,
    /// Bytes in it when it was opened.
    pub len: u64,
}

impl BootFile {
    /// Opens a regular file for reading; does not hang on a FIFO.
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let unreadable = |problem: String| BootError::Unreadable { what, path: path.to_owned(), problem };
        let file =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|e| {
                match e.kind() {
                    ErrorKind::NotFound => BootError::Missing { what, path: path.to_owned() },
                    _ => unreadable(e.to_string()),
                }
            })?;
        let meta = file.metadata().map_err(|e| unreadable(e.to_string()))?;
        if !meta.is_file() {
            return Err(unreadable("not a regular file".to_owned()));
        }
        Ok(Self { what, path: path.to_owned(), file, len: meta.len() })
    }

    /// An error about reading this file.
    pub(super) fn unreadable(&self, problem: impl std::fmt::Display) -> BootError {
        BootError::Unreadable { what: self.what, path: self.path.clone(), problem: problem.to_string() }
    }

    /// Up to `most` bytes from the start.
    pub(super) fn head(&mut self, most: u64) -> Result<Vec<u8>, BootError> {
        self.at(0, most)
    }

    /// Up to `most` bytes from `offset`; fewer at the end of the file.
    pub(super) fn at(&mut self, offset: u64, most: u64) -> Result<Vec<u8>, BootError> {
        let mut bytes = Vec::new();
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| (&self.file).take(most).read_to_end(&mut bytes))
            .map_err(|e| self.unreadable(e))?;
        Ok(bytes)
    }
}
