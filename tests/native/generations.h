// One file after the other of a state that changes in part: see generations.cc.
#pragma once

#include <string>

#include "sample.h"

namespace lazyckpt::stress {

// Some generations. Where the directory lies on a file system that shares blocks (XFS, btrfs) they share what is the same, and what
// is declared not to change is not read.
void save_generations(Random& random, const std::string& directory);

}  // namespace lazyckpt::stress
