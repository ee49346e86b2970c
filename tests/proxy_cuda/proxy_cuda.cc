// A CUDA driver that has another one do all the work, and checks meanwhile what it is asked to do: with the books and the rules of
// the strict model (tests/strict_cuda/), which it tells of as that does, by fake_violations(). So they hold on real devices, too.
//
// LAZYCKPT_PROXIED_DRIVER names the driver behind it; else it is what PROXIED_DRIVER was when this was built, the system's if
// nothing. LAZYCKPT_PROXY_TRACE names a file for the calls, which tests/devices/replay_trace.py plays to another driver.
//
// It sees the calls of the library alone. What others do with the device, torch above all, it does not see: their kernels, their
// captures, what they wait for. It asks the driver about their streams and memory when it meets them. Calls are made one at a time,
// but for those that pin memory.
// What the driver refuses is not checked, and changes nothing in the books.
#include <cstdint>

#include "books.h"

using proxy::Address;
using proxy::Call;
using proxy::Context;
using proxy::Event;
using proxy::forward;
using proxy::Range;
using proxy::State;
using proxy::Stream;
using proxy::trace;

#define DRIVER extern "C" __attribute__((visibility("default"))) int

namespace {

using Number = unsigned long long;
constexpr int kFirstSticky = 700, kLastSticky = 720;  // errors after which a context is of no use

// Default streams are those of the context that is current.
std::string token(const void* handle, const Stream& stream) {
  if (proxy::is_default(handle)) return std::to_string(reinterpret_cast<uintptr_t>(handle));
  return "s" + std::to_string(stream.number);
}

// `ask` asks the driver behind; `note(call, code)` enters what came of it. `alone`: no other call meanwhile, so that the books have
// the order in which the driver was asked.
template <typename Ask, typename Note>
int pass(const char* name, Ask ask, Note note, bool alone = true) {
  State& s = strict::state();
  strict::is_called_by_driver(s, name);
  strict::Lock driver(s.calls, std::defer_lock);
  if (alone) driver.lock();
  const int code = ask();
  if (!alone) driver.lock();
  strict::Lock lock(s.mutex);
  Call call{s, driver, lock, name};
  ++s.counts[name];
  strict::tick(s);
  call.context = strict::this_thread().current;
  note(call, code);
  if (code >= kFirstSticky && code <= kLastSticky && call.context != nullptr) {  // nothing goes on there any more
    for (const Stream* stream : s.streams)
      if (stream->context == call.context) strict::learn(s, stream->clock);
  }
  return code;
}

template <typename Ask>
int pass(const char* name, Ask ask) {
  return pass(name, ask, [](Call&, int) {});
}

// What the model would have said differs.
void expect(Call& call, int expected, int code) {
  if (expected == code) return;
  call.s.violation(call.name + " is expected to return " + std::to_string(expected) + ", but the driver says " + std::to_string(code));
}

bool is_captured(const Stream& stream) { return stream.capture != nullptr; }

void enter(Call& call, Stream& stream, strict::Operation operation) {
  operation.call = call.name;
  if (!is_captured(stream)) strict::put_in_order(call.s, stream, operation);
}

}  // namespace

// ---- the driver, devices, contexts -----------------------------------------------------------------------------------

DRIVER cuInit(unsigned flags) {
  return pass("cuInit", [&] { return forward("cuInit", flags); });
}

DRIVER cuDriverGetVersion(int* version) {
  return pass("cuDriverGetVersion", [&] { return forward("cuDriverGetVersion", version); });
}

DRIVER cuDeviceGetCount(int* count) {
  return pass("cuDeviceGetCount", [&] { return forward("cuDeviceGetCount", count); });
}

DRIVER cuDeviceGet(int* device, int ordinal) {
  return pass("cuDeviceGet", [&] { return forward("cuDeviceGet", device, ordinal); });
}

DRIVER cuDeviceGetPCIBusId(char* text, int length, int device) {
  return pass("cuDeviceGetPCIBusId", [&] { return forward("cuDeviceGetPCIBusId", text, length, device); });
}

