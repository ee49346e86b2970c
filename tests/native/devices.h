// Files with bytes of devices, which the fake CUDA driver plays.
#pragma once

#include <string>

#include "sample.h"

namespace lazyckpt::stress {

// An engine, several threads that save and fence, streams that overwrite what was saved, calls of the driver that fail.
// `library` is the fake driver.
void carry_from_devices(Random& random, const std::string& directory, const std::string& library);

}  // namespace lazyckpt::stress
