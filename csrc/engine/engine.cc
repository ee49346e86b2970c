#include "engine/engine.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "base/crc32.h"
#include "base/fault.h"
#include "base/signals.h"
#include "os/cpus.h"

namespace lazyckpt {
namespace {

constexpr size_t kSmallestChunk = size_t{64} << 10;
constexpr size_t kTouchStep = size_t{16} << 20;
constexpr double kInterruptIntervalS = 0.1;
constexpr double kPublishIntervalS = 0.005;  // between calls to the writers while chunks are published
constexpr double kGiveUpS = 2.0;  // for failed jobs to come back from their system calls

size_t fit_chunk(const EngineOptions& options) {
  size_t chunk = std::max(options.chunk_bytes, kSmallestChunk);
  while (chunk > kSmallestChunk && chunk > options.arena_bytes / 4) chunk /= 2;
  return chunk;
}

std::vector<iovec> to_iovecs(const Chunk& chunk) {
  std::vector<iovec> pieces;
  pieces.reserve(chunk.segments.size());
  for (const Segment& segment : chunk.segments) {
    auto* base = const_cast<std::byte*>(segment.source);  // iovec has no const; a write only reads
    if (!pieces.empty() && static_cast<std::byte*>(pieces.back().iov_base) + pieces.back().iov_len == base) {
      pieces.back().iov_len += segment.length;
    } else {
      pieces.push_back({base, segment.length});
    }
  }
  return pieces;
}

}  // namespace

Engine::Engine(const EngineOptions& options)
    : owner_(::getpid()), chunk_bytes_(fit_chunk(options)), arena_(std::max(options.arena_bytes, 4 * kSmallestChunk), options.most_arena_bytes),
      monitor_(std::make_shared<Monitor>()), reserve_(arena_, chunk_bytes_),
      stager_(monitor_, arena_, reserve_,
              {chunk_bytes_, options.cuda_library, options.device_cache_bytes, options.device_window_bytes,
               options.pinned_slab_bytes, options.smallest_pinned_slab_bytes, options.device_batches,
               options.device_rate}) {
  try {
    start_threads(std::max(options.writers, 1));
  } catch (const std::system_error& error) {
    stop_threads();
    throw Error(ErrorKind::kStorage, std::string("cannot start the writer threads: ") + error.what() +
                                         "; raise the limit of processes (ulimit -u)", error.code().value());
  }
}

Engine::~Engine() { stop_threads(); }

void Engine::start_threads(int writers) {
  const SignalsBlocked blocked;
  for (int i = 0; i < writers; ++i) {
    threads_.emplace_back([this] { write_jobs(); });
    pthread_setname_np(threads_.back().native_handle(), ("ckpt-writer-" + std::to_string(i)).c_str());
  }
  threads_.emplace_back([this] { touch_arena(); });
  pthread_setname_np(threads_.back().native_handle(), "ckpt-touch");
}

// Threads that write go where the memory is that they read: near the first device, for which the arena is.
void Engine::open_devices(const std::vector<int>& devices) {
  stager_.open(devices);
  const std::optional<std::string> cpus = stager_.cpus_near_first();
  if (!cpus) return;
  std::call_once(placed_, [&] {
    // Not the last, which touches the arena and may have ended: that would place this thread instead.
    for (size_t i = 0; i + 1 < threads_.size(); ++i) run_on(threads_[i].native_handle(), *cpus);
  });
}

void Engine::grow_arena(size_t bytes) {
  arena_.grow(bytes);
  Lock lock(monitor_->mutex);
  monitor_->changed.notify_all();
}

void Engine::stop_threads() {
  {
    Lock lock(monitor_->mutex);
    closed_ = stop_ = true;
    stager_.stop();
    for (const auto& job : jobs_) {
      job->submitted = true;
      job->fail(Error(ErrorKind::kClosed, "the engine was closed before '" + job->file->path() + "' was durable"));
    }
    monitor_->changed.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
  stager_.join();
}

bool Engine::forked() const { return ::getpid() != owner_; }

size_t Engine::in_flight() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return jobs_.size();
}

bool Engine::arena_pinned() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return stager_.all_pinned();
}

std::string Engine::pin_failure() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return stager_.pin_failure();
}

std::vector<Stager::CacheState> Engine::device_caches() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return stager_.caches();
}

// Waits until done() or the deadline; true if done. Gives the caller's interrupt a chance a few times a second.
bool Engine::wait(Lock& lock, double deadline, const Interrupt& interrupt, const std::function<bool()>& done) {
  double next_look = monotonic_seconds() + kInterruptIntervalS;
  while (!done()) {
    const double now = monotonic_seconds();
    if (now >= deadline) return false;
    if (interrupt && now >= next_look) {
      lock.unlock();
      interrupt();
      lock.lock();
      next_look = now + kInterruptIntervalS;
      continue;
    }
    monitor_->changed.wait_for(lock, std::chrono::duration<double>(std::min(deadline, next_look) - now));
  }
  return true;
}

// ---- The caller's side -------------------------------------------------------------------------------------------

