// Where memory lies, by number, and what computes there. Whoever speaks of devices needs no driver for that.
#pragma once

#include <cstdint>
#include <map>

namespace lazyckpt {

constexpr int kHost = -1;  // in place of a device: ordinary memory

using Streams = std::map<int, uintptr_t>;  // device -> the CUstream on which the caller computes just now

}  // namespace lazyckpt
