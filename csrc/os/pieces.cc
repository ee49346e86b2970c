#include "os/pieces.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace lazyckpt {

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
  void* memory = nullptr;
  if (::posix_memalign(&memory, std::max(align, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
  AlignedBytes made(static_cast<std::byte*>(memory));
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