std::shared_ptr<Job> Engine::submit(std::unique_ptr<WritableFile> file, FileSpec spec, const CaptureChecks& checks,
                                    double timeout_s, const Interrupt& interrupt, const Streams& streams) {
  const double deadline = monotonic_seconds() + timeout_s;
  Lock lock(monitor_->mutex);
  try {
    if (closed_) throw Error(ErrorKind::kClosed, "this checkpoint engine is closed; make a new Checkpointer");
    await_pinning(lock, *file, spec, deadline, interrupt);
  } catch (...) {
    file->discard();
    throw;
  }
  lock.unlock();
  const auto job = std::make_shared<Job>(monitor_, std::move(file), std::move(spec), chunk_bytes_, checks, timeout_s);
  const bool has_device_bytes = !job->devices.empty();
  job->stats.arena_bytes = arena_.size();
  lock.lock();
  try {
    if (has_device_bytes) begin_on_devices(lock, *job, streams);
  } catch (...) {
    job->file->discard();
    throw;
  }
  jobs_.push_back(job);
  if (has_device_bytes) stager_.add(job);
  ++job->active;
  if (has_device_bytes) monitor_->changed.notify_all();  // writers are woken when there is something to write
  try {
    if (has_device_bytes) prepare_arena(lock, *job, deadline, interrupt);
    if (job->probes) {  // before all other copies: their room may have to wait for chunks whose probes are looked at
      lock.unlock();
      stager_.record_probes(job);
      lock.lock();
    }
    publish_chunks(lock, job, deadline, interrupt);
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    job->fail(Error(ErrorKind::kCancelled, "the save to '" + job->file->path() + "' was interrupted"));
    // The caller is about to free the memory that writers may be reading.
    wait(lock, monotonic_seconds() + kGiveUpS, nullptr, [&] { return job->active == 1; });
    --job->active;
    job->submitted = true;
    monitor_->changed.notify_all();
    throw;
  }
  --job->active;
  job->submitted = true;
  job->note_captured();
  lock.unlock();  // else who is woken waits for it at once
  monitor_->changed.notify_all();
  return job;
}

// Until it is known whether copies from devices go to pinned memory, once in an engine's life. If none can be pinned, nothing of
// devices is lazy: a copy to pageable memory in the background would hold up the launches of all other threads.
void Engine::await_pinning(Lock& lock, const WritableFile& file, FileSpec& spec, double deadline, const Interrupt& interrupt) {
  std::vector<int> devices;
  for (const Extent& extent : spec.extents) {
    const bool known = std::find(devices.begin(), devices.end(), extent.device) != devices.end();
    if (on_device(extent.kind) && !known) devices.push_back(extent.device);
  }
  if (devices.empty()) return;
  lock.unlock();
  open_devices(devices);
  lock.lock();
  if (!wait(lock, deadline, interrupt, [&] { return stager_.pinning_known() || closed_; })) {
    throw Error(ErrorKind::kDeadline, "host memory for '" + file.path() + "' was not pinned in time: raise the timeout, or see nvidia-smi",
                0, file.path());
  }
  if (closed_) throw Error(ErrorKind::kClosed, "this checkpoint engine was closed meanwhile; make a new Checkpointer");
  if (stager_.pinned()) return;
  for (Extent& extent : spec.extents) {
    if (extent.kind == Source::kDeviceLazy) extent.kind = Source::kDeviceCopy;
  }
}

void Engine::begin_on_devices(Lock& lock, Job& job, const Streams& streams) {
  lock.unlock();
  stager_.begin(job, streams);
  lock.lock();
  if (closed_) throw Error(ErrorKind::kClosed, "this checkpoint engine was closed meanwhile; make a new Checkpointer");
}

// Before the job takes any room: see ArenaReserve.
void Engine::prepare_arena(Lock& lock, Job& job, double deadline, const Interrupt& interrupt) {
  const double begin = monotonic_seconds();
  const size_t align = std::max<size_t>(Arena::kGranule, job.file->limits().memory_align);
  const bool in_time = wait(lock, deadline, interrupt, [&] { return job.failed() || reserve_.keep_room(align); });
  job.stats.arena_wait_s += monotonic_seconds() - begin;
  if (!in_time) job.fail(deadline_error(job, "room in the arena", job.timeout_s));
}

void Engine::publish_chunks(Lock& lock, const std::shared_ptr<Job>& shared, double deadline, const Interrupt& interrupt) {
  Job& job = *shared;
  double next_call = monotonic_seconds() + kPublishIntervalS;
  for (size_t index = 0; index < job.chunks.size(); ++index) {
    Chunk& chunk = job.chunks[index];
    if (job.failed()) return;
    const size_t room = chunk.device_lazy_bytes > 0 ? chunk.device_copy_bytes : chunk.bounce_bytes;
    if (room > 0) {
      Span& span = chunk.has_eager_span() ? chunk.eager_span : chunk.bounce;
      span = allocate(lock, job, room, chunk.has_device_bytes(), deadline, interrupt, [] { return true; });
    }
    if (job.failed()) return;
    job.stats.bytes_copied_in_save += chunk.bounce_bytes - chunk.device_lazy_bytes;
    lock.unlock();
    if (chunk.has_device_bytes()) {
      copy_host_bytes(chunk, job.spec);
      if (!job.checks.verify || checksum_on_devices(shared, index, deadline, interrupt)) stager_.copy_eager(shared, index);
    } else {
      if (room > 0) fill_bounce(chunk, job.spec);
      if (job.checks.verify) checksum_pieces(chunk, true);
    }
    lock.lock();
    if (job.failed()) {
      if (chunk.flying == 0) chunk.release_memory();
      return;
    }
    chunk.state = chunk.arrived() ? ChunkState::kPending : ChunkState::kArriving;
    ++job.published;
    if (monotonic_seconds() < next_call) continue;  // to be woken by each would cost the caller more than they gain
    monitor_->changed.notify_all();
    next_call = monotonic_seconds() + kPublishIntervalS;
  }
}

