// What the fake driver is made of: its controls, marks in streams, and streams that are threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace fake {

constexpr int kMostDevices = 8;
constexpr unsigned char kPoison = 0xA5;
constexpr std::align_val_t kMemoryAlign{512};
constexpr int kLeastPriority = 0, kGreatestPriority = -5;

enum Code : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kCaptureUnsupported = 900,
};

// What an event waits for: one recording of it.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  int error = kSuccess;

  void finish(int code) {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    error = code;
    changed.notify_all();
  }
  int wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return done; });
    return error;
  }
  int query() {
    std::lock_guard<std::mutex> lock(mutex);
    return done ? error : kNotReady;
  }
};

struct Fault {
  int64_t skip;
  int code;
  bool late;  // the call succeeds, the work fails
};

// Copies that do not begin.
enum class Hold : int { kNone, kAll, kFromAllocated };  // the last: out of memory of cuMemAlloc

// See fake_set_order().
enum class Order : int { kRight, kWithoutWaits, kOneQueue };

// Whatever the tests set and count.
struct Controls {
  std::mutex mutex;
  std::condition_variable changed;
  int devices = 2;
  double most_delay_s = 0;
  std::map<std::string, double> call_delays;  // of calls themselves, by name
  Hold hold = Hold::kNone;
  std::atomic<Order> order{Order::kRight};
  std::mt19937_64 random{0};
  std::map<std::string, std::vector<Fault>> faults;
  std::map<std::string, int64_t> counts, live;
  std::map<uintptr_t, size_t> registered;
  int global_captures = 0;  // that are going on, in the mode in which others may not make unsafe calls
  uint64_t largest_registration = UINT64_MAX, most_registered = UINT64_MAX;  // bytes at once, and of all together
  size_t total_bytes = size_t{4} << 30;  // of each device
  std::map<int, size_t> others_bytes;    // what others have taken of a device
  std::map<uintptr_t, std::pair<int, size_t>> allocated;   // address -> device, bytes
  std::map<uintptr_t, size_t> of_training;                 // other memory that plays allocations of a device
  std::multimap<uintptr_t, size_t> copying;  // what copies that have not ended read and write
};

inline Controls& controls() {
  static auto* made = new Controls;  // streams may outlive the statics
  return *made;
}

inline size_t free_bytes(int device) {  // requires the lock of controls()
  size_t used = controls().others_bytes[device];
  for (const auto& [address, block] : controls().allocated) used += block.first == device ? block.second : 0;
  return controls().total_bytes > used ? controls().total_bytes - used : 0;
}

inline double random_delay() {
  Controls& all = controls();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.most_delay_s > 0 ? std::uniform_real_distribution<double>(0, all.most_delay_s)(all.random) : 0;
}

inline void count(const std::string& what) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  ++controls().counts[what];
}

inline void count_live(const std::string& what, int change) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().live[what] += change;
}

// The fault that strikes this call, if any; each call is counted.
inline Fault consult(const std::string& call) {
  Controls& all = controls();
  std::unique_lock<std::mutex> lock(all.mutex);
  if (const auto delay = all.call_delays.find(call); delay != all.call_delays.end()) {
    const std::chrono::duration<double> pause(delay->second);
    lock.unlock();
    std::this_thread::sleep_for(pause);
    lock.lock();
  }
  ++all.counts[call];
  auto& faults = all.faults[call];
  for (auto it = faults.begin(); it != faults.end(); ++it) {
    if (it->skip-- > 0) continue;
    const Fault found = *it;
    faults.erase(it);
    return found;
  }
  return {0, kSuccess, false};
}

}  // namespace fake

// ---- Streams -----------------------------------------------------------------------------------------------------

struct CUctx_st {
  int device = 0;
  std::atomic<int> users{0};
};

struct CUstream_st;

namespace fake {

// With Order::kOneQueue: turns in which all work is done, in the order in which it was enqueued.
struct Turns {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t given = 0, next = 0;

  std::function<void(CUstream_st&)> in_turn(std::function<void(CUstream_st&)> work) {
    std::lock_guard<std::mutex> lock(mutex);
    return [this, own = given++, work = std::move(work)](CUstream_st& self) {
      {
        std::unique_lock<std::mutex> waiting(mutex);
        changed.wait(waiting, [&] { return next == own; });
      }
      work(self);
      std::lock_guard<std::mutex> ended(mutex);
      ++next;
      changed.notify_all();
    };
  }
};

inline Turns& turns() {
  static auto* made = new Turns;
  return *made;
}

}  // namespace fake

