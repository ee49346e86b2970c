#include "reading/zip_directory.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "base/error.h"
#include "format/zip_format.h"
#include "os/file.h"
#include "reading/range_reader.h"

namespace lazyckpt {
namespace {

using namespace zip;

constexpr size_t kLongestComment = kMax16;

[[noreturn]] void corrupt(const ReadableFile& file, const std::string& what) {
  throw Error(ErrorKind::kCorrupt, "'" + file.path() + "' is damaged or not a torch zip file: " + what, 0, file.path());
}

[[noreturn]] void refuse_compressed(const ReadableFile& file, const std::string& name) {
  corrupt(file, "record '" + name + "' is compressed (if this is a TorchScript archive, torch.jit.load reads it)");
}

template <typename Bytes>
uint64_t number(const Bytes& bytes, size_t at, int width) {
  uint64_t value = 0;
  for (int i = 0; i < width; ++i) value |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[at + i])) << (8 * i);
  return value;
}

bool has_signature(const std::string& bytes, size_t at, uint32_t signature) { return number(bytes, at, 4) == signature; }

std::string read(const ReadableFile& file, uint64_t offset, uint64_t length) {
  if (offset > file.size() || length > file.size() - offset) corrupt(file, "its directory points outside the file");
  std::string bytes(static_cast<size_t>(length), '\0');
  file.read_at(bytes.data(), bytes.size(), offset);
  return bytes;
}

struct Directory {
  uint64_t offset = 0, size = 0, count = 0;
};

Directory find_directory(const ReadableFile& file) {
  const uint64_t tail_bytes = std::min<uint64_t>(file.size(), kEndBytes + kLongestComment);
  const std::string tail = read(file, file.size() - tail_bytes, tail_bytes);
  if (tail.size() < kEndBytes) corrupt(file, "it is too short");
  size_t at = tail.size() - kEndBytes;
  while (!has_signature(tail, at, kEndSignature) || number(tail, at + 20, 2) != tail.size() - at - kEndBytes) {
    if (at-- == 0) corrupt(file, "it has no end record; was it cut off?");
  }
  Directory found{number(tail, at + 16, 4), number(tail, at + 12, 4), number(tail, at + 10, 2)};
  const uint64_t end_offset = file.size() - tail.size() + at;
  const bool wants_zip64 = found.offset == kMax32 || found.size == kMax32 || found.count == kMax16;
  if (end_offset >= kZip64LocatorBytes) {
    const std::string locator = read(file, end_offset - kZip64LocatorBytes, kZip64LocatorBytes);
    if (has_signature(locator, 0, kZip64LocatorSignature)) {
      const std::string end64 = read(file, number(locator, 8, 8), kZip64EndBytes);
      if (!has_signature(end64, 0, kZip64EndSignature)) corrupt(file, "its zip64 end record is missing");
      return {number(end64, 48, 8), number(end64, 40, 8), number(end64, 32, 8)};
    }
  }
  if (wants_zip64) corrupt(file, "its zip64 locator is missing");
  return found;
}

// Replaces the numbers that the 32-bit fields sent to the zip64 field.
void read_zip64(const ReadableFile& file, const std::string& bytes, size_t at, size_t end, ZipEntry& entry,
                uint64_t& stored_size) {
  while (at + 4 <= end) {
    const uint64_t id = number(bytes, at, 2), length = number(bytes, at + 2, 2);
    at += 4;
    if (length > end - at) break;
    if (id == kZip64Extra) {
      size_t field = at;
      for (uint64_t* value : {&entry.size, &stored_size, &entry.header_offset}) {
        if (*value != kMax32) continue;
        if (field + 8 > at + length) corrupt(file, "a zip64 field of '" + entry.name + "' is too short");
        *value = number(bytes, field, 8);
        field += 8;
      }
      return;
    }
    at += static_cast<size_t>(length);
  }
}

ZipEntry parse_entry(const ReadableFile& file, const std::string& bytes, size_t& at) {
  if (bytes.size() - at < kDirectoryEntryBytes || !has_signature(bytes, at, kDirectorySignature)) {
    corrupt(file, "its directory is broken at entry offset " + std::to_string(at));
  }
  const uint64_t flags = number(bytes, at + 8, 2), method = number(bytes, at + 10, 2);
  const size_t name = static_cast<size_t>(number(bytes, at + 28, 2));
  const size_t extra = static_cast<size_t>(number(bytes, at + 30, 2));
  const size_t comment = static_cast<size_t>(number(bytes, at + 32, 2));
  const size_t fixed_end = at + kDirectoryEntryBytes;
  if (bytes.size() - fixed_end < name + extra + comment) corrupt(file, "its directory is cut off");
  ZipEntry entry;
  entry.name = bytes.substr(fixed_end, name);
  entry.crc = static_cast<uint32_t>(number(bytes, at + 16, 4));
  uint64_t stored_size = number(bytes, at + 20, 4);
  entry.size = number(bytes, at + 24, 4);
  entry.header_offset = number(bytes, at + 42, 4);
  read_zip64(file, bytes, fixed_end + name, fixed_end + name + extra, entry, stored_size);
  if ((flags & kEncrypted) != 0) corrupt(file, "record '" + entry.name + "' is encrypted");
  if (method != kStored || stored_size != entry.size) refuse_compressed(file, entry.name);
  at = fixed_end + name + extra + comment;
  return entry;
}

