// A net below the promise that lazy bytes change only behind a fence: a few of them are noted when a save begins, and looked at
// again once they have been captured. Most writes to a tensor write to all of it, so they do not get past.
//
// That is cheap, some hundred cache lines for a GiB, and no proof: a write to a part of a tensor may miss every witness.
// JobStats::witness_s is the caller's time that it took; `verify` looks at every byte instead.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "jobs/chunk.h"

namespace lazyckpt {

class Witnesses {
 public:
  // Notes bytes of every lazy run on the host that a chunk writes from where it lies. Reads nothing else of the tensors.
  explicit Witnesses(const std::vector<Chunk>& chunks);

  // The record of the first one whose bytes are others now; kStructure if there is none. The memory must still be there.
  uint32_t find_changed(size_t chunk) const;
  uint32_t find_changed() const { return find_changed_in(0, witnesses_.size()); }

 private:
  static constexpr size_t kBytes = 64;  // a line of the cache: to read less costs as much

  struct Witness {
    const std::byte* source;
    uint32_t record;
    uint8_t length;
    std::array<std::byte, kBytes> noted;
  };

  void choose(const std::byte* source, size_t length, uint32_t record);
  void choose_in(const Segment& run, size_t places, uint64_t& random);
  uint32_t find_changed_in(size_t begin, size_t end) const;

  std::vector<Witness> witnesses_;
  std::vector<size_t> ends_;  // of each chunk's
};

}  // namespace lazyckpt
