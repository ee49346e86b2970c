// The CUDA driver, found at run time: one table of function pointers, and owners for what it hands out. Nothing here is
// linked, so one build runs with and without a GPU, and a library with the same symbols can stand in for the driver.
//
// Every type is the driver's own ABI, written out again; symbols carry the `_v2` where the ABI has one. A call works on
// the context that is current in its thread: see Current.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/device.h"
#include "base/error.h"

namespace lazyckpt::cuda {

using Result = int;
using DeviceHandle = int;
using Address = unsigned long long;  // CUdeviceptr
using ContextHandle = struct CUctx_st*;
using StreamHandle = struct CUstream_st*;  // null is the default stream, which is what torch computes on
using EventHandle = struct CUevent_st*;

enum : Result {
  kSuccess = 0,
  kOutOfMemory = 2,
  kNoDevice = 100,
  kNotReady = 600,
  kIllegalAddress = 700,
  kCaptureUnsupported = 900,
  kCaptureImplicit = 906,  // the default stream, while another stream of the context is being captured
};

constexpr unsigned kStreamNonBlocking = 1;      // no implicit order with the default stream
constexpr unsigned kEventBlockingSync = 1;      // who waits for it sleeps
constexpr unsigned kEventDisableTiming = 2;     // cheaper to record
constexpr unsigned kHostRegisterPortable = 1;   // pinned for all contexts, not only the current one
constexpr int kCaptureModeRelaxed = 2;
constexpr Result kInvalidContext = 201;

// Of a batch of copies, CUmemcpyAttributes. The hints are for managed memory; type 0 is none.
struct CopyLocation {
  int type = 0, id = 0;
};
struct CopyAttributes {
  int source_order = 1;  // read in the order of the stream
  CopyLocation source_hint, target_hint;
  unsigned flags = 0;
};
static_assert(sizeof(CopyAttributes) == 24);

// The calls that are used, as X(field, symbol, arguments).
#define LAZYCKPT_CUDA_CALLS(X)                                                                       \
  X(init, cuInit, (unsigned flags))                                                                  \
  X(driver_get_version, cuDriverGetVersion, (int* version))                                          \
  X(device_get, cuDeviceGet, (DeviceHandle * device, int ordinal))                                   \
  X(device_get_pci_bus_id, cuDeviceGetPCIBusId, (char* text, int length, DeviceHandle device))       \
  X(device_get_count, cuDeviceGetCount, (int* count))                                                \
  X(primary_ctx_retain, cuDevicePrimaryCtxRetain, (ContextHandle * context, DeviceHandle device))    \
  X(primary_ctx_release, cuDevicePrimaryCtxRelease_v2, (DeviceHandle device))                        \
  X(ctx_set_current, cuCtxSetCurrent, (ContextHandle context))                                       \
  X(ctx_get_current, cuCtxGetCurrent, (ContextHandle * context))                                     \
  X(ctx_get_stream_priority_range, cuCtxGetStreamPriorityRange, (int* least, int* greatest))         \
  X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int* mode))                           \
  X(stream_create, cuStreamCreateWithPriority, (StreamHandle * stream, unsigned flags, int priority)) \
  X(stream_destroy, cuStreamDestroy_v2, (StreamHandle stream))                                       \
  X(stream_query, cuStreamQuery, (StreamHandle stream))                                              \
  X(stream_wait_event, cuStreamWaitEvent, (StreamHandle stream, EventHandle event, unsigned flags))  \
  X(stream_is_capturing, cuStreamIsCapturing, (StreamHandle stream, int* status))                    \
  X(event_create, cuEventCreate, (EventHandle * event, unsigned flags))                              \
  X(event_destroy, cuEventDestroy_v2, (EventHandle event))                                           \
  X(event_record, cuEventRecord, (EventHandle event, StreamHandle stream))                           \
  X(event_query, cuEventQuery, (EventHandle event))                                                  \
  X(memcpy_dtoh_async, cuMemcpyDtoHAsync_v2, (void* to, Address from, size_t bytes, StreamHandle stream))       \
  X(memcpy_htod_async, cuMemcpyHtoDAsync_v2, (Address to, const void* from, size_t bytes, StreamHandle stream)) \
  X(memcpy_dtod_async, cuMemcpyDtoDAsync_v2, (Address to, Address from, size_t bytes, StreamHandle stream))     \
  X(mem_alloc, cuMemAlloc_v2, (Address * address, size_t bytes))                                     \
  X(mem_free, cuMemFree_v2, (Address address))                                                       \
  X(mem_get_info, cuMemGetInfo_v2, (size_t * free, size_t* total))                                   \
  X(mem_host_register, cuMemHostRegister_v2, (void* begin, size_t bytes, unsigned flags))            \
  X(mem_host_unregister, cuMemHostUnregister, (void* begin))                                         \
  X(pointer_get_attribute, cuPointerGetAttribute, (void* value, int attribute, Address address))     \
  X(get_error_name, cuGetErrorName, (Result code, const char** name))                                \
  X(get_error_string, cuGetErrorString, (Result code, const char** text))

