#include "fault.h"

#if LAZYCKPT_FAULT_HOOKS

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

namespace lazyckpt::fault {
namespace {

std::mutex mutex;  // guards all below but `armed`
std::vector<Fault> faults;
std::string crash_name;
int64_t crash_skip = 0;
std::atomic<bool> armed{false};  // so that an unarmed process pays one load

bool matches(const Fault& fault, const char* call, const std::string& path) {
  return fault.call == call && path.find(fault.path_part) != std::string::npos;
}

}  // namespace

void add(const Fault& fault) {
  std::lock_guard<std::mutex> lock(mutex);
  faults.push_back(fault);
  armed = true;
}

void clear() {
  std::lock_guard<std::mutex> lock(mutex);
  faults.clear();
  crash_name.clear();
  armed = false;
}

void set_crash_point(const std::string& name, int64_t skip) {
  std::lock_guard<std::mutex> lock(mutex);
  crash_name = name;
  crash_skip = skip;
  armed = true;
}

Verdict consult(const char* call, const std::string& path) {
  if (!armed) return {};
  Verdict verdict;
  double delay_s = 0;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (Fault& fault : faults) {
      if (!matches(fault, call, path)) continue;
      if (fault.skip > 0) {
        --fault.skip;
        continue;
      }
      if (fault.count == 0) continue;
      if (fault.count > 0) --fault.count;
      if (fault.error != 0) verdict.error = fault.error;
      if (fault.short_bytes >= 0) verdict.short_bytes = fault.short_bytes;
      delay_s += fault.delay_s;
    }
  }
  if (delay_s > 0) std::this_thread::sleep_for(std::chrono::duration<double>(delay_s));
  return verdict;
}

void crash_point(const char* name) {
  if (!armed) return;
  std::lock_guard<std::mutex> lock(mutex);
  if (crash_name != name || crash_skip-- > 0) return;
  ::kill(::getpid(), SIGKILL);
}

}  // namespace lazyckpt::fault

#endif  // LAZYCKPT_FAULT_HOOKS
