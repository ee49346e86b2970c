#include "format/torch_zip.h"

#include <algorithm>

namespace lazyckpt {
namespace {

constexpr uint32_t kSmallAlign = 64;
// Records that leave directly start at a page plus the address's own remainder: any file system that this file is later
// copied to, and any mmap of it, finds them as well aligned as here.
constexpr uint32_t kPage = 4096;

// Where torch puts large tensors, modulo a page: what processes that write the same file expect of each other. A tensor
// that lies elsewhere is copied.
constexpr uint32_t kUsualRemainder = 64;

// From here on a record may be shared with the file of the save before (jobs/baseline.h), if it lies at the same place.
constexpr uint64_t kWorthSharing = uint64_t{1} << 20;

void begin_at_page(ZipRecord& record) { record.align = std::max(record.align, kPage); }

// What is no storage: wherever in memory it lies, which is somewhere else each time, what follows stays in its place.
ZipRecord place_blob(const NamedBytes& blob, const TorchFile& file) {
  return {blob.name, blob.length, file.uniform_alignment != 0 ? file.uniform_alignment : kSmallAlign, 0};
}

ZipRecord align_record(std::string name, const std::byte* bytes, uint64_t length, Source kind, const TorchFile& file,
                        const IoLimits& limits, bool whole) {
  if (file.uniform_alignment != 0) return {std::move(name), length, file.uniform_alignment, 0};
  const bool direct = whole ? limits.direct() : file.direct;
  if (kind == Source::kCopy || on_device(kind) || !direct) return {std::move(name), length, kSmallAlign, 0};
  if (!whole) return {std::move(name), length, kPage, kUsualRemainder};
  return place_storage(std::move(name), {bytes, length, kind}, limits);
}

}  // namespace

ZipRecord place_storage(std::string name, const StorageBytes& storage, const IoLimits& limits) {
  if (storage.kind == Source::kCopy || on_device(storage.kind) || !limits.direct()) {
    return {std::move(name), storage.length, kSmallAlign, 0};
  }
  // A block boundary of the file must fall on an aligned address: congruence modulo the memory alignment does it.
  const auto align = std::max<uint32_t>(kPage, static_cast<uint32_t>(block_bytes(limits)));
  const auto remainder = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(storage.bytes) % limits.memory_align);
  return {std::move(name), storage.length, align, remainder};
}

ZipRecord place_after_values(std::string name, const StorageBytes& storage, const IoLimits& limits) {
  ZipRecord record = place_storage(std::move(name), storage, limits);
  if (storage.length >= kWorthSharing) begin_at_page(record);
  return record;
}

FileSpec describe(const TorchFile& file, const IoLimits& limits, Share share, ZipLayout& layout) {
  std::vector<ZipRecord> records;
  std::vector<Extent> payloads;
  records.reserve(file.head.size() + file.storages.size() + file.tail.size());
  payloads.reserve(records.capacity());
  const auto add = [&](ZipRecord record, const std::byte* bytes, Source kind, int device = kHost) {
    payloads.push_back({bytes, record.size, 0, kind, static_cast<uint32_t>(payloads.size()), device});
    records.push_back(std::move(record));
  };
  for (const NamedBytes& blob : file.head) add(place_blob(blob, file), blob.bytes, blob.kind);
  for (size_t i = 0; i < file.storages.size(); ++i) {
    const StorageBytes& storage = file.storages[i];
    const bool whole = share.whole() && !file.alike;
    const std::string name = "data/" + std::to_string(file.numbers.empty() ? i : file.numbers[i]);
    add(align_record(name, storage.bytes, storage.length, storage.kind, file, limits, whole), storage.bytes, storage.kind,
        storage.device);
  }
  const bool shares = std::any_of(file.storages.begin(), file.storages.end(),
                                  [](const StorageBytes& storage) { return storage.length >= kWorthSharing; });
  // Else a number in the pickle that takes a byte more than the last time would move all storages.
  if (shares && file.uniform_alignment == 0) begin_at_page(records[file.head.size()]);
  for (const NamedBytes& blob : file.tail) add(place_blob(blob, file), blob.bytes, blob.kind);

  layout = lay_out_zip(file.archive, records);
  FileSpec spec = to_spec(layout, std::move(payloads));
  spec.share = share;
  spec.share.body_end = layout.directory_offset;
  return spec;
}

std::string fill_directory(const ZipLayout& layout, const std::vector<uint32_t>& record_crcs) {
  std::string directory(layout.file_size - layout.directory_offset, '\0');
  for (const StructurePart& part : layout.parts) {
    const uint64_t from = std::max(part.offset, layout.directory_offset), to = part.offset + part.length;
    if (from >= to) continue;
    directory.replace(from - layout.directory_offset, to - from, layout.structure, part.begin + (from - part.offset), to - from);
  }
  for (const CrcField& field : layout.crc_fields) {
    if (field.offset < layout.directory_offset) continue;
    for (size_t byte = 0; byte < sizeof(uint32_t); ++byte) {
      directory[field.offset - layout.directory_offset + byte] = static_cast<char>(record_crcs.at(field.record) >> (8 * byte));
    }
  }
  return directory;
}

}  // namespace lazyckpt
