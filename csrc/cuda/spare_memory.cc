#include "cuda/spare_memory.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace lazyckpt {
namespace {

constexpr int kTakenAtSave = 2;
constexpr size_t kFewestChunks = 4;
constexpr size_t kGranule = 512;  // what cuMemAlloc aligns to, and the unit in which devices copy fastest
constexpr size_t kSmallestReserve = size_t{512} << 20;
constexpr size_t kReserveFraction = 20;

// What must stay free: the training's allocator asks for more in the middle of a step.
size_t reserve_of(size_t total) { return std::max(total / kReserveFraction, kSmallestReserve); }

std::string mib(size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

std::string scarce(const char* what, const cuda::Context& context, const cuda::MemoryLevel& level) {
  return std::string(what) + " on CUDA device " + std::to_string(context.device()) + ": " + mib(level.free) +
         " are free, and " + mib(reserve_of(level.total)) + " of them are left to the training; choose a smaller device_cache, "
         "or none";
}

}  // namespace

template <typename Act>
void DeviceCache::keep_failure(Act act) {
  try {
    act();
  } catch (const Error& error) {  // what there is stays as it is
    std::lock_guard<std::mutex> lock(mutex_);
    failure_ = error.what();
  }
}

void DeviceCache::note_save(const std::shared_ptr<const cuda::Context>& context) {
  if (limit_bytes_ == 0 || saves_ == kTakenAtSave || ++saves_ < kTakenAtSave) return;
  keep_failure([&] { take(context); });
}

void DeviceCache::give_back_if_scarce(const cuda::Context& context) {
  if (size() > 0) keep_failure([&] { give_back(context); });
}

void DeviceCache::take(const std::shared_ptr<const cuda::Context>& context) {
  const cuda::MemoryLevel level = context->memory_level();
  const size_t reserve = reserve_of(level.total), fewest = kFewestChunks * chunk_bytes_;
  const size_t spare = level.free > reserve ? level.free - reserve : 0;
  size_t bytes = std::min(limit_bytes_, spare) / kGranule * kGranule;
  if (spare < fewest) return hold(nullptr, scarce("there is no memory for the cache", *context, level));
  std::optional<Error> refused;
  for (; bytes >= fewest; bytes = bytes / 2 / kGranule * kGranule) {
    try {
      return hold(std::make_unique<cuda::Memory>(context, bytes), "");
    } catch (const Error& error) {
      refused = error;
    }
  }
  hold(nullptr, refused ? refused->what() : "device_cache is less than the " + mib(fewest) + " that would be of use");
}

void DeviceCache::give_back(const cuda::Context& context) {
  const cuda::MemoryLevel level = context.memory_level();
  if (level.free >= reserve_of(level.total)) return;
  std::unique_ptr<cuda::Memory> block;  // it goes without the lock
  std::lock_guard<std::mutex> lock(mutex_);
  if (ranges_->used() > 0) return;
  block = std::move(block_);
  failure_ = scarce("the cache was given back", context, level);
}

void DeviceCache::hold(std::unique_ptr<cuda::Memory> block, std::string failure) {
  std::lock_guard<std::mutex> lock(mutex_);
  block_ = std::move(block);
  failure_ = std::move(failure);
  if (block_ == nullptr) return;
  ranges_ = std::make_unique<Ranges>(reinterpret_cast<std::byte*>(block_->address()), block_->size(), kGranule);
}

Span DeviceCache::try_allocate(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  return block_ != nullptr ? ranges_->try_allocate(bytes, kGranule) : Span();
}

size_t DeviceCache::size() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return block_ != nullptr ? block_->size() : 0;
}

size_t DeviceCache::used() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return ranges_ != nullptr ? ranges_->used() : 0;
}

std::string DeviceCache::failure() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

}  // namespace lazyckpt
