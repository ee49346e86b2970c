// What the driver knows: contexts, streams, events, memory, captures, and the controls of the tests.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <limits>
#include <mutex>
#include <set>
#include <thread>

#include "clocks.h"

namespace strict {

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kContextIsDestroyed = 709,
  kAlreadyRegistered = 712,
  kNotRegistered = 713,
  kNotPermitted = 800,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCaptureUnmatched = 903,
  kCaptureIsolation = 905,
  kCaptureImplicit = 906,
  kCapturedEvent = 907,
  kCaptureWrongThread = 908,
};

enum CaptureMode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };
enum Engine : int { kCompute, kHostFunction, kToHost, kFromHost, kOnDevice, kEngines };
inline bool is_copy(Engine engine) { return engine >= kToHost; }
enum class Order : int { kRight, kWithoutWaits, kOneQueue };  // in which work is done, whatever was promised
constexpr int kMostDevices = 8;
constexpr size_t kPage = 4096;
using Time = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

struct Stream;
struct Capture;

struct Context {
  void* handle = nullptr;
  uint64_t number = 0;  // for traces
  int device = 0;
  bool is_green = false;  // another context of the device than its primary one
  int references = 0;
  int error = kSuccess;  // what an operation failed with; all later calls return it
  size_t taken = 0;      // bytes of memory
  Stream* legacy = nullptr;
  std::map<Component, Stream*> of_threads;  // per-thread default streams
  Time::time_point engine_free[kEngines] = {};  // of the device
  Component last_component = 0;                 // what was enqueued last on the device
  uint64_t last_position = 0;
};

struct Transfer {
  Address to = 0, from = 0;
  size_t bytes = 0;
  int fill = -1;                     // the value that a kernel writes; -1: copy
  bool from_allocated = false;       // out of memory that cuMemAlloc gave
  bool cancelled = false;            // its memory has gone
  int failure = kSuccess;            // with which it will fail
  std::shared_ptr<char> keeps_from, keeps_to;
};

struct Operation {
  Stream* stream = nullptr;
  uint64_t position = 0;
  Knowledge start;  // what has happened before it begins
  Clock waits;      // what it waits for, beside what stands before it in its stream
  Engine engine = kCompute;
  std::vector<Transfer> transfers;
  void (*function)(void*) = nullptr;  // that the driver calls, with this
  void* data = nullptr;
  bool is_running = false;  // the function
  std::string call;
  Time::duration delay{};
  uint64_t ready_number = 0;  // 0: not ready yet
  Time::time_point ready_at;
  bool is_mark() const { return transfers.empty() && function == nullptr; }  // only a place in the stream
};

struct Stream {
  void* handle = nullptr;
  uint64_t number = 0;
  Context* context = nullptr;
  Component component = 0;
  bool is_blocking = true, is_legacy = false, is_given_out = false, is_destroyed = false;
  uint64_t position = 0;  // of what was enqueued last
  Knowledge clock;        // when that has been done
  std::deque<Operation> queue;
  std::shared_ptr<Capture> capture;
  std::vector<Operation> graph;  // what was captured last
};

struct Event {
  void* handle = nullptr;
  uint64_t number = 0;
  Context* context = nullptr;
  bool is_destroyed = false;
  Stream* stream = nullptr;  // where it was recorded; null: nowhere yet
  uint64_t position = 0;     // there
  Knowledge clock;
  std::shared_ptr<Capture> capture;
};

struct Capture {
  int mode = kGlobal;
  Component owner = 0;
  Stream* origin = nullptr;
  bool is_invalid = false;
  std::vector<Operation> operations;
};

struct DeviceMemory {
  Range range;
  int device = 0;
  std::shared_ptr<char> owned;
  bool is_guessed = false;    // from what a kernel wrote
  bool is_allocated = false;  // by cuMemAlloc; else a test has told of it
  uint64_t id = 0;
};

struct Registration {
  Range range;
  Context* context = nullptr;
  std::shared_ptr<char> owned;  // of cuMemHostAlloc
};

struct Fault {
  int64_t skip = 0;
  int code = 0;
  bool late = false;
};

struct State {
  // A call holds `calls` from its begin to its end, unless it waits without holding the driver up; `mutex` guards all the rest.
  std::mutex calls, mutex;
  std::condition_variable changed;
  bool is_initialized = false, is_shut_down = false, worker_runs = false;

