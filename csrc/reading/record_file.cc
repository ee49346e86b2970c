#include "reading/record_file.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>
#include <thread>

#include "base/crc32.h"
#include "base/error.h"
#include "base/signals.h"
#include "format/zip_format.h"
#include "format/zip_layout.h"

namespace lazyckpt {
namespace {

constexpr uint64_t kCheckedAtOnce = uint64_t{4} << 20;
// Bytes between records are kept for comparison up to this much in all; files of ours and torch's have far less.
constexpr uint64_t kMostKept = uint64_t{64} << 20;

std::vector<size_t> in_file_order(const std::vector<ZipEntry>& entries) {
  std::vector<size_t> order(entries.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return entries[a].payload_offset < entries[b].payload_offset; });
  return order;
}

// The CRC-32 of ranges that follow each other.
uint32_t join(const std::vector<ReadRange>& ranges, const std::vector<uint32_t>& crcs) {
  uint32_t whole = 0;
  for (size_t i = 0; i < ranges.size(); ++i) whole = crc32_combine(whole, crcs[i], ranges[i].length);
  return whole;
}

std::string archive_of(const std::vector<ZipEntry>& entries) {
  return entries.empty() ? std::string() : entries[0].name.substr(0, entries[0].name.find('/'));
}

bool is_pickle(const ZipEntry& entry) {
  const size_t slash = entry.name.find('/');
  return slash != std::string::npos && entry.name.compare(slash, std::string::npos, "/data.pkl") == 0;
}

// The stretches of a file between its records, with their bytes where these are kept.
class Gaps {
 public:
  Gaps(const ReadableFile& file, const std::vector<ZipEntry>& entries, const std::vector<size_t>& order) : file_(file) {
    uint64_t begin = 0, total = 0;
    for (const size_t index : order) {
      ranges.push_back({begin, entries[index].payload_offset - begin});
      begin = entries[index].payload_offset + entries[index].size;
    }
    ranges.push_back({begin, file.size() - begin});
    for (const ReadRange& range : ranges) total += range.length;
    if (total > kMostKept) return;
    bytes_.resize(static_cast<size_t>(total));
    size_t at = 0;
    for (ReadRange& range : ranges) {
      range.to = reinterpret_cast<std::byte*>(bytes_.data()) + at;
      at += static_cast<size_t>(range.length);
    }
  }
  Gaps(const Gaps&) = delete;
  Gaps& operator=(const Gaps&) = delete;

  // `length` bytes at `offset` of the file.
  std::string bytes_at(uint64_t offset, size_t length) const {
    std::string found(length, '\0');
    auto after = std::upper_bound(ranges.begin(), ranges.end(), offset,
                                  [](uint64_t at, const ReadRange& range) { return at < range.offset; });
    const ReadRange* const gap = after == ranges.begin() ? nullptr : &*std::prev(after);
    if (gap != nullptr && gap->to != nullptr && offset + length <= gap->offset + gap->length) {
      std::copy_n(reinterpret_cast<const char*>(gap->to) + (offset - gap->offset), length, found.begin());
    } else {
      file_.read_at(found.data(), length, offset);
    }
    return found;
  }

  std::vector<ReadRange> ranges;  // one before each record, and one behind the last

