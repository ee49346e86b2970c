#include "os/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/fault.h"
#include "os/pieces.h"

namespace lazyckpt {
namespace {

// Asked for where the kernel does not tell (before Linux 6.1, some network file systems): a page satisfies all known
// devices, and a refusal at the first write still falls back to the page cache.
constexpr uint32_t kAssumedAlign = 4096;
// A larger alignment costs more in padding and bouncing than direct I/O gives; it also outgrows the zip's padding field.
constexpr uint32_t kLargestAlign = 32768;
// Short writes in a row that complete no block before the file is given up.
constexpr int kMostStalls = 8;
constexpr mode_t kFileMode = 0666;  // the umask decides
constexpr mode_t kDirectoryMode = 0777;
constexpr const char* kAccessList = "system.posix_acl_access";

const char* remedy(int error) {
  switch (error) {
    case ENOSPC: return "; free space there, keep fewer checkpoints, or save elsewhere";
    case EDQUOT: return "; the disk quota is used up: free space, raise it, or save elsewhere";
    case EIO: return "; the device or the file server failed: look at the kernel log, and save elsewhere";
    case EROFS: return "; the file system is mounted read-only";
    case EACCES:
    case EPERM: return "; check the permissions of the directory and the user that runs the job";
    case ENAMETOOLONG: return "; choose a shorter name or path";
    case EFBIG: return "; files may not be that large here: raise the limit of the process (ulimit -f), or save elsewhere";
    case ENOENT: return "; was a directory of the path removed?";
    case EMFILE:
    case ENFILE: return "; too many open files: raise the limit (ulimit -n)";
    default: return "";
  }
}

std::string parent_of(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

bool is_there(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0;
}

// For messages and faults: a directory that is held by a descriptor is named as it is called now.
std::string readable(const std::string& path) {
  const std::string prefix = "/proc/self/fd/";
  if (path.compare(0, prefix.size(), prefix) != 0) return path;
  const std::string link = path.substr(0, path.find('/', prefix.size()));
  std::array<char, PATH_MAX> target{};
  const ssize_t length = ::readlink(link.c_str(), target.data(), target.size());
  return length <= 0 ? path : std::string(target.data(), static_cast<size_t>(length)) + path.substr(link.size());
}

[[noreturn]] void throw_error(const char* call, const std::string& path, int error, int64_t offset, const char* advice) {
  std::string text = std::string(call) + " failed on '" + path + "'";
  if (offset >= 0) text += " at offset " + std::to_string(offset);
  text += ": ";
  text += std::strerror(error);
  throw Error(ErrorKind::kStorage, text + advice, error, path);
}

[[noreturn]] void fail(const char* call, const std::string& given, int error, int64_t offset = -1) {
  const std::string path = readable(given);
  const bool says_all = error == ENOENT && is_there(parent_of(path));
  throw_error(call, path, error, offset, says_all ? "" : remedy(error));
}

// What was to be made cannot be missing; where its directory is not, the file system takes nothing new.
[[noreturn]] void fail_to_make(const char* call, const std::string& given, int error) {
  const std::string path = readable(given);
  const bool refused = error == ENOENT && is_there(parent_of(path));
  throw_error(call, path, error, -1, refused ? "; no files can be made in its directory (of /proc, or the like): save elsewhere" : remedy(error));
}

// Runs one system call behind its fault hook; EINTR is continued. `system_call` returns -1 and sets errno on failure.
template <typename Call>
auto invoke(const char* name, const std::string& path, Call system_call) -> decltype(system_call()) {
  for (;;) {
    const fault::Verdict verdict = fault::consult(name, readable(path));
    if (verdict.error != 0) {
      errno = verdict.error;
    } else {
      const auto result = system_call();
      if (result >= 0) return result;
    }
    if (errno != EINTR) return -1;
  }
}

int open_file(const std::string& path, int flags, mode_t mode = kFileMode) {
  return invoke("open", path, [&] { return ::open(path.c_str(), flags | O_CLOEXEC, mode); });
}

// Empty if there is none.
std::string access_list_of(const std::string& path) {
  std::array<char, 4096> list{};
  const ssize_t length = ::getxattr(path.c_str(), kAccessList, list.data(), list.size());
  return length <= 0 ? std::string() : std::string(list.data(), static_cast<size_t>(length));
}

// Descriptors are closed once whatever close() says: on Linux the number is free even after an error.
void close_file(Descriptor& fd, const std::string& path) {
  const fault::Verdict verdict = fault::consult("close", path);
  int error = ::close(fd.release()) < 0 ? errno : 0;
  if (verdict.error != 0) error = verdict.error;
  if (error != 0 && error != EINTR) fail("close", path, error);
}

void write_all(int fd, const std::string& path, const std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t written =
        invoke("write", path, [&] { return ::write(fd, bytes.data() + done, bytes.size() - done); });
    if (written < 0) fail("write", path, errno, static_cast<int64_t>(done));
    done += static_cast<size_t>(written);
  }
}

std::string name_of(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

bool is_memory_file_system(int fd) {
  struct statfs stat {};
  if (::fstatfs(fd, &stat) != 0) return false;
  return stat.f_type == TMPFS_MAGIC || stat.f_type == RAMFS_MAGIC;
}

#if LAZYCKPT_FAULT_HOOKS
IoLimits overridden{0, 0};
#endif

IoLimits ask_limits(int fd) {
#if LAZYCKPT_FAULT_HOOKS
  if (overridden.offset_align != 0) return overridden;
#endif
#ifdef STATX_DIOALIGN
  struct statx stat {};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stat) == 0 && (stat.stx_mask & STATX_DIOALIGN) != 0) {
    if (stat.stx_dio_offset_align == 0 || stat.stx_dio_mem_align == 0) return {};  // no direct I/O on this file
    return {stat.stx_dio_mem_align, stat.stx_dio_offset_align};
  }
#endif
  if (is_memory_file_system(fd)) return {};
  return {kAssumedAlign, kAssumedAlign};
}

}  // namespace

