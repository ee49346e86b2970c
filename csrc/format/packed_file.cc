#include "format/packed_file.h"

namespace lazyckpt {

FileSpec describe_packed(const std::vector<NamedBytes>& head, const std::vector<StorageBytes>& tensors) {
  FileSpec spec;
  spec.extents.reserve(head.size() + tensors.size());
  const auto add = [&](const std::byte* bytes, uint64_t length, Source kind, int device) {
    const auto record = static_cast<uint32_t>(spec.record_count++);
    if (length > 0) spec.extents.push_back({bytes, length, spec.size, kind, record, device});
    spec.size += length;
  };
  for (const NamedBytes& blob : head) add(blob.bytes, blob.length, blob.kind, kHost);
  for (const StorageBytes& tensor : tensors) add(tensor.bytes, tensor.length, tensor.kind, tensor.device);
  return spec;
}

}  // namespace lazyckpt
