// A model of the CUDA driver that holds its callers to what NVIDIA's documentation promises, and to nothing beyond.
//
// It is a library with the driver's symbols. "Device memory" is host memory: that which cuMemAlloc gives out, and that of
// which a test tells (fake_declare). Work is done by a thread of the model's own, stream by stream, one operation at a time on
// each engine of a device, as soon as all that it is ordered behind has been done. So bytes move as they would, and files are
// right.
//
// Whether two accesses to memory race does not hang on when they are done. Each stream and each thread of the host is a
// component of a vector clock; an operation begins with the clock of its stream and of the thread that enqueues it, events
// carry clocks from stream to stream, and waits and successful queries carry them to threads. Of two accesses to the same
// bytes, one of them a write, the later one must know of the earlier one; else fake_violations() tells of both.
//
// What it cannot see, and what it supposes instead:
// - What the host does with memory by itself: reading a pinned buffer before its copy has ended, writing it while one reads it.
//   A test can tell of its own (fake_touch). The target of a copy to the host is poisoned until the copy is done.
// - How threads of the host tell each other what they have learned (locks, queues, joins). For copies, and for the end of
//   memory, it is supposed that what one thread has learned from the driver all know. For kernels, which are what trains, it is
//   not: a kernel is ordered by streams, events and its own thread's waits alone, unless the test says that its thread has been
//   told (fake_learn). Where it says so, a missing order is found only while no thread has seen the copies end: hold them.
// - Memory handed from one tensor to the next by an allocator: a test tells of it as of new memory.
//
// Not in the documentation, and supposed: which calls are "potentially unsafe" during a capture (it names cudaMalloc; here also
// whatever frees, registers or unregisters memory, and whatever asks or waits for events, streams and contexts), that a copy to
// memory which is registered in part is refused, and that pages are registered once.
#include <cstdint>

#include "controls.h"

using strict::Address;
using strict::Call;
using strict::Context;
using strict::Event;
using strict::Needs;
using strict::Operation;
using strict::Range;
using strict::run_call;
using strict::State;
using strict::Stream;
using strict::StreamHandle;
using strict::Transfer;

#define DRIVER extern "C" __attribute__((visibility("default"))) int

// ---- the driver, devices, contexts -----------------------------------------------------------------------------------

DRIVER cuInit(unsigned flags) {
  return run_call("cuInit", Needs::kNothing, [&](Call& call) -> int {
    if (flags != 0) return strict::kInvalidValue;
    call.s.is_initialized = true;
    return 0;
  });
}

DRIVER cuDriverGetVersion(int* version) {
  return run_call("cuDriverGetVersion", Needs::kNothing, [&](Call&) -> int {
    if (version == nullptr) return strict::kInvalidValue;
#ifdef WITHOUT_BATCHES
    *version = 12040;
#else
    *version = 12080;
#endif
    return 0;
  });
}

DRIVER cuDeviceGetCount(int* count) {
  return run_call("cuDeviceGetCount", Needs::kDriver, [&](Call& call) -> int {
    *count = call.s.devices;
    return 0;
  });
}

DRIVER cuDeviceGet(int* device, int ordinal) {
  return run_call("cuDeviceGet", Needs::kDriver, [&](Call& call) -> int {
    if (ordinal < 0 || ordinal >= call.s.devices) return strict::kInvalidDevice;
    *device = ordinal;
    return 0;
  });
}

DRIVER cuDeviceGetPCIBusId(char* text, int length, int device) {
  return run_call("cuDeviceGetPCIBusId", Needs::kDriver, [&](Call& call) -> int {
    if (device < 0 || device >= call.s.devices) return strict::kInvalidDevice;
    if (text == nullptr || length < 13) return strict::kInvalidValue;
    std::snprintf(text, static_cast<size_t>(length), "0000:%02X:00.0", 0x3a + device);
    return 0;
  });
}

