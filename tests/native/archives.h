// Files of several zip archives, one behind the other, for the stress program.
#pragma once

#include <string>

#include "sample.h"

namespace lazyckpt::stress {

// A file of one kind or the other: extents and fields by chance, or archives as TorchZipSequence has them.
Sample make_sample(Random& random);

// Cuts the archives out of a file that is as expected, and lets the reader of torch files read each by itself, which knows nothing
// of how they were laid out. `path` is a name that nobody else uses.
void check_archives(const Sample& sample, const std::string& path);

}  // namespace lazyckpt::stress
