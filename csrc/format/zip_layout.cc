#include "format/zip_layout.h"

#include <algorithm>
#include <utility>

#include "base/crc32.h"
#include "base/error.h"
#include "format/zip_format.h"

namespace lazyckpt {
namespace {

using namespace zip;

constexpr size_t kLongPadding = 256;  // bytes: all that are as long are the same bytes of the structure
constexpr size_t kUsualPadding = 4096;

class Builder {
 public:
  Builder(const std::string& archive, const std::vector<ZipRecord>& records) : archive_(archive), records_(records) {
    numbers_.reserve(records.size());
    header_offsets_.reserve(records.size());
    size_t texts = 0, contents = 0;
    uint32_t number = 0;
    for (const ZipRecord& record : records) {
      numbers_.push_back(record.contents == nullptr ? number++ : kStructure);
      texts += name_bytes(record);
      contents += record.contents == nullptr ? 0 : record.size;
    }
    layout_.structure.reserve(2 * texts + contents + records.size() * kMostAroundRecord + kEndRecords);
    layout_.payload_offsets.reserve(number);
    layout_.crc_fields.reserve(2 * number);
    layout_.parts.reserve(2 * number + 1);
  }

  // Of records [first, end).
  ByteRange add_archive(size_t first, size_t end) {
    begin_ = cursor_;
    for (size_t i = first; i < end; ++i) add_record(i);
    add_directory(first, end);
    return {begin_, cursor_};
  }

  ZipLayout end() {
    end_part();
    layout_.file_size = cursor_;
    return std::move(layout_);
  }

 private:
  static constexpr size_t kMostAroundRecord = kLocalHeaderBytes + kDirectoryEntryBytes + 24 + 48 + 64;  // without its name
  static constexpr size_t kEndRecords = kZip64EndBytes + kZip64LocatorBytes + kEndBytes;

  void put16(uint16_t value) { put(value, 2); }
  void put32(uint32_t value) { put(value, 4); }
  void put64(uint64_t value) { put(value, 8); }
  // Numbers are gathered, because there are dozens for each record.
  void put(uint64_t value, size_t bytes) {
    if (numbers_used_ + bytes > sizeof numbers_text_) flush();
    for (size_t i = 0; i < bytes; ++i) numbers_text_[numbers_used_ + i] = static_cast<char>(value >> (8 * i));
    numbers_used_ += bytes;
    cursor_ += bytes;
  }
  void flush() {
    layout_.structure.append(numbers_text_, numbers_used_);
    numbers_used_ = 0;
  }
  void put_name(const ZipRecord& record) {
    flush();
    layout_.structure.append(archive_).append(1, '/').append(record.name);
    cursor_ += name_bytes(record);
  }
  size_t name_bytes(const ZipRecord& record) const { return archive_.size() + 1 + record.name.size(); }
  // Large tensors are aligned to pages, so that their padding is more than all other structure; nobody is to write it each time.
  void put_padding(size_t length) {
    flush();
    if (length < kLongPadding) {
      layout_.structure.append(length, kPaddingByte);
    } else {
      end_part();
      if (padding_bytes_ < length) {
        padding_at_ = layout_.structure.size();
        padding_bytes_ = length <= kUsualPadding ? kUsualPadding : kLargestAlign;
        layout_.structure.append(padding_bytes_, kPaddingByte);
        part_begin_ = layout_.structure.size();
      }
      layout_.parts.push_back({cursor_, padding_at_, length});
    }
    cursor_ += length;
  }
  void put_crc(size_t index) {
    const ZipRecord& record = records_[index];
    if (record.contents != nullptr) return put32(crc32(0, record.contents, record.size));
    layout_.crc_fields.push_back({cursor_, numbers_[index]});
    put32(0);
  }
  uint64_t in_archive() const { return cursor_ - begin_; }

