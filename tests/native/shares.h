// Files that several ranks write together, each its share: ranks are threads here, with an engine each or one for all.
#pragma once

#include <string>

#include "sample.h"

namespace lazyckpt::stress {

// A few files, by 1, 2, 3 or 5 ranks, that are then completed and compared with what they should hold; sometimes one
// share of a file fails, and the others are compared.
void write_together(Random& random, const std::string& directory);

}  // namespace lazyckpt::stress
