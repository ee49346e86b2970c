// Reading ranges of a file to host memory and to devices, which the fake CUDA driver plays.
#pragma once

#include <string>

#include "sample.h"

namespace lazyckpt::stress {

// One file, read by several threads, to memory that kernels still write to; sometimes the storage or the driver fails, or the
// caller gives up. `library` is the fake driver.
void load_to_devices(Random& random, const std::string& directory, const std::string& library);

}  // namespace lazyckpt::stress
