// Spare memory of one device, where the fence puts what has not left for the host yet: a copy inside the device takes
// some twentieth of the time that one to the host takes.
//
// The block belongs to the training before it belongs to us. It is taken once, when the second save begins: by then the training
// has been through a whole iteration since the first, and its allocator keeps what it needs at its peak. It is as large as
// allowed, and never so that less than a reserve stays free; and it is given back for good as soon as the reserve is touched.
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

  // These may wait for the device: for a thread that nobody waits for, with the context current. Failures end in failure(), not
  // in an error.
  void note_save(const std::shared_ptr<const cuda::Context>& context);  // takes the block, at the second
  // Gives the block back if memory has become scarce and it is not in use. To be called often: the training may allocate any time.
  void give_back_if_scarce(const cuda::Context& context);

  // Device memory, whose address Span::begin() is; an invalid one if there is no room just now.
  Span try_allocate(size_t bytes);

  size_t size() const;
  size_t used() const;
  std::string failure() const;  // why there is no block, if it was wanted

 private:
  void take(const std::shared_ptr<const cuda::Context>& context);
  void give_back(const cuda::Context& context);
  template <typename Act>
  void keep_failure(Act act);
  void hold(std::unique_ptr<cuda::Memory> block, std::string failure);

  const size_t limit_bytes_, chunk_bytes_;
  int saves_ = 0;  // until the block is taken; only note_save() looks at it

  mutable std::mutex mutex_;  // guards what follows
  std::unique_ptr<cuda::Memory> block_;
  std::unique_ptr<Ranges> ranges_;  // stays when the block goes
  std::string failure_;
};

}  // namespace lazyckpt
