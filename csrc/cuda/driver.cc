#include "cuda/driver.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

namespace lazyckpt::cuda {
namespace {

constexpr char kSystemLibrary[] = "libcuda.so.1";
constexpr uintptr_t kLastOfDefaultStreams = 2;  // null, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
constexpr size_t kPage = 4096;  // what is registered shares none with anything else: no page can be registered twice
constexpr char kConsequence[] = "; so no CUDA tensor can be saved, while tensors in host memory can";

Error no_driver(const std::string& library, const std::string& cause, const std::string& remedy) {
  return Error(ErrorKind::kDevice, "the CUDA driver '" + library + "' cannot be used: " + cause + kConsequence + "; " + remedy);
}

const char* remedy_for(Result code) {
  switch (code) {
    case kOutOfMemory: return "free memory of the device or of the host, or choose a smaller arena_bytes";
    case kNoDevice: return "see whether nvidia-smi shows a GPU and whether CUDA_VISIBLE_DEVICES hides it";
    case kCaptureUnsupported:
    case kCaptureImplicit: return "save and load outside of graph captures, and call ckpt.fence() before a capture begins and before each replay";
    case kIllegalAddress: return "a kernel of this process broke its context: CUDA_LAUNCH_BLOCKING=1 shows which one";
    default: return "see nvidia-smi and the kernel log for what is wrong with the device; the last checkpoint is untouched";
  }
}

}  // namespace

// ---- Driver ------------------------------------------------------------------------------------------------------

Driver::Driver(const std::string& library) {
  const std::string name = library.empty() ? kSystemLibrary : library;
  void* handle = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* cause = ::dlerror();
    throw no_driver(name, cause != nullptr ? cause : "it cannot be loaded", "install the NVIDIA driver on this machine");
  }
  look_up(handle, name);
  Result code = table_.init(0);
  if (code == kSuccess) code = table_.device_get_count(&device_count_);
  if (code != kSuccess) throw no_driver(name, "cuInit says " + text_of(code), remedy_for(code));
  if (device_count_ == 0) throw no_driver(name, "it sees no device", remedy_for(kNoDevice));
}

