#include "staging/lane.h"

#include <algorithm>
#include <string>
#include <utility>

namespace lazyckpt {
namespace {

constexpr size_t kWindowWithCache = size_t{32} << 20;  // less: the stream that computes waits for it at each fence

// A stream holds about a thousand calls; whoever makes one more waits in the driver, with its locks held.
constexpr size_t kMostCopies = 512;

// True if it is over, in which case `error` is set if the copy failed. Without the lock.
bool is_over(const Flight& flight, const cuda::Table& table, std::optional<Error>& error) {
  if (flight.event == nullptr) return table.stream_query(flight.stream) != cuda::kNotReady;
  try {
    return flight.event->has_happened();
  } catch (const Error& caught) {
    error = with_path(*flight.job, caught);
    return true;
  }
}

}  // namespace

DeviceProgress& progress_of(Job& job, int device) {
  const auto is_of = [&](const DeviceProgress& progress) { return progress.device == device; };
  return *std::find_if(job.devices.begin(), job.devices.end(), is_of);
}

DeviceShare* share_of(Chunk& chunk, int device) {
  for (DeviceShare& share : chunk.device_shares) {
    if (share.device == device) return &share;
  }
  return nullptr;
}

Error with_path(const Job& job, const Error& error) {
  return Error(error.kind(), "'" + job.file->path() + "': " + error.what(), error.code());
}

Error error_of(const Job& job, const std::exception& caught) {
  if (const auto* error = dynamic_cast<const Error*>(&caught)) return with_path(job, *error);
  return with_path(job, Error(ErrorKind::kDevice, std::string("copying from a device failed: ") + caught.what()));
}

Error landing_deadline(const Flight& flight) {
  return Error(ErrorKind::kDeadline,
               "a copy to '" + flight.job->file->path() + "' from " + cuda::place_of(flight.device) + " did not end within " +
                   std::to_string(flight.job->timeout_s) +
                   " s; the device hangs, or is busy with what was enqueued before: raise the timeout, or see nvidia-smi",
               0, flight.job->file->path());
}

void Flight::take_off() {
  ++job->active;
  if (route != CopyRoute::kFromCache) ++job->flying;
  if (route == CopyRoute::kToProbe) ++job->probing;
  if (!is_for_chunk()) return;
  for (const FlightChunk& each : chunks) ++job->chunks[each.index].flying;
}

Lane::Lane(std::shared_ptr<Monitor> shared, std::shared_ptr<const cuda::Context> device, const LaneOptions& options)
    : monitor(std::move(shared)), context(std::move(device)), chunk_bytes(options.chunk_bytes),
      window_bytes(std::max(options.window_bytes, 2 * options.chunk_bytes)), rate(options.rate), events(std::make_shared<cuda::EventPool>(context)),
      cache(options.cache_bytes, options.chunk_bytes),
      in_batches(options.batches) {
  const cuda::Current current(*context);
  stream = std::make_unique<const cuda::Stream>(context);
}

void Lane::spend(size_t bytes) {
  if (rate > 0) next_at = std::max(next_at, monotonic_seconds()) + static_cast<double>(bytes) / static_cast<double>(rate);
}

bool Lane::land(Lock& lock) {
  if (flights.empty()) return false;
  std::vector<std::shared_ptr<Flight>> looked_at = flights;
  lock.unlock();
  std::vector<std::pair<std::shared_ptr<Flight>, std::optional<Error>>> over;
  std::vector<cuda::StreamHandle> busy;
  for (const auto& flight : looked_at) {
    if (std::find(busy.begin(), busy.end(), flight->stream) != busy.end()) continue;
    std::optional<Error> error;
    if (is_over(*flight, context->table(), error)) {
      over.emplace_back(flight, std::move(error));
    } else {
      busy.push_back(flight->stream);
    }
  }
  lock.lock();
  for (const auto& [flight, error] : over) {
    account_landed(*flight, error);
    flights.erase(std::find(flights.begin(), flights.end(), flight));
  }
  const double now = monotonic_seconds();
  for (const auto& flight : flights) {
    if (now > flight->deadline && !flight->job->failed()) flight->job->fail(landing_deadline(*flight));
  }
  if (over.empty()) return false;
  monitor->changed.notify_all();
  monitor->settled.notify_all();
  lock.unlock();
  looked_at.clear();
  over.clear();  // events go without the lock
  lock.lock();
  return true;
}

void Lane::account_landed(Flight& flight, const std::optional<Error>& error) {
  Job& job = *flight.job;
  flight.landed = true;
  flying_bytes -= flight.bytes;
  flying_copies -= flight.copies;
  if (flight.route != CopyRoute::kFromCache) --job.flying;
  if (flight.route == CopyRoute::kToProbe) --job.probing;
  --job.active;
  if (error) job.fail(*error);
  if (!flight.is_for_chunk()) return;
  for (const FlightChunk& each : flight.chunks) {
    Chunk& chunk = job.chunks[each.index];
    --chunk.flying;
    if (job.failed()) continue;
    if (flight.route == CopyRoute::kFromCache) progress_of(job, context->device()).cached.erase(each.index);
    chunk.settle();
  }
}

// As much as keeps the stream busy until we look again: with copies that take longer than the shortest pause between two
// looks, a look comes at the latest when twice the time of one copy has gone by, and two or more are in the window.
bool Lane::window_open(const Flight& next) const {
  const size_t most = cache.size() > 0 ? std::min(window_bytes, std::max(kWindowWithCache, 2 * chunk_bytes)) : window_bytes;
  const size_t bytes = flying_bytes + next.bytes, copies = flying_copies + next.copies;
  return bytes == 0 || (bytes + chunk_bytes <= most && copies < kMostCopies);
}

std::vector<cuda::Copy> Lane::copies_of(Flight& flight) const {
  Job& job = *flight.job;
  DeviceProgress& progress = progress_of(job, context->device());
  if (flight.lazy && !std::exchange(progress.ordered, true)) progress.before->hold_back(flight.stream);
  std::vector<cuda::Copy> copies;
  std::shared_ptr<cuda::Event> after;
  for (const FlightChunk& each : flight.chunks) {
    const Chunk& chunk = job.chunks[each.index];
    if (each.after != nullptr && each.after != after) each.after->hold_back(flight.stream);
    after = each.after;
    std::byte* base = !flight.lazy && chunk.has_eager_span() ? chunk.eager_span.begin() : chunk.bounce.begin();
    for (const DeviceCopy& copy : chunk.device_copies) {
      if (copy.lazy != flight.lazy || copy.device != progress.device) continue;
      const bool cached = flight.route == CopyRoute::kFromCache;
      const auto from = cached ? cuda::Address{each.cache + copy.at} : reinterpret_cast<cuda::Address>(copy.source);
      copies.push_back({reinterpret_cast<cuda::Address>(base + copy.at), from, copy.length});
    }
  }
  return copies;
}

void Lane::launch(Flight& flight, cuda::Route route, const std::vector<cuda::Copy>& copies, std::atomic<bool>* batches) const {
  auto event = std::make_shared<cuda::Event>(events);
  std::optional<Error> refused;
  try {
    cuda::enqueue_copies(*context, route, copies, flight.stream, batches);
  } catch (const Error& error) {
    refused = error;
  }
  try {
    event->record(flight.stream);
    flight.event = std::move(event);
  } catch (const Error&) {  // then the stream is looked at
    if (!refused) throw;
  }
  if (refused) throw *refused;
}

}  // namespace lazyckpt