// Those that a driver may lack. The last came with 12.8; symbols without a suffix keep the arguments of then. The first two are for
// trying a device out (self_check.h).
#define LAZYCKPT_CUDA_OPTIONAL_CALLS(X)                                                                             \
  X(launch_host_func, cuLaunchHostFunc, (StreamHandle stream, void (*function)(void*), void* data))                 \
  X(memset_async, cuMemsetD8Async, (Address to, unsigned char value, size_t bytes, StreamHandle stream))            \
  X(ctx_get_device, cuCtxGetDevice, (DeviceHandle * device))                                                        \
  X(stream_get_ctx, cuStreamGetCtx, (StreamHandle stream, ContextHandle * context))                                 \
  X(memcpy_batch_async, cuMemcpyBatchAsync,                                                                         \
    (Address * to, Address * from, size_t * sizes, size_t count, CopyAttributes * attributes, size_t * first_copies, \
     size_t attribute_count, size_t * failed_copy, StreamHandle stream))

struct Table {
#define LAZYCKPT_CUDA_FIELD(field, symbol, arguments) Result(*field) arguments = nullptr;
  LAZYCKPT_CUDA_CALLS(LAZYCKPT_CUDA_FIELD)
  LAZYCKPT_CUDA_OPTIONAL_CALLS(LAZYCKPT_CUDA_FIELD)  // null if there is none
#undef LAZYCKPT_CUDA_FIELD
};

// The loaded and initialised driver. It is never unloaded: threads of its own may live on in it.
class Driver {
 public:
  // `library`: empty for the one of the system. Throws an Error that says why no CUDA tensor can be saved.
  explicit Driver(const std::string& library);

  const Table& table() const { return table_; }
  int device_count() const { return device_count_; }

  // Throws if `code` is not kSuccess; `call` is the symbol, `device` -1 where there is none.
  void check(Result code, const char* call, int device) const;
  Error error(Result code, const std::string& call, int device) const;

 private:
  void look_up(void* handle, const std::string& library);
  std::string text_of(Result code) const;

  Table table_;
  int device_count_ = 0;
};

struct MemoryLevel {
  size_t free = 0, total = 0;
};

// The primary context of a device, the one that torch uses.
class Context {
 public:
  Context(std::shared_ptr<const Driver> driver, int device);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Driver& driver() const { return *driver_; }
  const Table& table() const { return driver_->table(); }
  int device() const { return device_; }
  std::string pci_id() const;  // as "0000:3B:00.0"; empty if the driver does not tell
  ContextHandle handle() const { return handle_; }
  void check(Result code, const char* call) const { driver_->check(code, call, device_); }

  // True if the stream that the calling thread means by this belongs to another context of the device, as a green one: events of
  // ours cannot be recorded there. By the handles of default streams it means those of the context that is current: to be asked
  // before Current changes that.
  bool is_foreign(StreamHandle stream) const;

  // True if work put on the stream now would become part of a graph instead of being done. Requires Current.
  bool is_capturing(StreamHandle stream) const;
  MemoryLevel memory_level() const;  // requires Current

 private:
  const std::shared_ptr<const Driver> driver_;
  const int device_;
  DeviceHandle device_handle_ = 0;
  ContextHandle handle_ = nullptr;
};

