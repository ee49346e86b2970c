// Writes of a file only what is not in the one before, and lets it share the blocks of the rest. The bytes are compared, never
// taken on trust, and are in the writer's hands all the time: whatever goes wrong with sharing, they are written.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "format/file_spec.h"
#include "jobs/baseline.h"
#include "jobs/chunk.h"
#include "jobs/frozen.h"
#include "os/file.h"

namespace lazyckpt {

struct ReuseRequest {
  bool wanted = false;  // else nothing is compared, and nothing kept for the next save
  bool shares = true;   // false: all is written, and compared for the next one's sake
  std::shared_ptr<const Baseline> baseline = {};  // of the file before; none of the first
  // Declared not to change, and as far as can be told without a look at them the same as in the file before. See frozen.h.
  std::vector<uint32_t> frozen = {};
};

// Of one job.
class Reuse {
 public:
  // `spec` must outlive it. Of `chunks` the pieces that are not read get their checksums.
  Reuse(const ReuseRequest& request, const FileSpec& spec, const IoLimits& limits, std::vector<Chunk>& chunks);

  // Of a range of the file, what is likely to be written.
  std::vector<ByteRange> likely_written(ByteRange range) const;

  // For who holds a chunk, before anything of it is read: shares what is not to be. What the file before cannot share is read after
  // all. Throws Error if it lies on a device. Returns how many bytes of the chunk are not read.
  uint64_t share_unread(WritableFile& file, Chunk& chunk);

  // Then, once its records have their checksums: notes what is in its pieces, and writes what the file before does not have, or
  // cannot share. Returns how many bytes it shares, those among them that are not read. Throws FrozenChanged.
  uint64_t write(WritableFile& file, const Chunk& chunk, size_t index);

  // Once the file is there. Where the next one could share nothing with it, nothing is compared or kept.
  void begin(const WritableFile& file);
  // When it is durable: what the next one needs; none if that could share nothing. `joined`: see Baseline.
  std::shared_ptr<Baseline> end(bool joined);

  bool was_refused() const { return refused_; }  // the file system does not share blocks

 private:
  bool is_compared(const Piece& piece) const;
  // What is the same as in the file before: pieces, or the blocks of those that are shared by now.
  struct Same {
    ByteRange range;
    bool is_shared;
  };

  Mark look_at(const Piece& piece, const Chunk& chunk, uint64_t begin, const Mark* before) const;
  void check_frozen(const Piece& piece, const Chunk& chunk, const Mark& mark, const Mark& before) const;
  Memory note_memory(const Chunk& chunk, uint64_t begin, uint64_t end) const;
  std::vector<Same> find_same(const Chunk& chunk, size_t index);
  ByteRange whole_blocks(ByteRange range, uint64_t block) const;
  bool share(WritableFile& file, ByteRange range);
  void look_again(const Chunk& chunk, size_t index);

  const std::shared_ptr<const Baseline> baseline_;
  const bool may_share_;
  const FileSpec& spec_;
  const uint64_t least_block_bytes_;
  const uint64_t block_bytes_;            // of the file before, too
  std::vector<bool> is_large_;            // of each record
  std::vector<bool> is_frozen_;           // of each record
  std::vector<std::vector<Mark>> marks_;  // of each chunk; whoever holds the chunk writes them
  std::optional<CloneSource> own_;        // the file that is written
  std::atomic<bool> ended_{false};  // nothing more is shared: the file before has changed, or cannot be shared
  std::atomic<bool> refused_{false};
};

// Writes all of a chunk, but for what can be shared if there is a `reuse`; returns how many bytes that is.
uint64_t write_out(WritableFile& file, const Chunk& chunk, Reuse* reuse, size_t index);

}  // namespace lazyckpt
