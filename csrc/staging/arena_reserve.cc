#include "staging/arena_reserve.h"

#include <algorithm>
#include <utility>

namespace lazyckpt {

bool ArenaReserve::keep_room(size_t align) {
  keeps_room_ = true;
  if (align > room_align_) {
    room_align_ = align;
    room_.reset();
  }
  if (!room_.valid()) room_ = arena_.try_allocate(chunk_bytes_, room_align_, 0, for_devices_);
  return room_.valid();
}

Span ArenaReserve::try_allocate(size_t bytes, size_t align, bool from_device) {
  if (keeps_room_ && !keep_room(align)) return {};
  if (from_device) return arena_.try_allocate(bytes, align, 0, for_devices_);
  Span span = for_devices_ < arena_.size() ? arena_.try_allocate(bytes, align, for_devices_) : Span();
  return span.valid() ? std::move(span) : arena_.try_allocate(bytes, align);
}

void ArenaReserve::let_go() {
  keeps_room_ = false;
  room_.reset();
}

bool ArenaReserve::find_room(Job& job, size_t index) {
  Chunk& chunk = job.chunks[index];
  const size_t align = std::max<size_t>(Arena::kGranule, job.file->limits().memory_align);
  chunk.bounce = try_allocate(chunk.bounce_bytes, align, true);
  if (chunk.bounce.valid()) return true;
  const auto waits = [](const Chunk& other) { return other.device_lazy_bytes > 0 && !other.bounce.valid(); };
  for (size_t i = job.next; i < index; ++i) {
    if (waits(job.chunks[i])) return false;
  }
  chunk.bounce = room_.valid() ? std::move(room_) : arena_.try_allocate(chunk.bounce_bytes, align, 0, for_devices_);
  return chunk.bounce.valid();
}

}  // namespace lazyckpt