DRIVER cuDevicePrimaryCtxRetain(Context** handle, int device) {
  return run_call("cuDevicePrimaryCtxRetain", Needs::kDriver, [&](Call& call) -> int {
    if (device < 0 || device >= strict::kMostDevices) return strict::kInvalidDevice;
    Context& context = call.s.contexts[device];
    if (context.references++ == 0) strict::begin_context(call.s, context, device);
    *handle = &context;
    return 0;
  });
}

// The last one ends the context, and all that was made in it.
DRIVER cuDevicePrimaryCtxRelease_v2(int device) {
  return run_call("cuDevicePrimaryCtxRelease", Needs::kDriver, [&](Call& call) -> int {
    State& s = call.s;
    if (device < 0 || device >= strict::kMostDevices) return strict::kInvalidDevice;
    Context& context = s.contexts[device];
    if (context.references == 0) return strict::kInvalidContext;
    if (--context.references > 0) return 0;
    context.of_threads.clear();
    for (Stream* stream : s.streams) stream->is_destroyed = stream->is_destroyed || stream->context == &context;
    for (Event* event : s.events) event->is_destroyed = event->is_destroyed || event->context == &context;
    std::vector<Address> allocations, registrations;
    for (const auto& [begin, memory] : s.device_memory)
      if (memory.is_allocated && memory.device == device) allocations.push_back(begin);
    for (const auto& [begin, memory] : s.registrations)
      if (memory.context == &context) registrations.push_back(begin);
    for (const Address begin : allocations) strict::give_back(s, begin);
    for (const Address begin : registrations)
      strict::unregister_memory(s, call.name, begin, s.registrations[begin].owned != nullptr);
    return 0;
  });
}

DRIVER cuCtxSetCurrent(Context* context) {
  return run_call("cuCtxSetCurrent", Needs::kDriver, [&](Call& call) -> int {
    const bool known = call.s.context_handles.count(context) != 0;
    if (context != nullptr && (!known || context->references == 0)) return strict::kInvalidContext;
    strict::this_thread().current = context;
    return 0;
  });
}

DRIVER cuCtxGetCurrent(Context** context) {
  return run_call("cuCtxGetCurrent", Needs::kDriver, [&](Call&) -> int {
    *context = strict::this_thread().current;
    return 0;
  });
}

DRIVER cuCtxGetDevice(int* device) {
  return run_call("cuCtxGetDevice", Needs::kContext, [&](Call& call) -> int {
    if (device == nullptr) return strict::kInvalidValue;
    *device = call.context->device;
    return 0;
  });
}

DRIVER cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return run_call("cuCtxGetStreamPriorityRange", Needs::kContext, [&](Call&) -> int {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return 0;
  });
}

DRIVER cuCtxSynchronize() {
  return run_call("cuCtxSynchronize", Needs::kContext, [&](Call& call) -> int {
    if (const int code = strict::check_unsafe(call)) return code;
    strict::Knowledge all;
    std::vector<std::pair<Stream*, uint64_t>> waits;
    for (Stream* stream : call.s.streams) {
      if (stream->context != call.context) continue;
      all.join(stream->clock);
      waits.emplace_back(stream, stream->position);
    }
    call.driver.unlock();
    for (const auto& [stream, position] : waits) strict::wait_for(call.s, call.lock, *stream, position);
    strict::learn(call.s, all);
    return call.context->error;
  });
}

// ---- streams ---------------------------------------------------------------------------------------------------------

DRIVER cuStreamCreateWithPriority(StreamHandle* handle, unsigned flags, int priority) {
  return run_call("cuStreamCreate", Needs::kContext, [&](Call& call) -> int {
    if (handle == nullptr || flags > 1) return strict::kInvalidValue;
    *handle = strict::new_stream(call.s, *call.context, flags == 0);
    (*handle)->is_given_out = true;
    ++call.s.counts[priority >= 0 ? "streams of the lowest priority" : "streams of another priority"];
    return 0;
  });
}

