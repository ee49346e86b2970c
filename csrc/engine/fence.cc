// The engine's fence: what has not left yet is captured, and the streams that compute wait for the copies that are going on.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace lazyckpt {

void Engine::fence(const Interrupt& interrupt, const Streams& given) {
  Lock lock(monitor_->mutex);
  const Streams streams = stager_.without_foreign(lock, given);
  if (!stager_.idle()) stager_.refuse_capture(lock, streams);
  const std::vector<std::shared_ptr<Job>> targets(jobs_.begin(), jobs_.end());
  for (auto job = targets.rbegin(); job != targets.rend(); ++job) {  // lanes come to the newest last
    if ((*job)->devices.empty() || (*job)->captured()) continue;
    const FenceVisit visit(lock, **job);
    stager_.cache_rest(lock, *job, streams);
  }
  for (const auto& job : targets) {
    if (job->captured()) continue;
    const FenceVisit visit(lock, *job, 1);
    capture(lock, job, monotonic_seconds() + job->timeout_s, interrupt, streams);
  }
  // All copies are enqueued: what computes waits for them, the host only where nobody can be told to.
  if (!stager_.idle()) await_landing(lock, stager_.order_behind_copies(lock, streams), interrupt);
}

void Engine::order(const Interrupt& interrupt, const Streams& streams) {
  Lock lock(monitor_->mutex);
  if (stager_.idle()) return;
  Streams waiting = stager_.without_foreign(lock, streams);
  const std::vector<int> captured = stager_.captured_into_graphs(lock, waiting);
  for (const int device : captured) waiting.erase(device);
  std::vector<std::shared_ptr<Flight>> left = stager_.order_behind_copies(lock, waiting);
  const auto is_no_concern = [&](const auto& flight) {
    return streams.count(flight->device) == 0 || std::find(captured.begin(), captured.end(), flight->device) != captured.end();
  };
  left.erase(std::remove_if(left.begin(), left.end(), is_no_concern), left.end());
  await_landing(lock, left, interrupt);
}

void Engine::await_landing(Lock& lock, const std::vector<std::shared_ptr<Flight>>& flights, const Interrupt& interrupt) {
  for (const auto& flight : flights) {
    Job& job = *flight->job;
    const double begin = monotonic_seconds();
    const bool in_time = wait(lock, begin + job.timeout_s, interrupt, [&] { return flight->landed; });
    job.stats.fence_s += monotonic_seconds() - begin;
    if (!in_time) job.fail(landing_deadline(*flight));
  }
}

// From the last chunk backwards, while the writers come forward: where they meet, all is captured.
void Engine::capture(Lock& lock, const std::shared_ptr<Job>& shared, double deadline, const Interrupt& interrupt,
                     const Streams& streams) {
  Job& job = *shared;
  if (!job.submitted) {
    wait(lock, deadline, interrupt, [&] { return job.submitted || job.failed(); });
    stager_.cache_rest(lock, shared, streams);
  }
  bool in_time = job.submitted || job.failed();
  for (size_t index = job.chunks.size(); in_time && index-- > job.next && !job.failed();) {
    Chunk& chunk = job.chunks[index];
    const auto uncaptured = [&] {
      const bool free = chunk.state == ChunkState::kPending || (chunk.state == ChunkState::kArriving && !chunk.staging);
      return free && chunk.lazy_bytes > 0;
    };
    if (!uncaptured()) continue;
    const size_t room = is_staged_whole(chunk, job.file->limits()) ? chunk.length : chunk.lazy_bytes;
    Span span = allocate(lock, job, room, false, deadline, interrupt, uncaptured);
    if (span.valid() && uncaptured()) stage(lock, job, chunk, std::move(span));
  }
  in_time = in_time && wait(lock, deadline, interrupt, [&] { return job.captured() || job.failed(); });
  if (!in_time) job.fail(deadline_error(job, "the capture at the fence", job.timeout_s));
}

void Engine::stage(Lock& lock, Job& job, Chunk& chunk, Span span) {
  chunk.staging = true;
  if (chunk.state == ChunkState::kPending) chunk.state = ChunkState::kStaging;
  ++job.active;
  lock.unlock();
  const bool whole = is_staged_whole(chunk, job.file->limits());
  const uint64_t copied = whole ? tensor_bytes(chunk) : chunk.lazy_bytes;
  if (whole) {
    stage_whole(chunk, std::move(span));
  } else {
    stage_lazy(chunk, std::move(span));
  }
  lock.lock();
  --job.active;
  chunk.staging = false;
  if (job.failed()) {
    chunk.state = ChunkState::kDone;
    if (chunk.flying == 0) chunk.release_memory();
  } else {
    chunk.state = chunk.arrived() ? ChunkState::kPending : ChunkState::kArriving;
    job.stats.bytes_copied_at_fence += copied;
    chunk.lazy_bytes = 0;
    --job.uncaptured;
    job.note_captured();
  }
  monitor_->changed.notify_all();
}

}  // namespace lazyckpt
