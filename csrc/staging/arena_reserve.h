// Room in the arena that is kept back for what comes from devices.
//
// Fences and eager copies take spans for late chunks while early ones have none yet. So that these never starve, room for one
// chunk is kept back while device jobs are in flight; only the first chunk of a job that has no span may take it. Its
// predecessors have theirs and can be written, so that the room comes back; and lanes pass by a chunk that waits for room if
// behind it there is one that has it.
#pragma once

#include <cstddef>

#include "jobs/job.h"
#include "memory/arena.h"

namespace lazyckpt {

// What comes from devices only goes to the part of the arena that is pinned: bytes [0, pinned) of it. What comes from the host
// goes there when the rest is full.
//
// Guarded by the monitor's mutex: all of it requires the lock.
class ArenaReserve {
 public:
  ArenaReserve(Arena& arena, size_t chunk_bytes) : arena_(arena), chunk_bytes_(chunk_bytes) {}
  ArenaReserve(const ArenaReserve&) = delete;
  ArenaReserve& operator=(const ArenaReserve&) = delete;

  // False as long as there is no room to keep back for a job whose spans are aligned so.
  bool keep_room(size_t align);
  // Devices may have as much of the arena as this from now on; before that is known, none.
  void set_for_devices(size_t bytes) { for_devices_ = bytes; }
  // No job with device bytes is left.
  void let_go();

  // As Arena::try_allocate(), but for the room that is kept back.
  Span try_allocate(size_t bytes, size_t align, bool from_device);
  // For the bounce of a chunk, out of what is kept back if its turn has come.
  bool find_room(Job& job, size_t index);

 private:
  Arena& arena_;
  const size_t chunk_bytes_;
  size_t for_devices_ = 0;
  bool keeps_room_ = false;
  size_t room_align_ = Arena::kGranule;
  Span room_;  // what is kept back, unless it is in use
};

}  // namespace lazyckpt
