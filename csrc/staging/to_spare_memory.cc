// The stager's way to the cache of a device: what a fence does for the chunks that no lane has claimed.
//
// They are reserved and enqueued in batches, the last chunks first, while the lane still claims from the front. A batch has
// one event behind it, which the lane's stream waits for before it reads the cache. A range of the cache is given back when
// the copy to the arena has landed, or else with the job, which does not end before all its flights have.
#include <algorithm>
#include <utility>

#include "staging/stager.h"

namespace lazyckpt {
namespace {

constexpr size_t kBatchBytes = size_t{64} << 20;

// The lazy bytes of one device: where they begin and end in the chunk's bounce, with what lies between them, and their number.
struct LazyPart {
  size_t begin = 0, end = 0, bytes = 0;
};

LazyPart lazy_part(const Chunk& chunk, int device) {
  LazyPart part{chunk.bounce_bytes, 0, 0};
  for (const DeviceCopy& copy : chunk.device_copies) {
    if (!copy.lazy || copy.device != device) continue;
    part.begin = std::min(part.begin, copy.at);
    part.end = std::max(part.end, copy.at + copy.length);
    part.bytes += copy.length;
  }
  return part;
}

}  // namespace

void Stager::cache_rest(Lock& lock, const std::shared_ptr<Job>& job, const Streams& streams) {
  for (const auto& [device, handle] : streams) {
    Lane* lane = find_lane(device);
    if (lane == nullptr) continue;
    while (cache_batch(lock, *lane, job, reinterpret_cast<cuda::StreamHandle>(handle))) {
    }
  }
}

// False if there is nothing left to do, or no room to do it.
bool Stager::cache_batch(Lock& lock, Lane& lane, const std::shared_ptr<Job>& job, cuda::StreamHandle stream) {
  if (!job->submitted || job->failed() || job->captured() || !job->has_device(lane.context->device())) return false;
  const CacheBatch batch = reserve_cache(lane, *job);
  if (batch.empty()) return false;
  const auto flight = std::make_shared<Flight>();
  flight->job = job;
  flight->device = lane.context->device();
  flight->lazy = false;
  flight->route = CopyRoute::kToCache;
  flight->stream = stream;
  flight->take_off();
  lock.unlock();
  std::optional<Error> error;
  try {
    copy_to_cache(lane, *flight, batch);
  } catch (const std::exception& caught) {
    error = error_of(*job, caught);
  }
  flight->deadline = monotonic_seconds() + job->timeout_s;
  lock.lock();
  book_cached(lane, flight, batch, error);
  return !job->failed();
}

Stager::CacheBatch Stager::reserve_cache(Lane& lane, Job& job) {
  const int device = lane.context->device();
  DeviceProgress& progress = progress_of(job, device);
  CacheBatch batch;
  size_t bytes = 0;
  for (size_t index = std::min(progress.cached_from, job.published); index > progress.next && bytes < kBatchBytes; --index) {
    Chunk& chunk = job.chunks[index - 1];
    if (share_of(chunk, device) != nullptr) {
      const LazyPart part = lazy_part(chunk, device);
      Span span = lane.cache.try_allocate(part.end - part.begin);
      if (!span.valid()) break;
      batch.push_back({index - 1, part.bytes, reinterpret_cast<uintptr_t>(span.begin()) - part.begin});
      progress.cached.emplace(index - 1, CachedShare{std::move(span), part.begin, nullptr});
      bytes += part.bytes;
    }
    progress.cached_from = index - 1;
  }
  return batch;
}

void Stager::copy_to_cache(Lane& lane, Flight& flight, const CacheBatch& batch) {
  const Job& job = *flight.job;
  const cuda::Current current(*lane.context);
  const DeviceProgress& progress = progress_of(*flight.job, lane.context->device());
  progress.before->hold_back(flight.stream);  // it need not be the stream of save()
  std::vector<cuda::Copy> copies;
  for (const CachePlace& place : batch) {
    for (const DeviceCopy& copy : job.chunks[place.chunk].device_copies) {
      if (!copy.lazy || copy.device != progress.device) continue;
      copies.push_back({place.base + copy.at, reinterpret_cast<cuda::Address>(copy.source), copy.length});
    }
  }
  lane.launch(flight, cuda::Route::kOnDevice, copies, &lane.in_batches);
}

void Stager::book_cached(Lane& lane, const std::shared_ptr<Flight>& flight, const CacheBatch& batch,
                         const std::optional<Error>& error) {
  Job& job = *flight->job;
  lane.flights.push_back(flight);
  if (error) job.fail(*error);
  if (!job.failed()) {
    DeviceProgress& progress = progress_of(job, lane.context->device());
    for (const CachePlace& place : batch) {
      progress.cached.at(place.chunk).written = flight->event;
      job.stats.device_cached_bytes += place.bytes;
      --job.uncaptured;
    }
    job.note_captured();
  }
  monitor_->changed.notify_all();
}

std::vector<Stager::CacheState> Stager::caches() const {
  std::vector<CacheState> states;
  for (const auto& lane : lanes_) {
    const DeviceCache& cache = lane->cache;
    states.push_back({lane->context->device(), cache.size(), cache.used(), cache.failure()});
  }
  return states;
}

}  // namespace lazyckpt
