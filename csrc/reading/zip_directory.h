// Reading a zip's central directory. Every number in it is suspect: a checkpoint may be damaged, or not ours.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace lazyckpt {

class ReadableFile;
struct ReadOptions;

// One record of an existing file.
struct ZipEntry {
  std::string name;  // with the archive's name
  uint64_t header_offset = 0;
  uint64_t payload_offset = 0;
  uint64_t size = 0;
  uint32_t crc = 0;
};

// The central directory of a file of stored records. Throws Error(kCorrupt) on anything that is inconsistent, lies
// outside the file, overlaps, stands there twice, or is compressed or encrypted. So a file never yields more bytes than it has.
std::vector<ZipEntry> read_zip_directory(const std::shared_ptr<const ReadableFile>& file, const ReadOptions& options);

// Where the extra fields of a local header begin; they go on to the payload.
uint64_t extra_offset(const ZipEntry& entry);

// Whether these extra fields of a local header are the padding that torch's writer and ours put there, and nobody else does.
// Some of their bytes may be damaged: most must be as they were written.
bool is_padding(const std::string& extra);

}  // namespace lazyckpt
