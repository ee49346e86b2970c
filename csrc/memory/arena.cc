#include "memory/arena.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "base/error.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace lazyckpt {
namespace {

constexpr size_t kMostNodes = 1024;  // of the kernel

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

Arena::Arena(size_t bytes, size_t most) : mapped_(round_up(std::max(bytes, most), kGranule)), size_(round_up(bytes, kGranule)) {
  const auto map = [](size_t wanted) {
    return ::mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  void* mapped = map(mapped_);
  if (mapped == MAP_FAILED && mapped_ > size_) {
    mapped_ = size_;
    mapped = map(mapped_);
  }
  if (mapped == MAP_FAILED) {
    throw Error(ErrorKind::kStorage,
                "cannot map an arena of " + std::to_string(size()) + " bytes: " + std::strerror(errno) +
                    "; choose a smaller arena_bytes",
                errno);
  }
  base_ = static_cast<std::byte*>(mapped);
  ::madvise(base_, mapped_, MADV_DONTFORK);
  ::madvise(base_, mapped_, MADV_HUGEPAGE);  // a wish: fewer faults, and fewer pages to pin for direct I/O
  ranges_.emplace(base_, size(), kGranule);
}

Arena::~Arena() { ::munmap(base_, mapped_); }

void Arena::grow(size_t bytes) {
  const size_t wanted = std::min(round_up(bytes, kGranule), mapped_);
  size_t before = size_.load();
  while (wanted > before && !size_.compare_exchange_weak(before, wanted)) {
  }
  ranges_->grow(wanted);
}

bool Arena::prefer_node(int node) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  unsigned long nodes[kMostNodes / kBits] = {};
  if (node < 0 || static_cast<size_t>(node) >= kMostNodes) return false;
  nodes[node / kBits] = 1UL << (node % kBits);
  // The kernel takes one bit less than it is told.
  return ::syscall(SYS_mbind, base_, mapped_, MPOL_PREFERRED, nodes, kMostNodes + 1, MPOL_MF_MOVE) == 0;
}

void Arena::touch(size_t from, size_t bytes) {
  // Populating writes nothing, so spans in use are not disturbed. A kernel without it (before 5.14) faults later.
  ::madvise(base_ + from, std::min(bytes, mapped_ - from), MADV_POPULATE_WRITE);
}

}  // namespace lazyckpt
