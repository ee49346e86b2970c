#include "cuda/upload.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <thread>
#include <utility>

#include "base/error.h"

namespace lazyckpt {
namespace {

constexpr auto kShortestPoll = std::chrono::microseconds(20), kLongestPoll = std::chrono::microseconds(500);

}  // namespace

// ---- Uplinks -----------------------------------------------------------------------------------------------------

Uplinks::Uplinks(const std::string& driver, const std::vector<int>& devices, const Streams& streams) {
  const auto loaded = std::make_shared<const cuda::Driver>(driver);
  for (const int device : devices) {
    const auto stream = streams.find(device);
    if (stream == streams.end()) {
      throw Error(ErrorKind::kDevice, "no stream was given for " + cuda::place_of(device) + "; give its current stream");
    }
    const auto handle = reinterpret_cast<cuda::StreamHandle>(stream->second);
    auto link = std::make_unique<Link>();
    link->context = std::make_shared<const cuda::Context>(loaded, device);
    if (link->context->is_foreign(handle)) throw cuda::foreign_refused(device);
    const cuda::Current current(*link->context);
    if (link->context->is_capturing(handle)) throw cuda::capture_refused(device, "load outside of captures");
    link->stream = std::make_unique<cuda::Stream>(link->context);
    const cuda::Event before(link->context);
    before.record(handle);
    before.hold_back(link->stream->get());
    links_[device] = std::move(link);
  }
}

// ---- UploadRing --------------------------------------------------------------------------------------------------

UploadRing::UploadRing(std::shared_ptr<Uplinks> links, size_t buffer_bytes, size_t align)
    : links_(std::move(links)), buffer_bytes_(buffer_bytes), align_(align) {}

UploadRing::~UploadRing() {
  for (Buffer& buffer : buffers_) {
    try {
      land(buffer);
    } catch (...) {  // who wanted to know what has failed has asked
    }
  }
}

std::byte* UploadRing::next() {
  turn_ = (turn_ + 1) % buffers_.size();
  Buffer& buffer = buffers_[turn_];
  land(buffer);
  if (buffer.memory == nullptr) make(buffer);
  return buffer.begin;
}

void UploadRing::add(int device, std::byte* to, const std::byte* from, size_t bytes) {
  gathered_[device].push_back({reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from), bytes});
}

void UploadRing::send() {
  for (auto& [device, copies] : gathered_) {
    if (copies.empty()) continue;
    launch(buffers_[turn_], device, copies);
    copies.clear();
  }
}

void UploadRing::finish() {
  for (Buffer& buffer : buffers_) land(buffer);
}

// Pinned for all devices, by way of the context of one.
void UploadRing::make(Buffer& buffer) {
  Uplinks::Link& link = links_->any();
  const cuda::Current current(*link.context);
  buffer.memory = std::make_unique<cuda::HostMemory>(link.context, buffer_bytes_ + align_);
  const auto address = reinterpret_cast<uintptr_t>(buffer.memory->begin());
  buffer.begin = buffer.memory->begin() + ((address + align_ - 1) / align_ * align_ - address);
}

void UploadRing::launch(Buffer& buffer, int device, const std::vector<cuda::Copy>& copies) {
  Uplinks::Link& link = links_->at(device);
  const cuda::Current current(*link.context);
  Flight& flight = buffer.flights[device];
  if (flight.event == nullptr) flight.event = std::make_unique<cuda::Event>(link.context);
  flight.marked = false;
  flight.flying = true;  // also if a copy is refused: others may be on their way
  cuda::enqueue_copies(*link.context, cuda::Route::kFromHost, copies, link.stream->get());
  flight.event->record(link.stream->get());
  flight.marked = true;
}

bool UploadRing::is_over(int device, Flight& flight) {
  const Uplinks::Link& link = links_->at(device);
  std::optional<cuda::Current> current;
  try {
    current.emplace(*link.context);
  } catch (const Error&) {  // nobody was asked: the copies may still be on their way
    return false;
  }
  if (!flight.marked) return link.context->table().stream_query(link.stream->get()) != cuda::kNotReady;
  return flight.event->has_happened();
}

// Waits for the copies out of the buffer; throws what the first has failed with, when all have ended.
void UploadRing::land(Buffer& buffer) {
  std::exception_ptr failure;
  for (auto& [device, flight] : buffer.flights) {
    for (auto pause = kShortestPoll; flight.flying; pause = std::min(2 * pause, kLongestPoll)) {
      try {
        flight.flying = !is_over(device, flight);
      } catch (...) {  // it has ended, too
        flight.flying = false;
        if (!failure) failure = std::current_exception();
      }
      if (flight.flying) std::this_thread::sleep_for(pause);
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace lazyckpt
