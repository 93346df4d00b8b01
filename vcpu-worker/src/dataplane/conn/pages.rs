//! Pages on a connection: between frames and guest memory, with or without a copy, as they are or packed.

use std::sync::Arc;
use std::time::Instant;

use super::super::compress::{Algorithm, Packer};
use super::super::error::{DataplaneError, Result};
use super::super::frame::{
    FLAG_LZ4, FLAG_ZSTD, FrameError, HEADER_BYTES, Header, Kind, PAGE_BYTES, PageRange, encode_ranges,
};
use super::Conn;
use crate::memory::GuestMemory;

impl Conn {
    /// Sends pages straight from guest memory, which must not change meanwhile: a stopped guest.
    pub(crate) fn send_guest_pages(
        &mut self,
        round: u32,
        ranges: &[PageRange],
        memory: &GuestMemory,
    ) -> Result<u64> {
        let pieces: Vec<(u64, u64)> = ranges.iter().map(|r| byte_range(*r)).collect();
        let data_len: u64 = pieces.iter().map(|(_, len)| len).sum();
        let stream = Arc::clone(&self.stream);
        let Some(fd) = stream.plain_fd() else { return self.send_copied_pages(round, ranges, memory) };
        let mut meta = Vec::with_capacity(ranges.len() * 8);
        encode_ranges(ranges, &mut meta);
        let mut header = self.next_header(Kind::Pages, round);
        header.count = (data_len / PAGE_BYTES) as u32;
        header.seal(&meta, memory.crc32c(&pieces, 0)?, data_len as u32);
        self.scratch.clear();
        self.scratch.extend_from_slice(&header.encode());
        self.scratch.extend_from_slice(&meta);
        memory
            .send_vectored(fd, &self.scratch, &pieces)
            .map_err(|error| self.io_error("sending pages", error))?;
        let bytes = self.scratch.len() as u64 + data_len;
        self.bytes_out += bytes;
        Ok(bytes)
    }

    /// Sends pages by way of a copy: of a running guest, or to be encrypted.
    pub(crate) fn send_copied_pages(
        &mut self,
        round: u32,
        ranges: &[PageRange],
        memory: &GuestMemory,
    ) -> Result<u64> {
        let mut data = std::mem::take(&mut self.bounce);
        let result = copy_pages(ranges, memory, &mut data).and_then(|pages| {
            let mut meta = Vec::with_capacity(ranges.len() * 8);
            encode_ranges(ranges, &mut meta);
            self.send(Kind::Pages, round, 0, pages as u32, &meta, &data)
        });
        self.bounce = data;
        result
    }

    /// [`Self::send_copied_pages`], compressed if that is worth it; `turn` waits until so many bytes may be sent.
    pub(crate) fn send_packed_pages(
        &mut self,
        round: u32,
        ranges: &[PageRange],
        memory: &GuestMemory,
        packer: &mut Packer,
        turn: impl FnOnce(u64) -> Result<()>,
    ) -> Result<u64> {
        let mut data = std::mem::take(&mut self.bounce);
        let result = copy_pages(ranges, memory, &mut data).and_then(|pages| {
            let mut meta = Vec::with_capacity(ranges.len() * 8);
            encode_ranges(ranges, &mut meta);
            let fixed = (HEADER_BYTES + meta.len()) as u64;
            let (kind, flags, bytes) = match packer.pack(&data)? {
                Some((Algorithm::Lz4, packed)) => (Kind::Packed, FLAG_LZ4, packed),
                Some((Algorithm::Zstd, packed)) => (Kind::Packed, FLAG_ZSTD, packed),
                None => (Kind::Pages, 0, data.as_slice()),
            };
            let begin = Instant::now();
            turn(fixed + bytes.len() as u64)?;
            let sent = self.send(kind, round, flags, pages as u32, &meta, bytes)?;
            packer.sent(sent, begin.elapsed());
            Ok(sent)
        });
        self.bounce = data;
        result
    }

