// What a finished file leaves for the next one in its place: what is written again, byte for byte, need not be written.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/device.h"
#include "format/file_spec.h"
#include "os/clone.h"

namespace lazyckpt {

// XXH3 of some bytes.
struct Digest {
  uint64_t low = 0, high = 0;
  bool operator==(const Digest& other) const { return low == other.low && high == other.high; }
};

// Where the bytes of a piece were, and some of them: for who is told that they do not change, and does not read them again. Null:
// they did not lie in one run.
struct Memory {
  static constexpr size_t kSampleBytes = 64;  // a line of the cache: to read less costs as much

  const std::byte* source = nullptr;
  int device = kHost;
  ByteRange whole = {};                // of the file: the blocks that have no other bytes
  uint32_t front_crc = 0, back_crc = 0;  // of what lies before and behind them
  uint64_t sample_at = 0;              // in the piece
  std::array<std::byte, kSampleBytes> sample = {};
};

// A piece of a file: where it lies, and what is in it. The digest is only known of what has had the same CRC-32 twice.
struct Mark {
  uint64_t offset = 0;
  uint64_t length = 0;
  uint32_t crc = 0;
  bool has_digest = false;
  uint32_t unread = 0;  // in how many saves in a row its bytes were not read
  Digest digest = {};
  Memory memory = {};  // if it has a digest

  uint64_t end() const { return offset + length; }
};

// Made when its file is durable. Constant once settled, and then any number of threads may use it.
class Baseline {
 public:
  // `marks` ascend. `joined`: other processes write to the file, too, and end it after us.
  Baseline(CloneSource source, std::vector<Mark> marks, bool joined);

  // When all of the file is there and a checkpoint names it: from then on nobody may change it. False if somebody has, or if it
  // cannot be told: then it is of no use. Of a joined file the others' writes until then cannot be told from those of strangers,
  // who do not know its hidden name.
  bool settle();

  const CloneSource& source() const { return source_; }
  const std::vector<Mark>& marks() const { return marks_; }
  // The mark of exactly these bytes; none if the file was cut otherwise.
  const Mark* find(uint64_t offset, uint64_t length) const;

 private:
  CloneSource source_;
  std::vector<Mark> marks_;
  const bool joined_;
  bool good_;
};

}  // namespace lazyckpt
