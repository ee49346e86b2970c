#include "shares.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/crc32.h"
#include "base/error.h"
#include "base/fault.h"
#include "checks.h"
#include "engine/engine.h"
#include "format/torch_zip.h"
#include "os/file.h"
#include "reading/range_reader.h"
#include "reading/record_file.h"

namespace lazyckpt::stress {
namespace {

constexpr uint64_t kSignatureBytes = 4;  // before the checksum, in the descriptor behind each record

// What one rank holds of a file.
struct Rank {
  std::string path;  // the one of the file, but spelt otherwise by each rank: a fault can strike one of them
  std::vector<Buffer> memory;
  ZipLayout layout;
  std::shared_ptr<Job> job;
  bool may_fail = false;
};

struct SharedFile {
  bool direct = false;
  uint32_t uniform_alignment = 0;
  std::vector<Source> kinds;
  std::vector<std::string> contents;  // of the records
  std::vector<Rank> ranks;
};

// Without memory: only for its layout.
TorchFile torch_file(const SharedFile& file, const std::vector<Buffer>& memory) {
  TorchFile made;
  made.archive = "archive";
  made.uniform_alignment = file.uniform_alignment;
  made.direct = file.direct;
  for (size_t i = 0; i < file.contents.size(); ++i) {
    const std::byte* bytes = memory.empty() ? nullptr : memory[i].begin();
    const uint64_t length = file.contents[i].size();
    if (i == 0) {
      made.head.push_back({"data.pkl", bytes, length, file.kinds[i]});
    } else if (i + 1 < file.contents.size()) {
      made.storages.push_back({bytes, length, file.kinds[i]});
    } else {
      made.tail.push_back({"version", bytes, length, file.kinds[i]});
    }
  }
  return made;
}

// ---- What to write -----------------------------------------------------------------------------------------------

// The checksum behind the record, or the signature before it, comes to lie across the edge of a chunk, and so of a share.
void aim(Random& random, SharedFile& file, size_t record, const IoLimits& limits, size_t chunk_bytes) {
  ZipLayout layout;
  describe(torch_file(file, {}), limits, {0, 2}, layout);
  const uint64_t begin = layout.payload_offsets[record], reach = kSignatureBytes + random.up_to(8);
  const uint64_t edge = ((begin + reach) / chunk_bytes + 1 + random.up_to(2)) * chunk_bytes;
  file.contents[record].resize(edge - reach - begin);
}

size_t choose_length(Random& random, size_t chunk_bytes) {
  switch (random.up_to(3)) {
    case 0: return 0;
    case 1: return 1 + random.up_to(4094);
    case 2: return random.up_to(chunk_bytes);
    default: return random.up_to(4 * chunk_bytes);
  }
}

SharedFile choose_file(Random& random, const std::string& probe_path, size_t chunk_bytes) {
  SharedFile file;
  file.direct = !random.one_in(3);
  file.uniform_alignment = random.choose<uint32_t>({0, 0, 64, 4096});
  const size_t records = 2 + random.up_to(10);
  for (size_t i = 0; i < records; ++i) {
    const bool storage = i > 0 && i + 1 < records;
    file.contents.emplace_back(choose_length(random, chunk_bytes), '\0');
    file.kinds.push_back(storage ? random.choose<Source>({Source::kCopy, Source::kLazy, Source::kLazy, Source::kOwned})
                                 : Source::kCopy);
  }
  WritableFile probe(probe_path, file.direct);
  for (size_t i = 0; i < records; ++i) {
    if (random.one_in(3)) aim(random, file, i, probe.limits(), chunk_bytes);
  }
  probe.discard();
  for (std::string& content : file.contents) {
    const size_t from = random.up_to(noise().size() - content.size());
    content.assign(reinterpret_cast<const char*>(noise().data()) + from, content.size());
  }
  return file;
}

// By the layout alone: nothing that has been cut into chunks.
std::string expected_bytes(const SharedFile& file, const ZipLayout& layout) {
  std::string bytes(layout.file_size, '\0');
  for (const StructurePart& part : layout.parts) {
    bytes.replace(part.offset, part.length, layout.structure, part.begin, part.length);
  }
  std::vector<uint32_t> crcs;
  for (size_t i = 0; i < file.contents.size(); ++i) {
    bytes.replace(layout.payload_offsets[i], file.contents[i].size(), file.contents[i]);
    crcs.push_back(plain_crc32(file.contents[i]));
  }
  for (const CrcField& field : layout.crc_fields) {
    for (size_t i = 0; i < 4; ++i) bytes[field.offset + i] = static_cast<char>(crcs[field.record] >> (8 * i));
  }
  return bytes;
}

// ---- The ranks ---------------------------------------------------------------------------------------------------

void act_on(const SharedFile& file, Rank& rank, Source kind, void (Buffer::*act)()) {
  for (size_t i = 0; i < rank.memory.size(); ++i) {
    if (file.kinds[i] == kind) (rank.memory[i].*act)();
  }
}

// Its bytes lie elsewhere in each rank; where torch puts them, mostly.
void write_share(Engine& engine, Random& random, const SharedFile& file, Rank& rank, Share share) {
  for (const std::string& content : file.contents) {
    rank.memory.emplace_back(content.size(), random.one_in(3) ? random.up_to(4095) : 64);
    std::memcpy(rank.memory.back().begin(), content.data(), content.size());
  }
  auto target = make_file(random, rank.path, file.direct, !share.whole());
  FileSpec spec = describe(torch_file(file, rank.memory), target->limits(), share, rank.layout);
  if (random.one_in(2)) spec.kept = std::shared_ptr<const void>(std::shared_ptr<const void>(), &rank.layout);
  rank.job = engine.submit(std::move(target), std::move(spec), {random.one_in(4)}, kPatienceS, {});
  act_on(file, rank, Source::kCopy, &Buffer::spoil);
  act_on(file, rank, Source::kCopy, &Buffer::release);
  if (random.one_in(3)) return;
  engine.fence({});
  const Outcome outcome = look_at(*rank.job);
  expect(outcome.captured, rank.path + " is not captured behind the fence");
  if (outcome.failed) return;
  act_on(file, rank, Source::kLazy, &Buffer::spoil);
  act_on(file, rank, Source::kLazy, &Buffer::release);
}

// ---- What has been written ---------------------------------------------------------------------------------------

// True if it is durable and right; false if it failed, as it may.
bool check_share(const Rank& rank, const std::string& expected, const std::string& found) {
  const Outcome outcome = look_at(*rank.job);
  if (outcome.failed) {
    expect(rank.may_fail, rank.path + " failed without a reason: " + outcome.error);
    return false;
  }
  const ByteRange range = rank.job->range;
  const auto part = [&](const std::string& bytes) {
    return bytes.substr(std::min<size_t>(range.begin, bytes.size()), range.end - range.begin);
  };
  const std::string wanted = part(expected);
  expect(part(found) == wanted, rank.path + ": the share does not hold what it should");
  expect(rank.job->checksums.written == plain_crc32(wanted), rank.path + ": the share has another CRC-32");
  return true;
}

// Adds what a rank has written of the last record; whoever ends that record must have read the same before.
void check_edges(const Rank& rank, RecordPart& last) {
  const RecordPart &read = rank.job->checksums.only_read, &written = rank.job->checksums.last_written;
  const bool same = read.record == last.record && read.length == last.length && read.crc == last.crc;
  expect(read.length == 0 || same, rank.path + ": the share ends a record that the ones before have begun otherwise");
  if (written.length == 0) return;
  if (written.record != last.record) last = {written.record, 0, 0};
  last.length += written.length;
  last.crc = crc32_combine(last.crc, written.crc, written.length);
}

// As ckpt/commit/shared_file.py does it. The CRC-32 of the file.
uint32_t join_shares(const SharedFile& file) {
  const Rank& first = file.ranks.front();
  std::vector<uint32_t> record_crcs(file.contents.size());
  uint32_t whole = 0;
  uint64_t at = 0;
  RecordPart last;
  for (const Rank& rank : file.ranks) {
    const Job& job = *rank.job;
    check_edges(rank, last);
    expect(job.range.begin == at, rank.path + ": the share begins elsewhere than the one before it ends");
    whole = crc32_combine(whole, job.checksums.written, job.range.end - job.range.begin);
    at = job.range.end;
    for (const uint32_t record : job.field_records) record_crcs[record] = job.crcs.record_crcs()[record];
  }
  expect(at == first.layout.directory_offset, first.path + ": the shares do not reach the directory");
  const std::string directory = fill_directory(first.layout, record_crcs);
  write_end(first.path, at, directory);
  return crc32(whole, directory.data(), directory.size());
}

// The file as a reader sees it.
void check_records(const SharedFile& file, const std::string& path, const std::string& found) {
  // Where all records are empty, all checksums are zero, and a reader cannot know that they are meant.
  const auto empty = [](const std::string& content) { return content.empty(); };
  const bool nothing_to_check = std::all_of(file.contents.begin(), file.contents.end(), empty);
  expect(verify_torch_file(path, {}) != nothing_to_check, path + " passes unchecked");
  const std::vector<ZipEntry> entries = read_zip_directory(std::make_shared<ReadableFile>(path), ReadOptions());
  expect(entries.size() == file.contents.size(), path + " has another number of records");
  for (size_t i = 0; i < std::min(entries.size(), file.contents.size()); ++i) {
    const std::string& content = file.contents[i];
    expect(entries[i].size == content.size(), entries[i].name + " has another size");
    expect(entries[i].crc == plain_crc32(content), entries[i].name + " has another CRC-32");
    expect(found.compare(entries[i].payload_offset, content.size(), content) == 0, entries[i].name + " is not the same");
  }
}

void check_whole(const SharedFile& file, const std::string& expected) {
  const Rank& first = file.ranks.front();
  const uint32_t crc = file.ranks.size() > 1 ? join_shares(file) : first.job->checksums.written;
  const std::string found = read_back(first.path);
  expect(found == expected, first.path + " does not hold what it should");
  expect(crc == plain_crc32(expected), first.path + " has another CRC-32");
  try {
    check_records(file, first.path, found);
  } catch (const Error& error) {
    mismatch(error.what());
  }
  ++durable;
  bytes_verified += found.size();
}

void check(const SharedFile& file) {
  const Rank& first = file.ranks.front();
  for (const Rank& rank : file.ranks) {
    expect(wait_until_finished(*rank.job), rank.path + " never finished");
    expect(rank.layout.structure == first.layout.structure && rank.layout.payload_offsets == first.layout.payload_offsets,
           rank.path + " has another layout");
  }
  if (mismatches > 0) return;
  const std::string expected = expected_bytes(file, first.layout), found = read_back(first.path);
  const auto right = std::count_if(file.ranks.begin(), file.ranks.end(),
                                   [&](const Rank& rank) { return check_share(rank, expected, found); });
  const bool together = file.ranks.size() > 1, all = static_cast<size_t>(right) == file.ranks.size();
  if (all) check_whole(file, expected);
  if (!all) ++failed;
  if (together) ++(all ? joined : torn);
  expect(exists(first.path) == (all || together), first.path + ": a share that fails leaves the file to the others");
  ::unlink(first.path.c_str());
}

class SharedRound {
 public:
  SharedRound(Random& random, const std::string& directory) : random_(random), directory_(directory) {}

