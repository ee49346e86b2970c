// The arena: one block of memory of exact size, the only large allocation of the engine. Bytes that cannot leave straight
// from their tensor (ragged ends, small records, what the fence captures) stay in spans of it until they are on disk.
#pragma once

#include <cstddef>
#include <limits>
#include <optional>

#include "memory/spans.h"

namespace lazyckpt {

class Arena {
 public:
  // Spans start at, and are rounded up to, multiples of this many bytes: a page, which every direct-I/O limit divides
  // or (up to the largest limit we accept) is a multiple of; see allocate().
  static constexpr size_t kGranule = 4096;

  // Maps `bytes` (rounded up to whole granules) of memory without touching it. Forked children do not inherit the
  // mapping, so a fork neither copies the arena nor lets a child write into it.
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* base() const { return base_; }
  size_t size() const { return size_; }

  // From now on its pages are taken from this memory node while it has free ones. What has been touched already is moved there:
  // the touch begins with the engine, before it is known which device it will work for, and pinned pages stay for ever.
  // Pages that a write is reading just now stay where they are. False if the kernel refuses.
  bool prefer_node(int node);

  // Makes [from, from + bytes) resident, so that no save pays for the first touch. Safe beside any other use.
  void touch(size_t from, size_t bytes);

  // See Ranges.
  Span try_allocate(size_t bytes, size_t align = kGranule, size_t from = 0, size_t to = std::numeric_limits<size_t>::max()) {
    return ranges_->try_allocate(bytes, align, from, to);
  }

  size_t used() const { return ranges_->used(); }
  size_t peak() const { return ranges_->peak(); }

 private:
  std::byte* base_ = nullptr;
  size_t size_ = 0;
  std::optional<Ranges> ranges_;  // set by the constructor
};

}  // namespace lazyckpt
