// From extents to chunks: how the bytes of one file are cut into the units that writers claim, and which of them leave
// straight from where they lie. Pure bookkeeping: no locks, no threads, no system calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/device.h"
#include "format/file_spec.h"
#include "memory/spans.h"
#include "os/file.h"
#include "os/pieces.h"

namespace lazyckpt {

// A run of bytes in memory, part of a chunk. kCopy: in the chunk's own span of the arena.
struct Segment {
  const std::byte* source = nullptr;
  size_t length = 0;
  Source kind = Source::kCopy;
  uint32_t record = kStructure;  // whose bytes these are; of a kCopy segment, which may hold several, it says nothing

  bool is_structure() const { return kind == Source::kOwned && record == kStructure; }  // and lies where FileSpec::kept keeps it
};

// A run of bytes of one record (or of the structure), for the checksums.
struct Piece {
  uint32_t record = kStructure;
  size_t length = 0;
  uint32_t crc = 0;
  bool seen = true;  // submit() can look at it: not so eager bytes of devices, which are on their way then
  bool kept = false;  // `crc` is that of the file before, of which most of it is taken without being read
  bool must_be_kept = false;  // that was not possible: it is read, and must have the bytes of the file before
};

// Device memory that goes to `at` bytes into a span.
struct DeviceCopy {
  const std::byte* source = nullptr;
  size_t length = 0;
  size_t at = 0;
  int device = kHost;
  bool lazy = true;
};

// What one device still has to put into a chunk: its lazy bytes.
struct DeviceShare {
  int device = kHost;
  bool enqueued = false;
};

enum class ChunkState : uint8_t {
  kUnpublished,  // save() still copies into it
  kArriving,     // some of its device bytes are not in the arena yet
  kPending,      // may be claimed; its lazy bytes are still in the tensors
  kStaging,      // the fence copies its lazy bytes
  kWriting,      // a writer has it
  kDone,         // on disk, or dropped because its job failed
};

struct Chunk {
  uint64_t offset = 0;  // in the file; a multiple of the chunk size, if it is written
  bool written = true;  // by this process; else it is only read, for the checksum of a record that ends in our share
  bool shares = false;  // it has bytes that are not read
  size_t length = 0;    // bytes to write: whole blocks
  size_t content = 0;   // bytes of the file proper; less than `length` only at the very end
  size_t first_extent = 0, end_extent = 0;
  size_t first_field = 0, end_field = 0;
  size_t bounce_bytes = 0;
  size_t lazy_bytes = 0;  // still to be captured
  std::vector<Segment> segments;
  std::vector<Piece> pieces;
  Span bounce;  // holds the kCopy segments
  // Only where device bytes are among them. They come to `bounce` late, and need no room in the arena before.
  size_t device_lazy_bytes = 0, device_copy_bytes = 0;
  std::vector<DeviceShare> device_shares;
  std::vector<DeviceCopy> device_copies;  // constant once published; eager ones go to `eager_span`, where there is one
  std::vector<std::byte> host_bytes;  // the host's kCopy bytes, until the chunk is written
  Span eager_span;                    // the eager device bytes of a chunk that has lazy ones, too
  size_t flying = 0;                  // batches of copies that are enqueued and have not been seen to end
  bool staging = false;               // the fence copies its host bytes while its device bytes arrive
  Span staged;  // holds what the fence copied
  ChunkState state = ChunkState::kUnpublished;
  uint32_t crc = 0;  // of `content` bytes, once written

  bool has_device_bytes() const { return device_lazy_bytes + device_copy_bytes > 0; }
  // Eager device bytes have a span of their own, rather than hold room for the lazy ones from save() on.
  bool has_eager_span() const { return device_lazy_bytes > 0 && device_copy_bytes > 0; }
  bool arrived() const;
  void settle();  // lets a writer have it if nothing is missing
  void release_memory();
};

// Some bytes of a record, from where it begins or a share of the file does.
struct RecordPart {
  uint32_t record = kStructure;  // which is that there is none
  uint64_t length = 0;
  uint32_t crc = 0;
};

// Of chunks that are done: what was only read of the record whose end we write, and what we have written of the last record. A
// record that several processes write is as long as what they have written of it, and the checksums must agree.
RecordPart part_only_read(const std::vector<Chunk>& chunks);
RecordPart last_part_written(const std::vector<Chunk>& chunks);

// What this process writes of the file.
ByteRange written_range(const FileSpec& spec, size_t chunk_bytes);

// The fields whose first byte lies in the range, as indices into spec.crc_fields.
ByteRange fields_in(const FileSpec& spec, ByteRange range);

// The chunks that are written, ascending; before them those that are only read.
std::vector<Chunk> cut_into_chunks(const FileSpec& spec, const IoLimits& limits, size_t chunk_bytes);

// Copies all that must leave the caller's memory at once into chunk.bounce, which must be allocated.
void fill_bounce(Chunk& chunk, const FileSpec& spec);

// For chunks with device bytes, instead of fill_bounce(). First: copies the host's part to chunk.host_bytes, finds the copies.
void copy_host_bytes(Chunk& chunk, const FileSpec& spec);
// Then, to find changes: the checksums of what lies in the tensors now. `fetched` has chunk.bounce_bytes, and the lazy device
// bytes where they will come to lie in chunk.bounce; the host's are put beside them.
void checksum_before(Chunk& chunk, const FileSpec& spec, std::byte* fetched);
// At last: the device bytes have arrived, in chunk.bounce and chunk.eager_span; puts the others beside them.
void complete_bounce(Chunk& chunk, const FileSpec& spec);

// Copies the lazy segments into `span` and lets them point there.
void stage_lazy(Chunk& chunk, Span span);

// Whether a fence rather copies all of the chunk, for which `span` must have chunk.length bytes: then a writer can write it from
// there. Else it copies it once more, to bring it together.
bool is_staged_whole(const Chunk& chunk, const IoLimits& limits);
void stage_whole(Chunk& chunk, Span span);

// Whether a writer copies the chunk to memory of its own, and writes it from there: where it has bytes that are not read, for which
// it leaves room; and where it goes past the page cache, and bytes lie where direct I/O cannot take them from, or in the caller's
// tensors. The copy costs little, since the checksum reads them anyway; then they are captured, without room in the arena and before
// the disk has them, and the disk takes them from huge pages: from small ones each request is cut into many. So a tensor may begin
// and end anywhere.
bool is_gathered(const Chunk& chunk, const IoLimits& limits);

// Does that, and finds what checksum_pieces() of records does, in one pass.
void gather_and_checksum(Chunk& chunk, const IoLimits& limits, WriterMemory& memory);

// Bytes that lie in the caller's memory; and bytes of structure that lie where they were laid out.
uint64_t tensor_bytes(const Chunk& chunk);
uint64_t structure_bytes(const Chunk& chunk);

// CRC-32 of each piece that belongs to a record (`of_records`) and is not kept, or of each that belongs to none.
void checksum_pieces(Chunk& chunk, bool of_records);

// The record of the first record piece whose bytes no longer have the checksum that checksum_pieces() found;
// kStructure if there is none.
uint32_t find_changed(const Chunk& chunk);

// The first record whose checksum, as far as there was one, is not the one of before; kStructure if there is none.
uint32_t find_changed_since(const Chunk& chunk, const std::vector<Piece>& before);

// Writes the CRC-32 fields that lie in the chunk; `record_crcs` must be final for their records.
void fill_crc_fields(Chunk& chunk, const FileSpec& spec, const std::vector<uint32_t>& record_crcs);

}  // namespace lazyckpt
