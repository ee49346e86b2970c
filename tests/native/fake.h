// The fake CUDA driver (tests/fake_cuda), as the stress program handles it.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "checks.h"
#include "cuda/driver.h"

namespace lazyckpt::stress {

constexpr int kDevices = 2;

// The controls of the fake driver.
struct Fake {
  explicit Fake(const std::string& library) : handle(::dlopen(library.c_str(), RTLD_NOW)) {
    expect(handle != nullptr, library + " cannot be loaded");
    find(configure, "fake_configure");
    find(fail, "fake_fail");
    find(fill, "fake_fill");
    find(synchronize, "fake_synchronize");
    find(live, "fake_live");
    find(set_memory, "fake_set_memory");
  }

  template <typename Function>
  void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(::dlsym(handle, name));
    expect(function != nullptr, std::string("the fake driver has no ") + name);
  }

  void expect_nothing_left() const {
    for (const char* what : {"events", "streams", "registrations", "contexts", "allocations", "frees of memory in use"}) {
      expect(live(what) == 0, std::string("the driver has not got back all ") + what);
    }
  }

  void* handle;
  void (*configure)(int devices, uint64_t seed, double most_delay_s) = nullptr;
  void (*fail)(const char* call, int64_t skip, int code, int late) = nullptr;
  void (*fill)(int device, cuda::StreamHandle stream, void* begin, int value, size_t bytes) = nullptr;
  void (*synchronize)(int device, cuda::StreamHandle stream) = nullptr;
  int64_t (*live)(const char* what) = nullptr;
  void (*set_memory)(int device, uint64_t total_bytes, uint64_t others_bytes) = nullptr;
};

}  // namespace lazyckpt::stress