// Makes a context the calling thread's, and puts the one before back. Meanwhile this thread may make all calls, also those by
// which it would otherwise break a graph capture that is going on in another one: making and ending streams and events, asking
// for events, pinning and allocating.
class Current {
 public:
  explicit Current(const Context& context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Context& context_;
  ContextHandle before_ = nullptr;
  int mode_ = kCaptureModeRelaxed;  // of before
};

std::string place_of(int device);  // for messages
// That a copy was asked for on such a stream; `advice` says what to do.
Error capture_refused(int device, const std::string& advice);
// That a stream of another context was given; code() is kInvalidContext.
Error foreign_refused(int device);

// A stream of the lowest priority. That is for kernels, should a copy be done by one: between copies by the copy engines
// priorities decide nothing. Making one requires Current; ending it does not.
class Stream {
 public:
  explicit Stream(std::shared_ptr<const Context> context);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  StreamHandle get() const { return handle_; }

 private:
  const std::shared_ptr<const Context> context_;
  StreamHandle handle_ = nullptr;
};

// Events to be used again: to make one and to end it are calls of the driver, which locks the context for them.
class EventPool {
 public:
  explicit EventPool(std::shared_ptr<const Context> context) : context_(std::move(context)) {}
  ~EventPool();
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  const std::shared_ptr<const Context>& context() const { return context_; }
  EventHandle take();  // requires Current
  void give_back(EventHandle event);  // calls no driver

 private:
  const std::shared_ptr<const Context> context_;
  std::mutex mutex_;  // guards what follows
  std::vector<EventHandle> free_;
};

class Event {
 public:
  // These require Current. Out of a pool: its end gives it back there, which asks nothing of the driver. Whoever waits for what
  // it stood behind goes on waiting for that, when it is recorded anew.
  explicit Event(std::shared_ptr<const Context> context);
  explicit Event(std::shared_ptr<EventPool> pool);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  const Context& context() const { return *context_; }
  void record(StreamHandle stream) const;             // requires Current
  void hold_back(StreamHandle stream) const;          // the stream goes on when this has happened
  bool has_happened() const;                          // requires Current; throws what the work before it failed with

 private:
  const std::shared_ptr<const Context> context_;
  const std::shared_ptr<EventPool> pool_;  // none: it ends with this
  EventHandle handle_ = nullptr;
};

// Host memory that devices copy to without the host's help. Making one requires Current.
class HostRegistration {
 public:
  HostRegistration(std::shared_ptr<const Context> context, void* begin, size_t bytes);
  ~HostRegistration();
  HostRegistration(const HostRegistration&) = delete;
  HostRegistration& operator=(const HostRegistration&) = delete;

 private:
  const std::shared_ptr<const Context> context_;
  void* const begin_;
};

// Memory of a device. Making it requires Current; ending it does not, but waits for what the device is doing.
class Memory {
 public:
  Memory(std::shared_ptr<const Context> context, size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  Address address() const { return address_; }
  size_t size() const { return bytes_; }

 private:
  const std::shared_ptr<const Context> context_;
  const size_t bytes_;
  Address address_ = 0;
};

// Host memory of its own, of whole pages, for copies from and to devices: pinned, unless that is refused. Forked children do not
// inherit it: a fork must not make pages change places under a copy. Making it requires Current.
class HostMemory {
 public:
  HostMemory(const std::shared_ptr<const Context>& context, size_t bytes);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  std::byte* begin() const { return begin_; }
  bool pinned() const { return registration_ != nullptr; }

 private:
  const size_t bytes_;
  std::byte* begin_ = nullptr;
  std::unique_ptr<HostRegistration> registration_;
};

struct Copy {
  Address to = 0, from = 0;
  size_t bytes = 0;
};
enum class Route { kToHost, kOnDevice, kFromHost };

// At most so many copies are given to the driver in one call: with tens of thousands it is known to crash, or to hang.
constexpr size_t kMostInBatch = 256;

// Enqueues copies whose order does not matter, by a call for each; or, with `in_batches`, by calls for many where the driver
// can. Such a call that fails turns `in_batches` off; what it may have enqueued is enqueued again, which harms nothing. Host
// memory must be pinned for it. Requires Current.
void enqueue_copies(const Context& context, Route route, const std::vector<Copy>& copies, StreamHandle stream,
                    std::atomic<bool>* in_batches = nullptr);

}  // namespace lazyckpt::cuda
