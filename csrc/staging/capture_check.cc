// The stager's way for submit() to look at the bytes of devices before they leave: all lazy ones, for Options.verify_capture, or
// some probes.
//
// They do not go through the arena, which may be full of bytes that leave only after the job in question. The copies are
// flights like others: the lane sees them end, fails the job at its deadline, and the job does not end before them.
#include <memory>
#include <utility>

#include "staging/stager.h"

namespace lazyckpt {

std::vector<std::shared_ptr<Flight>> Stager::fetch_lazy(const std::shared_ptr<Job>& job, size_t chunk,
                                                        const std::shared_ptr<cuda::HostMemory>& memory) {
  std::vector<std::shared_ptr<Flight>> flights;
  for (const DeviceShare& share : job->chunks[chunk].device_shares) {
    const auto flight = std::make_shared<Flight>();
    flight->job = job;
    flight->device = share.device;
    flight->chunks.emplace_back(chunk);
    flight->lazy = false;  // it is not on the lane's stream
    flight->route = CopyRoute::kToLook;
    flight->memory = memory;
    flight->stream = progress_of(*job, share.device).stream;
    look(flight);
    flights.push_back(flight);
  }
  return flights;
}

void Stager::look(const std::shared_ptr<Flight>& flight) {
  Job& job = *flight->job;
  std::vector<cuda::Copy> copies;
  for (const DeviceCopy& copy : job.chunks[flight->chunks.front().index].device_copies) {
    if (!copy.lazy || copy.device != flight->device) continue;
    const auto to = reinterpret_cast<cuda::Address>(flight->memory->begin() + copy.at);
    copies.push_back({to, reinterpret_cast<cuda::Address>(copy.source), copy.length});
  }
  Lock lock(monitor_->mutex);
  Lane& lane = *find_lane(flight->device);
  lock.unlock();
  launch_aside(lane, flight, copies);
}

// On the caller's stream, to memory that is not of the arena.
void Stager::launch_aside(Lane& lane, const std::shared_ptr<Flight>& flight, const std::vector<cuda::Copy>& copies) {
  Job& job = *flight->job;
  const cuda::Current current(*lane.context);
  Lock lock(monitor_->mutex);
  flight->take_off();
  lock.unlock();
  std::optional<Error> error;
  try {  // where pinning was refused, the driver waits for each copy, without a deadline
    lane.launch(*flight, cuda::Route::kToHost, copies, flight->memory->pinned() ? &lane.in_batches : nullptr);
  } catch (const std::exception& caught) {
    error = error_of(job, caught);
  }
  flight->deadline = monotonic_seconds() + job.timeout_s;
  lock.lock();
  lane.flights.push_back(flight);
  if (error) job.fail(*error);
  monitor_->changed.notify_all();
}

std::shared_ptr<cuda::HostMemory> Stager::lend_memory(int device) { return lend(spare_, device, options_.chunk_bytes); }

std::shared_ptr<cuda::HostMemory> Stager::lend(std::vector<std::shared_ptr<cuda::HostMemory>>& spare, int device, size_t bytes) {
  Lock lock(monitor_->mutex);
  if (!spare.empty()) {
    std::shared_ptr<cuda::HostMemory> memory = std::move(spare.back());
    spare.pop_back();
    return memory;
  }
  const Lane& lane = *find_lane(device);
  lock.unlock();
  const cuda::Current current(*lane.context);
  return std::make_shared<cuda::HostMemory>(lane.context, bytes);
}

void Stager::take_back(std::shared_ptr<cuda::HostMemory> memory) {
  Lock lock(monitor_->mutex);
  spare_.push_back(std::move(memory));
}

// ---- Probes ------------------------------------------------------------------------------------------------------

void Stager::record_probes(const std::shared_ptr<Job>& job) {
  DeviceProbes& probes = *job->probes;
  if (probes.all().empty()) return;
  probes.memory = lend(spare_for_probes_, job->devices.front().device, DeviceProbes::memory_bytes());
  if (!probes.memory->pinned()) {  // each copy would block the caller, and what cannot be pinned is not copied lazily anyway
    job->probes.reset();
    return;
  }
  for (const DeviceProgress& progress : job->devices) {
    std::vector<cuda::Copy> copies;
    for (const DeviceProbe& probe : probes.all()) {
      if (probe.device != progress.device) continue;
      const auto to = reinterpret_cast<cuda::Address>(probes.memory->begin() + probe.at);
      copies.push_back({to, reinterpret_cast<cuda::Address>(probe.source), probe.length});
    }
    if (copies.empty()) continue;
    const auto flight = std::make_shared<Flight>();
    flight->job = job;
    flight->device = progress.device;
    flight->lazy = false;  // it is not on the lane's stream
    flight->route = CopyRoute::kToProbe;
    flight->memory = probes.memory;
    flight->stream = progress.stream;
    Lock lock(monitor_->mutex);
    Lane& lane = *find_lane(progress.device);
    lock.unlock();
    launch_aside(lane, flight, copies);
  }
  Lock lock(monitor_->mutex);
  if (job->error && job->error->kind() == ErrorKind::kDevice) throw job->error->apart();
}

void Stager::take_back_probes(std::shared_ptr<cuda::HostMemory> memory) {
  if (memory == nullptr) return;
  Lock lock(monitor_->mutex);
  spare_for_probes_.push_back(std::move(memory));
}

}  // namespace lazyckpt