void Driver::look_up(void* handle, const std::string& library) {
  const auto find = [&](auto& field, const char* symbol) {
    void* found = ::dlsym(handle, symbol);
    if (found == nullptr) throw no_driver(library, std::string("it has no ") + symbol, "install a newer NVIDIA driver");
    field = reinterpret_cast<std::decay_t<decltype(field)>>(found);
  };
#define LAZYCKPT_CUDA_LOOK_UP(field, symbol, arguments) find(table_.field, #symbol);
  LAZYCKPT_CUDA_CALLS(LAZYCKPT_CUDA_LOOK_UP)
#undef LAZYCKPT_CUDA_LOOK_UP
#define LAZYCKPT_CUDA_LOOK_FOR(field, symbol, arguments) \
  table_.field = reinterpret_cast<decltype(table_.field)>(::dlsym(handle, #symbol));
  LAZYCKPT_CUDA_OPTIONAL_CALLS(LAZYCKPT_CUDA_LOOK_FOR)
#undef LAZYCKPT_CUDA_LOOK_FOR
}

std::string Driver::text_of(Result code) const {
  const char *name = nullptr, *text = nullptr;
  table_.get_error_name(code, &name);
  table_.get_error_string(code, &text);
  return std::string(name != nullptr ? name : "an unknown error") + " (" + std::to_string(code) + ": " +
         (text != nullptr ? text : "no text") + ")";
}

Error Driver::error(Result code, const std::string& call, int device) const {
  const std::string where = device < 0 ? "" : " on CUDA device " + std::to_string(device);
  return Error(ErrorKind::kDevice, call + where + " failed with " + text_of(code) + "; " + remedy_for(code), code);
}

void Driver::check(Result code, const char* call, int device) const {
  if (code != kSuccess) throw error(code, call, device);
}

// ---- Context -----------------------------------------------------------------------------------------------------

Context::Context(std::shared_ptr<const Driver> driver, int device) : driver_(std::move(driver)), device_(device) {
  check(table().device_get(&device_handle_, device), "cuDeviceGet");
  check(table().primary_ctx_retain(&handle_, device_handle_), "cuDevicePrimaryCtxRetain");
}

// Handles end in any thread, with their context current there. One that ends after the driver has, at the end of the
// process, has nothing left to give back: errors mean nothing here.
template <typename End>
void in_context(const Context& context, End end) {
  const Table& table = context.table();
  ContextHandle before = nullptr;
  const bool known = table.ctx_get_current(&before) == kSuccess;  // if not, ours stays current
  const bool inside = known && before == context.handle();
  int mode = kCaptureModeRelaxed;
  const bool relaxed = table.exchange_capture_mode(&mode) == kSuccess;
  // A second try, because what does not end here is lost to the process.
  if (!inside && table.ctx_set_current(context.handle()) != kSuccess) table.ctx_set_current(context.handle());
  end(table);
  if (relaxed) table.exchange_capture_mode(&mode);
  if (known && !inside) table.ctx_set_current(before);
}

Context::~Context() { table().primary_ctx_release(device_handle_); }

std::string Context::pci_id() const {
  char text[32] = {};
  return table().device_get_pci_bus_id(text, sizeof text, device_handle_) == kSuccess ? text : "";
}

bool Context::is_foreign(StreamHandle stream) const {
  ContextHandle context = nullptr;
  if (reinterpret_cast<uintptr_t>(stream) > kLastOfDefaultStreams) {
    return table().stream_get_ctx != nullptr && table().stream_get_ctx(stream, &context) == kSuccess && context != handle_;
  }
  DeviceHandle device = -1;
  if (table().ctx_get_current(&context) != kSuccess || context == nullptr || context == handle_) return false;
  return table().ctx_get_device != nullptr && table().ctx_get_device(&device) == kSuccess && device == device_handle_;
}

bool Context::is_capturing(StreamHandle stream) const {
  int status = 0;
  const Result code = table().stream_is_capturing(stream, &status);
  if (code == kCaptureImplicit) return true;
  check(code, "cuStreamIsCapturing");
  return status != 0;
}

MemoryLevel Context::memory_level() const {
  MemoryLevel level;
  check(table().mem_get_info(&level.free, &level.total), "cuMemGetInfo");
  return level;
}

Current::Current(const Context& context) : context_(context) {
  context.check(context.table().ctx_get_current(&before_), "cuCtxGetCurrent");
  context.check(context.table().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode");
  if (before_ == context.handle()) return;
  const Result code = context.table().ctx_set_current(context.handle());
  if (code == kSuccess) return;
  context.table().exchange_capture_mode(&mode_);
  context.check(code, "cuCtxSetCurrent");
}

Current::~Current() {
  context_.table().exchange_capture_mode(&mode_);
  if (before_ != context_.handle()) context_.table().ctx_set_current(before_);
}

std::string place_of(int device) { return "CUDA device " + std::to_string(device); }

Error foreign_refused(int device) {
  return Error(ErrorKind::kDevice,
               "the current stream of " + place_of(device) + " belongs to another context than the primary one of the device, as that "
               "of a green context does; copies cannot be put in order with it",
               kInvalidContext);
}

Error capture_refused(int device, const std::string& advice) {
  return Error(ErrorKind::kDevice,
               "the current stream of " + place_of(device) +
                   " is being captured into a graph, where a copy would be recorded instead of made; " + advice,
               kCaptureUnsupported);
}

namespace {

EventHandle make_event(const Context& context) {
  EventHandle event = nullptr;
  context.check(context.table().event_create(&event, kEventBlockingSync | kEventDisableTiming), "cuEventCreate");
  return event;
}

}  // namespace

// ---- Stream, Event, HostRegistration, HostMemory, Memory ---------------------------------------------------------

Stream::Stream(std::shared_ptr<const Context> context) : context_(std::move(context)) {
  int least = 0, greatest = 0;
  context_->check(context_->table().ctx_get_stream_priority_range(&least, &greatest), "cuCtxGetStreamPriorityRange");
  context_->check(context_->table().stream_create(&handle_, kStreamNonBlocking, least), "cuStreamCreateWithPriority");
}

Stream::~Stream() {
  in_context(*context_, [&](const Table& table) { table.stream_destroy(handle_); });
}

EventPool::~EventPool() {
  in_context(*context_, [&](const Table& table) {
    for (const EventHandle event : free_) table.event_destroy(event);
  });
}

EventHandle EventPool::take() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      const EventHandle event = free_.back();
      free_.pop_back();
      return event;
    }
  }
  return make_event(*context_);
}

void EventPool::give_back(EventHandle event) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(event);
}

Event::Event(std::shared_ptr<const Context> context) : context_(std::move(context)), handle_(make_event(*context_)) {}

Event::Event(std::shared_ptr<EventPool> pool) : context_(pool->context()), pool_(std::move(pool)), handle_(pool_->take()) {}

Event::~Event() {
  if (pool_ != nullptr) {
    pool_->give_back(handle_);
  } else {
    in_context(*context_, [&](const Table& table) { table.event_destroy(handle_); });
  }
}

