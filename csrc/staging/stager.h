// The stager: carries the bytes of devices to the arena, one thread and one stream for each device.
//
//     submit()   caller   eager bytes: copied on the caller's own stream, which puts them before whatever follows there
//     enqueue    lane     lazy bytes, in file order: a span (back-pressure), the copies, an event behind them
//     land       lane     looks whether events have happened; a chunk that has all its bytes may be written
//     fence()    caller   the streams that compute wait for the events of what is in flight; the host does not
//
// With a cache on the device (DeviceCache) the fence has less to wait for:
//
//     fence()    caller   what no lane has claimed yet is copied to the cache, from the last chunk on, on the stream that
//                         computes, which puts it before whatever follows there
//     enqueue    lane     the same chunks, from the cache, when their turn comes: nobody waits for them any more
//
// A lane keeps only so much in its stream as keeps it busy, until a fence waits. What is there comes before the copies of
// everybody else: devices copy in the order in which they are asked, whatever the priority of a stream. So loss.item() would
// wait for it; and with a cache the stream that computes does.
//
// A lane never blocks in the driver while it can help it: it asks (cuEventQuery) rather than waits, so that a device that
// hangs leaves threads that can be told so, and jobs that fail at their deadline. The memory of a copy in flight, on both
// sides, stays as it is until the copy has ended: a job that fails meanwhile ends after it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/device.h"
#include "cuda/driver.h"
#include "jobs/job.h"
#include "memory/arena.h"
#include "staging/arena_reserve.h"
#include "staging/lane.h"

namespace lazyckpt {

struct StagerOptions {
  size_t chunk_bytes = 0;
  std::string driver;      // the path of libcuda; empty: the system's
  size_t cache_bytes = 0;  // of each device, at most
  size_t window_bytes = 0;  // what a lane has in its stream while no fence waits, at most; two chunks at least
  size_t slab_bytes = 0, smallest_slab_bytes = 0;  // of the arena, that are pinned at once; at most, and at least
  bool batches = false;  // as LaneOptions
  size_t rate = 0;
};

class Stager {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // Nothing is loaded or started before the first use of a device.
  Stager(std::shared_ptr<Monitor> monitor, Arena& arena, ArenaReserve& reserve, StagerOptions options);
  ~Stager();  // after stop() and join()
  Stager(const Stager&) = delete;
  Stager& operator=(const Stager&) = delete;

  // ---- without the lock ----

  // Starts the lanes of these devices and, in the background, the pinning of the arena.
  void open(const std::vector<int>& devices);
  // The processors near the first device, as cpus_near() lists them; nothing before it is open.
  std::optional<std::string> cpus_near_first() const;
  // Before the job is published: what its streams have been given so far comes before its lazy copies.
  void begin(Job& job, const Streams& streams);
  // For submit(), so that it can look at lazy bytes: enqueues copies of a chunk's to where they lie in its bounce, but in
  // `memory` instead of that, on the caller's streams. Returns what must land; the memory stays as long.
  std::vector<std::shared_ptr<Flight>> fetch_lazy(const std::shared_ptr<Job>& job, size_t chunk,
                                                  const std::shared_ptr<cuda::HostMemory>& memory);
  // Memory for that, of the chunk size; to be given back when all has landed.
  std::shared_ptr<cuda::HostMemory> lend_memory(int device);
  void take_back(std::shared_ptr<cuda::HostMemory> memory);
  // For submit(): enqueues the copies of the job's probes, on the caller's streams. Without pinned memory for them there are none.
  void record_probes(const std::shared_ptr<Job>& job);
  void take_back_probes(std::shared_ptr<cuda::HostMemory> memory);  // when its job has ended; may be null
  // Enqueues the eager copies of a chunk, whose spans are there, on the caller's streams.
  void copy_eager(const std::shared_ptr<Job>& job, size_t chunk);
  void join();

  // ---- these require the lock ----

  void add(const std::shared_ptr<Job>& job);
  void remove(const std::shared_ptr<Job>& job);
  bool idle() const { return jobs_.empty(); }
  void stop() { stop_ = true; }

  // Whether it is known if any of the arena can be pinned: until then nothing is copied to it.
  bool pinning_known() const { return pinning_done_ || pinned(); }
  bool pinned() const { return !registrations_.empty(); }  // some of it, or all
  bool all_pinned() const { return pinning_done_ && pinned() && pin_failure_.empty(); }
  const std::string& pin_failure() const { return pin_failure_; }

  // The block of each device's cache, how much of it is in use, and why there is none.
  struct CacheState {
    int device = kHost;
    size_t bytes = 0, used = 0;
    std::string failure;
  };
  std::vector<CacheState> caches() const;

