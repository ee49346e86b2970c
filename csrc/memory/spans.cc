#include "memory/spans.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace lazyckpt {
namespace {

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

// ---- Span --------------------------------------------------------------------------------------------------------

Span::Span(Span&& other) noexcept
    : ranges_(std::exchange(other.ranges_, nullptr)),
      begin_(std::exchange(other.begin_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Span& Span::operator=(Span&& other) noexcept {
  if (this != &other) {
    reset();
    ranges_ = std::exchange(other.ranges_, nullptr);
    begin_ = std::exchange(other.begin_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void Span::reset() {
  if (valid()) ranges_->release(begin_, size_);
  ranges_ = nullptr;
  begin_ = nullptr;
  size_ = 0;
}

// ---- Ranges ------------------------------------------------------------------------------------------------------

Ranges::Ranges(std::byte* base, size_t size, size_t granule) : base_(base), granule_(granule), size_(size) {
  free_[0] = size;
}

Span Ranges::try_allocate(size_t bytes, size_t align, size_t from, size_t to) {
  const size_t wanted = round_up(std::max<size_t>(bytes, 1), granule_);
  const auto base = reinterpret_cast<uintptr_t>(base_);
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, length] = *it;
    if (offset >= to) break;
    const size_t first = std::max(offset, from), end = std::min(offset + length, to);
    const size_t skip = round_up(base + first, align) - (base + offset);
    if (end < offset + skip || end - offset - skip < wanted) continue;
    free_.erase(it);
    if (skip > 0) free_[offset] = skip;
    if (length - skip > wanted) free_[offset + skip + wanted] = length - skip - wanted;
    used_ += wanted;
    peak_ = std::max(peak_, used_);
    return Span(this, base_ + offset + skip, wanted);
  }
  return {};
}

void Ranges::release(std::byte* begin, size_t size) {
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

void Ranges::grow(size_t size) {
  size_t more = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (size <= size_) return;
    more = size - size_;
    size_ = size;
    used_ += more;
  }
  release(base_ + size - more, more);
}

size_t Ranges::used() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return used_;
}

size_t Ranges::peak() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return peak_;
}

}  // namespace lazyckpt
