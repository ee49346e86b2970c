// A CUDA driver for machines without a GPU, for the tests. "Device memory" is ordinary memory: any address counts. Each
// stream is a thread that does its work in order, late (random, seeded delays); events order streams as the real ones do.
//
// It is stricter than the real one: the destination of a copy holds poison until the copy is done, and the source is read
// at that moment; a call without a current context, or with a handle of another device, fails.
//
// What begins with `fake_` controls it.
#include "controls.h"
#include "streams.h"

using namespace fake;

#define UNSAFE_CALL(name) \
  FAKE_CALL(name);        \
  if (is_unsafe()) return kCaptureUnsupported

#define FAKE_CALL(name)                                  \
  const Fault fault = consult(name);                     \
  if (fault.code != kSuccess && !fault.late) return fault.code

// ---- The driver --------------------------------------------------------------------------------------------------

extern "C" {

int cuInit(unsigned) {
  FAKE_CALL("cuInit");
  return kSuccess;
}

int cuDriverGetVersion(int* version) {
  FAKE_CALL("cuDriverGetVersion");
#ifdef WITHOUT_BATCHES
  *version = 12040;
#else
  *version = 12080;
#endif
  return kSuccess;
}

int cuDeviceGetCount(int* devices) {
  FAKE_CALL("cuDeviceGetCount");
  *devices = controls().devices;
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  FAKE_CALL("cuDeviceGet");
  if (ordinal < 0 || ordinal >= controls().devices) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

int cuDeviceGetPCIBusId(char* text, int length, int device) {
  FAKE_CALL("cuDeviceGetPCIBusId");
  std::snprintf(text, static_cast<size_t>(length), "0000:%X:00.0", 0x3A + device);
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(CUctx_st** context, int device) {
  FAKE_CALL("cuDevicePrimaryCtxRetain");
  *context = context_of(device);
  ++(*context)->users;
  count_live("contexts", 1);
  return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  FAKE_CALL("cuDevicePrimaryCtxRelease");
  if (context_of(device)->users-- <= 0) return kInvalidContext;
  count_live("contexts", -1);
  return kSuccess;
}

int cuCtxSetCurrent(CUctx_st* context) {
  FAKE_CALL("cuCtxSetCurrent");
  current = context;
  return kSuccess;
}

int cuCtxGetCurrent(CUctx_st** context) {
  FAKE_CALL("cuCtxGetCurrent");
  *context = current;
  return kSuccess;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  FAKE_CALL("cuCtxGetStreamPriorityRange");
  if (current == nullptr) return kInvalidContext;
  *least = kLeastPriority;
  *greatest = kGreatestPriority;
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  FAKE_CALL("cuThreadExchangeStreamCaptureMode");
  std::swap(*mode, capture_mode);
  return kSuccess;
}

int cuStreamCreateWithPriority(Stream** stream, unsigned, int priority) {
  UNSAFE_CALL("cuStreamCreate");
  if (current == nullptr) return kInvalidContext;
  {
    std::lock_guard<std::mutex> lock(streams().mutex);
    *stream = start_stream(current);
  }
  count_live("streams", 1);
  count(priority == kLeastPriority ? "streams of the lowest priority" : "streams of another priority");
  return kSuccess;
}

// What it still has to do is done.
int cuStreamDestroy_v2(Stream* stream) {
  UNSAFE_CALL("cuStreamDestroy");
  if (current == nullptr) return kInvalidContext;
  std::lock_guard<std::mutex> lock(streams().mutex);
  const auto it = streams().alive.find(stream);
  if (it == streams().alive.end()) return kInvalidHandle;
  {
    std::lock_guard<std::mutex> inner(stream->mutex);
    stream->end = true;
    stream->changed.notify_all();
  }
  streams().alive.erase(it);
  count_live("streams", -1);
  return kSuccess;
}

int cuStreamQuery(Stream* handle) {
  UNSAFE_CALL("cuStreamQuery");
  if (current == nullptr) return kInvalidContext;
  Stream* stream = find_stream(handle, current->device);
  if (stream == nullptr) return kInvalidHandle;
  return stream->idle() ? kSuccess : kNotReady;
}

int cuStreamWaitEvent(Stream* handle, CUevent_st* event, unsigned) {
  FAKE_CALL("cuStreamWaitEvent");
  if (current == nullptr) return kInvalidContext;
  Stream* stream = find_stream(handle, current->device);
  if (stream == nullptr) return kInvalidHandle;
  const std::shared_ptr<Mark> mark = event->latest();
  if (controls().order == Order::kWithoutWaits) return kSuccess;
  if (mark != nullptr) stream->add([mark](Stream&) { mark->wait(); });
  return kSuccess;
}

int cuCtxGetDevice(int* device) {
  FAKE_CALL("cuCtxGetDevice");
  if (current == nullptr) return kInvalidContext;
  *device = current->device;
  return kSuccess;
}

int cuStreamGetCtx(Stream* handle, CUctx_st** context) {
  FAKE_CALL("cuStreamGetCtx");
  if (handle == nullptr && current == nullptr) return kInvalidContext;
  std::lock_guard<std::mutex> lock(streams().mutex);
  if (handle != nullptr && streams().alive.count(handle) == 0) return kInvalidHandle;
  *context = handle == nullptr ? current : handle->context;
  return kSuccess;
}

int cuStreamIsCapturing(Stream* handle, int* status) {
  FAKE_CALL("cuStreamIsCapturing");
  if (current == nullptr) return kInvalidContext;
  Stream* stream = find_stream(handle, current->device);
  if (stream == nullptr) return kInvalidHandle;
  *status = stream->capturing;
  return kSuccess;
}

int cuEventCreate(CUevent_st** event, unsigned flags) {
  UNSAFE_CALL("cuEventCreate");
  if (current == nullptr) return kInvalidContext;
  if (flags != 3) return kInvalidValue;  // blocking, without timing: what the library means to ask for
  *event = new CUevent_st;
  (*event)->context = current;
  count_live("events", 1);
  return kSuccess;
}

int cuEventDestroy_v2(CUevent_st* event) {
  UNSAFE_CALL("cuEventDestroy");
  if (current == nullptr) return kInvalidContext;
  delete event;
  count_live("events", -1);
  return kSuccess;
}

int cuEventRecord(CUevent_st* event, Stream* handle) {
  FAKE_CALL("cuEventRecord");
  if (current == nullptr) return kInvalidContext;
  Stream* stream = find_stream(handle, current->device);
  if (stream == nullptr || event->context != stream->context) return kInvalidHandle;
  const auto mark = std::make_shared<Mark>();
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->mark = mark;
  }
  stream->add([mark, recorded_by = std::this_thread::get_id()](Stream& self) {
    const auto failed = self.errors.extract(recorded_by);
    mark->finish(failed.empty() ? kSuccess : failed.mapped());
  });
  return kSuccess;
}

int cuEventQuery(CUevent_st* event) {
  UNSAFE_CALL("cuEventQuery");
  if (current == nullptr) return kInvalidContext;
  const std::shared_ptr<Mark> mark = event->latest();
  return mark == nullptr ? kSuccess : mark->query();
}

int cuEventSynchronize(CUevent_st* event) {
  UNSAFE_CALL("cuEventSynchronize");
  if (current == nullptr) return kInvalidContext;
  const std::shared_ptr<Mark> mark = event->latest();
  return mark == nullptr ? kSuccess : mark->wait();
}

int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, Stream* handle) {
  FAKE_CALL("cuMemcpyDtoHAsync");
  const bool pinned = is_registered(to, bytes);
  count(pinned ? "pinned copies" : "pageable copies");
  poison(handle, to, bytes);
  const int code = enqueue_copy(handle, to, reinterpret_cast<const void*>(from), bytes, fault);
  // As the real one: to pageable memory it returns when the copy is done.
  return code == kSuccess && !pinned ? wait_for_all(find_stream(handle, current->device)) : code;
}

#ifndef WITHOUT_BATCHES
// Two locations, of a kind and a number each, in the middle.
struct CopyAttributes {
  int source_order, locations[4];
  unsigned flags;
};

static bool is_of_device(const void* memory) {
  std::lock_guard<std::mutex> lock(controls().mutex);
  return is_allocated(memory);
}

// The k-th copy of a batch can fail: a fault of "batched copies", or of "copies batched on a device". Those before it are enqueued, as the real one may have done.
int cuMemcpyBatchAsync(unsigned long long* to, unsigned long long* from, size_t* sizes, size_t copies, CopyAttributes* attributes,
                       size_t* first_copies, size_t attribute_count, size_t* failed_copy, Stream* handle) {
  FAKE_CALL("cuMemcpyBatchAsync");
  if (handle == nullptr || copies == 0 || attribute_count != 1 || first_copies[0] != 0) return kInvalidValue;
  if (attributes->source_order != 1 || attributes->flags != 0) return kInvalidValue;
  const bool on_device = is_of_device(reinterpret_cast<void*>(to[0]));
  if (on_device) count("batches on a device");
  for (size_t i = 0; i < copies; ++i) {
    Fault own = consult("batched copies");
    if (on_device && own.code == kSuccess) own = consult("copies batched on a device");
    void* target = reinterpret_cast<void*>(to[i]);
    *failed_copy = i;
    if (own.code != kSuccess && !own.late) return own.code;
    const void* source = reinterpret_cast<const void*>(from[i]);
    if (!is_of_device(target)) {
      // Memory of training plays a device's without being allocated here: one side must be pinned.
      if (!is_registered(target, sizes[i]) && !is_registered(source, sizes[i])) return kInvalidValue;
      count("pinned copies");
    }
    if (is_registered(source, sizes[i])) {
      poison_in_turn(handle, target, sizes[i]);
    } else {
      poison(handle, target, sizes[i]);
    }
    const Fault& last = own.code != kSuccess ? own : fault;
    const int code = enqueue_copy(handle, target, source, sizes[i], last);
    if (code != kSuccess) return code;
  }
  return kSuccess;
}
#endif

int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, Stream* handle) {
  FAKE_CALL("cuMemcpyHtoDAsync");
  const bool pinned = is_registered(from, bytes);
  count(pinned ? "pinned copies" : "pageable copies");
  poison_in_turn(handle, reinterpret_cast<void*>(to), bytes);
  const int code = enqueue_copy(handle, reinterpret_cast<void*>(to), from, bytes, fault);
  // As the real one: from pageable memory it returns when that has been read.
  return code == kSuccess && !pinned ? wait_for_all(find_stream(handle, current->device)) : code;
}

