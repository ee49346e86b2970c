// Blocks that two files share (reflinks), where the file system can. The storage system calls for it stand in clone.cc, each
// behind its fault hook, as those of file.cc do.
#pragma once

#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <string>

#include "os/file.h"

namespace lazyckpt {

// A file whose blocks others may share. It is held open, so that it does not matter what becomes of its name; whoever changes it
// in place is seen by its size or the time of its last change.
class CloneSource {
 public:
  // Of the file that is open as `fd`, by a descriptor of its own. None where its file system is not one that shares blocks and
  // tells every change at once (one of a network may tell it late), or where it may not be read.
  static std::optional<CloneSource> open(int fd, const std::string& path);

  // It is to stay as it is now. False if that cannot be told.
  bool note();
  // Whether it is as it was then; false if that cannot be told.
  bool unchanged() const;

  // Lets the file that is open as `to` share the bytes from `offset` on, at the same place. All are multiples of block_bytes().
  // Returns 0, or the errno of what went wrong: then these bytes of `to` are to be written.
  int clone_into(int to, uint64_t offset, uint64_t bytes) const;

  uint32_t block_bytes() const { return block_bytes_; }

 private:
  struct Stamp {
    int64_t size = -1;
    timespec changed{};
  };
  std::optional<Stamp> look() const;

  // Forked children let go of theirs: a worker that lives as long as the training would keep the blocks of what is removed.
  class Held;

  std::string path_;
  std::shared_ptr<Held> held_;
  uint32_t block_bytes_ = 0;
  Stamp noted_;
};

// Whether an error of clone_into() says that it is of no use to try again on this file system.
bool is_refusal(int error);

}  // namespace lazyckpt
