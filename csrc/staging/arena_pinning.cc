// The stager's pinning of the arena, by a thread of its own, near the first device: it is the same memory for all of them. When the
// arena grows, what is new is pinned, too.
//
// It is pinned in slabs, from its beginning on. One registration of hundreds of GiB is refused, and large ones are now and then:
// a slab that is refused is tried at half its size. What is pinned serves at once; what is not serves the host's bytes alone. If
// nothing can be pinned, submit() copies what comes from devices itself, to memory that is not.
#include <pthread.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "base/signals.h"
#include "os/cpus.h"
#include "os/memory_node.h"
#include "staging/stager.h"

namespace lazyckpt {
namespace {

constexpr size_t kTouchStep = size_t{16} << 20;
constexpr size_t kFewestChunks = 4;  // what there must be room for, at the least

}  // namespace

void Stager::start_pinning(Lane& lane) {
  try {
    const SignalsBlocked blocked;
    pinner_ = std::thread([this, &lane] { pin_arena(lane); });
    pthread_setname_np(pinner_.native_handle(), "ckpt-pin");
  } catch (const std::system_error& error) {
    Lock lock(monitor_->mutex);
    end_pinning(0, std::string("cannot start the thread that pins the arena: ") + error.what());
  }
}

void Stager::pin_arena(Lane& lane) {
  std::optional<cuda::Current> current;
  try {
    current.emplace(*lane.context);
  } catch (const Error& error) {
    Lock lock(monitor_->mutex);
    return end_pinning(0, error.what());
  }
  const std::string pci_id = lane.context->pci_id();
  run_on(::pthread_self(), cpus_near(sysfs(), pci_id));
  const int node = numa_node_of(sysfs(), pci_id);
  if (node != kNoNode) arena_.prefer_node(node);  // refused, as in some containers: it is only slower
  for (size_t pinned = 0;;) {
    const size_t wanted = arena_.size();
    pinned = pin_up_to(lane, pinned, wanted);
    Lock lock(monitor_->mutex);
    end_pinning(pinned, pin_failure_);
    monitor_->changed.wait(lock, [&] { return stop_ || arena_.size() > wanted; });
    if (stop_) return;
    pinning_done_ = pinned < wanted;  // what was refused is not tried again
  }
}

// From `pinned` on, and returns what is pinned then.
size_t Stager::pin_up_to(Lane& lane, size_t pinned, size_t end) {
  const size_t smallest = options_.smallest_slab_bytes, fewest = std::max(smallest, kFewestChunks * options_.chunk_bytes);
  size_t slab = pinned == 0 ? fewest : options_.slab_bytes;  // the first is small, so that the first save need not wait long
  {
    Lock lock(monitor_->mutex);
    if (!pin_failure_.empty()) return pinned;
  }
  while (pinned < end) {
    const size_t least = pinned == 0 ? fewest : smallest;
    if (!pin_slab(lane, pinned, end, slab, std::min(least, end - pinned))) break;
    slab = pinned == 0 ? options_.slab_bytes : slab;
    pinned = slab_ends()->back();
  }
  return pinned;
}

// Requires the lock.
void Stager::end_pinning(size_t pinned, const std::string& failure) {
  if (pinned == 0) reserve_.set_for_devices(arena_.size());
  pin_failure_ = failure;
  pinning_done_ = true;
  monitor_->changed.notify_all();
}

// From `begin` on, and not beyond `end`: `bytes` of the arena, half of that where it is refused, and so on until it would be less than `least`. `bytes`
// becomes what was not refused. False if all was refused, or the engine ends.
bool Stager::pin_slab(Lane& lane, size_t begin, size_t end, size_t& bytes, size_t least) {
  bytes = std::min(bytes, end - begin);
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