struct CUstream_st {
  int device = 0;
  CUctx_st* context = nullptr;  // in which it was made
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void(CUstream_st&)>> work;
  bool busy = false, end = false;
  std::atomic<int> capturing{0};
  // Of work that failed, by the thread that enqueued it, until an event recorded by the same thread tells it: the real driver
  // tells everybody for ever, which would leave nothing to test. Only the stream's thread touches it.
  std::map<std::thread::id, int> errors;

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return !work.empty() || end; });
      if (work.empty()) return;
      const auto next = std::move(work.front());
      work.pop_front();
      busy = true;
      lock.unlock();
      next(*this);
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
  void add(std::function<void(CUstream_st&)> next) {
    std::lock_guard<std::mutex> lock(mutex);
    const bool in_turn = fake::controls().order == fake::Order::kOneQueue;
    work.push_back(in_turn ? fake::turns().in_turn(std::move(next)) : std::move(next));
    changed.notify_all();
  }
  bool idle() {
    std::lock_guard<std::mutex> lock(mutex);
    return work.empty() && !busy;
  }
};

struct CUevent_st {
  CUctx_st* context = nullptr;  // in which it was made
  std::mutex mutex;
  std::shared_ptr<fake::Mark> mark;  // guarded by mutex; none: never recorded
  std::shared_ptr<fake::Mark> latest() {
    std::lock_guard<std::mutex> lock(mutex);
    return mark;
  }
};

namespace fake {

using Stream = CUstream_st;

inline thread_local CUctx_st* current = nullptr;

// cuStreamBeginCapture: while a capture of the mode "global" goes on, no thread whose own mode is not "relaxed" may make a call
// that is potentially unsafe, which would end the capture with an error.
constexpr int kModeGlobal = 0, kModeRelaxed = 2;
inline thread_local int capture_mode = kModeGlobal;
inline bool is_unsafe() {
  if (capture_mode == kModeRelaxed) return false;
  std::lock_guard<std::mutex> lock(controls().mutex);
  if (controls().global_captures == 0) return false;
  ++controls().counts["captures broken"];
  return true;
}

inline CUctx_st* context_of(int device) {
  static auto* all = [] {
    auto* made = new CUctx_st[kMostDevices];
    for (int i = 0; i < kMostDevices; ++i) made[i].device = i;
    return made;
  }();
  return &all[device];
}

struct Streams {
  std::mutex mutex;
  std::map<Stream*, std::shared_ptr<Stream>> alive;
  std::map<CUctx_st*, Stream*> of_context;  // the default ones
};

inline Streams& streams() {
  static auto* made = new Streams;
  return *made;
}

inline Stream* start_stream(CUctx_st* context) {  // requires the lock of streams()
  auto stream = std::make_shared<Stream>();
  stream->device = context->device;
  stream->context = context;
  streams().alive[stream.get()] = stream;
  std::thread([stream] { stream->run(); }).detach();
  return stream.get();
}

// The stream that a handle means for the calling thread; null if it means none.
inline Stream* find_stream(Stream* handle, int device) {
  std::lock_guard<std::mutex> lock(streams().mutex);
  if (handle == nullptr) {
    CUctx_st* const context = current != nullptr && current->device == device ? current : context_of(device);
    Stream*& mine = streams().of_context[context];
    if (mine == nullptr) mine = start_stream(context);
    return mine;
  }
  return streams().alive.count(handle) != 0 && handle->device == device ? handle : nullptr;
}

// A copy may lie inside a registration, or touch none.
inline bool crosses_registrations(const void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  std::lock_guard<std::mutex> lock(controls().mutex);
  for (const auto& [from, length] : controls().registered) {
    const bool touches = at < from + length && from < at + bytes;
    if (touches && !(at >= from && at + bytes <= from + length)) return true;
  }
  return false;
}

inline bool is_registered(const void* begin, size_t bytes) {
  Controls& all = controls();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto at = reinterpret_cast<uintptr_t>(begin);
  auto it = all.registered.upper_bound(at);
  if (it == all.registered.begin()) return false;
  --it;
  return at >= it->first && at + bytes <= it->first + it->second;
}

// In memory of cuMemAlloc.
inline bool is_allocated(const void* begin) {  // requires the lock of controls()
  const auto at = reinterpret_cast<uintptr_t>(begin);
  const auto block = controls().allocated.upper_bound(at);
  return block != controls().allocated.begin() && at < std::prev(block)->first + std::prev(block)->second.second;
}

// A copy may lie inside an allocation, and not reach beyond it; of memory that nobody has declared nothing is known.
inline bool crosses_allocations(const void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  std::lock_guard<std::mutex> lock(controls().mutex);
  for (const auto& [from, length] : controls().of_training) {
    const bool touches = at < from + length && from < at + bytes;
    if (touches && !(at >= from && at + bytes <= from + length)) return true;
  }
  return false;
}

inline void wait_while_held(const void* from) {
  Controls& all = controls();
  std::unique_lock<std::mutex> lock(all.mutex);
  const bool allocated = is_allocated(from);
  all.changed.wait(lock, [&] { return all.hold == Hold::kNone || (all.hold == Hold::kFromAllocated && !allocated); });
}

inline void sleep_a_little() {
  const double delay_s = random_delay();
  if (delay_s > 0) std::this_thread::sleep_for(std::chrono::duration<double>(delay_s));
}

// What a copy reads and writes, from the moment it is enqueued.
inline void begin_copying(const void* begin, size_t bytes) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().copying.emplace(reinterpret_cast<uintptr_t>(begin), bytes);
}