#if LAZYCKPT_FAULT_HOOKS
void override_limits(IoLimits limits) { overridden = limits; }
#endif

// ---- Descriptor --------------------------------------------------------------------------------------------------

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    if (valid()) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

Descriptor::~Descriptor() {
  if (valid()) ::close(fd_);
}

int Descriptor::release() { return std::exchange(fd_, -1); }

// ---- WritableFile ------------------------------------------------------------------------------------------------

WritableFile::WritableFile(std::string path, bool direct, bool shared, const std::optional<IoLimits>& expected,
                           bool with_directory, std::string like, int directory)
    : path_(std::move(path)), like_(std::move(like)), direct_(direct), shared_(shared), with_directory_(with_directory) {
  if (directory >= 0) {
    directory_ = Descriptor(::fcntl(directory, F_DUPFD_CLOEXEC, 0));
    if (!directory_.valid()) fail("fcntl", path_, errno);
  }
  if (expected) {
    limits_ = *expected;
    return;
  }
  open_new();
  found_ = limits_ = find_limits();
}

void WritableFile::create() {
  if (found_) return;
  open_new();
  found_ = find_limits();
  const bool suits = found_->direct() && limits_.memory_align % found_->memory_align == 0 &&
                     limits_.offset_align % found_->offset_align == 0;
  if (limits_.direct() && suits) return;
  fell_back_ = limits_.direct();
  if (found_->direct() && ::fcntl(fd_.get(), F_SETFL, 0) != 0) fail("fcntl", path_, errno);
}

int WritableFile::open_here(int flags, uint32_t mode) const {
  if (!directory_.valid()) return open_file(path_, flags, mode);
  const std::string name = name_of(path_);
  return invoke("open", path_, [&] { return ::openat(directory_.get(), name.c_str(), flags | O_CLOEXEC, mode); });
}

void WritableFile::open_new() {
  const int flags = O_WRONLY | O_CREAT | (shared_ ? 0 : O_EXCL);
  struct stat old {};
  const bool replaces = !like_.empty() && ::stat(like_.c_str(), &old) == 0 && S_ISREG(old.st_mode);
  const mode_t mode = replaces ? kFileMode & old.st_mode & S_IRWXU : kFileMode;  // never readable by more than the old one
  fd_ = Descriptor(open_here(flags, mode));
  if (!fd_.valid() && errno == ENOENT && with_directory_) {
    made_directory_ = make_directory(parent_of(path_), false);
    fd_ = Descriptor(open_here(flags, mode));
  }
  if (!fd_.valid()) fail_to_make("open", path_, errno);
  if (replaces) take_permissions(access_list_of(like_), old.st_mode & kDirectoryMode, old.st_uid, old.st_gid);
}

