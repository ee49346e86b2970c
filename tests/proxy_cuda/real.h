// The driver behind the proxy, and the trace of what it is asked.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "../strict_cuda/transfers.h"

#ifndef PROXIED_DRIVER
#define PROXIED_DRIVER "libcuda.so.1"
#endif

namespace proxy {

constexpr int kNotSupported = 801;

[[gnu::visibility("hidden")]] inline void* real_library() {
  static void* const loaded = [] {
    const char* const named = std::getenv("LAZYCKPT_PROXIED_DRIVER");
    const char* const path = named != nullptr && *named != 0 ? named : PROXIED_DRIVER;
    void* const handle = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) std::fprintf(stderr, "the proxy finds no driver to forward to: %s\n", ::dlerror());
    return handle;
  }();
  return loaded;
}

// By its symbol, and looked up once.
template <typename Function>
[[gnu::visibility("hidden")]] Function* real(const char* symbol) {
  static std::mutex mutex;
  static std::map<std::string, void*> found;
  std::lock_guard<std::mutex> lock(mutex);
  const auto known = found.find(symbol);
  if (known != found.end()) return reinterpret_cast<Function*>(known->second);
  void* const address = real_library() != nullptr ? ::dlsym(real_library(), symbol) : nullptr;
  found[symbol] = address;
  return reinterpret_cast<Function*>(address);
}

template <typename... Arguments>
int forward(const char* symbol, Arguments... arguments) {
  auto* const function = real<int(Arguments...)>(symbol);
  return function != nullptr ? function(arguments...) : kNotSupported;
}

// ---- the trace -------------------------------------------------------------------------------------------------------

// A line for each call that can matter to others: the thread, the call, its arguments, and ` = code` if it failed. Streams, events
// and contexts have numbers. "%p" in the name is the number of the process.
[[gnu::visibility("hidden")]] inline std::FILE* trace_file() {
  static std::FILE* const file = []() -> std::FILE* {
    const char* const named = std::getenv("LAZYCKPT_PROXY_TRACE");
    if (named == nullptr || *named == 0) return nullptr;
    std::string path = named;
    if (const size_t place = path.find("%p"); place != std::string::npos) path.replace(place, 2, std::to_string(::getpid()));
    return std::fopen(path.c_str(), "w");
  }();
  return file;
}

// Requires the lock of the calls: lines stand in the order of these.
[[gnu::format(printf, 3, 4)]] inline void trace(strict::State& s, int code, const char* format, ...) {
  std::FILE* const file = trace_file();
  if (file == nullptr) return;
  std::fprintf(file, "%zu ", strict::known_thread(s).component);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(file, format, arguments);
  va_end(arguments);
  if (code != 0) std::fprintf(file, " = %d", code);
  std::fputc('\n', file);
}

}  // namespace proxy
