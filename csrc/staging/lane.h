// A lane: one device at work for the stager, with a stream of its own, and the copies that are in flight there.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/device.h"
#include "base/error.h"
#include "cuda/driver.h"
#include "cuda/spare_memory.h"
#include "jobs/job.h"

namespace lazyckpt {

enum class CopyRoute : uint8_t {
  kDirect,     // from the caller's memory to the arena
  kToCache,    // from there to the cache: those of several chunks
  kToLook,     // from there to memory of the host's, where submit() looks at it
  kToProbe,    // from there to memory of the host's, with which a writer compares: see DeviceProbes
  kFromCache,  // and on to the arena
};

// A chunk in a flight to the arena.
struct FlightChunk {
  explicit FlightChunk(size_t chunk) : index(chunk) {}
  size_t index;
  uintptr_t cache = 0;  // kFromCache: the address that stands for the begin of the chunk's bounce
  std::shared_ptr<cuda::Event> after;  // and what the copies must come after
};

// Copies on one stream with one event behind them: those of one chunk, or, on the lane's stream, of several in file order.
struct Flight {
  // Requires the lock. From here on the job does not end before the flight has landed.
  void take_off();
  bool is_for_chunk() const { return route == CopyRoute::kDirect || route == CopyRoute::kFromCache; }

  std::shared_ptr<Job> job;
  int device = kHost;
  std::vector<FlightChunk> chunks;  // if it is for chunks, or kToLook
  bool lazy = true;
  CopyRoute route = CopyRoute::kDirect;
  size_t bytes = 0, copies = 0;  // on a lane's stream
  std::shared_ptr<cuda::HostMemory> memory;  // kToLook, kToProbe: where they go; stays until they have landed
  cuda::StreamHandle stream = nullptr;
  std::shared_ptr<cuda::Event> event;  // behind the copies; none if it could not be had: then the stream is looked at
  double deadline = 0;
  bool landed = false;  // guarded by the monitor's mutex, as all of it once the lane has it
};

struct LaneOptions {
  size_t chunk_bytes = 0;
  size_t cache_bytes = 0;   // of its device, at most
  size_t window_bytes = 0;  // what it has in its stream while no fence waits, at most; two chunks at least
  bool batches = false;     // many copies by one call of the driver, where it can
  size_t rate = 0;          // bytes a second that leave while no fence waits, at most; 0: as many as can
};

struct Lane {
  using Lock = std::unique_lock<std::mutex>;

  Lane(std::shared_ptr<Monitor> shared, std::shared_ptr<const cuda::Context> device, const LaneOptions& options);
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // Whether its stream may be given more than such a flight, which it has not got yet, besides what fences wait for. Requires
  // the lock.
  bool window_open(const Flight& next) const;
  // Whether it may give its stream something that no fence waits for, as far as the rate goes; and that it has. Require the lock.
  bool in_time() const { return rate == 0 || monotonic_seconds() >= next_at; }
  void spend(size_t bytes);
  // True if something has landed. Gives the lock up to ask the driver.
  bool land(Lock& lock);

  // These without the lock, and with the context current.

  // The copies of its chunks to the arena, or to their eager spans. Puts the flight's stream behind what they must come after.
  std::vector<cuda::Copy> copies_of(Flight& flight) const;
  // The copies, and an event behind them, even if one is refused: others may be on their way. `batches` as enqueue_copies()
  // has it; null where the memory is not pinned, since nothing is known of batches to such.
  void launch(Flight& flight, cuda::Route route, const std::vector<cuda::Copy>& copies, std::atomic<bool>* batches) const;

  const std::shared_ptr<Monitor> monitor;
  const std::shared_ptr<const cuda::Context> context;
  const size_t chunk_bytes, window_bytes, rate;
  const std::shared_ptr<cuda::EventPool> events;
  std::unique_ptr<const cuda::Stream> stream;
  DeviceCache cache;
  std::atomic<bool> in_batches;  // if wanted, until the driver refuses a batch of copies
  // Guarded by the monitor's mutex:
  bool has_begun = false;  // a save has, of which the cache is to know: jobs that begin before another has ended may be one
  bool has_ended = true;   // a job has, since one has begun here
  double next_at = 0;      // when the rate allows more
  size_t flying_bytes = 0, flying_copies = 0;  // lazy ones in its stream
  std::vector<std::shared_ptr<Flight>> flights;
  bool ready = false;            // its thread is in the context. One of this and the next comes to be
  std::optional<Error> failure;  // why its thread ends at once

  std::thread thread;  // last: it uses all of the above

 private:
  void account_landed(Flight& flight, const std::optional<Error>& error);  // requires the lock
};

DeviceProgress& progress_of(Job& job, int device);
DeviceShare* share_of(Chunk& chunk, int device);  // null if it has none
Error with_path(const Job& job, const Error& error);
Error error_of(const Job& job, const std::exception& caught);  // of one of ours, or of want of memory
Error landing_deadline(const Flight& flight);  // it has not landed in time

}  // namespace lazyckpt
