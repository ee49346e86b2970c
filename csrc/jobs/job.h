// A job: one file on its way to disk, from submit() to durable or failed.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/condition_variable.h"
#include "base/device.h"
#include "base/error.h"
#include "cuda/driver.h"
#include "format/file_spec.h"
#include "format/zip_layout.h"
#include "jobs/chunk.h"
#include "jobs/device_probes.h"
#include "jobs/reuse.h"
#include "jobs/witness.h"
#include "jobs/word_sum.h"
#include "memory/spans.h"
#include "os/file.h"

namespace lazyckpt {

// The one lock of an engine and its jobs. Work happens outside it; it is taken a few times for each chunk of some MiB.
struct Monitor {
  std::mutex mutex;
  std::condition_variable changed;  // any state below has moved
  // A job is captured, released, finished, or has failed. Who waits for that alone is not woken for each chunk: on a machine whose
  // cores are all busy, each time takes one of them from the training.
  std::condition_variable settled;
};

double monotonic_seconds();

// How a job looks whether the bytes that it has written are those of save().
struct CaptureChecks {
  bool verify = false;  // each lazy byte: a checksum inside submit(), and another of what was captured
  bool probe = false;   // some device bytes: see DeviceProbes
  bool sum = false;     // finds a sum of each record of a device, for the caller to compare: see word_sum.h
};

struct JobStats {
  uint64_t bytes_total = 0;
  uint64_t bytes_from_tensors = 0;     // that left the caller's memory by the hand of a writer: neither copied before, nor at a fence
  uint64_t bytes_copied_in_save = 0;   // copied to the arena by submit(), with structure and padding, but for what is left:
  uint64_t bytes_of_structure = 0;     // that writers take from where it was laid out
  uint64_t bytes_copied_at_fence = 0;  // of tensors
  double arena_wait_s = 0;  // the caller's time spent waiting for room in the arena: back-pressure
  double witness_s = 0;  // of submit(): spent on noting witnesses
  double fence_s = 0;       // the caller's time spent in fences while this job was uncaptured
  double captured_at = 0;   // CLOCK_MONOTONIC seconds; 0: not yet
  double written_at = 0;    // all bytes handed to the file system; what follows is its flush
  double flushed_at = 0;    // data durable, under the temporary name
  bool direct_io = false;
  uint64_t bytes_from_devices = 0;
  uint64_t device_cached_bytes = 0;  // of them, through the cache of their device
  bool arena_pinned = false;  // device copies went to pinned memory
  std::string pin_failure;    // why not
  uint64_t arena_bytes = 0;   // size of the arena when the job began
  uint64_t probed_bytes = 0;  // of devices, that were looked at in save(), and are the same in the file
  int changed_device = kHost;  // on which there were others
  uint64_t reused_bytes = 0;   // not written: the file shares them with the one before
  bool reuse_refused = false;  // its file system cannot do that
  uint64_t unread_bytes = 0;   // of those that are reused: not even looked at
  bool frozen_changed = false;  // the error is that of a record which was declared not to change
};

// The CRC-32s of the records and of the file, joined from the chunks' as they come, strictly in file order.
class CrcChain {
 public:
  explicit CrcChain(size_t records) : record_crcs_(records, 0) {}

  // Adds a chunk's record pieces. Chunks may come in any order; what has become contiguous is folded in.
  void add(std::vector<Chunk>& chunks, size_t index);
  // Blocks until all chunks before and including `index` are folded in; false if the job was given up meanwhile.
  bool wait_for(size_t index);
  void give_up();

  const std::vector<uint32_t>& record_crcs() const { return record_crcs_; }

 private:
  std::mutex mutex_;  // guards what follows; record_crcs_ may be read without it for records that have ended
  std::condition_variable advanced_;
  std::vector<uint32_t> record_crcs_;
  std::vector<bool> ready_;
  size_t folded_ = 0;
  bool given_up_ = false;
};

// The lazy bytes of a chunk that the fence has put into the cache of their device.
struct CachedShare {
  Span span;
  uint64_t first = 0;                    // span.begin() stands for this place in the chunk's bounce
  std::shared_ptr<cuda::Event> written;  // behind the copies to it; none as long as the fence is enqueuing them
};

// What a job has to do with one device. For the stager.
struct DeviceProgress {
  int device = kHost;
  cuda::StreamHandle stream = nullptr;  // of the caller, at submit()
  std::unique_ptr<cuda::Event> before;  // what that stream had been given then: it wrote the lazy bytes
  bool ordered = false;                 // our stream waits for that
  // Guarded by monitor->mutex:
  size_t next = 0;  // chunks [0, next) need nothing more from the device
  size_t cached_from = std::numeric_limits<size_t>::max();  // the fence has put those from here on into the cache
  std::map<size_t, CachedShare> cached;  // by chunk; until they have landed, or their job has ended
};

// Of what a job has written, and, where the file is shared, of the records that others write a part of.
struct Checksums {
  uint32_t written = 0;
  std::vector<uint32_t> pieces;  // of each `piece_bytes` of it, so that parts of the file can be verified
  uint64_t piece_bytes = 0;
  RecordPart only_read, last_written;
};

enum class Phase : uint8_t { kNew, kPreparing, kWriting, kFinishing, kFinished };

struct Job {
  Job(std::shared_ptr<Monitor> shared, std::unique_ptr<WritableFile> target, FileSpec description, size_t chunk_bytes,
      const CaptureChecks& how, double capture_timeout_s);

