#include "archives.h"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "checks.h"
#include "format/torch_zip_sequence.h"
#include "reading/record_file.h"

namespace lazyckpt::stress {
namespace {

std::string text_of(const Buffer& buffer) { return {reinterpret_cast<const char*>(buffer.begin()), buffer.length()}; }

class ArchiveMaker {
 public:
  explicit ArchiveMaker(Random& random) : random_(random), many_(random.one_in(4)) {}

  Sample make() {
    for (size_t i = 0; i <= random_.up_to(5); ++i) pickles_.push_back(make_pickle());
    const size_t archives = 1 + random_.up_to(many_ ? 150 : 8);
    for (size_t i = 0; i < archives; ++i) add_archive();
    lay_out();
    return std::move(sample_);
  }

 private:
  std::string make_pickle() {
    Buffer noise(1 + random_.up_to(400), 0);
    noise.fill(random_);
    return text_of(noise);
  }

  void add_archive() {
    const auto pickle = static_cast<uint32_t>(random_.up_to(pickles_.size() - 1));
    const auto storages = static_cast<uint32_t>(random_.one_in(3) ? random_.up_to(4) : random_.up_to(1));
    sequence_.pickle_of.push_back(pickle);
    sequence_.storages_of.push_back(storages);
    std::vector<std::pair<std::string, std::string>> records{{"archive/data.pkl", pickles_[pickle]}, {"archive/byteorder", "little"}};
    for (uint32_t key = 0; key < storages; ++key) records.emplace_back("archive/data/" + std::to_string(key), add_storage());
    records.emplace_back("archive/version", "3\n");
    sample_.archives.push_back({0, 0, std::move(records)});
  }

  std::string add_storage() {
    const size_t longest = many_ ? 300 : random_.one_in(3) ? 300000 : 6000;
    const size_t length = random_.one_in(8) ? 0 : random_.up_to(longest);
    Buffer buffer(length, random_.one_in(3) ? random_.up_to(4095) : 64);
    buffer.fill(random_);
    const auto kind = random_.choose<Source>({Source::kCopy, Source::kLazy, Source::kLazy, Source::kOwned});
    sequence_.storages.push_back({buffer.begin(), length, kind});
    storages_.push_back(std::move(buffer));
    return text_of(storages_.back());
  }

  // As a file of these limits is laid out; what it is written to may turn out to demand others.
  void lay_out() {
    for (const std::string& pickle : pickles_) sequence_.pickles.push_back(pickle);
    const auto limits = random_.choose<IoLimits>({{1, 1}, {512, 512}, {4096, 512}, {4096, 4096}, {32768, 32768}});
    std::vector<ByteRange> places;
    ZipLayout layout;
    sample_.spec = describe(sequence_, limits, layout, places);
    expect(places.size() == sample_.archives.size(), "not each archive has a place");
    for (size_t i = 0; i < places.size(); ++i) {
      sample_.archives[i].begin = places[i].begin;
      sample_.archives[i].end = places[i].end;
    }
    sample_.expected.assign(sample_.spec.size, '\0');
    for (Extent& extent : sample_.spec.extents) take_over(extent);
    fill_in_checksums();
  }

  // The structure is copied: it goes away with the layout, and may change behind submit(), as all that is copied.
  void take_over(Extent& extent) {
    sample_.expected.replace(extent.offset, extent.length, reinterpret_cast<const char*>(extent.source), extent.length);
    if (extent.record != kStructure) {
      sample_.memory.emplace_back(extent.kind, std::move(storages_.at(extent.record)));
      return;
    }
    Buffer copied(extent.length, 0);
    std::memcpy(copied.begin(), extent.source, extent.length);
    extent.source = copied.begin();
    sample_.memory.emplace_back(extent.kind, std::move(copied));
  }

  void fill_in_checksums() {
    std::vector<uint32_t> crcs(sample_.spec.record_count);
    for (const Extent& extent : sample_.spec.extents) {
      if (extent.record != kStructure) crcs[extent.record] = plain_crc32(sample_.expected.substr(extent.offset, extent.length));
    }
    for (const CrcField& field : sample_.spec.crc_fields) {
      for (size_t i = 0; i < 4; ++i) sample_.expected[field.offset + i] = static_cast<char>(crcs.at(field.record) >> (8 * i));
    }
  }

  Random& random_;
  const bool many_;
  std::vector<std::string> pickles_;
  std::vector<Buffer> storages_;
  TorchZipSequence sequence_;
  Sample sample_;
};

void check_archive(const Archive& archive, const std::string& path) {
  const RecordFile file(path, false, {});
  const std::vector<ZipEntry>& entries = file.entries();
  expect(file.checksummed(), path + " has no checksums");
  if (entries.size() != archive.records.size()) return mismatch(path + " does not have as many records as it was given");
  std::vector<std::string> found(entries.size());
  RecordFile::Wanted wanted;
  for (size_t i = 0; i < entries.size(); ++i) {
    found[i].resize(entries[i].size);
    wanted.push_back({i, reinterpret_cast<std::byte*>(found[i].data())});
  }
  file.read_whole(wanted, {});
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto& [name, content] = archive.records[i];
    expect(entries[i].name == name, path + " has " + entries[i].name + " where " + name + " was to be");
    expect(found[i] == content, path + ": " + name + " has other bytes");
  }
}

}  // namespace

Sample make_sample(Random& random) { return random.one_in(3) ? ArchiveMaker(random).make() : SampleMaker(random, 4096).make(); }

void check_archives(const Sample& sample, const std::string& path) {
  uint64_t end = 0;
  for (const Archive& archive : sample.archives) {
    expect(archive.begin == end, path + " does not begin where the one before it ends");
    end = archive.end;
    std::ofstream(path, std::ios::binary | std::ios::trunc)
        .write(sample.expected.data() + archive.begin, static_cast<std::streamsize>(archive.end - archive.begin));
    try {
      check_archive(archive, path);
      ++archives_read;
    } catch (const Error& error) {
      mismatch(path + " cannot be read: " + error.what());
    }
  }
  if (sample.archives.empty()) return;
  expect(end == sample.expected.size(), path + " is not the last one in its file");
  ::unlink(path.c_str());
}

}  // namespace lazyckpt::stress
