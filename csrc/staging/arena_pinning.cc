// The stager's pinning of the arena, once, by the first lane: it is the same memory for all devices, near the first of them.
// Without it copies are right, but hold up who enqueues them.
#include <memory>
#include <string>
#include <utility>

#include "os/memory_node.h"
#include "staging/stager.h"

namespace lazyckpt {
namespace {

constexpr size_t kTouchStep = size_t{16} << 20;

}  // namespace

void Stager::pin_arena(Lane& lane) {
  if (!lane.pins_arena) {
    Lock lock(monitor_->mutex);
    monitor_->changed.wait(lock, [&] { return pinning_done_ || stop_; });
    return;
  }
  const int node = numa_node_of(sysfs(), lane.context->pci_id());
  if (node != kNoNode) arena_.prefer_node(node);  // refused, as in some containers: it is only slower
  for (size_t from = 0; from < arena_.size(); from += kTouchStep) {
    {
      Lock lock(monitor_->mutex);
      if (stop_) return;
    }
    arena_.touch(from, kTouchStep);
  }
  std::unique_ptr<cuda::HostRegistration> made;
  std::string failure;
  try {
    made = std::make_unique<cuda::HostRegistration>(lane.context, arena_.base(), arena_.size());
  } catch (const Error& error) {
    failure = error.what();
  }
  Lock lock(monitor_->mutex);
  registration_ = std::move(made);
  pin_failure_ = std::move(failure);
  pinning_done_ = true;
  monitor_->changed.notify_all();
}

bool Stager::is_pinned() const {
  Lock lock(monitor_->mutex);
  return pinned();
}

}  // namespace lazyckpt
