#include "verify.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "crc32.h"
#include "error.h"
#include "file.h"
#include "zip_layout.h"

namespace lazyckpt {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{4} << 20;
constexpr uint32_t kAnyAlign = 32768;

struct Range {
  uint64_t offset = 0, length = 0;
};

// The CRC-32 of each range; the ranges are cut into pieces that the threads take in turn.
std::vector<uint32_t> checksum_ranges(const ReadableFile& file, const std::vector<Range>& ranges, int threads) {
  struct Piece {
    size_t range;
    uint64_t offset, length;
    uint32_t crc;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < ranges.size(); ++i) {
    for (uint64_t done = 0; done < ranges[i].length; done += kPieceBytes) {
      pieces.push_back({i, ranges[i].offset + done, std::min(kPieceBytes, ranges[i].length - done), 0});
    }
  }
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr first_error;
  const auto work = [&] {
    try {
      const auto buffer = std::make_unique<char[]>(kPieceBytes);
      for (size_t i = next++; i < pieces.size(); i = next++) {
        file.read_at(buffer.get(), static_cast<size_t>(pieces[i].length), pieces[i].offset);
        pieces[i].crc = crc32(0, buffer.get(), static_cast<size_t>(pieces[i].length));
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!first_error) first_error = std::current_exception();
      next = pieces.size();
    }
  };
  std::vector<std::thread> helpers;
  const size_t wanted = std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), pieces.size());
  for (size_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (first_error) std::rethrow_exception(first_error);
  std::vector<uint32_t> crcs(ranges.size(), 0);
  for (const Piece& piece : pieces) crcs[piece.range] = crc32_combine(crcs[piece.range], piece.crc, piece.length);
  return crcs;
}

void check_records(const ReadableFile& file, const std::vector<ZipEntry>& entries, int threads) {
  std::vector<Range> ranges;
  ranges.reserve(entries.size());
  for (const ZipEntry& entry : entries) ranges.push_back({entry.payload_offset, entry.size});
  const std::vector<uint32_t> crcs = checksum_ranges(file, ranges, threads);
  for (size_t i = 0; i < entries.size(); ++i) {
    if (crcs[i] == entries[i].crc) continue;
    throw Error(ErrorKind::kCorrupt,
                "record '" + entries[i].name + "' of '" + file.path() + "' (" + std::to_string(entries[i].size) +
                    " bytes at offset " + std::to_string(entries[i].payload_offset) +
                    ") fails its CRC-32: the bytes on disk are not those that were written",
                0, file.path());
  }
}

// What the writer would have put around these records.
ZipLayout expected_layout(const std::vector<ZipEntry>& entries, const std::string& archive) {
  std::vector<ZipRecord> records;
  records.reserve(entries.size());
  for (const ZipEntry& entry : entries) {
    const auto remainder = static_cast<uint32_t>(entry.payload_offset % kAnyAlign);
    records.push_back({entry.name.substr(archive.size() + 1), entry.size, kAnyAlign, remainder});
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
  constexpr uint64_t kMax32 = 0xFFFFFFFFu;
  constexpr int kMostBreaks = 4;
  uint64_t end = 0;
  int breaks = 0;
  for (const ZipEntry& entry : entries) {
    if (entry.header_offset != end && ++breaks > kMostBreaks) return false;
    const bool wide = entry.size >= kMax32 || entry.header_offset >= kMax32;
    end = entry.payload_offset + entry.size + (entry.size == 0 ? 0 : wide ? 24 : 16);
  }
  return true;
}

// Compares the bytes between the records with what the writer puts there. A file by another zip writer agrees nowhere
// and passes; one that agrees in some places and not in others is damaged.
void check_structure(const ReadableFile& file, const std::vector<ZipEntry>& entries) {
  if (entries.empty() || !are_contiguous(entries)) return;
  const std::string archive = entries[0].name.substr(0, entries[0].name.find('/'));
  for (const ZipEntry& entry : entries) {
    if (entry.name.compare(0, archive.size() + 1, archive + "/") != 0) return;
  }
  const ZipLayout layout = expected_layout(entries, archive);
  size_t agreeing = 0;
  uint64_t first_damage = file.size();
  for (const StructurePart& part : layout.parts) {
    std::string bytes(part.length, '\0');
    const bool inside = part.offset <= file.size() && part.length <= file.size() - part.offset;
    if (inside) file.read_at(bytes.data(), bytes.size(), part.offset);
    if (inside && layout.structure.compare(part.begin, part.length, bytes) == 0) {
      ++agreeing;
    } else {
      first_damage = std::min(first_damage, part.offset);
    }
  }
  const bool sizes_agree = layout.file_size == file.size();
  if (agreeing == 0 || (agreeing == layout.parts.size() && sizes_agree)) return;
  throw Error(ErrorKind::kCorrupt,
              "'" + file.path() + "' is damaged between its records, at or after offset " + std::to_string(first_damage),
              0, file.path());
}

bool is_pickle(const ZipEntry& entry) {
  const size_t slash = entry.name.find('/');
  return slash != std::string::npos && entry.name.compare(slash, std::string::npos, "/data.pkl") == 0;
}

}  // namespace

FileDigest digest_file(const std::string& path, int threads) {
  const ReadableFile file(path);
  return {file.size(), checksum_ranges(file, {{0, file.size()}}, threads)[0]};
}

bool verify_torch_file(const std::string& path, int threads) {
  const ReadableFile file(path);
  const std::vector<ZipEntry> entries = read_zip_directory(file);
  if (std::none_of(entries.begin(), entries.end(), is_pickle)) {
    throw Error(ErrorKind::kCorrupt, "'" + path + "' is not a torch file: this zip has no record data.pkl", 0, path);
  }
  const bool unchecked = std::all_of(entries.begin(), entries.end(), [](const ZipEntry& entry) { return entry.crc == 0; });
  if (unchecked) return false;
  check_records(file, entries, threads);
  check_structure(file, entries);
  return true;
}

}  // namespace lazyckpt
