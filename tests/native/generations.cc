// Files of which each shares blocks with the one before, while memory is written to, calls fail, and fences pass: each must hold
// what its memory held when it was submitted, and the files before must stay as they were.
#include "generations.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/fault.h"
#include "checks.h"
#include "engine/engine.h"
#include "jobs/baseline.h"

namespace lazyckpt::stress {
namespace {

constexpr int kGenerations = 7;
constexpr size_t kKept = 3;
constexpr size_t kLeast = size_t{1} << 20;  // of smaller records nothing is compared

struct Tensor {
  Buffer memory;
  Source kind;
  uint64_t offset;
  int changed_at = 0;  // the generation before which it was last written to
};

struct File {
  std::string path, expected;
};

void fill(Random& random, const Buffer& buffer) {
  for (size_t at = 0; at < buffer.length(); at += noise().size() / 2) {
    const size_t length = std::min(noise().size() / 2, buffer.length() - at);
    std::memcpy(buffer.begin() + at, noise().data() + random.up_to(noise().size() - length), length);
  }
}

class Generations {
 public:
  Generations(Random& random, const std::string& directory)
      : random_(random), prefix_(directory + "/generation-"), direct_(!random.one_in(3)), engine_(choose()) {
    uint64_t at = 1 + random.up_to(200);
    for (size_t i = 0; i <= random.up_to(2); ++i) {
      if (random.one_in(2)) at = (at + 4095) / 4096 * 4096;
      const size_t length = kLeast + random.up_to(700000);
      tensors_.push_back({Buffer(length, random.up_to(4095)), random.choose<Source>({Source::kLazy, Source::kLazy, Source::kCopy}), at});
      fill(random, tensors_.back().memory);
      at += length + sizeof(uint32_t) + random.up_to(100);
    }
    size_ = at;
    structure_.assign(size_, 's');
  }

  void run() {
    for (now_ = 0; now_ < kGenerations; ++now_) save();
    baseline_.reset();
    for (const File& file : files_) check(file);
    for (const File& file : files_) ::unlink(file.path.c_str());
  }

 private:
  EngineOptions choose() {
    EngineOptions options;
    options.arena_bytes = size_t{1} << (19 + random_.up_to(3));
    options.chunk_bytes = size_t{1} << (16 + random_.up_to(3));
    options.writers = 1 + static_cast<int>(random_.up_to(2));
    return options;
  }

  void write_to_some() {
    for (Tensor& tensor : tensors_) {
      if (!random_.one_in(3)) continue;
      tensor.changed_at = now_;
      if (random_.one_in(2)) {
        fill(random_, tensor.memory);
      } else {
        tensor.memory.begin()[random_.up_to(tensor.memory.length() - 1)] ^= std::byte{1};
      }
    }
  }

  // Truly, or of what has been written to as a whole: that is seen.
  std::vector<uint32_t> declare() {
    std::vector<uint32_t> frozen;
    for (uint32_t record = 0; record < tensors_.size(); ++record) {
      Tensor& tensor = tensors_[record];
      if (tensor.changed_at > baseline_of_ || random_.one_in(4)) continue;
      if (random_.one_in(8)) fill(random_, tensor.memory), tensor.changed_at = now_;
      frozen.push_back(record);
    }
    return frozen;
  }

  FileSpec describe(std::string& expected) {
    FileSpec spec;
    spec.record_count = tensors_.size();
    spec.size = size_;
    expected = structure_;
    uint64_t at = 0;
    const auto add_structure = [&](uint64_t end) {
      if (at < end) spec.extents.push_back({reinterpret_cast<const std::byte*>(structure_.data()) + at, end - at, at, Source::kCopy});
      at = end;
    };
    for (uint32_t record = 0; record < tensors_.size(); ++record) {
      const Tensor& tensor = tensors_[record];
      const size_t length = tensor.memory.length();
      const std::string content(reinterpret_cast<const char*>(tensor.memory.begin()), length);
      add_structure(tensor.offset);
      spec.extents.push_back({tensor.memory.begin(), length, tensor.offset, tensor.kind, record});
      at = tensor.offset + length;
      spec.crc_fields.push_back({at, record});
      const uint32_t crc = plain_crc32(content);
      expected.replace(tensor.offset, length, content);
      for (size_t i = 0; i < sizeof(crc); ++i) expected[at + i] = static_cast<char>(crc >> (8 * i));
      add_structure(at + sizeof(crc));
    }
    add_structure(size_);
    return spec;
  }

  // True if the save may fail for it.
  bool choose_faults(const std::string& path) {
    if (random_.one_in(4)) fault::add({"FICLONERANGE", "", static_cast<int64_t>(random_.up_to(6)), 1 + static_cast<int64_t>(random_.up_to(9)), random_.choose<int>({EIO, EINVAL, ENOSPC, EINTR}), -1, 0});
    if (!random_.one_in(8)) return false;
    fault::add({random_.choose<std::string>({"pwritev", "fdatasync"}), path, static_cast<int64_t>(random_.up_to(3)), 1, EIO, -1, 0});
    return true;
  }

  void save() {
    write_to_some();
    ReuseRequest reuse{true, !random_.one_in(6), baseline_, {}};
    if (baseline_ != nullptr) reuse.frozen = declare();
    File file{prefix_ + std::to_string(now_), ""};
    FileSpec spec = describe(file.expected);
    const bool may_fail = choose_faults(file.path);
    const auto job = engine_.submit(make_file(random_, file.path, direct_), std::move(spec), {}, kPatienceS, {}, {}, reuse);
    if (random_.one_in(2)) engine_.fence({});
    expect(wait_until_finished(*job), file.path + " never finished");
    fault::clear();
    const Outcome outcome = look_at(*job);
    if (outcome.failed) {
      ++failed;
      return expect(may_fail, file.path + " failed without a reason: " + outcome.error);
    }
    check(file);
    ++durable;
    bytes_verified += file.expected.size();
    bytes_unread += job->stats.unread_bytes;
    expect(job->checksums.written == plain_crc32(file.expected), file.path + " has another CRC-32");
    keep(std::move(file), *job);
  }

  void keep(File file, Job& job) {
    files_.push_back(std::move(file));
    if (files_.size() > kKept) {
      ::unlink(files_.front().path.c_str());
      files_.pop_front();
    }
    if (random_.one_in(8)) return;  // as if it had not been published
    std::shared_ptr<Baseline> left;
    {
      std::lock_guard<std::mutex> lock(job.monitor->mutex);
      left.swap(job.baseline);
    }
    if (left == nullptr || !left->settle()) return;
    baseline_ = std::move(left);
    baseline_of_ = now_;
  }

  static void check(const File& file) {
    expect(read_back(file.path) == file.expected, file.path + " does not hold what it should");
  }

  Random& random_;
  const std::string prefix_;
  const bool direct_;
  Engine engine_;
  std::vector<Tensor> tensors_;
  std::string structure_;
  uint64_t size_ = 0;
  std::shared_ptr<const Baseline> baseline_;
  int baseline_of_ = 0, now_ = 0;
  std::deque<File> files_;
};

}  // namespace

void save_generations(Random& random, const std::string& directory) { Generations(random, directory).run(); }

}  // namespace lazyckpt::stress