void Event::record(StreamHandle stream) const {
  context_->check(context_->table().event_record(handle_, stream), "cuEventRecord");
}

void Event::hold_back(StreamHandle stream) const {
  context_->check(context_->table().stream_wait_event(stream, handle_, 0), "cuStreamWaitEvent");
}

bool Event::has_happened() const {
  const Result code = context_->table().event_query(handle_);
  if (code == kNotReady) return false;
  context_->check(code, "a copy (seen by cuEventQuery)");
  return true;
}

HostRegistration::HostRegistration(std::shared_ptr<const Context> context, void* begin, size_t bytes)
    : context_(std::move(context)), begin_(begin) {
  context_->check(context_->table().mem_host_register(begin, bytes, kHostRegisterPortable), "cuMemHostRegister");
}

HostRegistration::~HostRegistration() {
  in_context(*context_, [&](const Table& table) { table.mem_host_unregister(begin_); });
}

HostMemory::HostMemory(const std::shared_ptr<const Context>& context, size_t bytes)
    : bytes_((bytes + kPage - 1) / kPage * kPage) {
  void* const mapped = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  ::madvise(mapped, bytes_, MADV_DONTFORK);
  begin_ = static_cast<std::byte*>(mapped);
  try {
    registration_ = std::make_unique<HostRegistration>(context, begin_, bytes_);
  } catch (const Error&) {  // then copies to it hold up whoever enqueues them
  } catch (...) {
    ::munmap(begin_, bytes_);
    throw;
  }
}

HostMemory::~HostMemory() {
  registration_.reset();
  ::munmap(begin_, bytes_);
}

Memory::Memory(std::shared_ptr<const Context> context, size_t bytes) : context_(std::move(context)), bytes_(bytes) {
  context_->check(context_->table().mem_alloc(&address_, bytes), "cuMemAlloc");
}

Memory::~Memory() {
  in_context(*context_, [&](const Table& table) { table.mem_free(address_); });
}

// ---- Copies ------------------------------------------------------------------------------------------------------

namespace {

// The default stream, by either of its names: batches are refused there.
bool is_legacy(StreamHandle stream) { return reinterpret_cast<uintptr_t>(stream) <= 1; }

bool copy_in_one_call(const Table& table, const Copy* copies, size_t count, StreamHandle stream) {
  std::vector<Address> to, from;
  std::vector<size_t> sizes;
  for (size_t i = 0; i < count; ++i) {
    to.push_back(copies[i].to);
    from.push_back(copies[i].from);
    sizes.push_back(copies[i].bytes);
  }
  CopyAttributes attributes;
  size_t first = 0, failed = 0;
  return table.memcpy_batch_async(to.data(), from.data(), sizes.data(), count, &attributes, &first, 1, &failed, stream) ==
         kSuccess;
}

// How many have been enqueued, from the first on.
size_t copy_in_batches(const Table& table, const std::vector<Copy>& copies, StreamHandle stream) {
  size_t done = 0;
  while (done < copies.size()) {
    const size_t count = std::min(copies.size() - done, kMostInBatch);
    if (!copy_in_one_call(table, &copies[done], count, stream)) return done;
    done += count;
  }
  return done;
}

}  // namespace

void enqueue_copies(const Context& context, Route route, const std::vector<Copy>& copies, StreamHandle stream,
                    std::atomic<bool>* in_batches) {
  const Table& table = context.table();
  size_t done = 0;
  if (in_batches != nullptr && *in_batches && table.memcpy_batch_async != nullptr && copies.size() > 1 && !is_legacy(stream)) {
    done = copy_in_batches(table, copies, stream);
    if (done < copies.size()) *in_batches = false;
  }
  for (; done < copies.size(); ++done) {
    const Copy& copy = copies[done];
    switch (route) {
      case Route::kToHost: {
        auto* const to = reinterpret_cast<void*>(copy.to);
        context.check(table.memcpy_dtoh_async(to, copy.from, copy.bytes, stream), "cuMemcpyDtoHAsync");
        break;
      }
      case Route::kOnDevice:
        context.check(table.memcpy_dtod_async(copy.to, copy.from, copy.bytes, stream), "cuMemcpyDtoDAsync");
        break;
      case Route::kFromHost: {
        const auto* const from = reinterpret_cast<const void*>(copy.from);
        context.check(table.memcpy_htod_async(copy.to, from, copy.bytes, stream), "cuMemcpyHtoDAsync");
        break;
      }
    }
  }
}

}  // namespace lazyckpt::cuda
