// The stager's way for Options.verify_capture: submit() looks at the lazy bytes of devices before they leave.
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
  Lock lock(monitor_->mutex);
  Lane& lane = *find_lane(flight->device);
  lock.unlock();
  const cuda::Current current(*lane.context);
  std::vector<cuda::Copy> copies;
  for (const DeviceCopy& copy : job.chunks[flight->chunks.front().index].device_copies) {
    if (!copy.lazy || copy.device != flight->device) continue;
    const auto to = reinterpret_cast<cuda::Address>(flight->memory->begin() + copy.at);
    copies.push_back({to, reinterpret_cast<cuda::Address>(copy.source), copy.length});
  }
  lock.lock();
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

std::shared_ptr<cuda::HostMemory> Stager::lend_memory(int device) {
  Lock lock(monitor_->mutex);
  if (!spare_.empty()) {
    std::shared_ptr<cuda::HostMemory> memory = std::move(spare_.back());
    spare_.pop_back();
    return memory;
  }
  const Lane& lane = *find_lane(device);
  lock.unlock();
  const cuda::Current current(*lane.context);
  return std::make_shared<cuda::HostMemory>(lane.context, options_.chunk_bytes);
}

void Stager::take_back(std::shared_ptr<cuda::HostMemory> memory) {
  Lock lock(monitor_->mutex);
  spare_.push_back(std::move(memory));
}

}  // namespace lazyckpt