  const std::shared_ptr<Monitor> monitor;
  const std::unique_ptr<WritableFile> file;
  FileSpec spec;  // constant; emptied at the end
  const ByteRange range;  // of the file: what this job writes
  const ByteRange fields;  // indices: the CRC fields in it
  std::vector<uint32_t> field_records;  // their records: the checksums that this job finds
  std::vector<ByteRange> archives;  // of a file of several: where each lies. Of who has submitted it
  std::vector<uint64_t> payloads;   // and where each record does
  std::shared_ptr<const ZipLayout> layout;  // kept where the file is shared: its directory is written later
  const CaptureChecks checks;
  const double timeout_s;  // the longest that a fence waits for it
  CrcChain crcs;
  std::vector<DeviceProgress> devices;  // one for each device with bytes in the file; ascending; emptied at the end
  std::vector<Chunk> chunks;  // a chunk belongs to whoever moved its state to kStaging or kWriting
  std::optional<Witnesses> witnesses;  // of all lazy bytes on the host, unless `verify` looks at each of them anyway
  std::optional<DeviceProbes> probes;
  std::unique_ptr<Reuse> reuse;  // until it is finished, if that is wanted
  std::vector<uint32_t> doubted;  // records that were declared not to change and look otherwise. Of who has submitted it

  // Guarded by monitor->mutex:
  Phase phase = Phase::kNew;
  size_t published = 0;    // chunks [0, published) may be claimed
  size_t next = 0;         // chunks [0, next) have been claimed, in file order
  size_t done = 0;         // chunks on disk
  size_t active = 0;       // threads (writers, submitter, fence) inside one of its chunks or its file
  size_t uncaptured = 0;   // chunks whose lazy host bytes are still only in the tensors, and shares of devices not enqueued
  size_t probing = 0;      // copies of the probes that have not been seen to end
  std::vector<WordSum> word_sums;  // one for each record, if they are wanted
  size_t flying = 0;       // batches of copies from the caller's device memory that have not been seen to end
  size_t fencing = 0;      // fences that wait for it
  bool submitted = false;  // submit() has published its last chunk, or given up
  bool waited_for_room = false;  // its chunks are more than the arena holds just now
  std::optional<Error> error;  // the first one
  Checksums checksums;  // once finished
  std::shared_ptr<Baseline> baseline;  // for the next one, once finished; whoever publishes it takes it
  JobStats stats;

  void note_witnesses();
  Checksums sum_up() const;  // when all chunks are done
  // For who holds the chunk: throws if its lazy bytes are others now. What the fence has copied is looked at by whoever waits for it.
  void look_at_witnesses(size_t chunk) const;
  // The same for the device bytes of a chunk that is complete: waits for its probes, and throws if one is others than at
  // submit(). False if the job fails meanwhile.
  bool look_at_probes(size_t chunk);

  // All of these require the lock. Of failed(), captured(), released() and finished(), monitor->settled tells when they become true.
  bool failed() const { return error.has_value(); }
  bool has_device(int device) const;
  // What the fences of the caller promise: work enqueued behind them may write to device memory, although copies from it may
  // still be going on. Only when all is released may the memory be freed.
  bool captured() const { return submitted && uncaptured == 0; }
  bool released() const { return captured() && flying == 0; }
  bool finished() const { return phase == Phase::kFinished; }
  void note_captured();
  void fail(const Error& first_error);
};

Error deadline_error(const Job& job, const std::string& what, double waited_s);
Error changed_error(const Job& job, uint32_t record);

// A fence looks at a job, which does not finish meanwhile, so that its chunks stay. Comes and goes with the lock; takes it
// back where an interrupted wait has left it.
class FenceVisit {
 public:
  // `hurries` is 1 if lanes are to put off what this fence does not wait for.
  FenceVisit(std::unique_lock<std::mutex>& lock, Job& job, size_t hurries = 0) : lock_(lock), job_(job), hurries_(hurries) {
    ++job_.active;
    job_.fencing += hurries_;
    job_.monitor->changed.notify_all();
  }
  ~FenceVisit() {
    if (!lock_.owns_lock()) lock_.lock();
    --job_.active;
    job_.fencing -= hurries_;
    job_.stats.fence_s += monotonic_seconds() - begin_;
    job_.monitor->changed.notify_all();
  }
  FenceVisit(const FenceVisit&) = delete;
  FenceVisit& operator=(const FenceVisit&) = delete;

 private:
  std::unique_lock<std::mutex>& lock_;
  Job& job_;
  const size_t hurries_;
  const double begin_ = monotonic_seconds();
};

}  // namespace lazyckpt
