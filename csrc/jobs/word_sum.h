// A checksum that a device computes fast, too: the sum of the 64-bit little-endian words of a record, modulo 2^64, the last of
// which is filled up with zeros. It tells of bytes that are others, not of words that have changed places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "jobs/chunk.h"

namespace lazyckpt {

// Of a part of a record that begins `offset` bytes behind its begin. The sums of all parts add up to that of the record.
uint64_t word_sum(const std::byte* bytes, size_t length, uint64_t offset);

// Of what a chunk has of each record that lies on a device, in file order. All its bytes must be there.
std::vector<std::pair<uint32_t, uint64_t>> word_sums(const Chunk& chunk, const FileSpec& spec);

}  // namespace lazyckpt
