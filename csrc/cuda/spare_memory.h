// Spare memory of one device, where the fence puts what has not left for the host yet: a copy inside the device takes
// some twentieth of the time that one to the host takes.
//
// The block belongs to the training before it belongs to us: it is taken once, as large as allowed and never so that less
// than a reserve stays free; and it is given back for good, if the training has come to need the reserve.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>

#include "cuda/driver.h"
#include "memory/spans.h"

namespace lazyckpt {

class DeviceCache {
 public:
  // At most `limit_bytes`; fewer than a few chunks are not worth having. Zero: no cache.
  DeviceCache(size_t limit_bytes, size_t chunk_bytes) : limit_bytes_(limit_bytes), chunk_bytes_(chunk_bytes) {}
  DeviceCache(const DeviceCache&) = delete;
  DeviceCache& operator=(const DeviceCache&) = delete;

  // Takes the block, the first time, or gives it back if it is not in use and memory has become scarce. May wait for the
  // device: for a thread that nobody waits for, with the context current. Failures end in failure(), not in an error.
  void review(const std::shared_ptr<const cuda::Context>& context);

  // Device memory, whose address Span::begin() is; an invalid one if there is no room just now.
  Span try_allocate(size_t bytes);

  size_t size() const;
  size_t used() const;
  std::string failure() const;  // why there is no block, if it was wanted

 private:
  void take(const std::shared_ptr<const cuda::Context>& context);
  void give_back_if_scarce(const cuda::Context& context);
  void hold(std::unique_ptr<cuda::Memory> block, std::string failure);

  const size_t limit_bytes_, chunk_bytes_;
  bool reviewed_ = false;  // only review() looks at it

  mutable std::mutex mutex_;  // guards what follows
  std::unique_ptr<cuda::Memory> block_;
  std::unique_ptr<Ranges> ranges_;  // stays when the block goes
  std::string failure_;
};

}  // namespace lazyckpt
