// The engine: writer threads that carry chunks from memory to files, and the fence that makes what has not left yet safe.
//
//     submit()   caller   cut into chunks; copy small and eager bytes to the arena; publish the chunks
//     write      writers  claim chunks in file order: CRC-32 and a copy in one pass, fill in CRC fields, one pwritev each
//     fence()    caller   copy unclaimed lazy bytes to the arena, last chunk first; wait for the claimed ones
//     finish     writers  truncate to size, fdatasync, close: the job is durable under its temporary name
//
// Chunks of a file are claimed in order, so a writer that needs the CRC-32 of a record that began earlier waits only for
// threads that are already computing it. A failed job is dropped chunk by chunk, its file removed.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/device.h"
#include "format/file_spec.h"
#include "jobs/job.h"
#include "memory/arena.h"
#include "os/pieces.h"
#include "staging/arena_reserve.h"
#include "staging/stager.h"

namespace lazyckpt {

struct EngineOptions {
  size_t arena_bytes = size_t{1} << 30;
  size_t chunk_bytes = size_t{4} << 20;  // a power of two; made smaller where the arena holds fewer than four
  int writers = 4;
  std::string cuda_library = {};  // the CUDA driver, looked for when a device is first used; empty: the system's
  size_t device_cache_bytes = 0;  // spare memory that a fence may use on each device; see DeviceCache
  size_t device_window_bytes = size_t{64} << 20;  // what one device has to copy in the background at once, at most
  size_t pinned_slab_bytes = size_t{1} << 30, smallest_pinned_slab_bytes = size_t{64} << 20;  // of the arena
  bool device_batches = false;  // many copies by one call of the driver, where it can
  size_t device_rate = 0;  // bytes a second that leave each device while no fence waits, at most; 0: as many as can
  size_t most_arena_bytes = 0;  // to which it may grow; less than arena_bytes: it never does
};

// Called now and then by a waiting caller, without the lock; throws to give the wait up (a signal handler raised).
using Interrupt = std::function<void()>;

class Engine {
 public:
  explicit Engine(const EngineOptions& options);
  // Fails what is still in flight and joins the threads. Must not run in a forked child: see forked().
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // True in a child of the process that made the engine: its threads do not exist here and its locks may be held by
  // nobody, so nothing but this may be called, and the object must be leaked.
  bool forked() const;

  // Returns once everything that may change before the fence has been copied. Waits for room in the arena at most until
  // the deadline. A failure in the background is the job's; one on the caller's side is thrown, and fails the job too.
  std::shared_ptr<Job> submit(std::unique_ptr<WritableFile> file, FileSpec spec, const CaptureChecks& checks, double timeout_s,
                              const Interrupt& interrupt, const Streams& streams = {}, const ReuseRequest& reuse = {});

  // Returns once every job submitted so far is captured or has failed; a job that cannot be captured within the timeout
  // that it was submitted with is failed, which makes it safe to change its tensors too. Copies from devices are only known
  // to be enqueued then: the streams wait for them, and for those of a device that is not named, the host.
  void fence(const Interrupt& interrupt, const Streams& streams = {});

  // For fences behind that which has captured all: more streams, on which others compute, wait for the copies that are still
  // going on. One that is being captured into a graph is left out: what is recorded there is not done now. The host waits only
  // for copies without an event on the devices that are named, and for all where the stream is of another context than ours.
  void order(const Interrupt& interrupt, const Streams& streams);

  // Prepares for saves from these devices: else the first one does it.
  void open_devices(const std::vector<int>& devices);

  // Room for what saves from devices need, as far as the options allow. What is new is pinned in the background.
  void grow_arena(size_t bytes);

  // Refuses new jobs, then waits for those in flight; fails what the deadline leaves. Safe to call twice. False if a
  // writer is still inside a system call, or a device inside a copy, some seconds later: then joining may take for ever, and
  // the caller leaks.
  bool close(double timeout_s, const Interrupt& interrupt);

  size_t in_flight() const;
  const Arena& arena() const { return arena_; }
  bool arena_pinned() const;
  std::string pin_failure() const;  // why it is not, if that was tried
  std::vector<Stager::CacheState> device_caches() const;
  size_t chunk_bytes() const { return chunk_bytes_; }

 private:
  using Lock = std::unique_lock<std::mutex>;
  enum class Task { kPrepare, kWrite, kFinish };
  struct Claim {
    Task task;
    std::shared_ptr<Job> job;
    size_t chunk;
  };

  void start_threads(int writers);
  void stop_threads();
  void touch_arena();
  void write_jobs();
  bool try_claim(Claim& claim);  // requires the lock
  void prepare(Job& job);
  void write_chunk(Job& job, size_t index, WriterMemory& memory);
  bool account_captured(Job& job, Chunk& chunk);
  std::shared_ptr<Job> make_job(std::unique_ptr<WritableFile> file, FileSpec spec, const CaptureChecks& checks, double timeout_s,
                                ReuseRequest reuse);
  uint64_t share_unread(Job& job, Chunk& chunk);
  uint64_t write_all(Job& job, const Chunk& chunk, size_t index);
  void account_written(Job& job, Chunk& chunk, uint64_t from_tensors, uint64_t reused);  // requires the lock
  void add_word_sums(Job& job, const Chunk& chunk);
  void finish(const std::shared_ptr<Job>& job);

  void await_pinning(Lock& lock, const WritableFile& file, FileSpec& spec, double deadline, const Interrupt& interrupt);
  void begin_on_devices(Lock& lock, Job& job, const Streams& streams);
  void prepare_arena(Lock& lock, Job& job, double deadline, const Interrupt& interrupt);
  void publish_chunks(Lock& lock, const std::shared_ptr<Job>& job, double deadline, const Interrupt& interrupt);
  void copy_aside(const std::shared_ptr<Job>& job, size_t index, double deadline, const Interrupt& interrupt);
  bool checksum_on_devices(const std::shared_ptr<Job>& job, size_t index, double deadline, const Interrupt& interrupt);
  void await_landing(Lock& lock, const std::vector<std::shared_ptr<Flight>>& flights, const Interrupt& interrupt);
  void capture(Lock& lock, const std::shared_ptr<Job>& job, double deadline, const Interrupt& interrupt,
               const Streams& streams);
  void stage(Lock& lock, Job& job, Chunk& chunk, Span span);
  Span allocate(Lock& lock, Job& job, size_t bytes, bool from_device, double deadline, const Interrupt& interrupt,
                const std::function<bool()>& still_wanted);
  bool wait(Lock& lock, double deadline, const Interrupt& interrupt, const std::function<bool()>& done);

  const pid_t owner_;
  const size_t chunk_bytes_;
  Arena arena_;
  const std::shared_ptr<Monitor> monitor_;
  ArenaReserve reserve_;  // guarded by the monitor's mutex
  Stager stager_;

  // Guarded by monitor_->mutex:
  std::deque<std::shared_ptr<Job>> jobs_;  // in flight, oldest first
  bool closed_ = false;
  bool stop_ = false;

  std::once_flag placed_;  // threads_, near the first device
  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace lazyckpt
