// What tests say: some to the stand-in behind the proxy, if it is one, some to the books. Included by proxy_cuda.cc alone.
#pragma once

#define CONTROL extern "C" __attribute__((visibility("default")))

namespace {

template <typename Result, typename... Arguments>
Result control(const char* symbol, Arguments... arguments) {
  auto* const function = proxy::real<Result(Arguments...)>(symbol);
  if (function == nullptr) return Result();
  return function(arguments...);
}

Stream* stream_of(State& s, int device, void* handle) {
  const auto known = s.stream_handles.find(handle);
  if (known != s.stream_handles.end()) return known->second;
  Context* const current = strict::this_thread().current;
  return current != nullptr && current->device == device ? current->legacy : s.contexts[device].legacy;
}

}  // namespace

// ---- to the stand-in behind ------------------------------------------------------------------------------------------

CONTROL void fake_configure(int devices, uint64_t seed, double most_delay_s) {
  control<void>("fake_configure", devices, seed, most_delay_s);
  strict::Lock lock(strict::state().mutex);
  strict::state().counts.clear();
}
CONTROL void fake_fail(const char* call, int64_t skip, int code, int late) { control<void>("fake_fail", call, skip, code, late); }
CONTROL void fake_set_order(int order) { control<void>("fake_set_order", order); }
CONTROL void fake_delay(const char* call, double seconds) { control<void>("fake_delay", call, seconds); }
CONTROL void fake_hold_copies(int hold) { control<void>("fake_hold_copies", hold); }
CONTROL void fake_set_memory(int device, uint64_t total, uint64_t others) {
  control<void>("fake_set_memory", device, total, others);
}
CONTROL void fake_limit_pinning(uint64_t most, uint64_t all) { control<void>("fake_limit_pinning", most, all); }
CONTROL void fake_allocated(void* begin, uint64_t bytes) { control<void>("fake_allocated", begin, bytes); }
CONTROL void fake_capture_globally(int begins) { control<void>("fake_capture_globally", begins); }
CONTROL int fake_is_capturing(void* stream) { return control<int>("fake_is_capturing", stream); }
CONTROL void* fake_green_context(int device) { return control<void*>("fake_green_context", device); }
CONTROL int64_t fake_live(const char* what) { return control<int64_t>("fake_live", what); }

// Calls are counted here: the proxy makes some of its own.
CONTROL int64_t fake_count(const char* what) {
  strict::Lock lock(strict::state().mutex);
  const auto own = strict::state().counts.find(what);
  if (own != strict::state().counts.end()) return own->second;
  return std::string(what).rfind("cu", 0) == 0 ? 0 : control<int64_t>("fake_count", what);
}

CONTROL void fake_set_capturing(int device, void* handle, int capturing) {
  control<void>("fake_set_capturing", device, handle, capturing);
  State& s = strict::state();
  strict::Lock lock(s.mutex);
  if (Stream* const stream = stream_of(s, device, handle); stream != nullptr)
    stream->capture = capturing != 0 ? std::make_shared<strict::Capture>() : nullptr;
}

CONTROL void fake_fill(int device, void* handle, void* address, int value, size_t bytes) {
  State& s = strict::state();
  strict::Lock driver(s.calls);
  control<void>("fake_fill", device, handle, address, value, bytes);
  strict::Lock lock(s.mutex);
  strict::tick(s);
  const Range range{reinterpret_cast<Address>(address), bytes};
  Stream* const stream = stream_of(s, device, handle);
  if (bytes == 0 || stream == nullptr) return;
  look_up(s, device, range);
  trace(s, 0, "kernel %d 0x%llx %zu %d %s", device, range.begin, bytes, value & 0xff, token(handle, *stream).c_str());
  Call call{s, driver, lock, "a kernel"};
  strict::Operation kernel;
  kernel.transfers.push_back({});
  kernel.transfers.front().to = range.begin;
  kernel.transfers.front().bytes = bytes;
  kernel.transfers.front().fill = value & 0xff;
  enter(call, *stream, std::move(kernel));
}

CONTROL void fake_synchronize(int device, void* handle) {
  State& s = strict::state();
  strict::Knowledge clock;
  {
    strict::Lock lock(s.mutex);
    strict::tick(s);
    if (const Stream* const stream = stream_of(s, device, handle); stream != nullptr) clock = stream->clock;
  }
  control<void>("fake_synchronize", device, handle);
  strict::Lock driver(s.calls), lock(s.mutex);
  strict::learn(s, clock);
  if (const Stream* const stream = stream_of(s, device, handle); stream != nullptr)
    trace(s, 0, "synchronize %d %s", device, token(handle, *stream).c_str());
}

// ---- to the books ----------------------------------------------------------------------------------------------------

CONTROL void fake_declare(int device, void* address, size_t bytes) {
  State& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  const Range range{reinterpret_cast<Address>(address), bytes};
  if (bytes == 0) return;
  strict::tell_of_memory(s, device, range, false);
  trace(s, 0, "memory %d 0x%llx %zu", device, range.begin, bytes);
}

CONTROL void fake_learn() {
  State& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  strict::tick(s);
  s.of_threads[strict::known_thread(s).component].join(s.of_all_threads);
  trace(s, 0, "learn");
}

CONTROL void fake_touch(void* address, size_t bytes, int is_write) {
  State& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  strict::tick(s);
  strict::touch(s, {reinterpret_cast<Address>(address), bytes}, is_write != 0);
  trace(s, 0, "touch 0x%llx %zu %d", reinterpret_cast<Address>(address), bytes, is_write);
}

CONTROL const char* fake_violations() {
  State& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  if (std::FILE* const file = proxy::trace_file(); file != nullptr) std::fflush(file);
  return s.tell_violations();
}

CONTROL int fake_forget() {
  State& s = strict::state();
  strict::Lock driver(s.calls), lock(s.mutex);
  strict::forget_order(s);
  strict::forget_told_memory(s);
  trace(s, 0, "forget");
  return 1;
}
