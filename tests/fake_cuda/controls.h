// What the tests call to control the fake driver, and to ask what it has seen.
#pragma once

#include "streams.h"

using namespace fake;

extern "C" {

// Faults, delays and counts begin anew; what is alive stays alive, and counted.
void fake_configure(int devices, uint64_t seed, double most_delay_s) {
  Controls& all = controls();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.devices = std::min(devices, kMostDevices);
  all.random.seed(seed);
  all.most_delay_s = most_delay_s;
  all.hold = Hold::kNone;
  all.order = Order::kRight;
  all.total_bytes = size_t{4} << 30;
  all.others_bytes.clear();
  all.largest_registration = all.most_registered = UINT64_MAX;
  all.faults.clear();
  all.call_delays.clear();
  all.counts.clear();
  all.changed.notify_all();
}

// The call of this name (without `_v2` and `WithPriority`) fails after `skip` more; `late`: the copy itself does.
void fake_fail(const char* call, int64_t skip, int code, int late) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().faults[call].push_back({skip, code, late != 0});
}

// What streams do with each other: 0: as they should, 1: they do not wait for events, 2: each does one thing after the other with
// all of its device, as where all share one queue of the hardware.
void fake_set_order(int order) { controls().order = static_cast<Order>(order); }

// Each call of this name takes so long.
void fake_delay(const char* call, double seconds) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().call_delays[call] = seconds;
}

// 0: none, 1: all, 2: those out of memory of cuMemAlloc.
void fake_hold_copies(int hold) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().hold = static_cast<Hold>(hold);
  controls().changed.notify_all();
}

// What cuMemGetInfo says, and cuMemAlloc keeps to: the size of all devices, and what others have taken of this one.
void fake_set_memory(int device, uint64_t total_bytes, uint64_t others_bytes) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().total_bytes = total_bytes;
  controls().others_bytes[device] = others_bytes;
}

// How much host memory can be pinned by one call, and altogether, beside what is.
void fake_limit_pinning(uint64_t at_once, uint64_t altogether) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().largest_registration = at_once;
  for (const auto& [from, length] : controls().registered) altogether += altogether < UINT64_MAX - length ? length : 0;
  controls().most_registered = altogether;
}

int64_t fake_count(const char* what) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  return controls().counts[what];
}

int64_t fake_live(const char* what) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  return controls().live[what];
}

void fake_set_capturing(int device, Stream* handle, int capturing) { find_stream(handle, device)->capturing = capturing; }

// Memory of the training is from now on one allocation of a device; none if it has no bytes.
void fake_allocated(void* begin, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  if (bytes == 0) {
    controls().of_training.erase(reinterpret_cast<uintptr_t>(begin));
  } else {
    controls().of_training[reinterpret_cast<uintptr_t>(begin)] = bytes;
  }
}

// As torch asks it, apart from what is counted here.
int fake_is_capturing(Stream* handle) { return find_stream(handle, 0)->capturing; }

// A capture of the mode "global" begins or ends, in some thread of the process.
void fake_capture_globally(int begins) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  controls().global_captures += begins != 0 ? 1 : -1;
}

// What cuCtxFromGreenCtx would give for the only green context of a device.
CUctx_st* fake_green_context(int device) {
  static auto* all = [] {
    auto* made = new CUctx_st[kMostDevices];
    for (int i = 0; i < kMostDevices; ++i) made[i].device = i;
    return made;
  }();
  return &all[device];
}

// Work on a stream, as a kernel of the training would do it.
void fake_fill(int device, Stream* handle, void* begin, int value, size_t bytes) {
  find_stream(handle, device)->add([=](Stream&) {
    sleep_a_little();
    std::memset(begin, value, bytes);
  });
}

void fake_synchronize(int device, Stream* handle) { wait_for_all(find_stream(handle, device)); }

}  // extern "C"
