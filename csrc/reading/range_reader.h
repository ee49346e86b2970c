// Reading many ranges of a file at once: by threads of its own, past the page cache where that is to be had, with the CRC-32 of
// each range computed on the way, while the bytes are still warm.
//
// What is long, and lies in the file as it is to lie in memory (congruent modulo the alignment of direct I/O), is read
// straight to its place. Ragged ends, short ranges and all others come through a bounce buffer, one for each thread;
// neighbours share a read. So memory beside the destinations is bounded by threads x piece_bytes; by three times that if some are
// on devices, to which copies go on out of one pinned buffer while the next piece is read into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/device.h"

namespace lazyckpt {

class ReadableFile;

struct ReadRange {
  uint64_t offset = 0;
  uint64_t length = 0;
  std::byte* to = nullptr;  // null: the bytes are only checksummed
  int device = kHost;       // where that is an address of
};

struct ReadOptions {
  int threads = 4;
  double timeout_s = 1800;
  size_t piece_bytes = size_t{4} << 20;  // of one read; a multiple of every alignment
  // Called by the waiting thread, some times a second; may throw, which ends the reading.
  std::function<void()> interrupt;
  // Called before read_ranges() throws if a thread hangs in the kernel: it may write to its destination at any time later, so
  // the destinations must never be freed.
  std::function<void()> abandon;
  std::string driver;  // that of devices: its path; empty: the system's
  Streams streams;     // of each device with destinations; what they have been given so far comes before what is written there
};

// Fills the destinations and returns the CRC-32 of each range, in their order. Ranges may lie in any order, and overlap in the
// file. Throws Error: kCorrupt if the file ends before a range does, kStorage, kDeadline, kDevice; destinations are then in any
// state. When it returns, bytes for devices have arrived.
std::vector<uint32_t> read_ranges(const std::shared_ptr<const ReadableFile>& file, const std::vector<ReadRange>& ranges,
                                  const ReadOptions& options);

}  // namespace lazyckpt