  Context contexts[kMostDevices];             // the primary ones
  std::map<void*, Context*> context_handles;  // all that have been made, and what they are to those who call
  std::map<void*, Stream*> stream_handles;
  std::map<void*, Event*> event_handles;
  std::vector<uint64_t> done;              // by component: how far it has come; of threads, infinitely
  std::vector<Component> ended_threads;    // their components
  std::vector<Component> free_components;  // of which no clock speaks any more
  std::map<Component, Clock> of_threads;
  Clock of_all_threads;
  std::set<Stream*> streams;
  std::set<Event*> events;
  std::vector<Stream*> busy;           // have something in their queues
  Operation* running = nullptr;        // the function that the driver calls just now: one at a time
  std::map<Address, DeviceMemory> device_memory;
  std::map<Address, Registration> registrations;
  std::set<std::shared_ptr<Capture>> captures;
  History history;
  uint64_t last_number = 0;

  // Controls
  int devices = 2;
  uint64_t seed = 0;
  double most_delay_s = 0;
  Order order = Order::kRight;
  int hold = 0;  // 1: all copies, 2: those out of allocated memory
  uint64_t largest_registration = UINT64_MAX, most_registered = UINT64_MAX;  // bytes at once, and of all together
  std::map<std::string, double> delays;                                      // of calls, in seconds
  size_t memory_total = size_t{80} << 30;
  std::map<int, size_t> memory_of_others;  // by device
  std::map<std::string, int64_t> counts;
  std::map<std::string, std::deque<Fault>> faults;
  int64_t frees_in_use = 0;
  std::vector<std::string> violations;
  std::string told;

  // One a line, and they are forgotten. The text lasts until the next call.
  const char* tell_violations() {
    constexpr size_t kMost = 200;
    told.clear();
    for (size_t i = 0; i < std::min(kMost, violations.size()); ++i) told += violations[i] + "\n";
    if (violations.size() > kMost) told += "and " + std::to_string(violations.size() - kMost) + " more\n";
    violations.clear();
    return told.c_str();
  }

  Component new_component(bool of_thread) {
    const uint64_t position = of_thread ? std::numeric_limits<uint64_t>::max() : 0;
    if (free_components.empty()) {
      done.push_back(position);
      return done.size() - 1;
    }
    const Component found = free_components.back();
    free_components.pop_back();
    done[found] = position;
    return found;
  }

  void violation(std::string text) {
    for (const std::string& known : violations)
      if (known == text) return;
    violations.push_back(std::move(text));
  }
};

// It is never destroyed: threads of the library may call until the process has ended. Hidden: each loaded copy has its own.
[[gnu::visibility("hidden")]] inline State& state() {
  static State* const only = new State;
  return *only;
}

constexpr Component kNone = std::numeric_limits<Component>::max();

struct Thread {
  Component component = kNone;
  uint64_t ticks = 0;
  Context* current = nullptr;
  int capture_mode = kGlobal;
  const Operation* function = nullptr;  // which the driver has called in it

  ~Thread() {
    if (component == kNone) return;
    Lock lock(state().mutex);
    state().ended_threads.push_back(component);
  }
};

[[gnu::visibility("hidden")]] inline Thread& this_thread() {
  static thread_local Thread own;
  return own;
}

inline std::string in_hex(Address address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", address);
  return text;
}

inline std::string text_of(const Range& range) { return "[" + in_hex(range.begin) + ", +" + std::to_string(range.bytes) + ")"; }

inline std::string name_of(const Stream& stream) {
  const std::string kind = stream.is_legacy ? "legacy default" : stream.is_blocking ? "blocking" : "non-blocking";
  return kind + " stream " + std::to_string(stream.component) + " of device " + std::to_string(stream.context->device) +
         (stream.context->is_green ? ", in a green context" : "");
}

inline Thread& known_thread(State& s) {
  Thread& own = this_thread();
  if (own.component == kNone) own.component = s.new_component(true);
  return own;
}

// Each call is a step of its thread.
inline void tick(State& s) {
  Thread& own = known_thread(s);
  s.of_threads[own.component].raise(own.component, ++own.ticks);
  s.of_all_threads.raise(own.component, own.ticks);
}

inline void learn(State& s, const Knowledge& what) {
  s.of_threads[known_thread(s).component].join(what.own);
  s.of_all_threads.join(what.joint);
}

}  // namespace strict
