// The writers' side of the engine: what its threads do, from the pages of the arena to the end of a file.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/crc32.h"
#include "base/fault.h"
#include "engine/engine.h"

namespace lazyckpt {
namespace {

constexpr size_t kTouchStep = size_t{16} << 20;

// Without memory for it there is none, and the job ends as it would have.
std::shared_ptr<Baseline> end_reuse(Reuse& reuse, const Job& job) {
  try {
    return reuse.end(!job.spec.share.whole());
  } catch (const std::exception&) {
    return nullptr;
  }
}

}  // namespace

void Engine::touch_arena() {
  for (size_t from = 0; from < arena_.size(); from += kTouchStep) {
    {
      std::lock_guard<std::mutex> lock(monitor_->mutex);
      if (stop_) return;
    }
    arena_.touch(from, kTouchStep);
  }
}

void Engine::write_jobs() {
  WriterMemory memory;
  Lock lock(monitor_->mutex);
  for (;;) {
    Claim claim{Task::kWrite, nullptr, 0};
    monitor_->changed.wait(lock, [&] { return try_claim(claim) || (stop_ && jobs_.empty()); });
    if (claim.job == nullptr) return;
    lock.unlock();
    try {
      switch (claim.task) {
        case Task::kPrepare: prepare(*claim.job); break;
        case Task::kWrite: write_chunk(*claim.job, claim.chunk, memory); break;
        case Task::kFinish: finish(claim.job); break;
      }
      lock.lock();
    } catch (const Error& error) {
      lock.lock();
      claim.job->fail(error);
    } catch (const std::exception& error) {
      lock.lock();
      claim.job->fail(Error(ErrorKind::kStorage, std::string("writing '") + claim.job->file->path() + "': " + error.what()));
    }
    --claim.job->active;
    monitor_->changed.notify_all();
  }
}

// The oldest job first: its file becomes durable soonest, and its spans come back soonest.
bool Engine::try_claim(Claim& claim) {
  for (const auto& job : jobs_) {
    const bool idle = job->active == 0 && job->submitted;
    if (job->phase == Phase::kFinishing) continue;
    if (job->failed()) {
      if (!idle) continue;
      job->phase = Phase::kFinishing;
      claim = {Task::kFinish, job, 0};
    } else if (job->phase == Phase::kNew) {
      job->phase = Phase::kPreparing;
      claim = {Task::kPrepare, job, 0};
    } else if (job->phase == Phase::kWriting && job->next < job->published &&
               job->chunks[job->next].state == ChunkState::kPending) {
      job->chunks[job->next].state = ChunkState::kWriting;
      claim = {Task::kWrite, job, job->next++};
    } else if (idle && job->done == job->chunks.size()) {
      job->phase = Phase::kFinishing;
      claim = {Task::kFinish, job, 0};
    } else {
      continue;
    }
    ++job->active;
    return true;
  }
  return false;
}

// What has been given up while this thread waited for its turn or for the file system makes nothing more there: the directory
// may be somebody else's by now.
void Engine::prepare(Job& job) {
  const auto given_up = [&] {
    Lock lock(monitor_->mutex);
    return job.failed();
  };
  if (given_up()) return;
  job.file->create();
  if (given_up()) return;
  if (job.reuse) job.reuse->begin(*job.file);
  const std::vector<ByteRange> reserved = job.reuse ? job.reuse->likely_written(job.range) : std::vector<ByteRange>{job.range};
  for (const ByteRange& range : reserved) job.file->preallocate(range.begin, range.end);
  fault::crash_point("preallocated");
  Lock lock(monitor_->mutex);
  job.phase = Phase::kWriting;
}

void Engine::write_chunk(Job& job, size_t index, WriterMemory& memory) {
  Chunk& chunk = job.chunks[index];
  const uint64_t unread = chunk.shares ? job.reuse->share_unread(*job.file, chunk) : 0;
  if (chunk.has_device_bytes()) complete_bounce(chunk, job.spec);
  if (!job.look_at_probes(index)) return;
  if (job.checks.sum) add_word_sums(job, chunk);
  const std::vector<Piece> before = job.checks.verify ? chunk.pieces : std::vector<Piece>();
  const uint64_t from_tensors = chunk.written ? tensor_bytes(chunk) : 0;
  const bool gathered = is_gathered(chunk, job.file->limits());
  if (gathered) {
    gather_and_checksum(chunk, job.file->limits(), memory);
  } else {
    checksum_pieces(chunk, true);
  }
  if (job.checks.verify) {
    if (const uint32_t record = find_changed_since(chunk, before); record != kStructure) throw changed_error(job, record);
  } else {
    job.look_at_witnesses(index);  // here, too: a write may be undone before the other look
  }
  if (gathered && chunk.lazy_bytes > 0 && !account_captured(job, chunk)) return;
  job.crcs.add(job.chunks, index);
  if (chunk.first_field < chunk.end_field) {
    if (!job.crcs.wait_for(index)) return;
    fill_crc_fields(chunk, job.spec, job.crcs.record_crcs());
  }
  checksum_pieces(chunk, false);
  for (const Piece& piece : chunk.pieces) chunk.crc = crc32_combine(chunk.crc, piece.crc, piece.length);
  const uint64_t reused = chunk.written ? write_all(job, chunk, index) : 0;
  if (!job.checks.verify) {
    job.look_at_witnesses(index);
  } else if (chunk.lazy_bytes > 0) {  // the write read the memory after the checksum did
    if (const uint32_t record = find_changed(chunk); record != kStructure) throw changed_error(job, record);
  }
  fault::crash_point("chunk-written");
  Lock lock(monitor_->mutex);
  job.stats.unread_bytes += unread;
  account_written(job, chunk, from_tensors, reused);
}

// But for what is shared: returns how many bytes that is.
uint64_t Engine::write_all(Job& job, const Chunk& chunk, size_t index) {
  try {
    return write_out(*job.file, chunk, job.reuse.get(), index);
  } catch (const FrozenChanged& changed) {
    Lock lock(monitor_->mutex);
    job.stats.frozen_changed = true;
    throw changed_error(job, changed.record);
  }
}

// The writer has all of it: the tensors may change, and may be gone. False if the job has failed meanwhile.
bool Engine::account_captured(Job& job, Chunk& chunk) {
  Lock lock(monitor_->mutex);
  chunk.lazy_bytes = 0;
  if (job.failed()) return false;
  --job.uncaptured;
  job.note_captured();
  monitor_->changed.notify_all();
  return true;
}

void Engine::add_word_sums(Job& job, const Chunk& chunk) {
  if (!chunk.written || !chunk.has_device_bytes()) return;
  std::vector<WordSum> sums(job.word_sums.size());
  lazyckpt::add_word_sums(chunk, job.spec, sums);
  Lock lock(monitor_->mutex);
  for (size_t i = 0; i < sums.size(); ++i) {
    job.word_sums[i].sum += sums[i].sum;
    job.word_sums[i].bytes += sums[i].bytes;
  }
}

void Engine::account_written(Job& job, Chunk& chunk, uint64_t from_tensors, uint64_t reused) {
  chunk.state = ChunkState::kDone;
  chunk.release_memory();
  ++job.done;
  job.stats.bytes_from_tensors += from_tensors;
  job.stats.reused_bytes += reused;
  if (job.failed() || chunk.lazy_bytes == 0) return;
  chunk.lazy_bytes = 0;
  --job.uncaptured;
  job.note_captured();
}

// Every path to here has active == 1: nobody else touches the file any more.
void Engine::finish(const std::shared_ptr<Job>& job) {
  bool failed = false;
  std::vector<DeviceProgress> devices;  // their events end without the lock
  {
    Lock lock(monitor_->mutex);
    failed = job->failed();
    devices.swap(job->devices);
    if (job->probes && !failed) job->stats.probed_bytes = job->probes->bytes();
    if (!failed) job->stats.written_at = monotonic_seconds();
  }
  if (job->probes) stager_.take_back_probes(std::exchange(job->probes->memory, nullptr));
  devices.clear();
  if (!failed) {
    try {
      fault::crash_point("chunks-written");
      job->file->finish(job->spec.size);
      fault::crash_point("data-durable");
    } catch (const Error& error) {
      Lock lock(monitor_->mutex);
      job->fail(error);
    }
  }
  const Checksums checksums = job->sum_up();
  const std::unique_ptr<Reuse> reuse = std::move(job->reuse);
  std::shared_ptr<Baseline> baseline = reuse && !failed ? end_reuse(*reuse, *job) : nullptr;
  Lock lock(monitor_->mutex);
  if (job->failed()) job->file->discard();  // perhaps only just: see Job::fail
  for (Chunk& chunk : job->chunks) chunk.release_memory();  // of chunks that were claimed when their job failed
  job->stats.direct_io = job->file->wrote_direct();
  job->checksums = checksums;
  if (!job->failed()) job->baseline = std::move(baseline);
  job->stats.reuse_refused = reuse && reuse->was_refused();
  job->phase = Phase::kFinished;
  job->chunks.clear();
  job->spec.extents = {};
  job->spec.crc_fields = {};
  job->spec.kept = nullptr;
  if (!job->failed()) job->stats.flushed_at = monotonic_seconds();
  jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
  stager_.remove(job);
  monitor_->settled.notify_all();
}

}  // namespace lazyckpt