  // Closes the part that has been growing since the last payload.
  void end_part() {
    flush();
    const size_t length = layout_.structure.size() - part_begin_;
    if (length > 0) layout_.parts.push_back({cursor_ - length, part_begin_, length});
    part_begin_ = layout_.structure.size();
  }

  void add_record(size_t index) {
    const ZipRecord& record = records_[index];
    header_offsets_.push_back(in_archive());
    add_local_header(record);
    if (record.contents == nullptr) layout_.payload_offsets.push_back(cursor_);
    if (record.size == 0) return;
    if (record.contents == nullptr) {
      end_part();
      cursor_ += record.size;
    } else {
      flush();
      layout_.structure.append(reinterpret_cast<const char*>(record.contents), record.size);
      cursor_ += record.size;
    }
    add_descriptor(index);
  }

  void add_local_header(const ZipRecord& record) {
    const uint64_t begin = in_archive();
    const bool large = needs_zip64(record.size), far = needs_zip64(begin);
    const size_t zip64 = (large || far ? 4 : 0) + (large ? 16 : 0) + (far ? 8 : 0);
    const size_t padding = padding_for(record, cursor_ + kLocalHeaderBytes + name_bytes(record) + zip64 + 4);
    put32(kLocalSignature);
    put16(0);
    put16(flags(record));
    put16(kStored);
    put32(0);  // no time
    put32(0);  // CRC and sizes: in the descriptor
    put32(0);
    put32(0);
    put16(static_cast<uint16_t>(name_bytes(record)));
    put16(static_cast<uint16_t>(zip64 + 4 + padding));
    put_name(record);
    if (zip64 > 0) {
      put16(kZip64Extra);
      put16(static_cast<uint16_t>(zip64 - 4));
      if (large) {
        put64(record.size);
        put64(0);  // miniz leaves the compressed size open here
      }
      if (far) put64(begin);
    }
    put16(kPaddingExtra);
    put16(static_cast<uint16_t>(padding));
    put_padding(padding);
  }

  static size_t padding_for(const ZipRecord& record, uint64_t start) {
    const uint32_t align = record.align;
    if (align == 0 || align > kLargestAlign || (align & (align - 1)) != 0 || record.remainder >= align) {
      throw Error(ErrorKind::kCorrupt, "a record alignment of " + std::to_string(align) +
                                           " bytes is not possible: it must be a power of two up to 32768");
    }
    return static_cast<size_t>((record.remainder + align - start % align) % align);
  }

  static uint16_t flags(const ZipRecord& record) { return record.size == 0 ? kUtf8 : kUtf8 | kHasDescriptor; }

  void add_descriptor(size_t index) {
    const uint64_t size = records_[index].size;
    const size_t width = is_descriptor_wide(size, header_offsets_[index]) ? 8 : 4;
    put32(kDescriptorSignature);
    put_crc(index);
    put(size, width);
    put(size, width);
  }

  void add_directory(size_t first_record, size_t end_record) {
    const uint64_t begin = in_archive();
    layout_.directory_offset = cursor_;
    for (size_t i = first_record; i < end_record; ++i) add_directory_entry(i);
    const uint64_t size = in_archive() - begin, end = in_archive(), count = end_record - first_record;
    put32(kZip64EndSignature);
    put64(kZip64EndBytes - 12);
    put16(kVersionMadeBy);
    put16(kVersionNeeded);
    put32(0);
    put32(0);
    put64(count);
    put64(count);
    put64(size);
    put64(begin);
    put32(kZip64LocatorSignature);
    put32(0);
    put64(end);
    put32(1);
    put32(kEndSignature);
    put32(0);
    put16(static_cast<uint16_t>(std::min<uint64_t>(count, kMax16)));
    put16(static_cast<uint16_t>(std::min<uint64_t>(count, kMax16)));
    put32(static_cast<uint32_t>(std::min<uint64_t>(size, kMax32)));
    put32(static_cast<uint32_t>(std::min<uint64_t>(begin, kMax32)));
    put16(0);
  }

