#include "os/pieces.h"

#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>

namespace lazyckpt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallPage = size_t{4} << 10;

AlignedBytes allocate(size_t bytes, size_t align) {
  void* memory = nullptr;
  if (::posix_memalign(&memory, std::max(align, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
  return AlignedBytes(static_cast<std::byte*>(memory));
}

}  // namespace

std::byte* WriterMemory::get(size_t bytes, size_t align) {
  assert(align <= kHugePage);
  if (bytes <= size_) return bytes_;
  unmap();
  const size_t unit = bytes < kHugePage ? kSmallPage : kHugePage;  // small chunks are no reason to take large pages
  const size_t wanted = (bytes + unit - 1) / unit * unit;
  void* mapped = ::mmap(nullptr, wanted + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mapped_ = mapped;
  mapped_bytes_ = wanted + kHugePage;
  const auto address = reinterpret_cast<uintptr_t>(mapped);
  bytes_ = static_cast<std::byte*>(mapped) + (kHugePage - address % kHugePage) % kHugePage;
  size_ = wanted;
  ::madvise(mapped_, mapped_bytes_, MADV_DONTFORK);
  if (unit == kHugePage) ::madvise(bytes_, wanted, MADV_HUGEPAGE);  // a wish
  return bytes_;
}

void WriterMemory::unmap() {
  if (mapped_ != nullptr) ::munmap(mapped_, mapped_bytes_);
  mapped_ = nullptr;
  bytes_ = nullptr;
  size_ = mapped_bytes_ = 0;
}

bool read_own_memory(void* to, const void* from, size_t bytes) {
  auto* target = static_cast<std::byte*>(to);
  const auto* source = static_cast<const std::byte*>(from);
  for (size_t done = 0; done < bytes;) {
    const iovec local{target + done, bytes - done};
    const iovec remote{const_cast<std::byte*>(source + done), bytes - done};  // iovec has no const; it is only read
    const ssize_t got = ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0);
    if (got <= 0 && errno != EINTR) return false;
    done += got > 0 ? static_cast<size_t>(got) : 0;
  }
  return true;
}

size_t consume(std::vector<iovec>& pieces, size_t first, size_t bytes) {
  while (first < pieces.size() && bytes >= pieces[first].iov_len) bytes -= pieces[first++].iov_len;
  if (bytes > 0) {
    pieces[first].iov_base = static_cast<char*>(pieces[first].iov_base) + bytes;
    pieces[first].iov_len -= bytes;
  }
  return first;
}

AlignedBytes gather(std::vector<iovec>& pieces, size_t first, size_t align) {
  size_t bytes = 0;
  for (size_t i = first; i < pieces.size(); ++i) bytes += pieces[i].iov_len;
  AlignedBytes made = allocate(bytes, align);
  std::byte* to = made.get();
  for (size_t i = first; i < pieces.size(); ++i) {
    std::memcpy(to, pieces[i].iov_base, pieces[i].iov_len);
    to += pieces[i].iov_len;
  }
  pieces.resize(first);
  pieces.push_back({made.get(), bytes});
  return made;
}

}  // namespace lazyckpt