int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, Stream* handle) {
  FAKE_CALL("cuMemcpyDtoDAsync");
  poison(handle, reinterpret_cast<void*>(to), bytes);
  return enqueue_copy(handle, reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, fault);
}

int cuMemsetD8Async(unsigned long long to, unsigned char value, size_t bytes, Stream* handle) {
  FAKE_CALL("cuMemsetD8Async");
  if (current == nullptr) return kInvalidContext;
  Stream* stream = find_stream(handle, current->device);
  if (stream == nullptr) return kInvalidHandle;
  if (stream->capturing != 0) return kCaptureUnsupported;
  stream->add([=](Stream&) { std::memset(reinterpret_cast<void*>(to), value, bytes); });
  return kSuccess;
}

int cuLaunchHostFunc(Stream* handle, void (*function)(void*), void* data) {
  FAKE_CALL("cuLaunchHostFunc");
  if (current == nullptr) return kInvalidContext;
  Stream* stream = find_stream(handle, current->device);
  if (stream == nullptr) return kInvalidHandle;
  if (stream->capturing != 0) return kCaptureUnsupported;
  stream->add([=](Stream&) { function(data); });
  return kSuccess;
}

int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  UNSAFE_CALL("cuMemAlloc");
  if (current == nullptr) return kInvalidContext;
  std::lock_guard<std::mutex> lock(controls().mutex);
  if (bytes > free_bytes(current->device)) return kOutOfMemory;
  *address = reinterpret_cast<uintptr_t>(::operator new(bytes, kMemoryAlign));
  controls().allocated[*address] = {current->device, bytes};
  controls().live["allocations"] += 1;
  return kSuccess;
}

