#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "error.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace lazyckpt {
namespace {

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

// ---- Span --------------------------------------------------------------------------------------------------------

Span::Span(Span&& other) noexcept
    : arena_(std::exchange(other.arena_, nullptr)),
      begin_(std::exchange(other.begin_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Span& Span::operator=(Span&& other) noexcept {
  if (this != &other) {
    reset();
    arena_ = std::exchange(other.arena_, nullptr);
    begin_ = std::exchange(other.begin_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void Span::reset() {
  if (valid()) arena_->release(begin_, size_);
  arena_ = nullptr;
  begin_ = nullptr;
  size_ = 0;
}

// ---- Arena -------------------------------------------------------------------------------------------------------

Arena::Arena(size_t bytes) : size_(round_up(bytes, kGranule)) {
  void* mapped = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Error(ErrorKind::kStorage,
                "cannot map an arena of " + std::to_string(size_) + " bytes: " + std::strerror(errno) +
                    "; choose a smaller arena_bytes",
                errno);
  }
  base_ = static_cast<std::byte*>(mapped);
  ::madvise(base_, size_, MADV_DONTFORK);
  ::madvise(base_, size_, MADV_HUGEPAGE);  // a wish: fewer faults, and fewer pages to pin for direct I/O
  free_[0] = size_;
}

Arena::~Arena() { ::munmap(base_, size_); }

void Arena::touch(size_t from, size_t bytes) {
  // Populating writes nothing, so spans in use are not disturbed. A kernel without it (before 5.14) faults later.
  ::madvise(base_ + from, std::min(bytes, size_ - from), MADV_POPULATE_WRITE);
}

Span Arena::try_allocate(size_t bytes, size_t align) {
  const size_t wanted = round_up(std::max<size_t>(bytes, 1), kGranule);
  const auto base = reinterpret_cast<uintptr_t>(base_);
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, length] = *it;
    const size_t skip = round_up(base + offset, align) - (base + offset);
    if (length < skip || length - skip < wanted) continue;
    free_.erase(it);
    if (skip > 0) free_[offset] = skip;
    if (length - skip > wanted) free_[offset + skip + wanted] = length - skip - wanted;
    used_ += wanted;
    peak_ = std::max(peak_, used_);
    return Span(this, base_ + offset + skip, wanted);
  }
  return {};
}

void Arena::release(std::byte* begin, size_t size) {
  std::lock_guard<std::mutex> lock(mutex_);
  used_ -= size;
  size_t offset = static_cast<size_t>(begin - base_);
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + size == next->first) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += size;
      return;
    }
  }
  free_[offset] = size;
}

size_t Arena::used() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return used_;
}

size_t Arena::peak() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return peak_;
}

}  // namespace lazyckpt