  void add_directory_entry(size_t index) {
    const ZipRecord& record = records_[index];
    const uint64_t header = header_offsets_[index];
    const bool large = needs_zip64(record.size), far = needs_zip64(header);
    const size_t zip64 = (large ? 16 : 0) + (far ? 8 : 0);
    const auto size32 = static_cast<uint32_t>(std::min<uint64_t>(record.size, kMax32));
    put32(kDirectorySignature);
    put16(0);
    put16(0);
    put16(flags(record));
    put16(kStored);
    put32(0);
    put_crc(index);
    put32(size32);
    put32(size32);
    put16(static_cast<uint16_t>(name_bytes(record)));
    put16(static_cast<uint16_t>(zip64 > 0 ? zip64 + 4 : 0));
    put16(0);  // no comment
    put16(0);  // disk
    put16(0);  // attributes
    put32(0);
    put32(static_cast<uint32_t>(std::min<uint64_t>(header, kMax32)));
    put_name(record);
    if (zip64 == 0) return;
    put16(kZip64Extra);
    put16(static_cast<uint16_t>(zip64));
    if (large) {
      put64(record.size);
      put64(record.size);
    }
    if (far) put64(header);
  }

  const std::string& archive_;
  const std::vector<ZipRecord>& records_;
  std::vector<uint32_t> numbers_;  // of payloads
  std::vector<uint64_t> header_offsets_;  // in their archives
  ZipLayout layout_;
  char numbers_text_[128];  // what belongs behind the structure so far
  size_t numbers_used_ = 0;
  uint64_t cursor_ = 0;    // in the file
  uint64_t begin_ = 0;     // of the archive
  size_t part_begin_ = 0;  // in layout_.structure
  size_t padding_at_ = 0, padding_bytes_ = 0;  // there, too: what long padding is taken from
};

}  // namespace

namespace {

void refuse_long_names(const std::string& archive, const std::vector<ZipRecord>& records) {
  for (const ZipRecord& record : records) {
    if (archive.size() + 1 + record.name.size() > kMax16) {
      throw Error(ErrorKind::kCorrupt, "a record name of more than 65535 bytes does not fit a zip file");
    }
  }
}

}  // namespace

ZipLayout lay_out_zip(const std::string& archive, const std::vector<ZipRecord>& records) {
  std::vector<ByteRange> places;
  return lay_out_zips(archive, records, {records.size()}, places);
}

ZipLayout lay_out_zips(const std::string& archive, const std::vector<ZipRecord>& records, const std::vector<size_t>& counts,
                       std::vector<ByteRange>& places) {
  refuse_long_names(archive, records);
  Builder builder(archive, records);
  places.clear();
  places.reserve(counts.size());
  size_t first = 0;
  for (const size_t count : counts) {
    places.push_back(builder.add_archive(first, first + count));
    first += count;
  }
  return builder.end();
}

FileSpec to_spec(const ZipLayout& layout, std::vector<Extent> payloads) {
  FileSpec spec;
  spec.size = layout.file_size;
  spec.record_count = payloads.size();
  spec.crc_fields = layout.crc_fields;
  spec.extents.reserve(payloads.size() + layout.parts.size());
  const auto* structure = reinterpret_cast<const std::byte*>(layout.structure.data());
  auto part = layout.parts.begin();
  const auto add_parts = [&](uint64_t before) {
    for (; part != layout.parts.end() && part->offset < before; ++part) {
      spec.extents.push_back({structure + part->begin, part->length, part->offset, Source::kCopy, kStructure, kHost});
    }
  };
  for (size_t i = 0; i < payloads.size(); ++i) {
    payloads[i].offset = layout.payload_offsets[i];
    add_parts(payloads[i].offset);
    if (payloads[i].length > 0) spec.extents.push_back(payloads[i]);
  }
  add_parts(layout.file_size);
  return spec;
}

}  // namespace lazyckpt
