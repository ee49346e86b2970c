// Faults and crashes on demand, for the tests. With LAZYCKPT_FAULT_HOOKS unset (every release build) the two calls are
// empty inline functions and the table does not exist.
#pragma once

#include <cstdint>
#include <string>

#ifndef LAZYCKPT_FAULT_HOOKS
#define LAZYCKPT_FAULT_HOOKS 0
#endif

namespace lazyckpt::fault {

// What a storage system call is to do instead of (or before) its work.
struct Verdict {
  int error = 0;             // non-zero: do nothing and fail with this errno
  int64_t short_bytes = -1;  // not negative: transfer at most this many bytes
};

#if LAZYCKPT_FAULT_HOOKS

struct Fault {
  std::string call;       // "open", "pwritev", "fdatasync", ...: see file.cc
  std::string path_part;  // matches paths that contain it; empty matches all
  int64_t skip = 0;       // let this many matching calls pass first
  int64_t count = -1;     // then strike this many of them; -1: all
  int error = 0;
  int64_t short_bytes = -1;
  double delay_s = 0;  // sleep this long before the call, or until it is cleared
};

void add(const Fault& fault);
void clear(const std::string& call = "");  // empty: the faults of all calls

// Kill this process with SIGKILL when crash_point(name) is reached for the skip-th time (0: the first).
void set_crash_point(const std::string& name, int64_t skip);

Verdict consult(const char* call, const std::string& path);
void crash_point(const char* name);

#else

inline Verdict consult(const char*, const std::string&) { return {}; }
inline void crash_point(const char*) {}

#endif

}  // namespace lazyckpt::fault
