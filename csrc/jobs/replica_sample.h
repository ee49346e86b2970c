// Whether several processes hold the same bytes, as far as a look at a few of them tells: all take their samples at the same
// places, and compare checksums.
//
// Small records are looked at as a whole. Of larger ones a write to all of it, or to a good part, is seen; a difference of a few
// elements is mostly not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lazyckpt {

struct Replica {
  const std::byte* bytes = nullptr;  // null: this process cannot look at them
  uint64_t length = 0;
};

// A checksum of each record's samples; 0 for those that are not looked at. The places follow from the seed, and from the number
// and the lengths of the records.
std::vector<uint32_t> sample_replicas(const std::vector<Replica>& records, uint64_t seed);

}  // namespace lazyckpt