// What is refused is done without. Bits of a group or of an access list that could not be kept would be somebody else's.
void WritableFile::take_permissions(const std::string& acl, uint32_t mode, uint32_t owner, uint32_t group) {
  struct stat own {};
  if (::fstat(fd_.get(), &own) != 0) return;
  const auto give = [&](uid_t user) {
    return invoke("fchown", path_, [&] { return ::fchown(fd_.get(), user, group); }) == 0;
  };
  const bool same = own.st_gid == group && own.st_uid == owner;
  const bool has_group = same || give(owner) || own.st_gid == group || give(static_cast<uid_t>(-1));
  if (has_group && !acl.empty() && ::fsetxattr(fd_.get(), kAccessList, acl.data(), acl.size(), 0) == 0) return;
  if (!has_group || !acl.empty()) mode = (mode & ~uint32_t{S_IRWXG}) | (mode & S_IRWXO) << 3;
  static_cast<void>(invoke("fchmod", path_, [&] { return ::fchmod(fd_.get(), mode); }));
}

// Direct I/O is switched on after the open: a file system that refuses the flag then still leaves us a good descriptor.
IoLimits WritableFile::find_limits() const {
  if (!direct_) return {};
  const IoLimits asked = ask_limits(fd_.get());
  if (!asked.direct() || std::max(asked.memory_align, asked.offset_align) > kLargestAlign) return {};
  const int set = invoke("fcntl", path_, [&] { return ::fcntl(fd_.get(), F_SETFL, O_DIRECT); });
  return set == 0 ? asked : IoLimits{};
}

// The kernel may grant O_DIRECT and refuse the write (some FUSE and stacked file systems): go on through the page cache.
void WritableFile::fall_back(int error, uint64_t offset) {
  if (::fcntl(fd_.get(), F_SETFL, 0) != 0) fail("pwritev", path_, error, static_cast<int64_t>(offset));
  fell_back_ = true;
}

void WritableFile::preallocate(uint64_t begin, uint64_t end) {
  if (begin >= end) return;
  const auto from = static_cast<off_t>(begin), length = static_cast<off_t>(end - begin);
  if (invoke("fallocate", path_, [&] { return ::fallocate(fd_.get(), 0, from, length); }) == 0) return;
  if (errno != EOPNOTSUPP && errno != ENOSYS) fail("fallocate", path_, errno);
  if (shared_) return;  // the others write, too: its end is not ours to set
  // No reservation on this file system: at least the end of the file stands still.
  if (invoke("ftruncate", path_, [&] { return ::ftruncate(fd_.get(), length); }) != 0) fail("ftruncate", path_, errno);
}

void WritableFile::write_at(std::vector<iovec>& pieces, uint64_t offset) {
  const uint64_t begin = offset;
  size_t first = 0;
  AlignedBytes bounce;  // once some of it could not be written from where it lies
  int stalls = 0;
  while (first < pieces.size()) {
    const int count = static_cast<int>(std::min<size_t>(pieces.size() - first, IOV_MAX));
    const bool was_direct = wrote_direct();  // another thread may fall back while this call is on its way
    const fault::Verdict verdict = fault::consult("pwritev", path_);
    ssize_t written = -1;
    if (verdict.error != 0) {
      errno = verdict.error;
    } else if (verdict.short_bytes >= 0) {
      iovec head = pieces[first];
      head.iov_len = std::min<size_t>(head.iov_len, static_cast<size_t>(verdict.short_bytes));
      written = ::pwritev(fd_.get(), &head, 1, static_cast<off_t>(offset));
    } else {
      written = ::pwritev(fd_.get(), &pieces[first], count, static_cast<off_t>(offset));
    }
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EFAULT && was_direct && bounce == nullptr) {
        bounce = gather(pieces, first, limits_.memory_align);
        continue;
      }
      if (errno != EINVAL || !was_direct) fail("pwritev", path_, errno, static_cast<int64_t>(offset));
      fall_back(errno, offset);
      continue;
    }
    // A short direct write may stop inside a block; the rest must start on one.
    const size_t block = was_direct ? limits_.offset_align : 1;
    const size_t usable = static_cast<size_t>(written) / block * block;
    if (usable > 0) stalls = 0;
    if (usable == 0 && ++stalls > kMostStalls) fail("pwritev", path_, EIO, static_cast<int64_t>(offset));
    first = consume(pieces, first, usable);
    offset += usable;
  }
  // Through the page cache: start the transfer now, so that the final sync does not find everything still to do.
  if (!wrote_direct()) {
    ::sync_file_range(fd_.get(), static_cast<off_t>(begin), static_cast<off_t>(offset - begin), SYNC_FILE_RANGE_WRITE);
  }
}

