// The stager's pinning of the arena, once, by the first lane: it is the same memory for all devices, near the first of them.
//
// It is pinned in slabs, from its beginning on. One registration of hundreds of GiB is refused, and large ones are now and then:
// a slab that is refused is tried at half its size. What is pinned serves at once; what is not serves the host's bytes alone. If
// nothing can be pinned, submit() copies what comes from devices itself, to memory that is not.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "os/memory_node.h"
#include "staging/stager.h"

namespace lazyckpt {
namespace {

constexpr size_t kTouchStep = size_t{16} << 20;
constexpr size_t kFewestChunks = 4;  // what there must be room for, at the least

}  // namespace

void Stager::pin_arena(Lane& lane) {
  if (!lane.pins_arena) {
    Lock lock(monitor_->mutex);
    monitor_->changed.wait(lock, [&] { return pinning_known() || stop_; });
    return;
  }
  const int node = numa_node_of(sysfs(), lane.context->pci_id());
  if (node != kNoNode) arena_.prefer_node(node);  // refused, as in some containers: it is only slower
  const size_t smallest = options_.smallest_slab_bytes, fewest = std::max(smallest, kFewestChunks * options_.chunk_bytes);
  size_t pinned = 0, slab = fewest;  // the first is small, so that the first save need not wait long
  while (pinned < arena_.size()) {
    const size_t least = pinned == 0 ? fewest : smallest;
    if (!pin_slab(lane, pinned, slab, std::min(least, arena_.size() - pinned))) break;
    slab = pinned == 0 ? options_.slab_bytes : slab;
    Lock lock(monitor_->mutex);
    pinned = slab_ends_->back();
  }
  Lock lock(monitor_->mutex);
  if (pinned == 0) reserve_.set_for_devices(arena_.size());
  pinning_done_ = true;
  monitor_->changed.notify_all();
}

// From `begin` on: `bytes` of the arena, half of that where it is refused, and so on until it would be less than `least`. `bytes`
// becomes what was not refused. False if all was refused, or the engine ends.
bool Stager::pin_slab(Lane& lane, size_t begin, size_t& bytes, size_t least) {
  bytes = std::min(bytes, arena_.size() - begin);
  for (;; bytes = bytes / 2 / Arena::kGranule * Arena::kGranule) {
    for (size_t from = begin; from < begin + bytes; from += kTouchStep) {
      {
        Lock lock(monitor_->mutex);
        if (stop_) return false;
      }
      arena_.touch(from, std::min(kTouchStep, begin + bytes - from));
    }
    try {
      auto made = std::make_unique<cuda::HostRegistration>(lane.context, arena_.base() + begin, bytes);
      note_slab(std::move(made), begin + bytes);
      return true;
    } catch (const Error& error) {
      if (bytes / 2 >= least) continue;
      Lock lock(monitor_->mutex);
      pin_failure_ = error.what();
      return false;
    }
  }
}

void Stager::note_slab(std::unique_ptr<cuda::HostRegistration> slab, size_t end) {
  Lock lock(monitor_->mutex);
  registrations_.push_back(std::move(slab));
  auto ends = std::make_shared<std::vector<size_t>>(*slab_ends_);
  ends->push_back(end);
  slab_ends_ = std::move(ends);
  reserve_.set_for_devices(end);
  monitor_->changed.notify_all();
}

// As copies none of which reaches from one slab into the next.
std::vector<cuda::Copy> Stager::split_at_slabs(const std::vector<cuda::Copy>& copies, const std::vector<size_t>& ends) const {
  const auto base = reinterpret_cast<cuda::Address>(arena_.base());
  std::vector<cuda::Copy> split;
  split.reserve(copies.size());
  for (cuda::Copy rest : copies) {
    for (auto end = std::upper_bound(ends.begin(), ends.end(), rest.to - base); end != ends.end(); ++end) {
      const size_t room = base + *end - rest.to;
      if (room >= rest.bytes) break;
      split.push_back({rest.to, rest.from, room});
      rest = {rest.to + room, rest.from + room, rest.bytes - room};
    }
    split.push_back(rest);
  }
  return split;
}

std::shared_ptr<const std::vector<size_t>> Stager::slab_ends() const {
  Lock lock(monitor_->mutex);
  return slab_ends_;
}

}  // namespace lazyckpt