// The real one would wait for the copies; whoever frees under them has lost track of them all the same.
int cuMemFree_v2(unsigned long long address) {
  UNSAFE_CALL("cuMemFree");
  std::lock_guard<std::mutex> lock(controls().mutex);
  const auto it = controls().allocated.find(address);
  if (current == nullptr || it == controls().allocated.end()) return kInvalidValue;
  if (is_being_copied(address, it->second.second)) {
    controls().live["frees of memory in use"] += 1;
    return kInvalidValue;
  }
  controls().allocated.erase(it);
  ::operator delete(reinterpret_cast<void*>(address), kMemoryAlign);
  controls().live["allocations"] -= 1;
  return kSuccess;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
  FAKE_CALL("cuMemGetInfo");
  if (current == nullptr) return kInvalidContext;
  std::lock_guard<std::mutex> lock(controls().mutex);
  *total = controls().total_bytes;
  *free = free_bytes(current->device);
  return kSuccess;
}

int cuMemHostRegister_v2(void* begin, size_t bytes, unsigned) {
  UNSAFE_CALL("cuMemHostRegister");
  if (current == nullptr) return kInvalidContext;
  std::lock_guard<std::mutex> lock(controls().mutex);
  uint64_t registered = 0;
  for (const auto& [from, length] : controls().registered) registered += length;
  if (bytes > controls().largest_registration || bytes + registered > controls().most_registered) return kOutOfMemory;
  controls().registered[reinterpret_cast<uintptr_t>(begin)] = bytes;
  controls().live["registrations"] += 1;
  return kSuccess;
}

