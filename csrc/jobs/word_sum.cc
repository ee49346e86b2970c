#include "jobs/word_sum.h"

#include <algorithm>
#include <cstring>

namespace lazyckpt {
namespace {

constexpr size_t kWord = sizeof(uint64_t);

uint64_t sum_bytes(const std::byte* bytes, size_t length, uint64_t offset) {
  uint64_t sum = 0;
  for (size_t i = 0; i < length; ++i) sum += static_cast<uint64_t>(bytes[i]) << (8 * ((offset + i) % kWord));
  return sum;
}

}  // namespace

uint64_t word_sum(const std::byte* bytes, size_t length, uint64_t offset) {
  const size_t head = std::min<size_t>(length, (kWord - offset % kWord) % kWord);
  uint64_t sum = sum_bytes(bytes, head, offset);
  size_t at = head;
  for (; at + kWord <= length; at += kWord) {
    uint64_t word;  // the machine's order: little-endian, as everywhere that a driver runs
    std::memcpy(&word, bytes + at, kWord);
    sum += word;
  }
  return sum + sum_bytes(bytes + at, length - at, offset + at);
}

void add_word_sums(const Chunk& chunk, const FileSpec& spec, std::vector<WordSum>& sums) {
  const uint64_t end = chunk.offset + chunk.content;
  uint64_t begin = chunk.offset;  // of the segment
  auto segment = chunk.segments.begin();
  for (size_t i = chunk.first_extent; i < chunk.end_extent; ++i) {
    const Extent& extent = spec.extents[i];
    const uint64_t from = std::max(extent.offset, chunk.offset), to = std::min(extent.offset + extent.length, end);
    if (!on_device(extent.kind) || from >= to) continue;
    while (from >= begin + segment->length) begin += (segment++)->length;
    sums[extent.record].sum += word_sum(segment->source + (from - begin), to - from, from - extent.offset);
    sums[extent.record].bytes += to - from;
  }
}

}  // namespace lazyckpt
