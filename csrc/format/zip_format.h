// The numbers of the zip format (PKWARE's APPNOTE.TXT, version 6.3), for who writes such files and who reads them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lazyckpt::zip {

// What a part of the file begins with, as four bytes, little-endian.
constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr uint32_t kDescriptorSignature = 0x08074b50;
constexpr uint32_t kDirectorySignature = 0x02014b50;
constexpr uint32_t kZip64EndSignature = 0x06064b50;
constexpr uint32_t kZip64LocatorSignature = 0x07064b50;
constexpr uint32_t kEndSignature = 0x06054b50;

// Their lengths, without what varies.
constexpr size_t kLocalHeaderBytes = 30;
constexpr size_t kDirectoryEntryBytes = 46;
constexpr size_t kZip64EndBytes = 56;
constexpr size_t kZip64LocatorBytes = 20;
constexpr size_t kEndBytes = 22;

constexpr uint16_t kEncrypted = 0x1;  // flags of a record
constexpr uint16_t kHasDescriptor = 0x8;
constexpr uint16_t kUtf8 = 0x800;
constexpr uint16_t kStored = 0;  // the method that does not compress
constexpr uint16_t kVersionMadeBy = 0x031e;
constexpr uint16_t kVersionNeeded = 0x002d;

constexpr uint16_t kZip64Extra = 0x0001;
constexpr uint32_t kMax32 = 0xFFFFFFFFu;  // the value that sends a reader to the zip64 field
constexpr uint16_t kMax16 = 0xFFFFu;
inline bool needs_zip64(uint64_t value) { return value >= kMax32; }

// The extra field by which torch's writer and ours align a payload: as many of one byte as it takes.
constexpr uint16_t kPaddingExtra = 0x4246;  // "FB"
constexpr char kPaddingByte = 'Z';
constexpr uint32_t kLargestAlign = 32768;  // the length of the field has 16 bits

// Of the data descriptor behind a record; one that is empty has none.
inline bool is_descriptor_wide(uint64_t size, uint64_t header_offset) {
  return needs_zip64(size) || needs_zip64(header_offset);
}
inline uint64_t descriptor_bytes(uint64_t size, uint64_t header_offset) {
  return size == 0 ? 0 : is_descriptor_wide(size, header_offset) ? 24 : 16;
}

}  // namespace lazyckpt::zip