// What was enqueued is still done.
DRIVER cuStreamDestroy_v2(StreamHandle handle) {
  return run_call("cuStreamDestroy", Needs::kContextEvenBroken, [&](Call& call) -> int {
    if (reinterpret_cast<uintptr_t>(handle) <= strict::kPerThreadHandle) return strict::kInvalidHandle;
    Stream* stream = nullptr;
    const int code = strict::stream_at(call, handle, stream);
    if (stream != nullptr) stream->is_destroyed = true;
    return code;
  });
}

DRIVER cuStreamQuery(StreamHandle handle) {
  return run_call("cuStreamQuery", Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (const int code = strict::check_wait(call, *stream)) return code;
    if (const int code = strict::check_unsafe(call)) return code;
    if (!strict::is_done(call.s, *stream, stream->position)) return strict::kNotReady;
    strict::learn(call.s, stream->clock);
    return 0;
  });
}

DRIVER cuStreamSynchronize(StreamHandle handle) {
  return run_call("cuStreamSynchronize", Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (const int code = strict::check_wait(call, *stream)) return code;
    if (const int code = strict::check_unsafe(call)) return code;
    const strict::Knowledge clock = stream->clock;
    call.driver.unlock();
    strict::wait_for(call.s, call.lock, *stream, stream->position);
    strict::learn(call.s, clock);
    return stream->context->error;
  });
}

// By the handle of a default stream the calling thread means that of its current context.
DRIVER cuStreamGetCtx(StreamHandle handle, Context** context) {
  const bool is_default = reinterpret_cast<uintptr_t>(handle) <= strict::kPerThreadHandle;
  return run_call("cuStreamGetCtx", is_default ? Needs::kContext : Needs::kDriver, [&](Call& call) -> int {
    if (context == nullptr) return strict::kInvalidValue;
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    *context = stream->context;
    return 0;
  });
}

DRIVER cuStreamIsCapturing(StreamHandle handle, int* status) {
  return run_call("cuStreamIsCapturing", Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    strict::Capture* captured = nullptr;
    if (strict::is_implicitly_captured(call.s, *stream, &captured)) return strict::kCaptureImplicit;  // which harms no capture
    *status = stream->capture == nullptr ? 0 : stream->capture->is_invalid ? 2 : 1;
    return 0;
  });
}

DRIVER cuStreamBeginCapture_v2(StreamHandle handle, int mode) {
  return run_call("cuStreamBeginCapture", Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    return strict::begin_capture(call, *stream, mode);
  });
}

// The graph stays with the stream: see fake_replay.
DRIVER cuStreamEndCapture(StreamHandle handle, void** graph) {
  return run_call("cuStreamEndCapture", Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (graph != nullptr) *graph = nullptr;
    return strict::end_capture(call, *stream);
  });
}

DRIVER cuThreadExchangeStreamCaptureMode(int* mode) {
  return run_call("cuThreadExchangeStreamCaptureMode", Needs::kDriver, [&](Call&) -> int {
    if (mode == nullptr || *mode < strict::kGlobal || *mode > strict::kRelaxed) return strict::kInvalidValue;
    std::swap(*mode, strict::this_thread().capture_mode);
    return 0;
  });
}

// ---- events ----------------------------------------------------------------------------------------------------------

DRIVER cuEventCreate(Event** handle, unsigned flags) {
  return run_call("cuEventCreate", Needs::kContext, [&](Call& call) -> int {
    if (handle == nullptr || flags > 7) return strict::kInvalidValue;
    *handle = strict::new_event(call.s, *call.context);
    return 0;
  });
}

DRIVER cuEventDestroy_v2(Event* handle) {
  return run_call("cuEventDestroy", Needs::kContextEvenBroken, [&](Call& call) -> int {
    Event* event = nullptr;
    if (const int code = strict::event_at(call, handle, event)) return code;
    event->is_destroyed = true;
    return 0;
  });
}

