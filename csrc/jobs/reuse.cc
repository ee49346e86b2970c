#include "jobs/reuse.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/crc32.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/random.h"

namespace lazyckpt {
namespace {

constexpr uint64_t kLeastRecord = uint64_t{1} << 20;  // smaller ones are written: their blocks hold other bytes, too
constexpr uint64_t kLeastShared = uint64_t{32} << 10;

// Calls visit(bytes, length) for each run of memory of bytes [begin, end) of the file, which lie in the chunk.
template <typename Visit>
void for_each_run(const Chunk& chunk, uint64_t begin, uint64_t end, Visit visit) {
  uint64_t at = chunk.offset;
  for (const Segment& segment : chunk.segments) {
    const uint64_t from = std::max(begin, at), until = std::min(end, at + segment.length);
    if (from < until) visit(segment.source + (from - at), static_cast<size_t>(until - from));
    at += segment.length;
    if (at >= end) return;
  }
}

Digest digest_of(const Chunk& chunk, uint64_t begin, uint64_t end) {
  XXH3_state_t state;
  XXH3_INITSTATE(&state);
  XXH3_128bits_reset(&state);
  for_each_run(chunk, begin, end, [&](const std::byte* bytes, size_t length) { XXH3_128bits_update(&state, bytes, length); });
  const XXH128_hash_t found = XXH3_128bits_digest(&state);
  return {found.low64, found.high64};
}

uint32_t crc_of(const Chunk& chunk, uint64_t begin, uint64_t end) {
  uint32_t crc = 0;
  if (begin < end) for_each_run(chunk, begin, end, [&](const std::byte* bytes, size_t length) { crc = crc32(crc, bytes, length); });
  return crc;
}

void write_range(WritableFile& file, const Chunk& chunk, uint64_t begin, uint64_t end) {
  if (begin >= end) return;
  std::vector<iovec> pieces;
  pieces.reserve(chunk.segments.size());
  for_each_run(chunk, begin, end, [&](const std::byte* bytes, size_t length) {
    auto* base = const_cast<std::byte*>(bytes);  // iovec has no const; a write only reads
    if (!pieces.empty() && static_cast<std::byte*>(pieces.back().iov_base) + pieces.back().iov_len == base) {
      pieces.back().iov_len += length;
    } else {
      pieces.push_back({base, length});
    }
  });
  file.write_at(pieces, begin);
}

std::vector<bool> find_large(const FileSpec& spec) {
  std::vector<uint64_t> bytes(spec.record_count, 0);
  for (const Extent& extent : spec.extents) {
    if (extent.record != kStructure) bytes[extent.record] += extent.length;
  }
  std::vector<bool> large;
  large.reserve(bytes.size());
  for (const uint64_t each : bytes) large.push_back(each >= kLeastRecord);
  return large;
}

}  // namespace

Reuse::Reuse(const ReuseRequest& request, const FileSpec& spec, const IoLimits& limits, std::vector<Chunk>& chunks)
    : baseline_(request.baseline),
      may_share_(request.shares && request.baseline != nullptr),
      spec_(spec),
      least_block_bytes_(block_bytes(limits)),
      block_bytes_(std::max<uint64_t>(least_block_bytes_, request.baseline ? request.baseline->source().block_bytes() : 1)),
      is_large_(find_large(spec)),
      is_frozen_(spec.record_count, false),
      marks_(chunks.size()) {
  for (const uint32_t record : request.frozen) is_frozen_.at(record) = true;
  if (baseline_ != nullptr && !keep_checksums(chunks, *baseline_)) {
    throw Error(ErrorKind::kCorrupt, "bytes that are not read have no checksum");  // leave_out_frozen() has tried it out
  }
}

bool Reuse::is_compared(const Piece& piece) const {
  return piece.record != kStructure && piece.length >= kLeastPiece && is_large_[piece.record];
}

// Those of a range: what lies in a block with other bytes is not shared.
ByteRange Reuse::whole_blocks(ByteRange range, uint64_t block) const {
  const uint64_t begin = (range.begin + block - 1) / block * block;
  const uint64_t end = range.end / block * block;
  return end < begin + kLeastShared ? ByteRange{begin, begin} : ByteRange{begin, end};
}

std::vector<ByteRange> Reuse::likely_written(ByteRange range) const {
  std::vector<ByteRange> written;
  uint64_t at = range.begin;
  if (may_share_ && own_) {
    for (const Mark& mark : baseline_->marks()) {
      const ByteRange same = whole_blocks({mark.offset, mark.end()}, block_bytes_);
      if (!mark.has_digest || same.begin < at || same.end > range.end || same.begin == same.end) continue;
      if (at < same.begin) written.push_back({at, same.begin});
      at = same.end;
    }
  }
  if (at < range.end) written.push_back({at, range.end});
  return written;
}

// The digest is computed only where the CRC-32s agree: what has changed costs nothing. Where the file before has none yet, this
// one gets it, and the next one may share.
Mark Reuse::look_at(const Piece& piece, const Chunk& chunk, uint64_t begin, const Mark* before) const {
  const uint64_t end = begin + piece.length;
  Mark mark{begin, piece.length, piece.crc};
  if (before == nullptr) return mark;
  if (piece.kept) {
    mark = *before;
    ++mark.unread;
  } else if (before->crc == piece.crc) {
    mark.digest = digest_of(chunk, begin, end);
    mark.has_digest = true;
    mark.memory = note_memory(chunk, begin, end);
  }
  check_frozen(piece, chunk, mark, *before);
  return mark;
}

bool Reuse::is_of_same_memory(const Mark& mark, const Mark& before) const {
  const Place place = find_place(spec_, mark.offset, mark.end());
  return place.source != nullptr && place.source == before.memory.source && place.device == before.memory.device;
}

// Of what is not read the edges are, since they lie in blocks with other bytes. Of what is read, only those can be wrong in some
// file before this one that have not been read since.
void Reuse::check_frozen(const Piece& piece, const Chunk& chunk, const Mark& mark, const Mark& before) const {
  bool same = true;
  if (piece.kept) {
    const Memory& known = before.memory;
    same = crc_of(chunk, mark.offset, known.whole.begin) == known.front_crc && crc_of(chunk, known.whole.end, mark.end()) == known.back_crc;
  } else if (piece.must_be_kept || (is_frozen_[piece.record] && before.unread > 0 && is_of_same_memory(mark, before))) {
    same = mark.has_digest && mark.digest == before.digest;
  }
  if (!same) throw FrozenChanged{piece.record};
}

Memory Reuse::note_memory(const Chunk& chunk, uint64_t begin, uint64_t end) const {
  Memory memory;
  if (end - begin < Memory::kSampleBytes) return memory;
  const Place place = find_place(spec_, begin, end);
  memory.source = place.source;
  memory.device = place.device;
  memory.whole = whole_blocks({begin, end}, std::max<uint64_t>(least_block_bytes_, own_ ? own_->block_bytes() : 1));
  memory.front_crc = crc_of(chunk, begin, memory.whole.begin);
  memory.back_crc = crc_of(chunk, memory.whole.end, end);
  // Nobody's writes shall happen to miss the same places of all pieces.
  uint64_t random = begin ^ reinterpret_cast<uintptr_t>(place.source);
  memory.sample_at = next_random(random) % (end - begin - Memory::kSampleBytes + 1);
  std::byte* to = memory.sample.data();
  const uint64_t from = begin + memory.sample_at;
  for_each_run(chunk, from, from + Memory::kSampleBytes, [&](const std::byte* bytes, size_t length) {
    std::memcpy(to, bytes, length);
    to += length;
  });
  return memory;
}

std::vector<Reuse::Same> Reuse::find_same(const Chunk& chunk, size_t index) {
  std::vector<Same> same;
  uint64_t at = chunk.offset;
  for (const Piece& piece : chunk.pieces) {
    const uint64_t begin = std::exchange(at, at + piece.length);
    const bool is_known = piece.kept || piece.must_be_kept;
    if (!is_known && (!own_ || !is_compared(piece))) continue;
    const Mark* before = baseline_ == nullptr ? nullptr : baseline_->find(begin, piece.length);
    const Mark mark = look_at(piece, chunk, begin, before);
    if (piece.kept) {
      same.push_back({mark.memory.whole, true});
    } else if (may_share_ && mark.has_digest && before->has_digest && before->digest == mark.digest) {
      if (!same.empty() && !same.back().is_shared && same.back().range.end == begin) {
        same.back().range.end = at;
      } else {
        same.push_back({{begin, at}, false});
      }
    }
    if (own_) marks_[index].push_back(mark);
  }
  return same;
}

// The file before is looked at on both sides of the call: what somebody writes into it must not come into this one, and the
// kernel keeps its time from going back. Whatever is said here, the caller can write the bytes.
bool Reuse::share(WritableFile& file, ByteRange range) {
  if (range.begin == range.end || ended_) return false;
  const CloneSource& source = baseline_->source();
  if (!source.unchanged()) {
    ended_ = true;
    return false;
  }
  if (const int error = source.clone_into(file.descriptor(), range.begin, range.end - range.begin); error != 0) {
    if (is_refusal(error)) ended_ = refused_ = true;
    return false;
  }
  if (!source.unchanged()) {
    ended_ = true;
    return false;
  }
  fault::crash_point("blocks-shared");
  return true;
}

uint64_t Reuse::share_unread(WritableFile& file, Chunk& chunk) {
  uint64_t at = chunk.offset, unread = 0;
  for (Piece& piece : chunk.pieces) {
    const uint64_t begin = std::exchange(at, at + piece.length);
    if (!piece.kept) continue;
    const Memory& memory = baseline_->find(begin, piece.length)->memory;
    if (share(file, memory.whole)) {
      unread += memory.whole.end - memory.whole.begin;
    } else if (memory.device != kHost || !read_after_all(chunk, piece, begin)) {
      throw UnreadRefused();
    }
  }
  return unread;
}

uint64_t Reuse::write(WritableFile& file, const Chunk& chunk, size_t index) {
  uint64_t at = chunk.offset, shared = 0;
  for (const Same& same : find_same(chunk, index)) {
    const ByteRange range = same.is_shared ? same.range : whole_blocks(same.range, block_bytes_);
    if (!same.is_shared && !share(file, range)) continue;
    write_range(file, chunk, at, range.begin);
    at = range.end;
    shared += range.end - range.begin;
  }
  write_range(file, chunk, at, chunk.offset + chunk.length);
  if (chunk.lazy_bytes > 0) look_again(chunk, index);
  return shared;
}

// The write has read the tensors themselves, after the digests were made of them. What is others now may be others in the file.
void Reuse::look_again(const Chunk& chunk, size_t index) {
  for (Mark& mark : marks_[index]) {
    if (mark.has_digest && !(digest_of(chunk, mark.offset, mark.offset + mark.length) == mark.digest)) mark.has_digest = false;
  }
}

void Reuse::begin(const WritableFile& file) { own_ = CloneSource::open(file.descriptor(), file.path()); }

std::shared_ptr<Baseline> Reuse::end(bool joined) {
  std::vector<Mark> all;
  for (const std::vector<Mark>& marks : marks_) all.insert(all.end(), marks.begin(), marks.end());
  marks_.clear();
  std::optional<CloneSource> own = std::exchange(own_, std::nullopt);
  if (!own || refused_ || all.empty()) return nullptr;
  return std::make_shared<Baseline>(std::move(*own), std::move(all), joined);
}

uint64_t write_out(WritableFile& file, const Chunk& chunk, Reuse* reuse, size_t index) {
  if (reuse != nullptr) return reuse->write(file, chunk, index);
  write_range(file, chunk, chunk.offset, chunk.offset + chunk.length);
  return 0;
}

}  // namespace lazyckpt
