// A file of blobs and tensors that stand one behind the other, without anything between or behind them: safetensors, whose
// header is the blob. Nothing can be placed for direct I/O in it.
#pragma once

#include <vector>

#include "format/file_spec.h"
#include "format/torch_zip.h"

namespace lazyckpt {

// The records of the spec are the blobs, then the tensors. Points to the bytes of both.
FileSpec describe_packed(const std::vector<NamedBytes>& head, const std::vector<StorageBytes>& tensors);

}  // namespace lazyckpt