DRIVER cuEventRecord(Event* event_handle, StreamHandle handle) {
  return run_call("cuEventRecord", Needs::kContext, [&](Call& call) -> int {
    Event* event = nullptr;
    Stream* stream = nullptr;
    if (const int code = strict::event_at(call, event_handle, event)) return code;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (event->context != stream->context) return strict::kInvalidHandle;
    if (const int code = strict::check_enqueue(call, *stream)) return code;
    event->stream = stream;
    event->capture = stream->capture;
    if (stream->capture != nullptr) return 0;
    Operation mark;
    mark.call = call.name;
    strict::enqueue(call.s, *stream, std::move(mark));
    event->position = stream->position;
    event->clock = stream->clock;
    return 0;
  });
}

DRIVER cuStreamWaitEvent(StreamHandle handle, Event* event_handle, unsigned flags) {
  return run_call("cuStreamWaitEvent", Needs::kContext, [&](Call& call) -> int {
    Event* event = nullptr;
    Stream* stream = nullptr;
    if (const int code = strict::event_at(call, event_handle, event)) return code;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (flags > 1) return strict::kInvalidValue;
    if (const int code = strict::check_enqueue(call, *stream)) return code;
    if (stream->capture != nullptr) {
      const bool inside = event->capture == stream->capture;
      return inside ? 0 : strict::invalidate(call, *stream->capture, strict::kCaptureIsolation);
    }
    if (event->capture != nullptr) {
      if (call.s.captures.count(event->capture) == 0) return strict::kCapturedEvent;
      stream->capture = event->capture;  // it becomes part of that
      return 0;
    }
    if (event->stream == nullptr) return 0;
    Operation mark;
    mark.call = call.name;
    if (call.s.order != strict::Order::kWithoutWaits) mark.waits.raise(event->stream->component, event->position);
    stream->clock.join(event->clock);
    strict::enqueue(call.s, *stream, std::move(mark));
    return 0;
  });
}

namespace {

int check_event(Call& call, const Event& event) {
  if (event.context->error != 0) return event.context->error;
  if (event.capture != nullptr) {
    const bool goes_on = call.s.captures.count(event.capture) != 0;
    return goes_on ? strict::invalidate(call, *event.capture, strict::kCapturedEvent) : strict::kCapturedEvent;
  }
  return strict::check_unsafe(call);
}

}  // namespace

DRIVER cuEventQuery(Event* handle) {
  return run_call("cuEventQuery", Needs::kContext, [&](Call& call) -> int {
    Event* event = nullptr;
    if (const int code = strict::event_at(call, handle, event)) return code;
    if (const int code = check_event(call, *event)) return code;
    if (event->stream == nullptr) return 0;
    if (!strict::is_done(call.s, *event->stream, event->position)) return strict::kNotReady;
    strict::learn(call.s, event->clock);
    return 0;
  });
}

DRIVER cuEventSynchronize(Event* handle) {
  return run_call("cuEventSynchronize", Needs::kContext, [&](Call& call) -> int {
    Event* event = nullptr;
    if (const int code = strict::event_at(call, handle, event)) return code;
    if (const int code = check_event(call, *event)) return code;
    if (event->stream == nullptr) return 0;
    const strict::Knowledge clock = event->clock;
    call.driver.unlock();
    strict::wait_for(call.s, call.lock, *event->stream, event->position);
    strict::learn(call.s, clock);
    return event->context->error;
  });
}

// ---- memory ----------------------------------------------------------------------------------------------------------

DRIVER cuMemAlloc_v2(Address* address, size_t bytes) {
  return run_call("cuMemAlloc", Needs::kContext, [&](Call& call) -> int {
    if (const int code = strict::check_unsafe(call)) return code;
    return strict::allocate(call.s, *call.context, bytes, address);
  });
}

DRIVER cuMemFree_v2(Address address) {
  return run_call("cuMemFree", Needs::kContextEvenBroken, [&](Call& call) -> int {
    if (const int code = strict::check_unsafe(call)) return code;
    return strict::give_back(call.s, address);
  });
}

DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
  return run_call("cuMemGetInfo", Needs::kContext, [&](Call& call) -> int {
    const size_t taken = call.s.memory_of_others[call.context->device] + call.context->taken;
    *total = call.s.memory_total;
    *free = taken < *total ? *total - taken : 0;
    return 0;
  });
}

