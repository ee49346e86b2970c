// First fit inside one block of memory, of the host or of a device: the block's bytes themselves are never looked at.
#pragma once

#include <cstddef>
#include <limits>
#include <map>
#include <mutex>

namespace lazyckpt {

class Ranges;

// A piece of a block, given back by its destructor.
class Span {
 public:
  Span() = default;
  Span(Span&& other) noexcept;
  Span& operator=(Span&& other) noexcept;
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;
  ~Span() { reset(); }

  std::byte* begin() const { return begin_; }
  size_t size() const { return size_; }
  bool valid() const { return begin_ != nullptr; }
  void reset();

 private:
  friend class Ranges;
  Span(Ranges* ranges, std::byte* begin, size_t size) : ranges_(ranges), begin_(begin), size_(size) {}

  Ranges* ranges_ = nullptr;
  std::byte* begin_ = nullptr;
  size_t size_ = 0;
};

// Which parts of a block are in use. It outlives its spans.
class Ranges {
 public:
  // Spans are rounded up to multiples of `granule` bytes; so must be `size`.
  Ranges(std::byte* base, size_t size, size_t granule);
  Ranges(const Ranges&) = delete;
  Ranges& operator=(const Ranges&) = delete;

  // A span of at least `bytes` whose start is a multiple of `align`; an invalid one if there is no room just now.
  // First fit by address, so that a light load keeps using the same, cache-warm pages. Of bytes [from, to) of the block.
  Span try_allocate(size_t bytes, size_t align, size_t from = 0, size_t to = std::numeric_limits<size_t>::max());

  // The block is `size` bytes from now on: more than before, or nothing happens.
  void grow(size_t size);

  size_t used() const;
  size_t peak() const;

 private:
  friend class Span;
  void release(std::byte* begin, size_t size);

  std::byte* const base_;
  const size_t granule_;

  mutable std::mutex mutex_;  // guards what follows
  size_t size_;
  std::map<size_t, size_t> free_;  // offset -> length; neighbours are merged
  size_t used_ = 0;
  size_t peak_ = 0;
};

}  // namespace lazyckpt