inline void end_copying(const void* begin, size_t bytes) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  auto& copying = controls().copying;
  const auto [first, last] = copying.equal_range(reinterpret_cast<uintptr_t>(begin));
  copying.erase(std::find_if(first, last, [&](const auto& each) { return each.second == bytes; }));
}

inline bool is_being_copied(uintptr_t begin, size_t bytes) {  // requires the lock of controls()
  const auto overlaps = [&](const auto& each) { return each.first < begin + bytes && begin < each.first + each.second; };
  return std::any_of(controls().copying.begin(), controls().copying.end(), overlaps);
}

inline int enqueue_copy(Stream* handle, void* to, const void* from, size_t bytes, const Fault& fault) {
  if (current == nullptr) return kInvalidContext;
  Stream* stream = find_stream(handle, current->device);
  if (stream == nullptr || stream->context != current) return kInvalidHandle;
  if (stream->capturing != 0) return kCaptureUnsupported;
  if (crosses_allocations(from, bytes) || crosses_allocations(to, bytes)) return kInvalidValue;
  if (crosses_registrations(from, bytes) || crosses_registrations(to, bytes)) return kInvalidValue;
  begin_copying(to, bytes);
  begin_copying(from, bytes);
  stream->add([=, enqueued_by = std::this_thread::get_id()](Stream& self) {
    wait_while_held(from);
    sleep_a_little();
    if (fault.code != kSuccess) {
      self.errors[enqueued_by] = fault.code;
    } else {
      std::memcpy(to, from, bytes);
    }
    end_copying(to, bytes);
    end_copying(from, bytes);
    count("copies that ended");
  });
  return kSuccess;
}

// For memory that something before the copy may still write to.
inline void poison_in_turn(Stream* handle, void* to, size_t bytes) {
  if (current == nullptr) return;
  if (Stream* stream = find_stream(handle, current->device); stream != nullptr) {
    stream->add([=](Stream&) { std::memset(to, kPoison, bytes); });
  }
}

// At once, so that nobody reads it before the copy has ended; but not under a copy of a batch that has failed, which its caller
// makes again.
inline void poison(Stream* handle, void* to, size_t bytes) {
  bool busy = false;
  {
    std::lock_guard<std::mutex> lock(controls().mutex);
    busy = is_being_copied(reinterpret_cast<uintptr_t>(to), bytes);
  }
  if (busy) return poison_in_turn(handle, to, bytes);
  std::memset(to, kPoison, bytes);
}

inline int wait_for_all(Stream* stream) {
  std::unique_lock<std::mutex> lock(stream->mutex);
  stream->changed.wait(lock, [&] { return stream->work.empty() && !stream->busy; });
  return kSuccess;
}

}  // namespace fake