    /// The bulk part of a page frame, straight into guest memory where it comes as it is, then read back for its sum.
    pub(crate) fn recv_guest_pages(
        &mut self,
        header: &Header,
        ranges: &[PageRange],
        memory: &GuestMemory,
    ) -> Result<()> {
        let pieces: Vec<(u64, u64)> = ranges.iter().map(|r| byte_range(*r)).collect();
        let stream = Arc::clone(&self.stream);
        let Some(fd) = stream.plain_fd().filter(|_| header.kind == Kind::Pages) else {
            return self
                .recv_through_buffer(header, ranges, |offset, piece| Ok(memory.write_at(offset, piece)?));
        };
        memory.recv_into(fd, &pieces).map_err(|error| self.io_error("receiving pages", error))?;
        self.bytes_in += u64::from(header.data_len);
        let found = memory.crc32c(&pieces, 0)?;
        if found == header.data_crc {
            return Ok(());
        }
        let expected = header.data_crc;
        Err(self.frame_error(FrameError::Checksum { part: "data", found, expected }))
    }

    /// [`Self::recv_guest_pages`] for pages that memory does not hold yet. Through a buffer that stays in the cache and
    /// `pwrite`: the kernel then puts a new page in place without clearing it and without a page fault, which takes
    /// half the time of touching it through the mapping (measured: 130 against 260 ms for 256 MiB). It also answers a
    /// lack of memory with an error where the mapping would answer with SIGBUS.
    pub(crate) fn recv_fresh_pages(
        &mut self,
        header: &Header,
        ranges: &[PageRange],
        memory: &GuestMemory,
    ) -> Result<()> {
        self.recv_through_buffer(header, ranges, |mut offset, mut piece| {
            while !piece.is_empty() {
                let done = rustix::io::pwrite(memory.fd(), piece, offset).map_err(|errno| {
                    DataplaneError::Io { what: "writing guest memory", source: errno.into() }
                })?;
                piece = piece.get(done.max(1)..).unwrap_or_default();
                offset += done as u64;
            }
            Ok(())
        })
    }

    /// The bulk part of a page frame, checked and unpacked, each range given to `put` with its offset.
    pub(crate) fn recv_through_buffer(
        &mut self,
        header: &Header,
        ranges: &[PageRange],
        mut put: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut data = std::mem::take(&mut self.bounce);
        // At most MAX_DATA_BYTES; what it held stays where it will be overwritten, which saves clearing it.
        data.resize(header.data_len as usize, 0);
        let mut unpacked = std::mem::take(&mut self.unpacked);
        let result = self.recv_exact(header, &mut data).and_then(|()| {
            let mut rest = data.as_slice();
            if header.kind == Kind::Packed {
                // At most MAX_DATA_BYTES: the header was checked.
                unpacked.resize((u64::from(header.count) * PAGE_BYTES) as usize, 0);
                let algorithm = if header.flags == FLAG_LZ4 { Algorithm::Lz4 } else { Algorithm::Zstd };
                self.unpacker
                    .unpack(algorithm, &data, &mut unpacked)
                    .map_err(|problem| self.frame_error(FrameError::Packed(problem)))?;
                rest = &unpacked;
            }
            for range in ranges {
                let (offset, len) = byte_range(*range);
                let Some((piece, after)) = rest.split_at_checked(len as usize) else { break };
                rest = after;
                put(offset, piece)?;
            }
            Ok(())
        });
        self.unpacked = unpacked;
        self.bounce = data;
        result
    }
}

/// Copies pages out of guest memory, one range after the other; returns their number.
fn copy_pages(ranges: &[PageRange], memory: &GuestMemory, out: &mut Vec<u8>) -> Result<u64> {
    let pages: u64 = ranges.iter().map(|range| range.pages).sum();
    out.resize((pages * PAGE_BYTES) as usize, 0);
    let mut rest = out.as_mut_slice();
    for range in ranges {
        let (offset, len) = byte_range(*range);
        let Some((here, after)) = rest.split_at_mut_checked(len as usize) else { break };
        memory.read_at(offset, here)?;
        rest = after;
    }
    Ok(pages)
}

fn byte_range(range: PageRange) -> (u64, u64) {
    (range.first * PAGE_BYTES, range.pages * PAGE_BYTES)
}