int cuMemHostUnregister(void* begin) {
  UNSAFE_CALL("cuMemHostUnregister");
  if (current == nullptr) return kInvalidContext;
  std::lock_guard<std::mutex> lock(controls().mutex);
  const auto it = controls().registered.find(reinterpret_cast<uintptr_t>(begin));
  if (it == controls().registered.end()) return kInvalidValue;
  if (is_being_copied(it->first, it->second)) controls().live["frees of memory in use"] += 1;
  controls().registered.erase(it);
  controls().live["registrations"] -= 1;
  return kSuccess;
}

// The kind of memory and the device, of what was registered or allocated here.
int cuPointerGetAttribute(void* value, int attribute, unsigned long long address) {
  FAKE_CALL("cuPointerGetAttribute");
  const void* at = reinterpret_cast<const void*>(address);
  const bool pinned = is_registered(at, 1);
  std::lock_guard<std::mutex> lock(controls().mutex);
  const bool of_device = is_allocated(at);
  if (!pinned && !of_device) return kInvalidValue;
  if (attribute == 2) {
    *static_cast<unsigned*>(value) = of_device ? 2 : 1;
  } else if (attribute == 9 && of_device) {
    *static_cast<int*>(value) = std::prev(controls().allocated.upper_bound(address))->second.first;
  } else {
    return kInvalidValue;
  }
  return kSuccess;
}

int cuGetErrorName(int code, const char** name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_FAKE";
  return kSuccess;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == 2 ? "out of memory" : "an error of the fake driver";
  return kSuccess;
}

}  // extern "C"