// Reads the local headers, which alone tell where the payloads begin, and their names.
std::vector<std::string> read_headers(const std::shared_ptr<const ReadableFile>& file, const std::vector<ZipEntry>& entries,
                                      const ReadOptions& options) {
  std::vector<std::string> headers;
  std::vector<ReadRange> ranges;
  headers.reserve(entries.size());
  for (const ZipEntry& entry : entries) {
    const uint64_t length = kLocalHeaderBytes + entry.name.size();
    if (entry.header_offset > file->size() || length > file->size() - entry.header_offset) {
      corrupt(*file, "its directory points outside the file");
    }
    headers.emplace_back(static_cast<size_t>(length), '\0');
    ranges.push_back({entry.header_offset, length, reinterpret_cast<std::byte*>(headers.back().data())});
  }
  read_ranges(file, ranges, options);
  return headers;
}

void find_payload(const ReadableFile& file, const std::string& header, ZipEntry& entry) {
  if (!has_signature(header, 0, kLocalSignature)) corrupt(file, "the header of record '" + entry.name + "' is broken");
  const uint64_t name = number(header, 26, 2), extra = number(header, 28, 2);
  if (name != entry.name.size() || header.compare(kLocalHeaderBytes, entry.name.size(), entry.name) != 0) {
    corrupt(file, "header and directory disagree on the name of record '" + entry.name + "'");
  }
  if (number(header, 8, 2) != kStored) refuse_compressed(file, entry.name);
  entry.payload_offset = entry.header_offset + kLocalHeaderBytes + name + extra;
}

void check_unique(const ReadableFile& file, const std::vector<ZipEntry>& entries) {
  std::unordered_set<std::string> names;
  for (const ZipEntry& entry : entries) {
    if (!names.insert(entry.name).second) corrupt(file, "record '" + entry.name + "' stands in it twice");
  }
}

void check_disjoint(const ReadableFile& file, std::vector<ZipEntry> entries, uint64_t directory_offset) {
  std::sort(entries.begin(), entries.end(),
            [](const ZipEntry& a, const ZipEntry& b) { return a.header_offset < b.header_offset; });
  for (size_t i = 0; i < entries.size(); ++i) {
    const ZipEntry& entry = entries[i];
    const uint64_t limit = i + 1 < entries.size() ? entries[i + 1].header_offset : directory_offset;
    if (entry.payload_offset > limit || entry.size > limit - entry.payload_offset) {
      corrupt(file, "record '" + entry.name + "' reaches into what follows it");
    }
  }
}

}  // namespace

std::vector<ZipEntry> read_zip_directory(const std::shared_ptr<const ReadableFile>& shared, const ReadOptions& options) {
  const ReadableFile& file = *shared;
  const Directory directory = find_directory(file);
  const std::string bytes = read(file, directory.offset, directory.size);
  if (directory.count > bytes.size() / kDirectoryEntryBytes) corrupt(file, "its directory counts too many records");
  std::vector<ZipEntry> entries;
  entries.reserve(static_cast<size_t>(directory.count));
  size_t at = 0;
  for (uint64_t i = 0; i < directory.count; ++i) entries.push_back(parse_entry(file, bytes, at));
  if (at != bytes.size()) corrupt(file, "its directory is longer than its records");
  check_unique(file, entries);
  const std::vector<std::string> headers = read_headers(shared, entries, options);
  for (size_t i = 0; i < entries.size(); ++i) find_payload(file, headers[i], entries[i]);
  check_disjoint(file, entries, directory.offset);
  return entries;
}

uint64_t extra_offset(const ZipEntry& entry) { return entry.header_offset + kLocalHeaderBytes + entry.name.size(); }

bool is_padding(const std::string& extra) {
  size_t at = 0;
  const bool sizes_come_first = extra.size() >= 4 && number(extra, 0, 2) == kZip64Extra;
  if (sizes_come_first) at = static_cast<size_t>(4 + number(extra, 2, 2));
  if (at + 4 > extra.size()) return false;
  const size_t padding = extra.size() - at - 4;
  std::string expected;
  for (const size_t field : {size_t{kPaddingExtra}, padding}) {
    for (int byte = 0; byte < 2; ++byte) expected.push_back(static_cast<char>(field >> (8 * byte)));
  }
  expected.append(padding, kPaddingByte);
  size_t alike = 0;
  for (size_t i = 0; i < expected.size(); ++i) alike += extra[at + i] == expected[i] ? 1 : 0;
  return alike > expected.size() / 2;  // two bytes are those of any field that stands there alone: the length
}

}  // namespace lazyckpt
