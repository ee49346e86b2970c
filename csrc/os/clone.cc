#include "os/clone.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cerrno>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "base/fault.h"

namespace lazyckpt {
namespace {

#ifndef XFS_SUPER_MAGIC
constexpr long XFS_SUPER_MAGIC = 0x58465342;
#endif
#ifndef BTRFS_SUPER_MAGIC
constexpr long BTRFS_SUPER_MAGIC = 0x9123683E;
#endif

// A larger block leaves little of a piece to share.
constexpr long kLargestBlock = 65536;

// Never destroyed: threads may come back behind static destructors.
struct Registry {
  std::mutex mutex;
  std::set<Descriptor*> all;
};

Registry& registry() {
  static Registry* const kept = std::make_unique<Registry>().release();
  static const int made = ::pthread_atfork([] { kept->mutex.lock(); }, [] { kept->mutex.unlock(); }, [] {
    for (Descriptor* each : kept->all) *each = Descriptor();
    kept->mutex.unlock();
  });
  static_cast<void>(made);
  return *kept;
}

bool shares_blocks(long type) { return type == XFS_SUPER_MAGIC || type == BTRFS_SUPER_MAGIC; }

}  // namespace

class CloneSource::Held {
 public:
  explicit Held(Descriptor opened) : fd(std::move(opened)) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().all.insert(&fd);
  }
  ~Held() {
    {
      std::lock_guard<std::mutex> lock(registry().mutex);
      registry().all.erase(&fd);
    }  // the file is closed without it: that may take long
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  Descriptor fd;
};

std::optional<CloneSource> CloneSource::open(int fd, const std::string& path) {
  struct statfs system {};
  if (::fstatfs(fd, &system) != 0 || !shares_blocks(static_cast<long>(system.f_type))) return std::nullopt;
  const long block = static_cast<long>(system.f_bsize);
  if (block < 512 || block > kLargestBlock || (block & (block - 1)) != 0) return std::nullopt;
  CloneSource source;
  // A description of its own: the writer's may only write. By the first one, since the path may name another file by now.
  const std::string self = "/proc/self/fd/" + std::to_string(fd);
  if (fault::consult("open", path).error != 0) return std::nullopt;
  Descriptor opened(::open(self.c_str(), O_RDONLY | O_CLOEXEC));
  if (!opened.valid()) return std::nullopt;
  source.held_ = std::make_shared<Held>(std::move(opened));
  source.path_ = path;
  source.block_bytes_ = static_cast<uint32_t>(block);
  return source;
}

std::optional<CloneSource::Stamp> CloneSource::look() const {
  struct stat found {};
  if (fault::consult("fstat", path_).error != 0 || ::fstat(held_->fd.get(), &found) != 0) return std::nullopt;
  return Stamp{static_cast<int64_t>(found.st_size), found.st_mtim};
}

bool CloneSource::note() {
  const std::optional<Stamp> now = look();
  noted_ = now.value_or(Stamp{});
  return now.has_value();
}

bool CloneSource::unchanged() const {
  const std::optional<Stamp> now = look();
  return now && noted_.size >= 0 && now->size == noted_.size && now->changed.tv_sec == noted_.changed.tv_sec &&
         now->changed.tv_nsec == noted_.changed.tv_nsec;
}

int CloneSource::clone_into(int to, uint64_t offset, uint64_t bytes) const {
  file_clone_range range{};
  range.src_fd = held_->fd.get();
  range.src_offset = range.dest_offset = offset;
  range.src_length = bytes;
  for (;;) {
    const fault::Verdict verdict = fault::consult("FICLONERANGE", path_);
    if (verdict.error == 0 && ::ioctl(to, FICLONERANGE, &range) == 0) return 0;
    const int error = verdict.error != 0 ? verdict.error : errno;
    if (error != EINTR) return error;
  }
}

bool is_refusal(int error) { return error == EOPNOTSUPP || error == EXDEV || error == ENOTTY || error == ENOSYS; }

}  // namespace lazyckpt
