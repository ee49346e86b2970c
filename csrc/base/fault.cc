#include "base/fault.h"

#if LAZYCKPT_FAULT_HOOKS

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/condition_variable.h"

namespace lazyckpt::fault {
namespace {

struct State {
  std::mutex mutex;  // guards what follows
  std::vector<Fault> faults;
  std::map<std::string, uint64_t> cleared;  // for each call: how often; "": how often all were
  std::condition_variable clearing;
  std::string crash_name;
  int64_t crash_skip = 0;
};

std::atomic<bool> armed{false};  // so that an unarmed process pays one load

// Never destroyed: a writer that hangs in the kernel at the end of the process may come back after static destructors. A forked
// child has one of its own, without faults: in its parent's, threads wait that it does not have.
State& state() {
  static State* kept = nullptr;
  static const auto renew = [] {
    kept = std::make_unique<State>().release();
    armed = false;
  };
  static const int made = (renew(), ::pthread_atfork(nullptr, nullptr, [] { renew(); }));
  static_cast<void>(made);
  return *kept;
}

bool matches(const Fault& fault, const char* call, const std::string& path) {
  return fault.call == call && path.find(fault.path_part) != std::string::npos;
}

}  // namespace

void add(const Fault& fault) {
  State& all = state();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.faults.push_back(fault);
  armed = true;
}

void clear(const std::string& call) {
  State& all = state();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto ended = [&](const Fault& fault) { return call.empty() || fault.call == call; };
  all.faults.erase(std::remove_if(all.faults.begin(), all.faults.end(), ended), all.faults.end());
  if (call.empty()) {
    all.crash_name.clear();
    armed = false;
  }
  ++all.cleared[call];
  all.clearing.notify_all();
}

void set_crash_point(const std::string& name, int64_t skip) {
  State& all = state();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.crash_name = name;
  all.crash_skip = skip;
  armed = true;
}

Verdict consult(const char* call, const std::string& path) {
  if (!armed) return {};
  Verdict verdict;
  double delay_s = 0;
  State& all = state();
  std::unique_lock<std::mutex> lock(all.mutex);
  for (Fault& fault : all.faults) {
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
  if (delay_s > 0) {
    const auto count = [&] { return all.cleared[""] + all.cleared[call]; };
    const uint64_t before = count();
    all.clearing.wait_for(lock, std::chrono::duration<double>(delay_s), [&] { return count() != before; });
  }
  return verdict;
}

void crash_point(const char* name) {
  if (!armed) return;
  State& all = state();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.crash_name != name || all.crash_skip-- > 0) return;
  ::kill(::getpid(), SIGKILL);
}

}  // namespace lazyckpt::fault

#endif  // LAZYCKPT_FAULT_HOOKS
