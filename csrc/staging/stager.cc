#include "staging/stager.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <system_error>
#include <thread>
#include <utility>

#include "base/signals.h"
#include "os/cpus.h"
#include "os/memory_node.h"

namespace lazyckpt {
namespace {

constexpr size_t kFlightBytes = size_t{16} << 20;  // copies with one event behind them, unless the last chunk goes beyond
constexpr double kShortestPollS = 50e-6, kLongestPollS = 2e-3;
constexpr double kLookS = 0.05;  // between two looks at how much memory of a device with a cache is free

using cuda::place_of;

Error capture_refused(int device) {
  return cuda::capture_refused(device, "save outside of captures, and call ckpt.fence() before a capture begins and before each replay");
}

}  // namespace

Stager::Stager(std::shared_ptr<Monitor> monitor, Arena& arena, ArenaReserve& reserve, StagerOptions options)
    : monitor_(std::move(monitor)), arena_(arena), reserve_(reserve), options_(std::move(options)) {}

Stager::~Stager() = default;

void Stager::join() {
  if (pinner_.joinable()) pinner_.join();
  for (const auto& lane : lanes_) {
    if (lane->thread.joinable()) lane->thread.join();
  }
}

// ---- The caller's side -------------------------------------------------------------------------------------------

Lane* Stager::find_lane(int device) const {
  for (const auto& lane : lanes_) {
    if (lane->context->device() == device) return lane.get();
  }
  return nullptr;
}

Lane& Stager::open_lane(int device) {
  {
    Lock lock(monitor_->mutex);
    if (Lane* lane = find_lane(device); lane != nullptr) return *lane;
  }
  if (driver_ == nullptr) driver_ = std::make_shared<const cuda::Driver>(options_.driver);
  auto context = std::make_shared<const cuda::Context>(driver_, device);
  const LaneOptions lane_options{options_.chunk_bytes, options_.cache_bytes, options_.window_bytes, options_.batches, options_.rate};
  auto made = std::make_unique<Lane>(monitor_, std::move(context), lane_options);
  Lane& lane = *made;
  Lock lock(monitor_->mutex);
  try {
    const SignalsBlocked blocked;
    lane.thread = std::thread([this, &lane] { run(lane); });
  } catch (const std::system_error& error) {
    throw Error(ErrorKind::kDevice, "cannot start the thread for " + place_of(device) + ": " + error.what() +
                                        "; raise the limit of processes (ulimit -u)");
  }
  pthread_setname_np(lane.thread.native_handle(), ("ckpt-cuda-" + std::to_string(device)).c_str());
  // Copies given to a lane whose thread has ended would never be seen to end, nor would their job.
  monitor_->changed.wait(lock, [&] { return lane.ready || lane.failure; });
  if (lane.failure) {
    lock.unlock();
    lane.thread.join();
    throw lane.failure->apart();
  }
  lanes_.push_back(std::move(made));
  const bool is_first = lanes_.size() == 1;
  lock.unlock();
  if (is_first) start_pinning(lane);
  return lane;
}

void Stager::open(const std::vector<int>& devices) {
  std::lock_guard<std::mutex> opening(open_mutex_);
  for (const int device : devices) open_lane(device);
}

std::optional<std::string> Stager::cpus_near_first() const {
  Lock lock(monitor_->mutex);
  if (lanes_.empty()) return std::nullopt;
  const Lane& lane = *lanes_.front();
  lock.unlock();
  return cpus_near(sysfs(), lane.context->pci_id());
}

void Stager::begin(Job& job, const Streams& streams) {
  std::lock_guard<std::mutex> opening(open_mutex_);
  for (DeviceProgress& progress : job.devices) {
    const auto stream = streams.find(progress.device);
    if (stream == streams.end()) {
      throw Error(ErrorKind::kDevice, "no stream was given for " + place_of(progress.device) + ", where tensors of '" +
                                          job.file->path() + "' lie; give its current stream");
    }
    Lane& lane = open_lane(progress.device);
    progress.stream = reinterpret_cast<cuda::StreamHandle>(stream->second);
    if (lane.context->is_foreign(progress.stream)) throw cuda::foreign_refused(progress.device);
    const cuda::Current current(*lane.context);
    if (lane.context->is_capturing(progress.stream)) throw capture_refused(progress.device);
    progress.before = std::make_unique<cuda::Event>(lane.events);
    progress.before->record(progress.stream);
  }
}

void Stager::copy_eager(const std::shared_ptr<Job>& job, size_t index) {
  const Chunk& chunk = job->chunks[index];
  if (chunk.device_copy_bytes == 0) return;
  for (const DeviceProgress& progress : job->devices) {
    const auto ours = [&](const DeviceCopy& copy) { return !copy.lazy && copy.device == progress.device; };
    if (std::none_of(chunk.device_copies.begin(), chunk.device_copies.end(), ours)) continue;
    const auto flight = std::make_shared<Flight>();
    flight->job = job;
    flight->device = progress.device;
    flight->chunks.emplace_back(index);
    flight->lazy = false;
    flight->stream = progress.stream;
    Lane* lane = nullptr;
    {
      Lock lock(monitor_->mutex);
      lane = find_lane(progress.device);
    }
    const cuda::Current current(*lane->context);
    {
      Lock lock(monitor_->mutex);
      flight->take_off();
    }
    enqueue(*lane, flight);
  }
  Lock lock(monitor_->mutex);
  if (job->error && job->error->kind() == ErrorKind::kDevice) throw job->error->apart();
}

void Stager::add(const std::shared_ptr<Job>& job) {
  jobs_.push_back(job);
  for (const DeviceProgress& progress : job->devices) {
    Lane& lane = *find_lane(progress.device);
    if (std::exchange(lane.has_ended, false)) lane.has_begun = true;
  }
}

void Stager::remove(const std::shared_ptr<Job>& job) {
  const auto found = std::find(jobs_.begin(), jobs_.end(), job);
  if (found == jobs_.end()) return;
  jobs_.erase(found);
  for (const auto& lane : lanes_) lane->has_ended = true;
  if (!jobs_.empty()) return;
  reserve_.let_go();
}

Streams Stager::without_foreign(Lock& lock, const Streams& streams) const {
  Streams own;
  for (const auto& [device, handle] : streams) {
    const Lane* lane = find_lane(device);
    lock.unlock();
    if (lane == nullptr || !lane->context->is_foreign(reinterpret_cast<cuda::StreamHandle>(handle))) own[device] = handle;
    lock.lock();
  }
  return own;
}

std::vector<int> Stager::captured_into_graphs(Lock& lock, const Streams& streams) const {
  std::vector<int> found;
  for (const auto& [device, handle] : streams) {
    const Lane* lane = find_lane(device);
    if (lane == nullptr) continue;
    lock.unlock();
    {
      const cuda::Current current(*lane->context);
      if (lane->context->is_capturing(reinterpret_cast<cuda::StreamHandle>(handle))) found.push_back(device);
    }
    lock.lock();
  }
  return found;
}

void Stager::refuse_capture(Lock& lock, const Streams& streams) const {
  const std::vector<int> captured = captured_into_graphs(lock, streams);
  if (!captured.empty()) throw capture_refused(captured.front());
}

std::vector<std::shared_ptr<Flight>> Stager::order_behind_copies(Lock& lock, const Streams& streams) const {
  std::vector<std::shared_ptr<Flight>> left;
  for (size_t i = 0; i < lanes_.size(); ++i) {
    const Lane& lane = *lanes_[i];
    const std::vector<std::shared_ptr<Flight>> flights = lane.flights;
    const auto stream = streams.find(lane.context->device());
    if (flights.empty()) continue;
    if (stream == streams.end()) {
      std::copy_if(flights.begin(), flights.end(), std::back_inserter(left),
                   [](const auto& flight) { return flight->route != CopyRoute::kFromCache; });
      continue;
    }
    lock.unlock();
    const auto waiting = reinterpret_cast<cuda::StreamHandle>(stream->second);
    {
      const cuda::Current current(*lane.context);
      bool last_of_ours = true;  // on our stream, the last event stands for all
      for (auto it = flights.rbegin(); it != flights.rend(); ++it) {
        const Flight& flight = **it;
        if (flight.route == CopyRoute::kFromCache) continue;
        if (flight.event == nullptr) {
          left.push_back(*it);
        } else if (!flight.lazy || std::exchange(last_of_ours, false)) {
          flight.event->hold_back(waiting);
        }
      }
    }
    lock.lock();
  }
  return left;
}

// ---- Lanes -------------------------------------------------------------------------------------------------------

void Stager::run(Lane& lane) {
  std::optional<cuda::Current> current;
  std::optional<Error> failure;
  try {
    current.emplace(*lane.context);
  } catch (const Error& error) {
    failure = error;
  }
  {
    Lock lock(monitor_->mutex);
    lane.ready = !failure;
    lane.failure = failure;
    monitor_->changed.notify_all();
  }
  if (failure) return;
  run_on(::pthread_self(), cpus_near(sysfs(), lane.context->pci_id()));
  carry(lane);
}

void Stager::carry(Lane& lane) {
  double poll_s = kShortestPollS, next_look = 0;
  Lock lock(monitor_->mutex);
  for (;;) {
    look_after_cache(lock, lane, next_look);
    if (lane.land(lock)) poll_s = kShortestPollS;
    if (const std::shared_ptr<Flight> flight = claim(lane); flight != nullptr) {
      lock.unlock();
      enqueue(lane, flight);
      lock.lock();
      poll_s = kShortestPollS;
    } else if (!lane.flights.empty()) {
      monitor_->changed.wait_for(lock, std::chrono::duration<double>(poll_s));
      poll_s = std::min(2 * poll_s, kLongestPollS);
    } else if (stop_) {
      return;
    } else if (!lane.in_time()) {
      monitor_->changed.wait_for(lock, std::chrono::duration<double>(lane.next_at - monotonic_seconds()));
    } else if (lane.cache.size() > 0) {
      monitor_->changed.wait_for(lock, std::chrono::duration<double>(kLookS));
    } else {
      monitor_->changed.wait(lock);
    }
  }
}

// The training may need the memory between two saves as well.
void Stager::look_after_cache(Lock& lock, Lane& lane, double& next_look) {
  const bool has_begun = std::exchange(lane.has_begun, false);
  const double now = monotonic_seconds();
  if (stop_ || (!has_begun && (lane.cache.size() == 0 || now < next_look))) return;
  lock.unlock();
  if (has_begun) lane.cache.note_save(lane.context);
  lane.cache.give_back_if_scarce(*lane.context);
  lock.lock();
  next_look = now + kLookS;
}

std::shared_ptr<Flight> Stager::claim(Lane& lane) {
  std::shared_ptr<Flight> flight = claim(lane, true);
  if (flight != nullptr || !lane.in_time()) return flight;
  flight = claim(lane, false);
  if (flight != nullptr) lane.spend(flight->bytes);
  return flight;
}

// What leaves next, of the oldest job for which there is any: some chunks, with one event behind their copies.
// `urgent`: only what a fence waits for.
std::shared_ptr<Flight> Stager::claim(Lane& lane, bool urgent) {
  bool may_allocate = true;
  for (const auto& job : jobs_) {
    if (job->failed() || !job->has_device(lane.context->device()) || (urgent && job->fencing == 0)) continue;
    // What submit() copies itself gets its room first, so that training goes on; if there is not enough, we make some.
    if (!job->submitted && !job->waited_for_room) continue;
    const auto flight = std::make_shared<Flight>();
    flight->job = job;
    flight->device = lane.context->device();
    flight->stream = lane.stream->get();
    while (flight->bytes < kFlightBytes && (urgent || lane.window_open(*flight)) &&
           claim_chunk(*flight, urgent, may_allocate)) {
    }
    if (flight->chunks.empty()) continue;
    lane.flying_bytes += flight->bytes;
    lane.flying_copies += flight->copies;
    flight->take_off();
    return flight;
  }
  return nullptr;
}

// The next chunk in file order, if it has its span, or may have one: rather one of another job that has than one that must wait.
bool Stager::claim_chunk(Flight& flight, bool urgent, bool& may_allocate) {
  Job& job = *flight.job;
  DeviceProgress& progress = progress_of(job, flight.device);
  for (; progress.next < job.published; ++progress.next) {
    const DeviceShare* share = share_of(job.chunks[progress.next], flight.device);
    if (share != nullptr && !share->enqueued) break;
  }
  if (progress.next == job.published) return false;
  Chunk& chunk = job.chunks[progress.next];
  const auto cached = progress.cached.find(progress.next);
  const bool is_cached = cached != progress.cached.end();
  if (is_cached && (urgent || cached->second.written == nullptr)) return false;
  const CopyRoute route = is_cached ? CopyRoute::kFromCache : CopyRoute::kDirect;
  if (!flight.chunks.empty() && route != flight.route) return false;
  if (!chunk.bounce.valid() && !(may_allocate && reserve_.find_room(job, progress.next))) {
    may_allocate = false;
    return false;
  }
  FlightChunk next(progress.next++);
  flight.route = route;
  flight.bytes += chunk.device_lazy_bytes;
  flight.copies += chunk.device_copies.size();
  if (is_cached) {
    next.cache = reinterpret_cast<uintptr_t>(cached->second.span.begin()) - cached->second.first;
    next.after = cached->second.written;
  }
  flight.chunks.push_back(std::move(next));
  return true;
}

void Stager::enqueue(Lane& lane, const std::shared_ptr<Flight>& flight) {
  std::optional<Error> error;
  try {
    const auto ends = slab_ends();
    lane.launch(*flight, cuda::Route::kToHost, split_at_slabs(lane.copies_of(*flight), *ends),
                ends->empty() ? nullptr : &lane.in_batches);
  } catch (const std::exception& caught) {
    error = error_of(*flight->job, caught);
  }
  flight->deadline = monotonic_seconds() + flight->job->timeout_s;
  Lock lock(monitor_->mutex);
  book(lane, flight, error);
}

void Stager::book(Lane& lane, const std::shared_ptr<Flight>& flight, const std::optional<Error>& error) {
  Job& job = *flight->job;
  lane.flights.push_back(flight);
  job.stats.arena_pinned = pinned();
  job.stats.pin_failure = pin_failure_;
  if (error) job.fail(*error);
  if (flight->lazy) {
    for (const FlightChunk& each : flight->chunks) {
      share_of(job.chunks[each.index], lane.context->device())->enqueued = true;
      if (flight->route == CopyRoute::kDirect && !job.failed()) --job.uncaptured;
    }
    if (!job.failed()) job.note_captured();
  }
  monitor_->changed.notify_all();
}

}  // namespace lazyckpt
