// All storage system calls of the project stand in file.cc, and those that share blocks in clone.cc: durability is decided in one
// place, and a fault hook stands before each of them. Every failure is an Error that names the call, the path, the offset and the remedy.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/fault.h"

namespace lazyckpt {

// What this file demands of direct I/O. Both 1: the file is written through the page cache.
struct IoLimits {
  uint32_t memory_align = 1;  // bytes; of every address and length handed to the kernel
  uint32_t offset_align = 1;  // bytes; of every file offset
  bool direct() const { return offset_align > 1; }
};

// A descriptor that closes itself.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor();

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int release();

 private:
  int fd_ = -1;
};

// A new file on its way to being durable. Not thread-safe but for write_at(), which any number of threads may call.
class WritableFile {
 public:
  // Creates `path`, which must not exist unless it is `shared`: then other processes create and write it, too. `direct`: ask
  // for direct I/O, and take what the file system grants. `expected`: what a file there was found to demand; then nothing is
  // touched before create(), which also makes a missing directory if `with_directory`. `like`: the file that it will replace,
  // whose permissions it gets as far as that is allowed; a missing one is no error. `directory`: a descriptor of the
  // directory, which is duplicated: the file is made and removed there, whatever its path has become meanwhile. -1: none.
  explicit WritableFile(std::string path, bool direct, bool shared = false,
                        const std::optional<IoLimits>& expected = std::nullopt, bool with_directory = false,
                        std::string like = {}, int directory = -1);

  // Creates the file if that is still to be done. Where it demands more than was expected it goes through the page cache.
  void create();

  const std::string& path() const { return path_; }
  const IoLimits& limits() const { return limits_; }  // that chunks are cut for
  const std::optional<IoLimits>& found() const { return found_; }  // what the file demands; none before it is created
  // False once a write has gone through the page cache: asked so, not granted, or refused by the kernel on the way.
  bool wrote_direct() const { return limits_.direct() && !fell_back_; }

  // Reserves the blocks, so that a full disk is known now and writers never move the end of the file.
  void preallocate(uint64_t begin, uint64_t end);

  // Writes the whole of `pieces` at `offset`; continues short writes. With direct limits, addresses, lengths and offset
  // obey them. Consumes `pieces`.
  void write_at(std::vector<iovec>& pieces, uint64_t offset);

  // Of the file, until it is finished or discarded; -1 before it is created.
  int descriptor() const { return fd_.get(); }

  // Cuts the file to `bytes` (whole aligned blocks were written) unless it is shared, makes data and size durable, closes.
  void finish(uint64_t bytes);

  // Closes and removes the file, but not one that others write, too, and the directory if it was made with it and is empty.
  // Never throws: it runs on the way out of an error.
  void discard() noexcept;

 private:
  int open_here(int flags, uint32_t mode) const;
  void open_new();
  void take_permissions(const std::string& acl, uint32_t mode, uint32_t owner, uint32_t group);
  IoLimits find_limits() const;
  void fall_back(int error, uint64_t offset);

  std::string path_;
  const std::string like_;
  Descriptor directory_;  // until the file is finished or discarded
  Descriptor fd_;
  const bool direct_, shared_, with_directory_;
  IoLimits limits_;
  std::optional<IoLimits> found_;
  bool made_directory_ = false;
  std::atomic<bool> fell_back_{false};
};

// A finished file. Any number of threads may read it.
class ReadableFile {
 public:
  // `direct`: read_blocks() goes past the page cache, where the file system can.
  explicit ReadableFile(const std::string& path, bool direct = false);
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  const IoLimits& limits() const { return limits_; }
  uint64_t bytes_read() const { return bytes_read_; }  // that the kernel has delivered so far, by all calls

  void read_at(void* to, size_t bytes, uint64_t offset) const;  // all of them, or an error

  // With direct limits, address, length and offset obey them. Reads all, or up to the end of the file; returns how many bytes.
  size_t read_blocks(void* to, size_t bytes, uint64_t offset) const;

 private:
  void open_direct();
  size_t read_some(bool direct, char* to, size_t bytes, uint64_t offset) const;

  std::string path_;
  Descriptor fd_;
  Descriptor direct_fd_;  // of the same file, if it is to be had
  IoLimits limits_;
  mutable std::atomic<bool> fell_back_{false};
  mutable std::atomic<uint64_t> bytes_read_{0};
  uint64_t size_ = 0;
};

// The steps of a publish. Paths are in the encoding of the file system.
void write_small_file(const std::string& path, const std::string& bytes);  // create or replace content, fsync, close
// That of each (path, bytes), and sync_directory() of each directory. All are written before the first is synced: what a journal
// holds of them is mostly written with that, and the others are hardly waited for.
void make_durable(const std::vector<std::pair<std::string, std::string>>& files, const std::vector<std::string>& directories);
void write_end(const std::string& path, uint64_t offset, const std::string& bytes);  // of a shared file; cut, fdatasync
// At most `most_bytes` from the beginning of a file that a kernel or a user keeps small; empty if there is none.
std::string read_some(const std::string& path, size_t most_bytes);
void rename_path(const std::string& from, const std::string& to);
void sync_directory(const std::string& path);  // makes renames and removals in it durable
// With missing parents; false if it is there already. durable: each that was made is fsynced into its own.
bool make_directory(const std::string& path, bool durable);
void remove_file(const std::string& path);     // a missing one is no error
void remove_directory(const std::string& path);  // an empty one; a missing one is no error

#if LAZYCKPT_FAULT_HOOKS
// Every file opened from now on pretends to have these limits; {0, 0} ends it.
void override_limits(IoLimits limits);
#endif

}  // namespace lazyckpt
