// Checking finished files: CRC-32s, by several threads.
#pragma once

#include <cstdint>
#include <string>

namespace lazyckpt {

struct FileDigest {
  uint64_t size = 0;
  uint32_t crc = 0;
};

// Size and CRC-32 of a whole file.
FileDigest digest_file(const std::string& path, int threads);

// Checks the CRC-32 of every record of a torch zip file, and, if the file was written by torch or by us, every byte
// between the records too. Throws Error(kCorrupt) naming what is wrong. Returns false if the file carries no CRC-32s
// (torch.serialization.set_crc32_options(False)), so that nothing could be checked.
bool verify_torch_file(const std::string& path, int threads);

}  // namespace lazyckpt