void WritableFile::finish(uint64_t bytes) {
  const auto length = static_cast<off_t>(bytes);
  if (!shared_ && invoke("ftruncate", path_, [&] { return ::ftruncate(fd_.get(), length); }) != 0) {
    fail("ftruncate", path_, errno);
  }
  if (invoke("fdatasync", path_, [&] { return ::fdatasync(fd_.get()); }) != 0) fail("fdatasync", path_, errno);
  close_file(fd_, path_);
  directory_ = Descriptor();  // whoever publishes it has one, too
}

void WritableFile::discard() noexcept {
  const bool created = fd_.valid() || found_.has_value();
  fd_ = Descriptor();
  if (created && !shared_ && directory_.valid()) ::unlinkat(directory_.get(), name_of(path_).c_str(), 0);
  if (created && !shared_ && !directory_.valid()) ::unlink(path_.c_str());
  directory_ = Descriptor();
  if (made_directory_) ::rmdir(parent_of(path_).c_str());  // not if somebody else has put something there
}

// ---- ReadableFile ------------------------------------------------------------------------------------------------

ReadableFile::ReadableFile(const std::string& path, bool direct) : path_(path), fd_(open_file(path, O_RDONLY | O_NONBLOCK)) {
  if (!fd_.valid()) fail("open", path_, errno);
  struct stat stat {};
  if (invoke("fstat", path_, [&] { return ::fstat(fd_.get(), &stat); }) != 0) fail("fstat", path_, errno);
  if (S_ISDIR(stat.st_mode)) fail("open", path_, EISDIR);
  if (!S_ISREG(stat.st_mode)) {
    throw Error(ErrorKind::kStorage, "cannot read '" + path_ + "': it is a FIFO or a device, not a regular file", EINVAL, path_);
  }
  size_ = static_cast<uint64_t>(stat.st_size);
  if (direct) open_direct();
}

// A second description of the file, so that ragged ends can still be read through the page cache. Opened through the first
// one: the path may name another file by now.
void ReadableFile::open_direct() {
  const IoLimits asked = ask_limits(fd_.get());
  if (!asked.direct() || std::max(asked.memory_align, asked.offset_align) > kLargestAlign) return;
  direct_fd_ = Descriptor(open_file("/proc/self/fd/" + std::to_string(fd_.get()), O_RDONLY | O_DIRECT));
  if (direct_fd_.valid()) limits_ = asked;
}

// One read of at least one byte; 0 at the end of the file.
size_t ReadableFile::read_some(bool direct, char* to, size_t bytes, uint64_t offset) const {
  for (;;) {
    const fault::Verdict verdict = fault::consult("pread", path_);
    if (verdict.short_bytes > 0) bytes = std::min(bytes, static_cast<size_t>(verdict.short_bytes));
    ssize_t got = -1;
    if (verdict.error != 0) {
      errno = verdict.error;
    } else {
      got = ::pread(direct ? direct_fd_.get() : fd_.get(), to, bytes, static_cast<off_t>(offset));
    }
    if (got >= 0) {
      bytes_read_ += static_cast<uint64_t>(got);
      return static_cast<size_t>(got);
    }
    if (errno == EINTR) continue;
    if (errno != EINVAL || !direct) fail("pread", path_, errno, static_cast<int64_t>(offset));
    fell_back_ = true;  // granted at the open and refused now, as some stacked file systems do
    direct = false;
  }
}

void ReadableFile::read_at(void* to, size_t bytes, uint64_t offset) const {
  auto* at = static_cast<char*>(to);
  while (bytes > 0) {
    const size_t got = read_some(false, at, bytes, offset);
    if (got == 0) {
      throw Error(ErrorKind::kCorrupt,
                  "'" + path_ + "' ends at byte " + std::to_string(offset) + ", inside a record: the file is truncated", 0,
                  path_);
    }
    at += got;
    offset += got;
    bytes -= got;
  }
}

