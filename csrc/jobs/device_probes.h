// A net below the promise that device bytes leave as they were at save(): some of those that will leave last are copied aside on
// the caller's own stream, inside save(), and compared with what is written.
//
// What leaves last is what a step that comes too early would reach first. A stream that nobody has put behind the copies, a graph
// that is replayed, a device that does not keep the order of its streams: each shows as a probe whose bytes are others. It costs
// the caller's stream sixteen copies, 4 MiB at most; a write to a part of a tensor may miss every probe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/driver.h"
#include "jobs/chunk.h"

namespace lazyckpt {

struct DeviceProbe {
  size_t chunk = 0;
  uint64_t offset = 0;  // in the file
  size_t length = 0;
  const std::byte* source = nullptr;  // on the device
  int device = kHost;
  uint32_t record = kStructure;
  size_t at = 0;  // in the memory of the probes
};

class DeviceProbes {
 public:
  static constexpr size_t kMost = 16;
  static constexpr size_t kBytes = size_t{256} << 10;  // of each, at most
  static constexpr size_t memory_bytes() { return kMost * kBytes; }

  // Chooses them, from the last chunk with device bytes on. Other places each time, so that nobody's writes miss them for ever.
  DeviceProbes(const std::vector<Chunk>& chunks, const FileSpec& spec);

  const std::vector<DeviceProbe>& all() const { return probes_; }
  bool covers(size_t chunk) const;
  size_t bytes() const;
  // The first of the chunk, whose bytes are all there, that is not what was recorded; null if there is none.
  const DeviceProbe* find_changed(const Chunk& chunk, size_t index) const;

  std::shared_ptr<cuda::HostMemory> memory;  // where they are recorded; set before the first copy

 private:
  struct Run;
  void choose_in(const Chunk& chunk, size_t index, const FileSpec& spec, size_t count, uint64_t& random);
  void choose_in(const Run& run, size_t index, size_t count, uint64_t& random);

  std::vector<DeviceProbe> probes_;
};

}  // namespace lazyckpt
