// How tests handle the driver. Those of the first kind are the entry points of the other stand-in, too.
#pragma once

#include "schedule.h"
#include "transfers.h"

namespace strict {

inline Stream* stream_of(State& s, int device, void* handle) {
  if (reinterpret_cast<uintptr_t>(handle) > kLegacyHandle) return static_cast<Stream*>(handle);
  Context* const current = this_thread().current;
  return current != nullptr && current->device == device ? current->legacy : s.contexts[device].legacy;
}

inline int64_t alive(const State& s, const std::string& what) {
  int64_t count = 0;
  if (what == "contexts")
    for (const Context& context : s.contexts) count += context.references;
  if (what == "streams")
    for (const Stream* stream : s.streams) count += stream->is_given_out && !stream->is_destroyed;
  if (what == "events")
    for (const Event* event : s.events) count += !event->is_destroyed;
  if (what == "registrations") count = static_cast<int64_t>(s.registrations.size());
  if (what == "allocations")
    for (const auto& [begin, memory] : s.device_memory) count += memory.is_allocated;
  if (what == "frees of memory in use") count = s.frees_in_use;
  return count;
}

}  // namespace strict

namespace strict {

// What a driver that has ended no longer holds: its caller has nowhere to give it back to, and may use host memory otherwise.
inline void begin_again(State& s) {
  s.is_shut_down = false;
  s.registrations.clear();
  s.device_memory.clear();
  s.history.forget_all();
  for (Context& context : s.contexts) context.taken = 0;
}

}  // namespace strict

#define CONTROL extern "C" __attribute__((visibility("default")))

// ---- as with the other stand-in --------------------------------------------------------------------------------------

CONTROL void fake_configure(int devices, uint64_t seed, double most_delay_s) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.devices = std::min(devices, strict::kMostDevices);
  s.seed = seed;
  s.most_delay_s = most_delay_s;
  s.hold = 0;
  s.order = strict::Order::kRight;
  s.largest_registration = s.most_registered = UINT64_MAX;
  s.delays.clear();
  s.memory_total = size_t{80} << 30;
  s.memory_of_others.clear();
  s.counts.clear();
  s.faults.clear();
  if (s.is_shut_down) strict::begin_again(s);
  for (auto& [handle, context] : s.context_handles) context->error = 0;
  s.changed.notify_all();
}

CONTROL int64_t fake_count(const char* what) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  return s.counts[what];
}

CONTROL int64_t fake_live(const char* what) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  return strict::alive(s, what);
}

CONTROL void fake_fail(const char* call, int64_t skip, int code, int late) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.faults[call].push_back({skip, code, late != 0});
}

CONTROL void fake_hold_copies(int hold) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.hold = hold;
  s.changed.notify_all();
}

CONTROL void fake_set_memory(int device, uint64_t total, uint64_t others) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.memory_total = total;
  s.memory_of_others[device] = others;
}

// A kernel that writes. Memory that nobody has told of is its device's from then on.
CONTROL void fake_fill(int device, void* stream_handle, void* address, int value, size_t bytes) {
  auto& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  strict::tick(s);
  const strict::Range range{reinterpret_cast<strict::Address>(address), bytes};
  if (bytes == 0) return;
  const auto found = strict::entry_at(s.device_memory, range.begin);
  if (found == s.device_memory.end() || !found->second.range.holds(range)) strict::tell_of_memory(s, device, range, true);
  strict::Operation kernel;
  kernel.call = "a kernel";
  strict::Transfer transfer;
  transfer.to = range.begin;
  transfer.bytes = bytes;
  transfer.fill = value & 0xff;
  kernel.transfers.push_back(transfer);
  strict::Stream& stream = *strict::stream_of(s, device, stream_handle);
  strict::Call call{s, driver, lock, "a kernel"};
  if (strict::check_enqueue(call, stream) == 0) strict::enqueue(s, stream, std::move(kernel));
}