  // Without those that belong to other contexts than ours, which cannot be told to wait. Gives the lock up meanwhile, as do the
  // next ones.
  Streams without_foreign(Lock& lock, const Streams& streams) const;
  // Those devices whose streams are being captured into graphs.
  std::vector<int> captured_into_graphs(Lock& lock, const Streams& streams) const;
  // Throws if there is one.
  void refuse_capture(Lock& lock, const Streams& streams) const;
  // For a fence: puts what these devices still have to enqueue for the job into their caches, as far as there is room, by
  // copies on these streams. A copy that fails is the job's failure. The caller keeps the job from ending.
  void cache_rest(Lock& lock, const std::shared_ptr<Job>& job, const Streams& streams);
  // Lets the streams wait for all copies in flight on their devices. Returns what the host must wait for instead: copies on
  // a device that is not named, or without an event.
  std::vector<std::shared_ptr<Flight>> order_behind_copies(Lock& lock, const Streams& streams) const;

 private:
  Lane& open_lane(int device);
  Lane* find_lane(int device) const;  // requires the lock
  void run(Lane& lane);
  void carry(Lane& lane);
  void look_after_cache(Lock& lock, Lane& lane, double& next_look);
  void start_pinning(Lane& lane);  // without the lock, as the next ones
  void pin_arena(Lane& lane);
  size_t pin_up_to(Lane& lane, size_t pinned, size_t end);
  void end_pinning(size_t pinned, const std::string& failure);
  bool pin_slab(Lane& lane, size_t begin, size_t end, size_t& bytes, size_t least);
  void note_slab(std::unique_ptr<cuda::HostRegistration> slab, size_t end);
  std::vector<cuda::Copy> split_at_slabs(const std::vector<cuda::Copy>& copies, const std::vector<size_t>& ends) const;
  std::shared_ptr<const std::vector<size_t>> slab_ends() const;
  std::shared_ptr<Flight> claim(Lane& lane);                            // requires the lock, as the next ones
  std::shared_ptr<Flight> claim(Lane& lane, bool urgent);
  bool claim_chunk(Flight& flight, bool urgent, bool& may_allocate);
  void enqueue(Lane& lane, const std::shared_ptr<Flight>& flight);      // without it
  void look(const std::shared_ptr<Flight>& flight);                     // without it
  void launch_aside(Lane& lane, const std::shared_ptr<Flight>& flight, const std::vector<cuda::Copy>& copies);  // without it
  std::shared_ptr<cuda::HostMemory> lend(std::vector<std::shared_ptr<cuda::HostMemory>>& spare, int device, size_t bytes);
  void book(Lane& lane, const std::shared_ptr<Flight>& flight, const std::optional<Error>& error);  // requires the lock

  // To the cache: see to_spare_memory.cc.
  struct CachePlace {
    size_t chunk = 0, bytes = 0;
    uintptr_t base = 0;  // as Flight::cache
  };
  using CacheBatch = std::vector<CachePlace>;
  bool cache_batch(Lock& lock, Lane& lane, const std::shared_ptr<Job>& job, cuda::StreamHandle stream);
  CacheBatch reserve_cache(Lane& lane, Job& job);  // requires the lock
  void copy_to_cache(Lane& lane, Flight& flight, const CacheBatch& batch);  // without it
  void book_cached(Lane& lane, const std::shared_ptr<Flight>& flight, const CacheBatch& batch,
                   const std::optional<Error>& error);  // requires the lock

  const std::shared_ptr<Monitor> monitor_;
  Arena& arena_;
  ArenaReserve& reserve_;
  const StagerOptions options_;

  std::mutex open_mutex_;  // guards driver_, and one opening at a time; taken before the monitor's
  std::shared_ptr<const cuda::Driver> driver_;

  // Guarded by monitor_->mutex:
  std::deque<std::shared_ptr<Job>> jobs_;  // with device bytes, oldest first
  bool pinning_done_ = false, stop_ = false;
  std::string pin_failure_;
  std::vector<std::unique_ptr<Lane>> lanes_;  // grows only
  std::vector<std::shared_ptr<cuda::HostMemory>> spare_, spare_for_probes_;  // to lend
  std::shared_ptr<const std::vector<size_t>> slab_ends_ = std::make_shared<std::vector<size_t>>();  // of what is pinned, ascending
  std::vector<std::unique_ptr<cuda::HostRegistration>> registrations_;  // they go before the contexts

  std::thread pinner_;  // last: it uses all of the above
};

}  // namespace lazyckpt
