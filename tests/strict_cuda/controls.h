// How tests handle the driver. Those of the first kind are the entry points of the other stand-in, too.
#pragma once

#include "call.h"

namespace strict {

inline Stream* stream_of(State& s, int device, void* handle) {
  Context& context = s.contexts[device];
  return reinterpret_cast<uintptr_t>(handle) <= kLegacyHandle ? context.legacy : static_cast<Stream*>(handle);
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
    for (const auto& [begin, memory] : s.device_memory) count += memory.owned != nullptr;
  if (what == "frees of memory in use") count = s.frees_in_use;
  return count;
}

// With nothing going on and no access on record there is nothing to put in order either.
inline void forget_order(State& s) {
  for (auto stream = s.streams.begin(); stream != s.streams.end();) {
    (*stream)->clock = {};
    stream = (*stream)->is_destroyed ? s.streams.erase(stream) : std::next(stream);
  }
  for (auto event = s.events.begin(); event != s.events.end();) {
    (*event)->clock = {};
    event = (*event)->is_destroyed ? s.events.erase(event) : std::next(event);
  }
  s.of_threads.clear();
  s.of_all_threads = {};
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
  s.memory_total = size_t{80} << 30;
  s.memory_of_others = 0;
  s.counts.clear();
  s.faults.clear();
  s.is_shut_down = false;
  for (auto& context : s.contexts) context.error = 0;
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

CONTROL void fake_set_memory(uint64_t total, uint64_t others) {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.memory_total = total;
  s.memory_of_others = others;
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
  const strict::Knowledge clock = strict::stream_of(s, device, stream_handle)->clock;
  strict::wait_for(s, lock, clock.own);
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
  const strict::Thread& own = strict::known_thread(s);
  const strict::Range range{reinterpret_cast<strict::Address>(address), bytes};
  const std::string what = is_write != 0 ? "write" : "read";
  auto text = std::make_shared<const std::string>("host's " + what + " of " + strict::text_of(range) + " by thread " +
                                                  std::to_string(own.component));
  s.history.record(range, {own.component, own.ticks, false, text}, is_write != 0, s.of_threads[own.component],
                   [&](const strict::Access& before) {
                     s.violation("race: nothing orders the " + *text + " behind the " + *before.text);
                   });
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
  constexpr size_t kMost = 12;
  s.told.clear();
  for (size_t i = 0; i < std::min(kMost, s.violations.size()); ++i) s.told += s.violations[i] + "\n";
  if (s.violations.size() > kMost) s.told += "and " + std::to_string(s.violations.size() - kMost) + " more\n";
  s.violations.clear();
  return s.told.c_str();
}

// Between tests: memory of before is given out anew without a word. Says whether nothing was going on any more.
CONTROL int fake_forget() {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  if (!s.busy.empty()) return 0;
  s.history.forget_all();
  strict::forget_order(s);
  for (auto entry = s.device_memory.begin(); entry != s.device_memory.end();)
    entry = entry->second.owned == nullptr ? s.device_memory.erase(entry) : std::next(entry);
  return 1;
}

CONTROL void fake_shut_down() {
  auto& s = strict::state();
  strict::Lock lock(s.mutex);
  s.is_shut_down = true;
}