// Not through the arena, which may be full of bytes that leave only after this job: for debugging this may cost memory. False
// if the job has failed: then copies may be on their way yet, and it ends after them.
bool Engine::checksum_on_devices(const std::shared_ptr<Job>& job, size_t index, double deadline, const Interrupt& interrupt) {
  std::shared_ptr<cuda::HostMemory> memory = stager_.lend_memory(job->devices.front().device);
  for (const auto& flight : stager_.fetch_lazy(job, index, memory)) {
    Lock lock(monitor_->mutex);
    if (!wait(lock, deadline, interrupt, [&] { return flight->landed || job->failed(); })) job->fail(landing_deadline(*flight));
    if (!job->failed()) continue;
    if (job->error->kind() == ErrorKind::kDevice) throw job->error->apart();
    return false;
  }
  checksum_before(job->chunks[index], job->spec, memory->begin());
  stager_.take_back(std::move(memory));
  return true;
}

// A span for the job, or an invalid one if it failed or still_wanted() turned false while waiting; fails the job at the
// deadline. The time spent waiting is back-pressure and is counted.
Span Engine::allocate(Lock& lock, Job& job, size_t bytes, bool from_device, double deadline, const Interrupt& interrupt,
                      const std::function<bool()>& still_wanted) {
  const size_t align = std::max<size_t>(Arena::kGranule, job.file->limits().memory_align);
  Span span = reserve_.try_allocate(bytes, align, from_device);
  if (span.valid()) return span;
  job.waited_for_room = true;
  monitor_->changed.notify_all();
  const double begin = monotonic_seconds();
  const bool in_time = wait(lock, deadline, interrupt, [&] {
    if (job.failed() || !still_wanted()) return true;
    span = reserve_.try_allocate(bytes, align, from_device);
    return span.valid();
  });
  job.stats.arena_wait_s += monotonic_seconds() - begin;
  if (!in_time) job.fail(deadline_error(job, "room in the arena", job.timeout_s));
  if (job.failed()) span.reset();
  return span;
}

bool Engine::close(double timeout_s, const Interrupt& interrupt) {
  Lock lock(monitor_->mutex);
  closed_ = true;
  const auto drained = [&] { return jobs_.empty(); };
  if (wait(lock, monotonic_seconds() + timeout_s, interrupt, drained)) return true;
  for (const auto& job : jobs_) job->fail(deadline_error(*job, "the flush", timeout_s));
  return wait(lock, monotonic_seconds() + kGiveUpS, interrupt, drained);
}

// ---- The writers' side -------------------------------------------------------------------------------------------

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
  job.file->preallocate(job.range.begin, job.range.end);
  fault::crash_point("preallocated");
  Lock lock(monitor_->mutex);
  job.phase = Phase::kWriting;
}

void Engine::write_chunk(Job& job, size_t index, WriterMemory& memory) {
  Chunk& chunk = job.chunks[index];
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
  if (chunk.written) {
    std::vector<iovec> pieces = to_iovecs(chunk);
    job.file->write_at(pieces, chunk.offset);
  }
  if (!job.checks.verify) {
    job.look_at_witnesses(index);
  } else if (chunk.lazy_bytes > 0) {  // the write read the memory after the checksum did
    if (const uint32_t record = find_changed(chunk); record != kStructure) throw changed_error(job, record);
  }
  fault::crash_point("chunk-written");
  Lock lock(monitor_->mutex);
  account_written(job, chunk, from_tensors);
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

void Engine::account_written(Job& job, Chunk& chunk, uint64_t from_tensors) {
  chunk.state = ChunkState::kDone;
  chunk.release_memory();
  ++job.done;
  job.stats.bytes_from_tensors += from_tensors;
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
  Lock lock(monitor_->mutex);
  if (job->failed()) job->file->discard();  // perhaps only just: see Job::fail
  for (Chunk& chunk : job->chunks) chunk.release_memory();  // of chunks that were claimed when their job failed
  job->stats.direct_io = job->file->wrote_direct();
  job->checksums = checksums;
  job->phase = Phase::kFinished;
  job->chunks.clear();
  job->spec.extents = {};
  job->spec.crc_fields = {};
  if (!job->failed()) job->stats.flushed_at = monotonic_seconds();
  jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
  stager_.remove(job);
}

}  // namespace lazyckpt
