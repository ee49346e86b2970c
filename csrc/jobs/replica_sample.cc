#include "jobs/replica_sample.h"

#include <algorithm>

#include "base/crc32.h"
#include "base/random.h"

namespace lazyckpt {
namespace {

constexpr uint64_t kLine = 64;  // of the cache: to read less costs as much
constexpr uint64_t kWhole = 4096;  // bytes of a record that is looked at as a whole
constexpr uint64_t kStride = uint64_t{4} << 20;  // bytes of a large record for each sample
// A state of few records gets more for each, so that differences in a part of one are found, too.
constexpr uint64_t kWanted = 512, kFewest = 4, kMost = 64;
constexpr size_t kAhead = 64;  // samples that are on their way from memory at once: one after the other would take thrice as long

struct Look {
  const std::byte* bytes;
  uint64_t length;
  uint32_t* crc;  // of the record's samples so far
};

class Sampler {
 public:
  Sampler() { looks_.reserve(kAhead); }

  // One line in each of as many equal parts.
  void add(const Replica& record, uint64_t places, uint64_t random, uint32_t* crc) {
    if (record.length <= kWhole) return look({record.bytes, record.length, crc});
    const uint64_t lines = (record.length + kLine - 1) / kLine;
    for (uint64_t place = 0; place < places; ++place) {
      const uint64_t first = lines * place / places, end = lines * (place + 1) / places;
      const uint64_t offset = (first + next_random(random) % (end - first)) * kLine;
      look({record.bytes + offset, std::min(kLine, record.length - offset), crc});
    }
  }

  void finish() {
    for (const Look& each : looks_) *each.crc = crc32(*each.crc, each.bytes, each.length);
    looks_.clear();
  }

 private:
  void look(const Look& next) {
    if (looks_.size() == kAhead) finish();
    __builtin_prefetch(next.bytes);
    looks_.push_back(next);
  }

  std::vector<Look> looks_;
};

}  // namespace

std::vector<uint32_t> sample_replicas(const std::vector<Replica>& records, uint64_t seed) {
  std::vector<uint32_t> found(records.size(), 0);
  if (records.empty()) return found;
  const uint64_t share = std::clamp(kWanted / records.size(), kFewest, kMost);
  Sampler sampler;
  for (size_t i = 0; i < records.size(); ++i) {
    const Replica& record = records[i];
    const uint64_t random = next_random(seed);
    if (record.bytes == nullptr || record.length == 0) continue;
    sampler.add(record, std::max(share, record.length / kStride), random, &found[i]);
  }
  sampler.finish();
  return found;
}

}  // namespace lazyckpt
