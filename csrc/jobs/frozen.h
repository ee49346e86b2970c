// Bytes that are not even read: of records that the caller has declared not to change, in memory that is the same, and that nobody
// is known to have written to since the file before. What the file before has of them is shared as it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format/file_spec.h"
#include "jobs/baseline.h"
#include "jobs/chunk.h"
#include "os/file.h"

namespace lazyckpt {

constexpr uint64_t kLeastPiece = uint64_t{64} << 10;  // that is compared; of less, a call costs more than the write

// Bytes of some record have changed that were declared not to.
struct FrozenChanged {
  uint32_t record;
};

// Bytes that were not to be read cannot be shared, and not be read after all.
struct UnreadRefused {};

// Lets all of these records that the file before has, in whole blocks, be kShared; `chunk_bytes` is what the file will be cut into.
// Of memory of the host a few bytes of each piece are looked at first. Returns the records of which they are others now: these are
// read as if nothing had been said of them.
//
// Of `supposed`, which are among the records, nobody has said that they do not change. They are left out only if they lie on the
// host, have been compared as a whole and found the same, and none of them looks otherwise now: who writes to one does to others.
std::vector<uint32_t> leave_out_frozen(FileSpec& spec, const std::vector<uint32_t>& records, const std::vector<uint32_t>& supposed,
                                       const Baseline& baseline, const IoLimits& limits, size_t chunk_bytes);

// Of chunks that were cut from that: their pieces get the checksums of the file before. False if it has not those of just these.
bool keep_checksums(std::vector<Chunk>& chunks, const Baseline& baseline);

// Reads the bytes of a piece, which is at `begin` in the file, after all. False if they cannot be read: that is late, and its memory
// may be gone by now.
bool read_after_all(Chunk& chunk, Piece& piece, uint64_t begin);

// Where the bytes [begin, end) of the file are, if they lie in one run of the memory of one record; null else.
struct Place {
  const std::byte* source = nullptr;
  int device = kHost;
};
Place find_place(const FileSpec& spec, uint64_t begin, uint64_t end);

}  // namespace lazyckpt