 private:
  const ReadableFile& file_;
  std::string bytes_;
};

// What the writer would have put around these records.
ZipLayout expected_layout(const std::vector<ZipEntry>& entries, const std::string& archive) {
  std::vector<ZipRecord> records;
  records.reserve(entries.size());
  for (const ZipEntry& entry : entries) {
    const auto remainder = static_cast<uint32_t>(entry.payload_offset % zip::kLargestAlign);
    records.push_back({entry.name.substr(archive.size() + 1), entry.size, zip::kLargestAlign, remainder});
  }
  ZipLayout layout = lay_out_zip(archive, records);
  size_t part = 0;
  for (const CrcField& field : layout.crc_fields) {
    while (field.offset >= layout.parts[part].offset + layout.parts[part].length) ++part;
    const size_t at = layout.parts[part].begin + static_cast<size_t>(field.offset - layout.parts[part].offset);
    for (size_t i = 0; i < 4; ++i) layout.structure[at + i] = static_cast<char>(entries[field.record].crc >> (8 * i));
  }
  return layout;
}

// Whether records begin where those before them end, as our writers lay them out, but for the few places that some
// damage may have moved. Only then is the expected layout built: its padding is bounded by the file's size.
bool are_contiguous(const std::vector<ZipEntry>& entries) {
  constexpr int kMostBreaks = 4;
  uint64_t end = 0;
  int breaks = 0;
  for (const ZipEntry& entry : entries) {
    if (entry.header_offset != end && ++breaks > kMostBreaks) return false;
    end = entry.payload_offset + entry.size + zip::descriptor_bytes(entry.size, entry.header_offset);
  }
  return true;
}

// Whether torch or we wrote it: the padding before some record says so. Not one field alone, which may be the damaged one: each
// record has a padding, and to hide who wrote the file, more than half of every one of them would have to be damaged.
bool is_by_torch_or_us(const std::vector<ZipEntry>& entries, const Gaps& gaps) {
  return std::any_of(entries.begin(), entries.end(), [&](const ZipEntry& entry) {
    const uint64_t begin = extra_offset(entry);
    return is_padding(gaps.bytes_at(begin, static_cast<size_t>(entry.payload_offset - begin)));
  });
}

bool are_of_one_archive(const std::vector<ZipEntry>& entries, const std::string& archive) {
  return std::all_of(entries.begin(), entries.end(), [&](const ZipEntry& entry) {
    return entry.name.compare(0, archive.size() + 1, archive + "/") == 0;
  });
}

[[noreturn]] void refuse_structure(const ReadableFile& file, const std::string& where) {
  throw Error(ErrorKind::kCorrupt, "'" + file.path() + "' is damaged between its records" + where, 0, file.path());
}

// Compares the bytes between the records with what the writer puts there. What another zip writer puts there is unknown.
void check_structure(const ReadableFile& file, const std::vector<ZipEntry>& entries, const Gaps& gaps) {
  if (!is_by_torch_or_us(entries, gaps)) return;
  const std::string archive = archive_of(entries);
  if (!are_contiguous(entries) || !are_of_one_archive(entries, archive)) refuse_structure(file, "");
  const ZipLayout layout = expected_layout(entries, archive);
  for (const StructurePart& part : layout.parts) {
    const bool inside = part.offset <= file.size() && part.length <= file.size() - part.offset;
    if (inside && layout.structure.compare(part.begin, part.length, gaps.bytes_at(part.offset, part.length)) == 0) continue;
    refuse_structure(file, ", at or after offset " + std::to_string(std::min(part.offset, file.size())));
  }
  if (layout.file_size != file.size()) refuse_structure(file, ": it does not end where it should");
}

// A part of a record in memory.
struct Piece {
  size_t entry;
  const std::byte* from;
  size_t length;
  uint32_t crc;
};

void cut_pieces(size_t entry, const std::byte* from, uint64_t length, std::vector<Piece>& pieces) {
  for (uint64_t done = 0; done < length; done += kCheckedAtOnce) {
    pieces.push_back({entry, from + done, static_cast<size_t>(std::min(kCheckedAtOnce, length - done)), 0});
  }
}

// By threads of its own and the caller's.
void checksum(std::vector<Piece>& pieces, int threads) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i; (i = next++) < pieces.size();) pieces[i].crc = crc32(0, pieces[i].from, pieces[i].length);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(std::max(threads, 1)));
  {
    const SignalsBlocked blocked;
    try {
      for (int i = 1; i < threads && static_cast<size_t>(i) < pieces.size(); ++i) others.emplace_back(work);
    } catch (const std::exception&) {
      // As many as the system allows: the caller's own is there.
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace

FileDigest digest_file(const std::string& path, const ReadOptions& options) {
  const auto file = std::make_shared<ReadableFile>(path, true);
  return {file->size(), read_ranges(file, {{0, file->size(), nullptr}}, options)[0]};
}

RecordFile::RecordFile(const std::string& path, bool direct, const ReadOptions& options)
    : file_(std::make_shared<ReadableFile>(path, direct)), entries_(read_zip_directory(file_, options)) {
  checksummed_ = std::any_of(entries_.begin(), entries_.end(), [](const ZipEntry& entry) { return entry.crc != 0; });
  if (std::none_of(entries_.begin(), entries_.end(), is_pickle)) {
    throw Error(ErrorKind::kCorrupt, "'" + path + "' is not a torch file: this zip has no record data.pkl", 0, path);
  }
}

void RecordFile::check_record(const ZipEntry& entry, uint32_t crc) const {
  if (crc == entry.crc || !checksummed_) return;
  throw Error(ErrorKind::kCorrupt,
              "record '" + entry.name + "' of '" + file_->path() + "' (" + std::to_string(entry.size) +
                  " bytes at offset " + std::to_string(entry.payload_offset) +
                  ") fails its CRC-32: the bytes on disk are not those that were written, or something wrote to the tensor while "
                  "it was being saved (Options.verify_capture finds that; ckpt.fence() before the write avoids it)",
              0, file_->path())
      .at(entry.payload_offset, entry.size);
}

std::vector<RecordFile::Place> RecordFile::places_of(const Wanted& wanted) const {
  std::vector<Place> places(entries_.size());
  for (const Place& place : wanted) places.at(place.entry) = place;
  return places;
}

void RecordFile::read(const Wanted& wanted, const ReadOptions& options) const {
  std::vector<ReadRange> ranges;
  for (const Place& place : wanted) {
    const ZipEntry& entry = entries_.at(place.entry);
    ranges.push_back({entry.payload_offset, entry.size, place.to, place.device});
  }
  const std::vector<uint32_t> crcs = read_ranges(file_, ranges, options);
  for (size_t i = 0; i < wanted.size(); ++i) check_record(entries_[wanted[i].entry], crcs[i]);
}

uint32_t RecordFile::read_whole(const Wanted& wanted, const ReadOptions& options) const {
  const std::vector<size_t> order = in_file_order(entries_);
  const std::vector<Place> places = places_of(wanted);
  const Gaps gaps(*file_, entries_, order);
  std::vector<ReadRange> ranges;  // gap, record, gap, record, ..., gap
  for (size_t i = 0; i < order.size(); ++i) {
    const ZipEntry& entry = entries_[order[i]];
    ranges.push_back(gaps.ranges[i]);
    const Place& place = places[order[i]];
    ranges.push_back({entry.payload_offset, entry.size, place.to, place.device});
  }
  ranges.push_back(gaps.ranges.back());
  const std::vector<uint32_t> crcs = read_ranges(file_, ranges, options);
  for (size_t i = 0; i < order.size(); ++i) check_record(entries_[order[i]], crcs[2 * i + 1]);
  if (checksummed_) check_structure(*file_, entries_, gaps);
  return join(ranges, crcs);
}

uint32_t RecordFile::read_share(const Wanted& wanted, uint64_t begin, uint64_t end, const ReadOptions& options) const {
  const std::vector<Place> places = places_of(wanted);
  std::vector<ReadRange> ranges;
  uint64_t done = begin;
  for (const size_t index : in_file_order(entries_)) {
    const ZipEntry& entry = entries_[index];
    const uint64_t first = std::max(entry.payload_offset, begin), last = std::min(entry.payload_offset + entry.size, end);
    if (first >= last) continue;
    if (done < first) ranges.push_back({done, first - done, nullptr});
    const Place& place = places[index];
    std::byte* const to = place.to == nullptr ? nullptr : place.to + (first - entry.payload_offset);
    ranges.push_back({first, last - first, to, place.device});
    done = last;
  }
  if (done < end) ranges.push_back({done, end - done, nullptr});
  return join(ranges, read_ranges(file_, ranges, options));
}

void RecordFile::check(const Wanted& in_memory, int threads) const {
  if (!checksummed_) return;
  std::vector<Piece> pieces;
  for (const Place& place : in_memory) cut_pieces(place.entry, place.to, entries_.at(place.entry).size, pieces);
  checksum(pieces, threads);
  std::vector<uint32_t> crcs(entries_.size(), 0);
  for (const Piece& piece : pieces) crcs[piece.entry] = crc32_combine(crcs[piece.entry], piece.crc, piece.length);
  for (const Place& place : in_memory) check_record(entries_[place.entry], crcs[place.entry]);
}

uint32_t RecordFile::claimed_crc(const ReadOptions& options) const {
  const std::vector<size_t> order = in_file_order(entries_);
  const Gaps gaps(*file_, entries_, order);
  const std::vector<uint32_t> crcs = read_ranges(file_, gaps.ranges, options);
  uint32_t whole = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const ZipEntry& entry = entries_[order[i]];
    whole = crc32_combine(whole, crcs[i], gaps.ranges[i].length);
    whole = crc32_combine(whole, entry.crc, entry.size);
  }
  return crc32_combine(whole, crcs.back(), gaps.ranges.back().length);
}

uint32_t RecordFile::directory_crc() const {
  uint32_t crc = 0;
  for (const ZipEntry& entry : entries_) {
    const uint64_t numbers[] = {entry.payload_offset, entry.size, entry.crc};
    crc = crc32(crc, entry.name.data(), entry.name.size());
    crc = crc32(crc, numbers, sizeof numbers);
  }
  return crc;
}

bool verify_torch_file(const std::string& path, const ReadOptions& options) {
  const RecordFile file(path, true, options);
  file.read_whole({}, options);
  return file.checksummed();
}

}  // namespace lazyckpt