DRIVER cuDevicePrimaryCtxRetain(void** handle, int device) {
  return pass("cuDevicePrimaryCtxRetain", [&] { return forward("cuDevicePrimaryCtxRetain", handle, device); },
              [&](Call& call, int code) {
                if (code != 0 || device < 0 || device >= strict::kMostDevices) return;
                Context& context = call.s.contexts[device];
                if (context.handle != *handle) proxy::adopt(call.s, context, *handle, device);
                trace(call.s, 0, "cuDevicePrimaryCtxRetain %d c%llu", device, Number{context.number});
              });
}

// Torch retains it as well: it does not end here.
DRIVER cuDevicePrimaryCtxRelease_v2(int device) {
  return pass("cuDevicePrimaryCtxRelease", [&] { return forward("cuDevicePrimaryCtxRelease_v2", device); },
              [&](Call& call, int code) { trace(call.s, code, "cuDevicePrimaryCtxRelease_v2 %d", device); });
}

DRIVER cuCtxSetCurrent(void* handle) {
  return pass("cuCtxSetCurrent", [&] { return forward("cuCtxSetCurrent", handle); }, [&](Call& call, int code) {
    if (code != 0) return;
    Context* const context = strict::this_thread().current = proxy::context_at(call.s, handle);
    trace(call.s, 0, "cuCtxSetCurrent c%llu", context != nullptr ? Number{context->number} : 0);
  });
}

// Others change it behind our back, so that this is where it is seen.
DRIVER cuCtxGetCurrent(void** handle) {
  return pass("cuCtxGetCurrent", [&] { return forward("cuCtxGetCurrent", handle); }, [&](Call& call, int code) {
    if (code != 0) return;
    Context* const context = proxy::context_at(call.s, *handle);
    if (context == strict::this_thread().current) return;
    strict::this_thread().current = context;
    trace(call.s, 0, "cuCtxSetCurrent c%llu", context != nullptr ? Number{context->number} : 0);
  });
}

DRIVER cuCtxGetDevice(int* device) {
  return pass("cuCtxGetDevice", [&] { return forward("cuCtxGetDevice", device); });
}

DRIVER cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return pass("cuCtxGetStreamPriorityRange", [&] { return forward("cuCtxGetStreamPriorityRange", least, greatest); });
}

DRIVER cuThreadExchangeStreamCaptureMode(int* mode) {
  return pass("cuThreadExchangeStreamCaptureMode", [&] { return forward("cuThreadExchangeStreamCaptureMode", mode); },
              [&](Call& call, int code) {
                if (code != 0) return;
                std::swap(*mode, strict::this_thread().capture_mode);  // what was exchanged for is what is known
                trace(call.s, 0, "cuThreadExchangeStreamCaptureMode %d", strict::this_thread().capture_mode);
                std::swap(*mode, strict::this_thread().capture_mode);
              });
}

// ---- streams ---------------------------------------------------------------------------------------------------------

DRIVER cuStreamCreateWithPriority(void** handle, unsigned flags, int priority) {
  return pass("cuStreamCreate", [&] { return forward("cuStreamCreateWithPriority", handle, flags, priority); },
              [&](Call& call, int code) {
                if (code != 0 || call.context == nullptr) return;
                Stream* const stream = strict::new_stream(call.s, *call.context, flags == 0);
                call.s.stream_handles.erase(stream->handle);
                stream->handle = *handle;
                call.s.stream_handles[*handle] = stream;
                trace(call.s, 0, "cuStreamCreateWithPriority %u %d s%llu", flags, priority, Number{stream->number});
              });
}

DRIVER cuStreamDestroy_v2(void* handle) {
  return pass("cuStreamDestroy", [&] { return forward("cuStreamDestroy_v2", handle); }, [&](Call& call, int code) {
    Stream* const stream = proxy::stream_at(call, handle, code == 0);
    if (stream == nullptr || code != 0) return;
    stream->is_destroyed = true;
    trace(call.s, code, "cuStreamDestroy_v2 s%llu", Number{stream->number});
  });
}

