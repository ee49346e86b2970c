// The pieces of memory that one write takes.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

namespace lazyckpt {

struct FreeBytes {
  void operator()(std::byte* bytes) const { std::free(bytes); }
};
using AlignedBytes = std::unique_ptr<std::byte, FreeBytes>;

// Of one writer, as large as it has ever needed; not touched before. In huge pages where there are some: direct I/O from memory
// whose pages lie apart is cut into more and smaller requests, and was a third slower on a virtual disk. A forked child does not
// get it: else the next write to it would copy it, to small pages, for good.
class WriterMemory {
 public:
  WriterMemory() = default;
  WriterMemory(const WriterMemory&) = delete;
  WriterMemory& operator=(const WriterMemory&) = delete;
  ~WriterMemory() { unmap(); }

  // `align` is at most that of a huge page.
  std::byte* get(size_t bytes, size_t align);

 private:
  void unmap();

  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  std::byte* bytes_ = nullptr;
  size_t size_ = 0;
};

// Of this process, by a system call: memory that is gone is an error and no signal. False if not all could be read.
bool read_own_memory(void* to, const void* from, size_t bytes);

// Drops the first `bytes` from the front of `pieces[first..]`; returns the new first.
size_t consume(std::vector<iovec>& pieces, size_t first, size_t bytes);

// The pieces from `first` on become one, of memory of its own. Some memory can be read and not be written from directly: where a
// driver has mapped it (pinned memory of CUDA's, managed memory), the kernel has no pages to give to the device.
AlignedBytes gather(std::vector<iovec>& pieces, size_t first, size_t align);

}  // namespace lazyckpt
