#include "jobs/witness.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/random.h"

namespace lazyckpt {
namespace {

// A small state gets more for each run, so that a write to some of its elements is found, too.
constexpr size_t kWanted = 256;
constexpr size_t kMostInRun = 16;
// Whoever writes to a run of this length is seen at its first bytes before it has come far; a shorter one is over at once.
constexpr size_t kLongRun = size_t{1} << 20;

bool is_lazy(const Segment& segment) { return segment.kind == Source::kLazy; }

size_t lazy_runs(const std::vector<Chunk>& chunks) {
  size_t runs = 0;
  for (const Chunk& chunk : chunks) runs += std::count_if(chunk.segments.begin(), chunk.segments.end(), is_lazy);
  return runs;
}

}  // namespace

Witnesses::Witnesses(const std::vector<Chunk>& chunks) {
  const size_t runs = lazy_runs(chunks);
  if (runs == 0) return;
  const size_t places = std::clamp<size_t>(kWanted / runs, 1, kMostInRun);
  // Nobody's writes shall happen to miss the same places each time.
  auto random = static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  witnesses_.reserve(runs * (places + 1));
  ends_.reserve(chunks.size());
  for (const Chunk& chunk : chunks) {
    for (const Segment& segment : chunk.segments) {
      if (is_lazy(segment)) choose_in(segment, places, random);
    }
    ends_.push_back(witnesses_.size());
  }
  for (Witness& witness : witnesses_) std::memcpy(witness.noted.data(), witness.source, witness.length);
}

// One in each of as many equal parts, and one at the beginning, where most writers begin.
void Witnesses::choose_in(const Segment& run, size_t places, uint64_t& random) {
  if (run.length >= kLongRun) choose(run.source, kBytes, run.record);
  const size_t lines = std::max<size_t>(run.length / kBytes, 1);
  places = std::min(places, lines);
  for (size_t place = 0; place < places; ++place) {
    const size_t first = lines * place / places, end = lines * (place + 1) / places;
    const size_t line = first + next_random(random) % (end - first);
    choose(run.source + line * kBytes, std::min(kBytes, run.length - line * kBytes), run.record);
  }
}

// They lie far apart in memory that nobody has looked at for long: all of them are on their way before the first is waited for.
void Witnesses::choose(const std::byte* source, size_t length, uint32_t record) {
  __builtin_prefetch(source);
  __builtin_prefetch(source + length - 1);
  Witness& witness = witnesses_.emplace_back();
  witness.source = source;
  witness.record = record;
  witness.length = static_cast<uint8_t>(length);
}

uint32_t Witnesses::find_changed(size_t chunk) const {
  if (ends_.empty()) return kStructure;
  return find_changed_in(chunk == 0 ? 0 : ends_[chunk - 1], ends_[chunk]);
}

uint32_t Witnesses::find_changed_in(size_t begin, size_t end) const {
  for (size_t i = begin; i < end; ++i) {
    const Witness& witness = witnesses_[i];
    if (std::memcmp(witness.source, witness.noted.data(), witness.length) != 0) return witness.record;
  }
  return kStructure;
}

}  // namespace lazyckpt
