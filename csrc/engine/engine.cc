#include "engine/engine.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "base/signals.h"
#include "os/cpus.h"

namespace lazyckpt {
namespace {

constexpr size_t kSmallestChunk = size_t{64} << 10;
constexpr double kInterruptIntervalS = 0.1;
constexpr double kPublishIntervalS = 0.005;  // between calls to the writers while chunks are published
constexpr double kGiveUpS = 2.0;  // for failed jobs to come back from their system calls

size_t fit_chunk(const EngineOptions& options) {
  size_t chunk = std::max(options.chunk_bytes, kSmallestChunk);
  while (chunk > kSmallestChunk && chunk > options.arena_bytes / 4) chunk /= 2;
  return chunk;
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
                                    double timeout_s, const Interrupt& interrupt, const Streams& streams,
                                    const ReuseRequest& reuse) {
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
  const std::shared_ptr<Job> job = make_job(std::move(file), std::move(spec), checks, timeout_s, reuse);
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

// With what of it is not read left out.
std::shared_ptr<Job> Engine::make_job(std::unique_ptr<WritableFile> file, FileSpec spec, const CaptureChecks& checks,
                                      double timeout_s, ReuseRequest reuse) {
  std::vector<uint32_t> doubted;
  std::shared_ptr<Job> job;
  try {
    if (reuse.shares && reuse.baseline != nullptr && !reuse.frozen.empty()) {
      doubted = leave_out_frozen(spec, reuse.frozen, reuse.supposed, *reuse.baseline, file->limits(), chunk_bytes_);
      const auto is_doubted = [&](uint32_t record) { return std::find(doubted.begin(), doubted.end(), record) != doubted.end(); };
      reuse.frozen.erase(std::remove_if(reuse.frozen.begin(), reuse.frozen.end(), is_doubted), reuse.frozen.end());
    }
    job = std::make_shared<Job>(monitor_, std::move(file), std::move(spec), chunk_bytes_, checks, timeout_s);
    if (reuse.wanted) job->reuse = std::make_unique<Reuse>(reuse, job->spec, job->file->limits(), job->chunks);
  } catch (...) {
    if (job != nullptr) job->file->discard();
    if (file != nullptr) file->discard();
    throw;
  }
  job->doubted = std::move(doubted);
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
    if (room > 0 || chunk.has_device_bytes() || job.checks.verify) {
      lock.unlock();
      copy_aside(shared, index, deadline, interrupt);
      lock.lock();
      if (job.failed()) {
        if (chunk.flying == 0) chunk.release_memory();
        return;
      }
    }
    chunk.state = chunk.arrived() ? ChunkState::kPending : ChunkState::kArriving;
    ++job.published;
    if (monotonic_seconds() < next_call) continue;  // to be woken by each would cost the caller more than they gain
    monitor_->changed.notify_all();
    next_call = monotonic_seconds() + kPublishIntervalS;
  }
}

// What of a chunk must leave the caller's memory inside submit(); with the checksums of what may stay, if they are wanted.
void Engine::copy_aside(const std::shared_ptr<Job>& job, size_t index, double deadline, const Interrupt& interrupt) {
  Chunk& chunk = job->chunks[index];
  if (chunk.has_device_bytes()) {
    copy_host_bytes(chunk, job->spec);
    if (!job->checks.verify || checksum_on_devices(job, index, deadline, interrupt)) stager_.copy_eager(job, index);
    return;
  }
  if (chunk.bounce_bytes > 0) fill_bounce(chunk, job->spec);
  if (job->checks.verify) checksum_pieces(chunk, true);
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

}  // namespace lazyckpt
