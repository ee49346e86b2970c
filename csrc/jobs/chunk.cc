#include "jobs/chunk.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/crc32.h"

namespace lazyckpt {
namespace {

uint64_t round_down(uint64_t value, uint64_t to) { return value / to * to; }
uint64_t round_up(uint64_t value, uint64_t to) { return round_down(value + to - 1, to); }

uint64_t end_of(const Extent& extent) { return extent.offset + extent.length; }

// Whether its bytes may stay where they are until a writer comes, or a fence, or for good.
bool stays(const Extent& extent) {
  return extent.kind == Source::kLazy || extent.kind == Source::kOwned || extent.kind == Source::kShared;
}

void add_segment(Chunk& chunk, const std::byte* source, uint64_t length, Source kind, uint32_t record = kStructure) {
  if (length == 0) return;
  if (kind == Source::kCopy) chunk.bounce_bytes += length;
  if (kind == Source::kLazy) chunk.lazy_bytes += length;
  if (kind == Source::kShared) chunk.shares = true;
  chunk.segments.push_back({source, static_cast<size_t>(length), kind, record});
}

void add_device_bytes(Chunk& chunk, const Extent& extent, uint64_t length) {
  if (!on_device(extent.kind) || length == 0) return;
  if (extent.kind == Source::kDeviceCopy) {
    chunk.device_copy_bytes += length;
    return;
  }
  chunk.device_lazy_bytes += length;
  auto& shares = chunk.device_shares;
  const auto same = [&](const DeviceShare& share) { return share.device == extent.device; };
  if (std::none_of(shares.begin(), shares.end(), same)) shares.push_back({extent.device, false});
}

void add_piece(Chunk& chunk, uint32_t record, uint64_t length, Source kind = Source::kCopy) {
  if (length == 0) return;
  const bool seen = kind != Source::kDeviceCopy;
  if (!chunk.pieces.empty() && chunk.pieces.back().record == record && chunk.pieces.back().seen == seen) {
    chunk.pieces.back().length += length;
  } else {
    chunk.pieces.push_back({record, static_cast<size_t>(length), 0, seen});
  }
}

// So that none reaches over a multiple of `every` bytes of the file.
void split_pieces(Chunk& chunk, uint64_t every) {
  std::vector<Piece> split;
  split.reserve(chunk.pieces.size() + static_cast<size_t>(chunk.content / every) + 1);
  uint64_t at = chunk.offset;
  for (const Piece& piece : chunk.pieces) {
    for (uint64_t left = piece.length; left > 0;) {
      const uint64_t length = std::min(left, every - at % every);
      split.push_back({piece.record, static_cast<size_t>(length), 0, piece.seen});
      at += length;
      left -= length;
    }
  }
  chunk.pieces = std::move(split);
}

// Extents [first_extent, end_extent) are set. Whether structure may stay, too: it does where a writer copies the chunk anyway.
bool leaves_structure(const Chunk& chunk, const FileSpec& spec, const IoLimits& limits) {
  if (spec.kept == nullptr || !limits.direct()) return false;
  const auto first = spec.extents.begin() + static_cast<std::ptrdiff_t>(chunk.first_extent);
  const auto end = spec.extents.begin() + static_cast<std::ptrdiff_t>(chunk.end_extent);
  return std::any_of(first, end, stays) && std::none_of(first, end, [](const Extent& each) { return on_device(each.kind); });
}

// Extents [first_extent, end_extent) are set; finds segments and pieces.
void describe(Chunk& chunk, const FileSpec& spec, const IoLimits& limits) {
  const bool structure_stays = leaves_structure(chunk, spec, limits);
  const size_t extents = chunk.end_extent - chunk.first_extent;
  chunk.segments.reserve(2 * extents + 1);
  chunk.pieces.reserve(extents + 1);
  const uint64_t begin = chunk.offset, content_end = begin + chunk.content;
  uint64_t segment_at = begin, piece_at = begin;
  for (size_t i = chunk.first_extent; i < chunk.end_extent; ++i) {
    const Extent& extent = spec.extents[i];
    const uint64_t from = std::max(extent.offset, begin), to = std::min(end_of(extent), content_end);
    add_piece(chunk, kStructure, from - piece_at);
    add_piece(chunk, extent.record, to - from, extent.was_device_copy ? Source::kDeviceCopy : extent.kind);
    add_device_bytes(chunk, extent, to - from);
    piece_at = to;
    const bool is_structure = extent.record == kStructure;
    if (!(is_structure ? structure_stays : stays(extent))) continue;
    add_segment(chunk, nullptr, from - segment_at, Source::kCopy);
    add_segment(chunk, extent.source + (from - extent.offset), to - from, is_structure ? Source::kOwned : extent.kind, extent.record);
    segment_at = to;
  }
  add_piece(chunk, kStructure, content_end - piece_at);
  // With what fills up the last block, unless a writer fills that up.
  add_segment(chunk, nullptr, (structure_stays ? content_end : begin + chunk.length) - segment_at, Source::kCopy);
}

// Calls visit(piece, bytes, length) for every run of memory of every piece, in file order; of what is not read without bytes.
template <typename ChunkRef, typename Visit>
void for_each_run(ChunkRef& chunk, Visit visit) {
  size_t segment = 0, used = 0;
  for (auto& piece : chunk.pieces) {
    size_t left = piece.length;
    while (left > 0) {
      const Segment& from = chunk.segments[segment];
      const size_t run = std::min(left, from.length - used);
      visit(piece, from.kind == Source::kShared ? nullptr : from.source + used, run);
      left -= run;
      used += run;
      if (used == from.length) {
        ++segment;
        used = 0;
      }
    }
  }
}

}  // namespace

ByteRange written_range(const FileSpec& spec, size_t chunk_bytes) {
  if (spec.share.whole()) return {0, spec.size};
  const uint64_t chunks = round_up(spec.share.body_end, chunk_bytes) / chunk_bytes;
  const auto edge = [&](uint64_t index) {
    return std::min(chunks * index / spec.share.count * chunk_bytes, spec.share.body_end);
  };
  return {edge(spec.share.index), edge(spec.share.index + 1)};
}

ByteRange fields_in(const FileSpec& spec, ByteRange range) {
  const auto before = [](const CrcField& field, uint64_t offset) { return field.offset < offset; };
  const auto first = std::lower_bound(spec.crc_fields.begin(), spec.crc_fields.end(), range.begin, before);
  const auto end = std::lower_bound(first, spec.crc_fields.end(), range.end, before);
  return {static_cast<uint64_t>(first - spec.crc_fields.begin()), static_cast<uint64_t>(end - spec.crc_fields.begin())};
}

namespace {

// A field that lies in [range) has the checksum of a record that may begin before: we read that part, too.
void add_read_chunks(std::vector<Chunk>& chunks, const FileSpec& spec, ByteRange range, size_t chunk_bytes) {
  const auto field = std::find_if(spec.crc_fields.begin(), spec.crc_fields.end(), [&](const CrcField& candidate) {
    return candidate.offset + sizeof(uint32_t) > range.begin && candidate.offset < range.end;
  });
  if (field == spec.crc_fields.end()) return;
  for (size_t i = 0; i < spec.extents.size() && spec.extents[i].offset < range.begin; ++i) {
    const Extent& extent = spec.extents[i];
    if (extent.record != field->record) continue;
    const uint64_t end = std::min(end_of(extent), range.begin);
    for (uint64_t begin = extent.offset; begin < end; begin += chunk_bytes) {
      Chunk chunk;
      chunk.offset = begin;
      chunk.written = false;
      chunk.length = static_cast<size_t>(std::min<uint64_t>(chunk_bytes, end - begin));
      chunk.first_extent = i;
      chunk.end_extent = i + 1;
      const bool copied = extent.kind == Source::kCopy || on_device(extent.kind);
      const std::byte* source = copied ? nullptr : extent.source + (begin - extent.offset);
      add_segment(chunk, source, chunk.length, copied ? Source::kCopy : extent.kind, extent.record);
      add_device_bytes(chunk, extent, chunk.length);
      add_piece(chunk, extent.record, chunk.length, extent.kind);
      chunks.push_back(std::move(chunk));
    }
  }
}

}  // namespace

std::vector<Chunk> cut_into_chunks(const FileSpec& spec, const IoLimits& limits, size_t chunk_bytes) {
  std::vector<Chunk> chunks;
  const ByteRange range = written_range(spec, chunk_bytes);
  chunks.reserve(static_cast<size_t>((range.end - range.begin) / chunk_bytes) + 2);
  if (!spec.share.whole()) add_read_chunks(chunks, spec, range, chunk_bytes);
  const uint64_t padded_end = round_up(range.end, block_bytes(limits));
  size_t extent = 0, field = 0;
  for (uint64_t begin = range.begin; begin < range.end; begin += chunk_bytes) {
    Chunk chunk;
    chunk.offset = begin;
    chunk.length = static_cast<size_t>(std::min<uint64_t>(chunk_bytes, padded_end - begin));
    const uint64_t end = begin + chunk.length;
    chunk.content = static_cast<size_t>(std::min(end, range.end) - begin);
    while (extent < spec.extents.size() && end_of(spec.extents[extent]) <= begin) ++extent;
    chunk.first_extent = chunk.end_extent = extent;
    while (chunk.end_extent < spec.extents.size() && spec.extents[chunk.end_extent].offset < end) ++chunk.end_extent;
    while (field < spec.crc_fields.size() && spec.crc_fields[field].offset + sizeof(uint32_t) <= begin) ++field;
    chunk.first_field = chunk.end_field = field;
    const uint64_t content_end = begin + chunk.content;
    while (chunk.end_field < spec.crc_fields.size() && spec.crc_fields[chunk.end_field].offset < content_end) ++chunk.end_field;
    describe(chunk, spec, limits);
    if (spec.sums_every > 0) split_pieces(chunk, spec.sums_every);
    chunks.push_back(std::move(chunk));
  }
  return chunks;
}

namespace {

// Calls visit(at, extent, from, length) for each run of the kCopy segments: `at` in the chunk's bounce, `from` in the extent,
// which is null where the file has zeros. Segments that the fence has staged are left out.
template <typename Visit>
void for_each_copied(const Chunk& chunk, const FileSpec& spec, Visit visit) {
  size_t at = 0;
  uint64_t begin = chunk.offset;
  size_t index = chunk.first_extent;
  const std::byte* staged = chunk.staged.begin();
  for (const Segment& segment : chunk.segments) {
    const uint64_t end = begin + segment.length;
    const bool is_staged = staged != nullptr && segment.source >= staged && segment.source < staged + chunk.staged.size();
    if (segment.kind == Source::kCopy && !is_staged) {
      uint64_t cursor = begin;
      for (size_t i = index; i < chunk.end_extent && spec.extents[i].offset < end; ++i) {
        const Extent& extent = spec.extents[i];
        const uint64_t from = std::max(extent.offset, begin), until = std::min(end_of(extent), end);
        if (from >= until) continue;
        if (from > cursor) visit(at + (cursor - begin), nullptr, 0, from - cursor);
        visit(at + (from - begin), &extent, from - extent.offset, until - from);
        cursor = until;
      }
      if (end > cursor) visit(at + (cursor - begin), nullptr, 0, end - cursor);
      at += segment.length;
    }
    begin = end;
    while (index < chunk.end_extent && end_of(spec.extents[index]) <= begin) ++index;
  }
}

void point_to(Chunk& chunk, std::byte* to) {
  for (Segment& segment : chunk.segments) {
    if (segment.kind != Source::kCopy || segment.source != nullptr) continue;
    segment.source = to;
    to += segment.length;
  }
}

}  // namespace

void fill_bounce(Chunk& chunk, const FileSpec& spec) {
  std::byte* bounce = chunk.bounce.begin();
  for_each_copied(chunk, spec, [&](size_t at, const Extent* extent, uint64_t from, uint64_t length) {
    if (extent == nullptr) {
      std::memset(bounce + at, 0, length);
    } else {
      std::memcpy(bounce + at, extent->source + from, length);
    }
  });
  point_to(chunk, bounce);
}

void copy_host_bytes(Chunk& chunk, const FileSpec& spec) {
  size_t eager = 0;
  for_each_copied(chunk, spec, [&](size_t at, const Extent* extent, uint64_t from, uint64_t length) {
    if (extent == nullptr) return;
    const std::byte* source = extent->source + from;
    if (!on_device(extent->kind)) {
      chunk.host_bytes.insert(chunk.host_bytes.end(), source, source + length);
      return;
    }
    const bool lazy = extent->kind == Source::kDeviceLazy, apart = !lazy && chunk.has_eager_span();
    // One for each record, also where neighbours seem to continue each other: a copy across two allocations is refused.
    chunk.device_copies.push_back({source, length, apart ? eager : at, extent->device, lazy});
    if (apart) eager += length;
  });
}

void checksum_before(Chunk& chunk, const FileSpec& spec, std::byte* fetched) {
  const std::byte* host = chunk.host_bytes.data();
  for_each_copied(chunk, spec, [&](size_t at, const Extent* extent, uint64_t, uint64_t length) {
    if (extent == nullptr || extent->kind == Source::kDeviceCopy) {
      std::memset(fetched + at, 0, length);
    } else if (!on_device(extent->kind)) {
      std::memcpy(fetched + at, std::exchange(host, host + length), length);
    }
  });
  point_to(chunk, fetched);
  checksum_pieces(chunk, true);
  for (Segment& segment : chunk.segments) {
    if (segment.kind == Source::kCopy) segment.source = nullptr;
  }
}

void complete_bounce(Chunk& chunk, const FileSpec& spec) {
  std::byte* bounce = chunk.bounce.begin();
  const std::byte *host = chunk.host_bytes.data(), *eager = chunk.eager_span.begin();
  for_each_copied(chunk, spec, [&](size_t at, const Extent* extent, uint64_t, uint64_t length) {
    if (extent == nullptr) {
      std::memset(bounce + at, 0, length);
    } else if (!on_device(extent->kind)) {
      std::memcpy(bounce + at, std::exchange(host, host + length), length);
    } else if (extent->kind == Source::kDeviceCopy && chunk.has_eager_span()) {
      std::memcpy(bounce + at, std::exchange(eager, eager + length), length);
    }
  });
  point_to(chunk, bounce);
}

bool Chunk::arrived() const {
  const auto enqueued = [](const DeviceShare& share) { return share.enqueued; };
  return flying == 0 && std::all_of(device_shares.begin(), device_shares.end(), enqueued);
}

void Chunk::settle() {
  if (state == ChunkState::kArriving && !staging && arrived()) state = ChunkState::kPending;
}

void Chunk::release_memory() {
  bounce.reset();
  staged.reset();
  eager_span.reset();
  std::vector<std::byte>().swap(host_bytes);
  read_late.clear();
}

uint64_t tensor_bytes(const Chunk& chunk) {
  uint64_t bytes = 0;
  for (const Segment& segment : chunk.segments) {
    const bool elsewhere = segment.kind == Source::kCopy || segment.kind == Source::kShared;
    bytes += elsewhere || segment.is_structure() ? 0 : segment.length;
  }
  return bytes;
}

uint64_t structure_bytes(const Chunk& chunk) {
  uint64_t bytes = 0;
  for (const Segment& segment : chunk.segments) bytes += segment.is_structure() ? segment.length : 0;
  return bytes;
}

bool is_gathered(const Chunk& chunk, const IoLimits& limits) {
  if (!chunk.written) return false;
  if (chunk.shares) return true;
  if (!limits.direct()) return false;
  const auto fits = [&](const Segment& segment) {
    return segment.kind == Source::kCopy && segment.length % block_bytes(limits) == 0 &&
           reinterpret_cast<uintptr_t>(segment.source) % limits.memory_align == 0;
  };
  return !std::all_of(chunk.segments.begin(), chunk.segments.end(), fits);
}

void gather_and_checksum(Chunk& chunk, const IoLimits& limits, WriterMemory& memory) {
  std::byte* const to = memory.get(chunk.length, limits.memory_align);
  std::byte* at = to;
  for (Piece& piece : chunk.pieces) {
    if (piece.record != kStructure && !piece.kept) piece.crc = 0;
  }
  for_each_run(chunk, [&](Piece& piece, const std::byte* bytes, size_t length) {
    if (piece.record != kStructure && !piece.kept) {
      piece.crc = crc32_copy(piece.crc, at, bytes, length);
    } else if (bytes != nullptr) {
      std::memcpy(at, bytes, length);
    }
    at += length;
  });
  std::memset(at, 0, chunk.length - chunk.content);
  chunk.segments = {{to, chunk.length, Source::kCopy, kStructure}};
}

bool is_staged_whole(const Chunk& chunk, const IoLimits& limits) {
  const bool apart = chunk.shares || chunk.has_device_bytes();
  return chunk.written && limits.direct() && !apart && chunk.lazy_bytes > chunk.length / 4 * 3;
}

void stage_whole(Chunk& chunk, Span span) {
  std::byte* to = span.begin();
  for (const Segment& segment : chunk.segments) {
    std::memcpy(to, segment.source, segment.length);
    to += segment.length;
  }
  std::byte* const end = span.begin() + chunk.length;
  std::memset(to, 0, static_cast<size_t>(end - to));
  chunk.segments = {{span.begin(), chunk.length, Source::kCopy, kStructure}};
  chunk.staged = std::move(span);
  chunk.bounce.reset();
}

void stage_lazy(Chunk& chunk, Span span) {
  std::byte* to = span.begin();
  for (Segment& segment : chunk.segments) {
    if (segment.kind != Source::kLazy) continue;
    std::memcpy(to, segment.source, segment.length);
    segment.source = to;
    segment.kind = Source::kCopy;
    to += segment.length;
  }
  chunk.staged = std::move(span);
}

void checksum_pieces(Chunk& chunk, bool of_records) {
  const auto wanted = [&](const Piece& piece) { return (piece.record != kStructure) == of_records && !piece.kept; };
  for (Piece& piece : chunk.pieces) {
    if (wanted(piece)) piece.crc = 0;
  }
  for_each_run(chunk, [&](Piece& piece, const std::byte* bytes, size_t length) {
    if (wanted(piece)) piece.crc = crc32(piece.crc, bytes, length);
  });
}

uint32_t find_changed(const Chunk& chunk) {
  const Piece* current = nullptr;
  uint32_t crc = 0, changed = kStructure;
  const auto close = [&] {
    if (current != nullptr && current->record != kStructure && crc != current->crc && changed == kStructure) {
      changed = current->record;
    }
  };
  for_each_run(chunk, [&](const Piece& piece, const std::byte* bytes, size_t length) {
    if (&piece != current) {
      close();
      current = &piece;
      crc = 0;
    }
    if (piece.record != kStructure) crc = crc32(crc, bytes, length);
  });
  close();
  return changed;
}

uint32_t find_changed_since(const Chunk& chunk, const std::vector<Piece>& before) {
  for (size_t i = 0; i < before.size(); ++i) {
    const Piece& now = chunk.pieces[i];
    if (now.record != kStructure && now.seen && now.crc != before[i].crc) return now.record;
  }
  return kStructure;
}

namespace {

void add_to(RecordPart& part, const Piece& piece) {
  part.record = piece.record;
  part.length += piece.length;
  part.crc = crc32_combine(part.crc, piece.crc, piece.length);
}

}  // namespace

RecordPart part_only_read(const std::vector<Chunk>& chunks) {
  RecordPart part;
  for (const Chunk& chunk : chunks) {
    if (chunk.written) break;
    for (const Piece& piece : chunk.pieces) add_to(part, piece);
  }
  return part;
}

RecordPart last_part_written(const std::vector<Chunk>& chunks) {
  RecordPart part;
  for (const Chunk& chunk : chunks) {
    if (!chunk.written) continue;
    for (const Piece& piece : chunk.pieces) {
      if (piece.record == kStructure) continue;
      if (piece.record != part.record) part = {};
      add_to(part, piece);
    }
  }
  return part;
}

void fill_crc_fields(Chunk& chunk, const FileSpec& spec, const std::vector<uint32_t>& record_crcs) {
  size_t segment = 0;
  uint64_t segment_at = chunk.offset;
  for (size_t i = chunk.first_field; i < chunk.end_field; ++i) {
    const CrcField& field = spec.crc_fields[i];
    for (uint64_t byte = 0; byte < sizeof(uint32_t); ++byte) {
      const uint64_t at = field.offset + byte;  // a field may straddle two chunks: each fills in its part
      if (at < chunk.offset || at >= chunk.offset + chunk.length) continue;
      while (at >= segment_at + chunk.segments[segment].length) segment_at += chunk.segments[segment++].length;
      // Of the arena, or of the writer: structure never lies in the caller's memory.
      auto* place = const_cast<std::byte*>(chunk.segments[segment].source + (at - segment_at));
      *place = static_cast<std::byte>(record_crcs[field.record] >> (8 * byte));
    }
  }
}

}  // namespace lazyckpt
