// What all parts of the stress program share: the tally, the weather, and how a job's end is looked at.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>

#include "base/error.h"
#include "base/fault.h"
#include "jobs/job.h"
#include "os/file.h"
#include "sample.h"

namespace lazyckpt::stress {

constexpr double kPatienceS = 60;  // for anything that takes milliseconds unless it hangs

inline std::atomic<int> mismatches{0};
inline std::atomic<int> durable{0}, failed{0}, cancelled{0}, interrupted_fences{0}, rounds{0}, fuzzed{0}, found_damaged{0};
inline std::atomic<int> joined{0}, torn{0};  // files that several ranks wrote together; those that one of them failed
inline std::atomic<uint64_t> bytes_verified{0}, bytes_cached{0};  // of them, through the caches of devices
inline std::atomic<int> archives_read{0};  // out of files of several
inline std::atomic<uint64_t> bytes_unread{0};  // of files that share blocks with others
inline std::atomic<uint64_t> bytes_loaded{0};  // to hosts and devices

inline void mismatch(const std::string& what) {
  ++mismatches;
  std::fprintf(stderr, "MISMATCH: %s\n", what.c_str());
}

inline void expect(bool fine, const std::string& what) {
  if (!fine) mismatch(what);
}

inline std::string read_back(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::string bytes(file ? static_cast<size_t>(file.tellg()) : 0, '\0');
  file.seekg(0);
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

inline bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

// What holds for all files of a round.
inline void choose_weather(Random& random) {
  if (random.one_in(3)) {
    override_limits(random.choose<IoLimits>({{512, 512}, {512, 4096}, {4096, 4096}, {4096, 512}, {32768, 32768}}));
  }
  if (random.one_in(2)) fault::add({"pwritev", "", 0, -1, 0, -1, random.seconds(random.one_in(3) ? 0.03 : 0.002)});
  if (random.one_in(4)) fault::add({"fdatasync", "", 0, -1, 0, -1, random.seconds(0.01)});
  if (random.one_in(4)) fault::add({"pwritev", "", 0, 40, 0, static_cast<int64_t>(32768 + random.up_to(40000)), 0});
  // Several in a row that complete no block are taken for a broken device.
  if (random.one_in(4)) fault::add({"pwritev", "", 0, 5, 0, static_cast<int64_t>(1 + random.up_to(32767)), 0});
  if (random.one_in(4)) fault::add({"pwritev", "", 3, 20, EINTR, -1, 0});
  if (random.one_in(6)) fault::add({"fallocate", "", 0, -1, EOPNOTSUPP, -1, 0});
}

// A file that is there already, or is created when its job is prepared, and may demand something else than was expected.
inline std::unique_ptr<WritableFile> make_file(Random& random, const std::string& path, bool direct, bool shared = false) {
  if (random.one_in(2)) return std::make_unique<WritableFile>(path, direct, shared);
  const auto expected = random.choose<IoLimits>({{1, 1}, {512, 512}, {4096, 512}, {4096, 4096}, {32768, 32768}});
  return std::make_unique<WritableFile>(path, direct, shared, direct ? expected : IoLimits{});
}

inline void end_weather() {
  fault::clear();
  override_limits({0, 0});
}

inline bool wait_until_finished(Job& job) {
  std::unique_lock<std::mutex> lock(job.monitor->mutex);
  const auto patience = std::chrono::duration<double>(kPatienceS);
  return job.monitor->settled.wait_for(lock, patience, [&] { return job.finished(); });
}

struct Outcome {
  bool finished, captured, failed;
  std::string error;
  ErrorKind kind;
};

inline Outcome look_at(Job& job) {
  std::lock_guard<std::mutex> lock(job.monitor->mutex);
  const bool has_failed = job.failed();
  return {job.finished(), job.captured(), has_failed, has_failed ? job.error->what() : "",
          has_failed ? job.error->kind() : ErrorKind::kStorage};
}

}  // namespace lazyckpt::stress
