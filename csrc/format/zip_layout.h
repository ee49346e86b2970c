// The torch zip file, as bytes that are to be written. It places records, and produces everything that stands around them
// (local headers, data descriptors, central directory), before a single tensor byte moves; only the CRC-32s are left open,
// as a list of places to fill in. The numbers of the format are in zip_format.h; reading/ knows them, too.
//
// The format is the one that torch 2.13's PyTorchFileWriter (miniz) writes: stored records, flags 0x808, CRC and sizes in
// a data descriptor, payload aligned by an "FB" extra field padded with 'Z', always a zip64 end record. Given the same
// records, alignments and contents the bytes are the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "format/file_spec.h"

namespace lazyckpt {

struct ZipRecord {
  std::string name;  // without the archive's name
  uint64_t size = 0;
  uint32_t align = 64;     // the payload's offset in the file is congruent to `remainder` modulo `align` (a power of two <= 32768)
  uint32_t remainder = 0;
  // `size` bytes that are copied to the structure, so that the CRC-32 is known at once. Null: a payload that is written from
  // where it lies. Payloads alone are numbered: by these numbers the rest of the core knows a record.
  const std::byte* contents = nullptr;
};

// `length` bytes of ZipLayout::structure, from `begin`, that belong at `offset` in the file. Parts of padding may share theirs.
struct StructurePart {
  uint64_t offset = 0;
  size_t begin = 0;
  size_t length = 0;
};

struct ZipLayout {
  std::vector<uint64_t> payload_offsets;  // one a payload
  std::string structure;
  std::vector<StructurePart> parts;      // ascending, disjoint from each other and from the payloads
  std::vector<CrcField> crc_fields;      // ascending by offset
  uint64_t directory_offset = 0;         // where the (last) central directory begins; it goes on to the end of the file
  uint64_t file_size = 0;
};

// Throws Error if a record's alignment cannot be had.
ZipLayout lay_out_zip(const std::string& archive, const std::vector<ZipRecord>& records);

// Several archives of the same name in one file, one behind the other. Each is complete: its bytes alone are a zip file.
//
// `counts`: how many of the records each archive has. `places` receives where each lies.
ZipLayout lay_out_zips(const std::string& archive, const std::vector<ZipRecord>& records, const std::vector<size_t>& counts,
                       std::vector<ByteRange>& places);

// The file as extents: the structure, and the payloads, which are given in order and without their offsets. Points into `layout`;
// set FileSpec::kept where that is to outlive submit().
FileSpec to_spec(const ZipLayout& layout, std::vector<Extent> payloads);

}  // namespace lazyckpt
