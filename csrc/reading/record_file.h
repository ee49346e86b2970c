// Reading and checking finished files: every byte is read once, for its CRC-32 and to its destination at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/device.h"
#include "os/file.h"
#include "reading/range_reader.h"
#include "reading/zip_directory.h"

namespace lazyckpt {

struct FileDigest {
  uint64_t size = 0;
  uint32_t crc = 0;
};

// Size and CRC-32 of a whole file.
FileDigest digest_file(const std::string& path, const ReadOptions& options);

// A torch zip file whose directory has been read and found consistent.
class RecordFile {
 public:
  // Throws Error(kCorrupt) if it is damaged, or no torch zip file.
  RecordFile(const std::string& path, bool direct, const ReadOptions& options);

  const ReadableFile& file() const { return *file_; }
  const std::vector<ZipEntry>& entries() const { return entries_; }
  // False if it carries no CRC-32s (torch.serialization.set_crc32_options(False)), so that nothing can be checked.
  bool checksummed() const { return checksummed_; }

  // An entry by its index, and where its bytes are to go.
  struct Place {
    size_t entry = 0;
    std::byte* to = nullptr;
    int device = kHost;  // where that is an address of
  };
  using Wanted = std::vector<Place>;

  // Reads entries and checks their CRC-32s.
  void read(const Wanted& wanted, const ReadOptions& options) const;

  // Reads the whole file, checks the CRC-32 of every record and, if it was written by torch or by us, every byte between
  // the records too. Returns the CRC-32 of the file.
  uint32_t read_whole(const Wanted& wanted, const ReadOptions& options) const;

  // Reads the bytes begin..end of the file, each once, and puts those of wanted records to their places; a destination is
  // that of a whole record, whatever part of it is read. Returns the CRC-32 of begin..end: those of neighbours join to
  // that of the file. Records are not checked: one may reach into another share.
  uint32_t read_share(const Wanted& wanted, uint64_t begin, uint64_t end, const ReadOptions& options) const;

  // Checks the CRC-32s of records that are in memory of the host already, by so many threads.
  void check(const Wanted& in_memory, int threads) const;

  // The CRC-32 that the file has if its records are what its directory says: of these no byte is read, but all between them.
  uint32_t claimed_crc(const ReadOptions& options) const;

  // CRC-32 of what the directory says: the same for two files of the same records, whatever the bytes around these.
  uint32_t directory_crc() const;

 private:
  void check_record(const ZipEntry& entry, uint32_t crc) const;
  std::vector<Place> places_of(const Wanted& wanted) const;  // by entry; null: not wanted

  std::shared_ptr<const ReadableFile> file_;
  std::vector<ZipEntry> entries_;
  bool checksummed_;
};

// Reads and checks the whole of a torch zip file. Returns whether it carries CRC-32s.
bool verify_torch_file(const std::string& path, const ReadOptions& options);

}  // namespace lazyckpt
