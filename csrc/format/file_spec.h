// A file as what is to be written of it: extents, each with the place of its bytes and when they may change, and where
// checksums are to be filled in. A format makes it; jobs cut it into chunks and know nothing else of the format.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "base/device.h"
#include "os/file.h"

namespace lazyckpt {

// What may happen to an extent's bytes, and so when they must have been read. The kinds of memory of the host are those that
// Python gives each record; see is_kind_of_record().
enum class Source : uint8_t {
  kCopy,   // may change as soon as submit() returns: copied to the arena before
  kLazy,   // may change after the next fence: left in place until then, copied to the arena by the fence
  kOwned,  // never changes: left in place until a writer comes
  // In the memory of a device, from where nothing is written in place:
  kDeviceCopy,  // may change behind what its stream has been given by submit(): copied on that stream
  kDeviceLazy,  // may change behind the next fence: copied on a stream of ours
  // Of a record of either: these bytes are in the file before, at the same place, and are not read. See leave_out_frozen().
  kShared,
};

inline bool is_kind_of_record(Source kind) {
  return kind == Source::kCopy || kind == Source::kLazy || kind == Source::kOwned;
}
inline bool on_device(Source kind) { return kind == Source::kDeviceCopy || kind == Source::kDeviceLazy; }

constexpr uint32_t kStructure = std::numeric_limits<uint32_t>::max();  // an extent or piece that belongs to no record

struct Extent {
  const std::byte* source = nullptr;
  uint64_t length = 0;
  uint64_t offset = 0;  // in the file
  Source kind = Source::kCopy;
  uint32_t record = kStructure;
  int device = kHost;  // where `source` is an address of
  bool was_device_copy = false;  // what is kShared now
};

// Four bytes of the file, little-endian: the CRC-32 of `record`.
struct CrcField {
  uint64_t offset = 0;
  uint32_t record = 0;
};

// Which part of a file this process writes: the others, who hold the same bytes, write the rest. The parts are whole chunks,
// as equal as can be, of all that lies before `body_end`; the central directory behind it needs the checksums of all parts.
struct Share {
  uint32_t index = 0, count = 1;
  uint64_t body_end = 0;
  bool whole() const { return count == 1; }
};

struct FileSpec {
  std::vector<Extent> extents;       // ascending by offset, disjoint, none empty
  std::vector<CrcField> crc_fields;  // ascending; they lie in kCopy extents behind the end of their record
  size_t record_count = 0;
  uint64_t size = 0;
  Share share;
  // Keeps what extents of structure point to, if that lasts, and is this file's alone: then writers may take it from there. None:
  // it goes away behind submit(), and is copied.
  std::shared_ptr<const void> kept;
  // Bytes: of each part of the file that is so long (the last may be shorter) the CRC-32 is wanted, too. 0: of parts as they come.
  uint64_t sums_every = 0;
};

// Bytes [begin, end) of a file.
struct ByteRange {
  uint64_t begin = 0, end = 0;
};

// The unit that must not be split: both limits are powers of two.
inline size_t block_bytes(const IoLimits& limits) { return std::max(limits.memory_align, limits.offset_align); }

}  // namespace lazyckpt