CONTROL void fake_synchronize(int device, void* stream_handle) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  strict::tick(s);
  const strict::Stream& stream = *strict::stream_of(s, device, stream_handle);
  const strict::Knowledge clock = stream.clock;
  strict::wait_for(s, lock, stream, stream.position);
  strict::learn(s, clock);
}

// The calling thread begins or ends a capture of global mode.
CONTROL void fake_set_capturing(int device, void* stream_handle, int capturing) {
  auto& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  strict::Call call{s, driver, lock, "the test"};
  strict::Stream& stream = *strict::stream_of(s, device, stream_handle);
  if (capturing != 0) {
    strict::begin_capture(call, stream, strict::kGlobal);
  } else {
    strict::end_capture(call, stream);
  }
}

CONTROL int fake_is_capturing(void* stream_handle) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  return strict::stream_of(s, 0, stream_handle)->capture != nullptr;
}

// A thread that nobody knows begins or ends a capture of global mode, on a stream that nobody knows.
CONTROL void fake_capture_globally(int begins) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  static strict::Stream* const hidden = strict::new_stream(s, s.contexts[0], false);
  if (hidden->capture != nullptr) s.captures.erase(hidden->capture);
  hidden->capture = nullptr;
  if (begins == 0) return;
  hidden->capture = std::make_shared<strict::Capture>();
  hidden->capture->owner = strict::kNone;
  hidden->capture->origin = hidden;
  s.captures.insert(hidden->capture);
}

CONTROL void fake_set_order(int order) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.order = static_cast<strict::Order>(order);
}

CONTROL void fake_delay(const char* call, double seconds) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.delays[call] = seconds;
}

// Beside what is.
CONTROL void fake_limit_pinning(uint64_t at_once, uint64_t altogether) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.largest_registration = at_once;
  s.most_registered = altogether;
  for (const auto& [begin, memory] : s.registrations)
    if (s.most_registered < UINT64_MAX - memory.range.bytes) s.most_registered += memory.range.bytes;
}

// What cuCtxFromGreenCtx would give for the only green context of a device.
CONTROL void* fake_green_context(int device) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  static strict::Context* all[strict::kMostDevices] = {};
  if (all[device] == nullptr) {
    all[device] = new strict::Context;
    all[device]->is_green = true;
    all[device]->references = 1;
    strict::begin_context(s, *all[device], device);
  }
  return all[device];
}

// ---- of this one alone -----------------------------------------------------------------------------------------------

// Memory that a test has from somewhere else: an allocation of the device from now on, with these limits.
CONTROL void fake_declare(int device, void* address, size_t bytes) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  if (bytes != 0) strict::tell_of_memory(s, device, {reinterpret_cast<strict::Address>(address), bytes}, false);
}

// The calling thread has been told what all threads know: by a wait that the driver does not see.
CONTROL void fake_learn() {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  strict::tick(s);
  s.of_threads[strict::known_thread(s).component].join(s.of_all_threads);
}

// The calling thread reads or writes memory itself.
CONTROL void fake_touch(void* address, size_t bytes, int is_write) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  strict::tick(s);
  strict::touch(s, {reinterpret_cast<strict::Address>(address), bytes}, is_write != 0);
}

// A graph is launched: what was captured on the one stream last is enqueued on the other.
CONTROL void fake_replay(int device, void* captured_handle, void* stream_handle) {
  auto& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  strict::tick(s);
  strict::Stream& stream = *strict::stream_of(s, device, stream_handle);
  for (const strict::Operation& operation : strict::stream_of(s, device, captured_handle)->graph)
    strict::enqueue(s, stream, operation);
}

// One violation a line, and they are forgotten. The text lasts until the next call.
CONTROL const char* fake_violations() {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  return s.tell_violations();
}

// Between tests: memory of before is given out anew without a word. Says whether nothing was going on any more.
CONTROL int fake_forget() {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  if (!s.busy.empty()) return 0;
  strict::forget_order(s);
  strict::forget_told_memory(s);
  return 1;
}

CONTROL void fake_shut_down() {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.is_shut_down = true;
}
