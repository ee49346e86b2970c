// The data file of a checkpoint of torch.distributed.checkpoint: many torch files, one behind the other. Each is a complete zip
// archive, as torch.save makes one of a tensor or of an object; the place of each stands in the checkpoint's `.metadata`.
//
// There may be tens of thousands of small ones. So what is not a storage lies in the structure of the layout, with its checksum,
// rather than be an extent of its own, and nothing of it is aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "format/file_spec.h"
#include "format/torch_zip.h"
#include "format/zip_layout.h"
#include "os/file.h"

namespace lazyckpt {

struct TorchZipSequence {
  std::vector<std::string_view> pickles;  // many archives may share one: it says nothing but dtype and shape
  std::vector<uint32_t> pickle_of;        // of each archive: which of them is its data.pkl
  std::vector<uint32_t> storages_of;      // of each archive: how many storages it has, data/0 ...
  std::vector<StorageBytes> storages;     // of the first archive, of the second, ...
};

// The records of the spec are the storages, in order. `places` receives where each archive lies.
//
// `layout` must outlive the submit() of the spec, whose extents point into its structure. Throws Error if the numbers do not fit
// each other.
FileSpec describe(const TorchZipSequence& sequence, const IoLimits& limits, ZipLayout& layout, std::vector<ByteRange>& places);

}  // namespace lazyckpt
