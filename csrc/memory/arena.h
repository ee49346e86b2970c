// The arena: one block of memory of exact size, which may grow, the only large allocation of the engine. Bytes that cannot leave straight
// from their tensor (small records, what save() or the fence captures) stay in spans of it until they are on disk.
#pragma once

#include <atomic>
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

  // Maps `most` bytes of address space, of which it has `bytes` (both rounded up to whole granules), without touching them; where
  // that much is refused, it can never grow. Forked children do not inherit the
  // mapping, so a fork neither copies the arena nor lets a child write into it.
  explicit Arena(size_t bytes, size_t most = 0);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* base() const { return base_; }
  size_t size() const { return size_.load(); }
  size_t most() const { return mapped_; }
  // It has `bytes` from now on, as far as they were mapped; never fewer than before.
  void grow(size_t bytes);

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
  size_t mapped_;
  std::atomic<size_t> size_;
  std::optional<Ranges> ranges_;  // set by the constructor
};

}  // namespace lazyckpt