DRIVER cuStreamQuery(void* handle) {
  return pass("cuStreamQuery", [&] { return forward("cuStreamQuery", handle); }, [&](Call& call, int code) {
    if (code == strict::kNotReady) return;
    Stream* const stream = proxy::stream_at(call, handle, code == 0);
    if (stream == nullptr) return;
    if (code != strict::kInvalidHandle) strict::learn(call.s, stream->clock);
    trace(call.s, code, "cuStreamQuery %s", token(handle, *stream).c_str());
  });
}

DRIVER cuStreamGetCtx(void* handle, void** context) {
  return pass("cuStreamGetCtx", [&] { return forward("cuStreamGetCtx", handle, context); });
}

DRIVER cuStreamIsCapturing(void* handle, int* status) {
  return pass("cuStreamIsCapturing", [&] { return forward("cuStreamIsCapturing", handle, status); }, [&](Call& call, int code) {
    Stream* const stream = proxy::stream_at(call, handle, code == 0);
    if (stream == nullptr || code != 0) return;
    // Who goes on all the same puts into a graph what is no operation yet.
    stream->capture = *status != 0 ? std::make_shared<strict::Capture>() : nullptr;
  });
}

DRIVER cuStreamWaitEvent(void* handle, void* event_handle, unsigned flags) {
  return pass("cuStreamWaitEvent", [&] { return forward("cuStreamWaitEvent", handle, event_handle, flags); },
              [&](Call& call, int code) {
                Event* const event = proxy::event_at(call, event_handle);
                Stream* const stream = proxy::stream_at(call, handle, code == 0);
                if (event == nullptr || stream == nullptr) return;
                trace(call.s, code, "cuStreamWaitEvent %s e%llu", token(handle, *stream).c_str(), Number{event->number});
                if (code != 0 || is_captured(*stream) || event->stream == nullptr) return;
                stream->clock.join(event->clock);
                enter(call, *stream, {});
              });
}

// ---- events ----------------------------------------------------------------------------------------------------------

DRIVER cuEventCreate(void** handle, unsigned flags) {
  return pass("cuEventCreate", [&] { return forward("cuEventCreate", handle, flags); }, [&](Call& call, int code) {
    if (code != 0 || call.context == nullptr) return;
    Event* const event = strict::new_event(call.s, *call.context);
    call.s.event_handles.erase(event->handle);
    event->handle = *handle;
    call.s.event_handles[*handle] = event;
    trace(call.s, 0, "cuEventCreate %u e%llu", flags, Number{event->number});
  });
}

DRIVER cuEventDestroy_v2(void* handle) {
  return pass("cuEventDestroy", [&] { return forward("cuEventDestroy_v2", handle); }, [&](Call& call, int code) {
    Event* const event = proxy::event_at(call, handle);
    if (event == nullptr || code != 0) return;
    event->is_destroyed = true;
    trace(call.s, code, "cuEventDestroy_v2 e%llu", Number{event->number});
  });
}

DRIVER cuEventRecord(void* event_handle, void* handle) {
  return pass("cuEventRecord", [&] { return forward("cuEventRecord", event_handle, handle); }, [&](Call& call, int code) {
    Event* const event = proxy::event_at(call, event_handle);
    Stream* const stream = proxy::stream_at(call, handle, code == 0);
    if (event == nullptr || stream == nullptr) return;
    trace(call.s, code, "cuEventRecord e%llu %s", Number{event->number}, token(handle, *stream).c_str());
    if (code != 0) return;
    if (event->context != stream->context) expect(call, strict::kInvalidHandle, code);
    if (is_captured(*stream)) return;
    enter(call, *stream, {});
    event->stream = stream;
    event->clock = stream->clock;
  });
}

DRIVER cuEventQuery(void* handle) {
  return pass("cuEventQuery", [&] { return forward("cuEventQuery", handle); }, [&](Call& call, int code) {
    if (code == strict::kNotReady) return;
    Event* const event = proxy::event_at(call, handle);
    if (event == nullptr) return;
    if (code != strict::kInvalidHandle) strict::learn(call.s, event->clock);
    trace(call.s, code, "cuEventQuery e%llu", Number{event->number});
  });
}

#include "copies.h"
#include "controls.h"
