// The arena: one block of memory of exact size, the only large allocation of the engine. Bytes that cannot leave straight
// from their tensor (ragged ends, small records, what the fence captures) stay in spans of it until they are on disk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace lazyckpt {

class Arena;

// A piece of the arena, given back by its destructor.
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
  friend class Arena;
  Span(Arena* arena, std::byte* begin, size_t size) : arena_(arena), begin_(begin), size_(size) {}

  Arena* arena_ = nullptr;
  std::byte* begin_ = nullptr;
  size_t size_ = 0;
};

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

  // Makes [from, from + bytes) resident, so that no save pays for the first touch. Safe beside any other use.
  void touch(size_t from, size_t bytes);

  // A span of at least `bytes` whose start is a multiple of `align`; an invalid one if there is no room just now.
  // First fit by address, so that a light load keeps using the same, cache-warm pages.
  Span try_allocate(size_t bytes, size_t align = kGranule);

  size_t used() const;
  size_t peak() const;

 private:
  friend class Span;
  void release(std::byte* begin, size_t size);

  std::byte* base_ = nullptr;
  size_t size_ = 0;

  mutable std::mutex mutex_;  // guards what follows
  std::map<size_t, size_t> free_;  // offset -> length; neighbours are merged
  size_t used_ = 0;
  size_t peak_ = 0;
};

}  // namespace lazyckpt