  void run() {
    choose_weather(random_);
    start_engines();
    for (uint64_t left = 1 + random_.up_to(2); left > 0; --left) add_file();
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < count_; ++i) {
      threads.emplace_back([this, i, seed = random_.up_to(~uint64_t{0})] { write_shares(i, Random(seed)); });
    }
    for (std::thread& thread : threads) thread.join();
    for (const SharedFile& file : files_) check(file);
    for (const auto& engine : engines_) {
      expect(engine->close(kPatienceS, {}), "an engine of a rank did not drain");
      expect(engine->arena().used() == 0, "the arena of a rank is in use after all jobs have ended");
    }
    end_weather();
  }

 private:
  void start_engines() {
    EngineOptions options;
    options.arena_bytes = size_t{1} << (18 + random_.up_to(3));
    options.chunk_bytes = size_t{1} << (16 + random_.up_to(2));  // four of them are as long as the noise
    options.writers = 1 + static_cast<int>(random_.up_to(2));
    count_ = random_.choose<uint32_t>({1, 2, 3, 5});
    const size_t engines = random_.one_in(2) ? 1 : count_;
    for (size_t i = 0; i < engines; ++i) engines_.push_back(std::make_unique<Engine>(options));
  }

  void add_file() {
    const std::string name = "shared" + std::to_string(files_.size()) + "-";
    files_.push_back(choose_file(random_, directory_ + "/" + name, engines_.front()->chunk_bytes()));
    std::vector<Rank>& ranks = files_.back().ranks;
    ranks.resize(count_);
    for (size_t i = 0; i < count_; ++i) ranks[i].path = directory_ + std::string(i + 1, '/') + name;
    if (random_.one_in(3)) add_fault(ranks[random_.up_to(count_ - 1)]);
  }

  void add_fault(Rank& rank) {
    rank.may_fail = true;
    static const std::vector<std::string> calls{"fallocate", "pwritev", "pwritev", "fdatasync", "close"};
    const std::string& call = random_.choose(calls);
    const auto skip = static_cast<int64_t>(call == "pwritev" ? random_.up_to(4) : 0);
    fault::add({call, rank.path, skip, 1, random_.choose<int>({ENOSPC, EIO, EINVAL}), -1, random_.seconds(0.003)});
  }

  void write_shares(uint32_t index, Random random) {
    Engine& engine = *engines_[index % engines_.size()];
    for (SharedFile& file : files_) write_share(engine, random, file, file.ranks[index], {index, count_});
  }

  Random& random_;
  const std::string directory_;
  uint32_t count_ = 0;
  std::vector<SharedFile> files_;
  std::vector<std::unique_ptr<Engine>> engines_;  // last: their writers read the memory of the files
};

}  // namespace

void write_together(Random& random, const std::string& directory) { SharedRound(random, directory).run(); }

}  // namespace lazyckpt::stress
