#include "jobs/frozen.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/crc32.h"
#include "base/error.h"
#include "os/pieces.h"

namespace lazyckpt {
namespace {

uint64_t end_of(const Extent& extent) { return extent.offset + extent.length; }

// Whether pieces of the record are cut there.
class Cuts {
 public:
  Cuts(const Extent& extent, const FileSpec& spec, size_t chunk_bytes)
      : extent_(extent), chunk_bytes_(chunk_bytes), sums_every_(spec.sums_every) {}

  // Whether there is a piece of just these bytes.
  bool make(const Mark& mark) const {
    return is_cut(mark.offset) && is_cut(mark.end()) && !lies_across(mark, chunk_bytes_) && !lies_across(mark, sums_every_);
  }

 private:
  bool is_cut(uint64_t at) const {
    const bool regular = at % chunk_bytes_ == 0 || (sums_every_ > 0 && at % sums_every_ == 0);
    return at == extent_.offset || at == end_of(extent_) || regular;
  }
  static bool lies_across(const Mark& mark, uint64_t every) {
    return every > 0 && mark.offset / every != (mark.end() - 1) / every;
  }

  const Extent& extent_;
  const uint64_t chunk_bytes_, sums_every_;
};

bool is_neighbour(const Extent& extent, const Extent& other) {
  return other.record == extent.record && (other.offset == end_of(extent) || end_of(other) == extent.offset);
}

// Not if a piece could reach into the extents beside it.
bool stands_alone(const FileSpec& spec, size_t index) {
  const Extent& extent = spec.extents[index];
  const bool before = index > 0 && is_neighbour(extent, spec.extents[index - 1]);
  return !before && (index + 1 == spec.extents.size() || !is_neighbour(extent, spec.extents[index + 1]));
}

// They lie far apart in memory that nobody has looked at for long.
void prefetch(const Mark& mark, const std::byte* source) { __builtin_prefetch(source + mark.memory.sample_at); }

bool looks_the_same(const Mark& mark, const std::byte* source) {
  const Memory& memory = mark.memory;
  const size_t front = memory.whole.begin - mark.offset, back = mark.end() - memory.whole.end;
  return std::memcmp(source + memory.sample_at, memory.sample.data(), Memory::kSampleBytes) == 0 &&
         crc32(0, source, front) == memory.front_crc && crc32(0, source + mark.length - back, back) == memory.back_crc;
}

using Marks = std::vector<const Mark*>;

// Of the extent, as far as it has them: those that stand for its bytes without a look at them.
Marks find_marks(const FileSpec& spec, size_t index, const Baseline& baseline, const IoLimits& limits, size_t chunk_bytes) {
  const Extent& extent = spec.extents[index];
  const uint64_t block = std::max<uint64_t>(block_bytes(limits), baseline.source().block_bytes());
  const ByteRange range = written_range(spec, chunk_bytes);
  const Cuts cuts(extent, spec, chunk_bytes);
  Marks found;
  if (!stands_alone(spec, index)) return found;
  const auto before = [](const Mark& mark, uint64_t at) { return mark.offset < at; };
  auto mark = std::lower_bound(baseline.marks().begin(), baseline.marks().end(), extent.offset, before);
  for (; mark != baseline.marks().end() && mark->end() <= end_of(extent); ++mark) {
    const Memory& memory = mark->memory;
    const bool there = mark->has_digest && memory.source == extent.source + (mark->offset - extent.offset) &&
                       memory.source != nullptr && memory.device == extent.device;
    const bool whole = memory.whole.begin < memory.whole.end && memory.whole.begin % block == 0 && memory.whole.end % block == 0;
    if (there && whole && mark->offset >= range.begin && mark->end() <= range.end && cuts.make(*mark)) found.push_back(&*mark);
  }
  return found;
}

// Whether they are all that would be compared of it: what is between them is too short for that.
bool are_complete(const Marks& marks, const Extent& extent, ByteRange range) {
  uint64_t at = std::max(extent.offset, range.begin);
  const uint64_t end = std::min(end_of(extent), range.end);
  for (const Mark* mark : marks) {
    if (mark->offset >= at + kLeastPiece) return false;
    at = mark->end();
  }
  return !marks.empty() && end < at + kLeastPiece;
}

void add(std::vector<Extent>& extents, const Extent& whole, uint64_t begin, uint64_t end, Source kind) {
  if (begin >= end) return;
  Extent part = whole;
  part.source += begin - whole.offset;
  part.offset = begin;
  part.length = end - begin;
  part.was_device_copy = whole.kind == Source::kDeviceCopy;
  part.kind = kind;
  extents.push_back(part);
}

std::vector<bool> is_among(const std::vector<uint32_t>& records, size_t count) {
  std::vector<bool> among(count, false);
  for (const uint32_t record : records) among.at(record) = true;
  return among;
}

bool looks_the_same(const Extent& extent, const Marks& marks) {
  const auto same = [](const Mark* mark) { return looks_the_same(*mark, mark->memory.source); };
  return extent.device != kHost || std::all_of(marks.begin(), marks.end(), same);
}

}  // namespace

std::vector<uint32_t> leave_out_frozen(FileSpec& spec, const std::vector<uint32_t>& records,
                                       const std::vector<uint32_t>& supposed, const Baseline& baseline, const IoLimits& limits,
                                       size_t chunk_bytes) {
  std::vector<uint32_t> doubted;
  std::vector<std::pair<size_t, Marks>> found;  // of which extent
  const std::vector<bool> frozen = is_among(records, spec.record_count), is_supposed = is_among(supposed, spec.record_count);
  const ByteRange range = written_range(spec, chunk_bytes);
  for (size_t i = 0; i < spec.extents.size(); ++i) {
    const Extent& extent = spec.extents[i];
    if (extent.record == kStructure || !frozen[extent.record]) continue;
    found.emplace_back(i, find_marks(spec, i, baseline, limits, chunk_bytes));
    Marks& marks = found.back().second;
    if (is_supposed[extent.record] && (extent.device != kHost || !are_complete(marks, extent, range))) marks.clear();
    if (extent.device != kHost) continue;
    for (const Mark* mark : marks) prefetch(*mark, mark->memory.source);
  }
  bool supposes = true;
  std::vector<bool> is_left_out = frozen;
  for (const auto& [index, marks] : found) {
    const Extent& extent = spec.extents[index];
    if (looks_the_same(extent, marks)) continue;
    doubted.push_back(extent.record);
    is_left_out[extent.record] = false;
    supposes = supposes && !is_supposed[extent.record];
  }
  if (!supposes) doubted.insert(doubted.end(), supposed.begin(), supposed.end());
  std::vector<Extent> extents;
  extents.reserve(spec.extents.size() + 2 * found.size());
  auto next = found.begin();
  for (size_t i = 0; i < spec.extents.size(); ++i) {
    const Extent& extent = spec.extents[i];
    uint64_t at = extent.offset;
    if (next != found.end() && next->first == i) {
      const Marks& marks = (next++)->second;
      const bool believed = is_left_out[extent.record] && (supposes || !is_supposed[extent.record]);
      for (const Mark* mark : believed ? marks : Marks()) {
        add(extents, extent, at, mark->memory.whole.begin, extent.kind);
        add(extents, extent, mark->memory.whole.begin, mark->memory.whole.end, Source::kShared);
        at = mark->memory.whole.end;
      }
    }
    add(extents, extent, at, end_of(extent), extent.kind);
  }
  std::swap(spec.extents, extents);
  std::vector<Chunk> chunks = cut_into_chunks(spec, limits, chunk_bytes);
  if (!keep_checksums(chunks, baseline)) std::swap(spec.extents, extents);  // it is cut otherwise than was foreseen: all is read
  return doubted;
}

bool keep_checksums(std::vector<Chunk>& chunks, const Baseline& baseline) {
  for (Chunk& chunk : chunks) {
    if (!chunk.shares) continue;
    std::vector<ByteRange> shared;
    uint64_t at = chunk.offset;
    for (const Segment& segment : chunk.segments) {
      if (segment.kind == Source::kShared) shared.push_back({at, at + segment.length});
      at += segment.length;
    }
    auto range = shared.begin();
    at = chunk.offset;
    for (Piece& piece : chunk.pieces) {
      const uint64_t begin = std::exchange(at, at + piece.length);
      if (range == shared.end() || range->begin >= at) continue;
      const Mark* mark = baseline.find(begin, piece.length);
      if (mark == nullptr || mark->memory.whole.begin != range->begin || mark->memory.whole.end != range->end) break;
      piece.crc = mark->crc;
      piece.kept = true;
      ++range;
    }
    if (range != shared.end()) return false;
  }
  return true;
}

bool read_after_all(Chunk& chunk, Piece& piece, uint64_t begin) {
  uint64_t at = chunk.offset;
  for (Segment& segment : chunk.segments) {
    if (at >= begin && at < begin + piece.length && segment.kind == Source::kShared) {
      chunk.read_late.emplace_back(segment.length);
      if (!read_own_memory(chunk.read_late.back().data(), segment.source, segment.length)) return false;
      segment.source = chunk.read_late.back().data();
      segment.kind = Source::kOwned;
    }
    at += segment.length;
  }
  piece.kept = false;
  piece.must_be_kept = true;
  return true;
}

Place find_place(const FileSpec& spec, uint64_t begin, uint64_t end) {
  const auto before = [](const Extent& extent, uint64_t at) { return end_of(extent) <= at; };
  auto extent = std::lower_bound(spec.extents.begin(), spec.extents.end(), begin, before);
  if (extent == spec.extents.end() || extent->offset > begin) return {};
  const Place place{extent->source + (begin - extent->offset), extent->device};
  for (; extent != spec.extents.end() && extent->offset < end; ++extent) {
    const bool joined = extent->offset <= begin || extent->source == place.source + (extent->offset - begin);
    if (!joined || extent->device != place.device) return {};
    if (end_of(*extent) >= end) return place;
    if (extent + 1 == spec.extents.end() || (extent + 1)->offset != end_of(*extent)) return {};
  }
  return {};
}

}  // namespace lazyckpt