size_t ReadableFile::read_blocks(void* to, size_t bytes, uint64_t offset) const {
  auto* at = static_cast<char*>(to);
  size_t done = 0;
  while (done < bytes) {
    // A short direct read may stop inside a block; what is left of this range then comes through the page cache.
    const size_t block = std::max(limits_.memory_align, limits_.offset_align);
    const bool direct = limits_.direct() && !fell_back_ && done % block == 0;
    const size_t got = read_some(direct, at + done, bytes - done, offset + done);
    if (got == 0) break;
    done += got;
    if (offset + done >= size_) break;  // no further call just to be told so
  }
  return done;
}

// ---- Publishing --------------------------------------------------------------------------------------------------

void write_small_file(const std::string& path, const std::string& bytes) { make_durable({{path, bytes}}, {}); }

void make_durable(const std::vector<std::pair<std::string, std::string>>& files, const std::vector<std::string>& directories) {
  std::vector<Descriptor> opened;
  opened.reserve(files.size());
  for (const auto& [path, bytes] : files) {
    opened.emplace_back(open_file(path, O_WRONLY | O_CREAT | O_TRUNC));
    if (!opened.back().valid()) fail_to_make("open", path, errno);
    write_all(opened.back().get(), path, bytes);
  }
  for (size_t i = 0; i < files.size(); ++i) {
    const int fd = opened[i].get();
    if (invoke("fsync", files[i].first, [fd] { return ::fsync(fd); }) != 0) fail("fsync", files[i].first, errno);
    close_file(opened[i], files[i].first);
  }
  for (const std::string& directory : directories) sync_directory(directory);
}

void write_end(const std::string& path, uint64_t offset, const std::string& bytes) {
  Descriptor fd(open_file(path, O_WRONLY));
  if (!fd.valid()) fail("open", path, errno);
  if (::lseek(fd.get(), static_cast<off_t>(offset), SEEK_SET) < 0) fail("lseek", path, errno);
  write_all(fd.get(), path, bytes);
  const auto size = static_cast<off_t>(offset + bytes.size());
  if (invoke("ftruncate", path, [&] { return ::ftruncate(fd.get(), size); }) != 0) fail("ftruncate", path, errno);
  if (invoke("fdatasync", path, [&] { return ::fdatasync(fd.get()); }) != 0) fail("fdatasync", path, errno);
  close_file(fd, path);
}

std::string read_some(const std::string& path, size_t most_bytes) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return {};
  std::string bytes(most_bytes, '\0');
  const ssize_t length = ::read(descriptor, bytes.data(), bytes.size());
  ::close(descriptor);
  bytes.resize(length < 0 ? 0 : static_cast<size_t>(length));
  return bytes;
}

void rename_path(const std::string& from, const std::string& to) {
  if (invoke("rename", to, [&] { return ::rename(from.c_str(), to.c_str()); }) != 0) fail("rename", to, errno);
}

void sync_directory(const std::string& path) {
  Descriptor fd(open_file(path, O_RDONLY | O_DIRECTORY));
  if (!fd.valid()) fail("open", path, errno);
  const int done = invoke("fsync", path, [&] { return ::fsync(fd.get()); });
  // Some network file systems have no directory fsync and say EINVAL; there a rename is durable by itself.
  if (done != 0 && errno != EINVAL) fail("fsync", path, errno);
}

bool make_directory(const std::string& path, bool durable) {
  bool made = true;
  if (invoke("mkdir", path, [&] { return ::mkdir(path.c_str(), kDirectoryMode); }) != 0) {
    const int error = errno;
    struct stat stat {};
    if (error == EEXIST && ::stat(path.c_str(), &stat) == 0 && S_ISDIR(stat.st_mode)) return false;
    const std::string parent = parent_of(path);
    if (error != ENOENT || parent == path) fail_to_make("mkdir", path, error);
    make_directory(parent, durable);
    made = invoke("mkdir", path, [&] { return ::mkdir(path.c_str(), kDirectoryMode); }) == 0;
    if (!made && errno != EEXIST) fail_to_make("mkdir", path, errno);
  }
  if (durable) sync_directory(parent_of(path));
  return made;
}

void remove_file(const std::string& path) {
  const int done = invoke("unlink", path, [&] { return ::unlink(path.c_str()); });
  if (done != 0 && errno != ENOENT) fail("unlink", path, errno);
}

void remove_directory(const std::string& path) {
  const int done = invoke("rmdir", path, [&] { return ::rmdir(path.c_str()); });
  if (done != 0 && errno != ENOENT) fail("rmdir", path, errno);
}

}  // namespace lazyckpt
