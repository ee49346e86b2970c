// A checksum that a device computes fast, too: the sum of the 64-bit little-endian words of a record, modulo 2^64, the last of
// which is filled up with zeros. It tells of bytes that are others, not of words that have changed places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "jobs/chunk.h"

namespace lazyckpt {

// Of a part of a record that begins `offset` bytes behind its begin. The sums of all parts add up to that of the record.
uint64_t word_sum(const std::byte* bytes, size_t length, uint64_t offset);

struct WordSum {
  uint64_t sum = 0;
  uint64_t bytes = 0;  // of the record, that are in it
};

// Adds what a chunk has of each record that lies on a device. All its bytes must be there.
void add_word_sums(const Chunk& chunk, const FileSpec& spec, std::vector<WordSum>& sums);

}  // namespace lazyckpt
