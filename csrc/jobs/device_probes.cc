#include "jobs/device_probes.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/random.h"

namespace lazyckpt {
namespace {

constexpr size_t kMostLookedAt = 256;  // extents of a chunk, of which the longest are taken

size_t device_bytes(const Chunk& chunk) { return chunk.device_lazy_bytes + chunk.device_copy_bytes; }

}  // namespace

// The part of an extent that lies in a chunk.
struct DeviceProbes::Run {
  uint64_t offset;  // in the file
  uint64_t length;
  const std::byte* source;
  int device;
  uint32_t record;
};

DeviceProbes::DeviceProbes(const std::vector<Chunk>& chunks, const FileSpec& spec) {
  const auto counts = [](const Chunk& chunk) { return chunk.written && device_bytes(chunk) > 0; };
  const auto with_bytes = static_cast<size_t>(std::count_if(chunks.begin(), chunks.end(), counts));
  if (with_bytes == 0) return;
  const size_t each = std::max<size_t>(kMost / with_bytes, 1);
  auto random = static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  for (size_t index = chunks.size(); index-- > 0 && probes_.size() < kMost;) {
    if (counts(chunks[index])) choose_in(chunks[index], index, spec, std::min(each, kMost - probes_.size()), random);
  }
  size_t at = 0;
  for (DeviceProbe& probe : probes_) {
    probe.at = at;
    at += kBytes;
  }
}

void DeviceProbes::choose_in(const Chunk& chunk, size_t index, const FileSpec& spec, size_t count, uint64_t& random) {
  std::vector<Run> runs;
  const uint64_t end = chunk.offset + chunk.content;
  for (size_t i = chunk.end_extent; i-- > chunk.first_extent && runs.size() < kMostLookedAt;) {
    const Extent& extent = spec.extents[i];
    if (!on_device(extent.kind)) continue;
    const uint64_t from = std::max(extent.offset, chunk.offset), to = std::min(extent.offset + extent.length, end);
    if (from < to) runs.push_back({from, to - from, extent.source + (from - extent.offset), extent.device, extent.record});
  }
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.length > b.length; });
  if (runs.size() > count) runs.resize(count);
  for (const Run& run : runs) choose_in(run, index, count / runs.size(), random);
}

// One in each of as many equal parts.
void DeviceProbes::choose_in(const Run& run, size_t index, size_t count, uint64_t& random) {
  count = std::min<size_t>(count, (run.length + kBytes - 1) / kBytes);
  for (size_t part = 0; part < count; ++part) {
    const uint64_t first = run.length * part / count, end = run.length * (part + 1) / count;
    const auto length = static_cast<size_t>(std::min<uint64_t>(kBytes, end - first));
    const uint64_t at = first + next_random(random) % (end - first - length + 1);
    probes_.push_back({index, run.offset + at, length, run.source + at, run.device, run.record, 0});
  }
}

bool DeviceProbes::covers(size_t chunk) const {
  return std::any_of(probes_.begin(), probes_.end(), [&](const DeviceProbe& probe) { return probe.chunk == chunk; });
}

size_t DeviceProbes::bytes() const {
  size_t sum = 0;
  for (const DeviceProbe& probe : probes_) sum += probe.length;
  return sum;
}

const DeviceProbe* DeviceProbes::find_changed(const Chunk& chunk, size_t index) const {
  for (const DeviceProbe& probe : probes_) {
    if (probe.chunk != index) continue;
    uint64_t begin = chunk.offset;  // of the segment; a run of a device never reaches from one into another
    auto segment = chunk.segments.begin();
    while (probe.offset >= begin + segment->length) begin += (segment++)->length;
    const std::byte* written = segment->source + (probe.offset - begin);
    if (std::memcmp(written, memory->begin() + probe.at, probe.length) != 0) return &probe;
  }
  return nullptr;
}

}  // namespace lazyckpt