DRIVER cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
  return run_call("cuMemHostAlloc", Needs::kContext, [&](Call& call) -> int {
    if (memory == nullptr || bytes == 0 || flags > 7) return strict::kInvalidValue;
    if (const int code = strict::check_unsafe(call)) return code;
    const size_t whole = (bytes + strict::kPage - 1) / strict::kPage * strict::kPage;
    std::shared_ptr<char> owned(static_cast<char*>(std::aligned_alloc(strict::kPage, whole)), std::free);
    if (owned == nullptr) return strict::kOutOfMemory;
    *memory = owned.get();
    return strict::register_memory(call.s, *call.context, {reinterpret_cast<Address>(*memory), bytes}, owned);
  });
}

DRIVER cuMemFreeHost(void* memory) {
  return run_call("cuMemFreeHost", Needs::kContextEvenBroken, [&](Call& call) -> int {
    if (const int code = strict::check_unsafe(call)) return code;
    return strict::unregister_memory(call.s, call.name, reinterpret_cast<Address>(memory), true);
  });
}

DRIVER cuMemHostRegister_v2(void* begin, size_t bytes, unsigned flags) {
  return run_call("cuMemHostRegister", Needs::kContext, [&](Call& call) -> int {
    if (flags > 15) return strict::kInvalidValue;
    if (const int code = strict::check_unsafe(call)) return code;
    return strict::register_memory(call.s, *call.context, {reinterpret_cast<Address>(begin), bytes}, nullptr);
  });
}

DRIVER cuMemHostUnregister(void* begin) {
  return run_call("cuMemHostUnregister", Needs::kContextEvenBroken, [&](Call& call) -> int {
    if (const int code = strict::check_unsafe(call)) return code;
    return strict::unregister_memory(call.s, call.name, reinterpret_cast<Address>(begin), false);
  });
}

DRIVER cuMemGetAddressRange_v2(Address* begin, size_t* bytes, Address address) {
  return run_call("cuMemGetAddressRange", Needs::kContext, [&](Call& call) -> int {
    const auto found = strict::entry_at(call.s.device_memory, address);
    if (found == call.s.device_memory.end()) return strict::kInvalidValue;
    if (begin != nullptr) *begin = found->second.range.begin;
    if (bytes != nullptr) *bytes = found->second.range.bytes;
    return 0;
  });
}

DRIVER cuPointerGetAttribute(void* value, int attribute, Address address) {
  return run_call("cuPointerGetAttribute", Needs::kContext, [&](Call& call) -> int {
    enum { kContextOf = 1, kType = 2, kDevicePointer = 3, kId = 7, kOrdinal = 9, kBegin = 11, kSize = 12 };
    const auto on_device = strict::entry_at(call.s.device_memory, address);
    const auto on_host = strict::entry_at(call.s.registrations, address);
    const bool is_device = on_device != call.s.device_memory.end();
    if (value == nullptr || (!is_device && on_host == call.s.registrations.end())) return strict::kInvalidValue;
    const Range range = is_device ? on_device->second.range : on_host->second.range;
    Context* const context = is_device ? &call.s.contexts[on_device->second.device] : on_host->second.context;
    switch (attribute) {
      case kContextOf: *static_cast<Context**>(value) = context; return 0;
      case kType: *static_cast<unsigned*>(value) = is_device ? 2 : 1; return 0;
      case kDevicePointer: *static_cast<Address*>(value) = address; return 0;
      case kId: *static_cast<unsigned long long*>(value) = is_device ? on_device->second.id : range.begin; return 0;
      case kOrdinal: *static_cast<int*>(value) = context->device; return 0;
      case kBegin: *static_cast<Address*>(value) = range.begin; return 0;
      case kSize: *static_cast<size_t*>(value) = range.bytes; return 0;
      default: return strict::kInvalidValue;
    }
  });
}

#include "copies.h"
#ifndef WITHOUT_BATCHES
#include "batches.h"
#endif
#include "errors.h"
