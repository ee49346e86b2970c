// A torch file as extents: storages and small records given, placed so that large host storages can leave zero-copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/device.h"
#include "format/file_spec.h"
#include "format/zip_layout.h"
#include "os/file.h"

namespace lazyckpt {

struct NamedBytes {
  std::string name;
  const std::byte* bytes = nullptr;
  uint64_t length = 0;
  Source kind = Source::kCopy;
};

// Written as the record data/<index>, or another number, see TorchFile::numbers.
struct StorageBytes {
  const std::byte* bytes = nullptr;
  uint64_t length = 0;
  Source kind = Source::kCopy;
  int device = kHost;
};

struct TorchFile {
  std::string archive;            // the name inside the zip: the file's base name without its last suffix
  std::vector<NamedBytes> head;   // before the storages
  std::vector<StorageBytes> storages;
  std::vector<NamedBytes> tail;   // behind them
  uint32_t uniform_alignment = 0;  // of every record, as torch.save does; 0: 64, and large storages for direct I/O
  bool direct = true;              // whether direct I/O is asked for
  bool alike = false;              // several processes write this very file, each its own
  std::vector<uint32_t> numbers;   // of the storages, by which the pickle knows them; empty: 0, 1, 2, ...
};

// How a storage of a file that one process writes is placed: large ones so that they can leave zero-copy by direct I/O.
ZipRecord place_storage(std::string name, const StorageBytes& storage, const IoLimits& limits);

// The same behind values that may take some bytes more in the next save: that should move nothing that could be shared with it.
ZipRecord place_after_values(std::string name, const StorageBytes& storage, const IoLimits& limits);

// A file that several processes write, together or each its own, has the same layout in all of them, wherever their tensors lie and whatever
// each has found its file system to demand.
//
// `layout` must outlive the submit() of the spec, whose extents point into its structure.
FileSpec describe(const TorchFile& file, const IoLimits& limits, Share share, ZipLayout& layout);

// The central directory, to the end of the file, given the checksums of all records.
std::string fill_directory(const ZipLayout& layout, const std::vector<uint32_t>& record_crcs);

}  // namespace lazyckpt
