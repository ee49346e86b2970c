#include "format/torch_zip_sequence.h"

#include <numeric>
#include <string>
#include <utility>

#include "base/error.h"

namespace lazyckpt {
namespace {

constexpr const char* kArchive = "archive";  // as torch.save calls it where it writes to no file of its own
constexpr std::string_view kVersion = "3\n";
// Who reads a part of a tensor must read and verify whole parts of the file.
constexpr uint64_t kSumsEvery = 256 * 1024;
constexpr std::string_view kByteOrder = "little";  // as all machines that we run on

ZipRecord in_structure(std::string name, std::string_view bytes) {
  return {std::move(name), bytes.size(), 1, 0, reinterpret_cast<const std::byte*>(bytes.data())};
}

void check(const TorchZipSequence& sequence) {
  const auto storages = std::accumulate(sequence.storages_of.begin(), sequence.storages_of.end(), uint64_t{0});
  bool fits = sequence.pickle_of.size() == sequence.storages_of.size() && storages == sequence.storages.size();
  for (const uint32_t pickle : sequence.pickle_of) fits = fits && pickle < sequence.pickles.size();
  if (!fits) throw Error(ErrorKind::kCorrupt, "archives, their pickles and their storages do not fit each other");
}

}  // namespace

FileSpec describe(const TorchZipSequence& sequence, const IoLimits& limits, ZipLayout& layout, std::vector<ByteRange>& places) {
  check(sequence);
  std::vector<ZipRecord> records;
  std::vector<size_t> counts;
  std::vector<Extent> payloads;
  records.reserve(3 * sequence.pickle_of.size() + sequence.storages.size());
  counts.reserve(sequence.pickle_of.size());
  payloads.reserve(sequence.storages.size());
  for (size_t archive = 0; archive < sequence.pickle_of.size(); ++archive) {
    const size_t first = records.size();
    records.push_back(in_structure("data.pkl", sequence.pickles[sequence.pickle_of[archive]]));
    records.push_back(in_structure("byteorder", kByteOrder));
    for (uint32_t key = 0; key < sequence.storages_of[archive]; ++key) {
      const StorageBytes& storage = sequence.storages[payloads.size()];
      records.push_back(place_after_values("data/" + std::to_string(key), storage, limits));
      payloads.push_back(
          {storage.bytes, storage.length, 0, storage.kind, static_cast<uint32_t>(payloads.size()), storage.device});
    }
    records.push_back(in_structure("version", kVersion));
    counts.push_back(records.size() - first);
  }
  layout = lay_out_zips(kArchive, records, counts, places);
  FileSpec spec = to_spec(layout, std::move(payloads));
  spec.sums_every = kSumsEvery;
  return spec;
}

}  // namespace lazyckpt
