#include "cuda/self_check.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <sstream>
#include <thread>
#include <utility>

namespace lazyckpt::cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kBytes = size_t{4} << 20;
constexpr size_t kSizes[] = {1, 63, 4097, kBytes - 1};
constexpr size_t kDeviceOffset = 3, kHostOffset = 5;  // both odd
constexpr size_t kRoom = kBytes + 4096;
// Much longer than what they hold up takes. Where all looks in order, a thread of the host may have come late: then the next.
constexpr int kPausesMs[] = {10, 20, 40, 80, 160};
constexpr auto kLook = std::chrono::microseconds(200);
constexpr int kBefore = 0x11, kWritten = 0x5A, kAfter = 0xC3;
constexpr int kMemoryType = 2, kDeviceOrdinal = 9;             // CU_POINTER_ATTRIBUTE_...
constexpr unsigned kHostType = 1, kDeviceType = 2;             // CU_MEMORYTYPE_...
constexpr Result kFirstOfCapture = 900, kLastOfCapture = 908;  // CUDA_ERROR_STREAM_CAPTURE_...

struct Late {};
struct Finding {
  Verdict verdict;
  std::string reason;
};

void pause(void* of) { std::this_thread::sleep_for(std::chrono::milliseconds(*static_cast<const int*>(of))); }

// All that the device may still be reading and writing when the time is over.
struct Scratch {
  explicit Scratch(const std::shared_ptr<const Context>& context)
      : device(context, kRoom), host(context, 2 * kRoom), copying(context), side(context), written(context), copied(context),
        done(context) {}

  Memory device;
  HostMemory host;
  Stream copying, side;
  Event written, copied, done;
};

class Check {
 public:
  Check(std::shared_ptr<const Context> context, Clock::time_point deadline)
      : context_(std::move(context)), deadline_(deadline), scratch_(std::make_unique<Scratch>(context_)) {}

  void run() {
    look_at_pointers();
    const std::pair<StreamHandle, const char*> computing[] = {{nullptr, "the default stream"},
                                                              {scratch_->side.get(), "another stream"}};
    for (const auto& [stream, name] : computing) {
      if (!read_after_write(stream, true)) fail("a copy overtook a write that it had to wait for", name);
      if (!write_after_read(stream, true)) fail("a write overtook a copy that it had to wait for", name);
    }
    // If streams wait for each other anyway, or the work takes no time, nothing was shown.
    const auto never_torn = [&](bool (Check::*without_wait)(StreamHandle, bool, const int&) const) {
      return std::all_of(std::begin(kPausesMs), std::end(kPausesMs),
                         [&](const int& pause_ms) { return (this->*without_wait)(nullptr, false, pause_ms); });
    };
    if (never_torn(&Check::read_after_write)) doubt("copies wait for writes on other streams unasked");
    if (never_torn(&Check::write_after_read)) doubt("writes wait for copies on other streams unasked");
    for (const size_t size : kSizes) {
      if (!there_and_back(size)) fail("a copy of " + std::to_string(size) + " bytes brought others", "the copying stream");
    }
  }

  // What the device has not let go of: there is no way to take it back.
  void leak() { static_cast<void>(scratch_.release()); }

 private:
  [[noreturn]] void fail(const std::string& what, const std::string& where) const {
    throw Finding{Verdict::kFailed, what + ", on " + where};
  }
  [[noreturn]] void doubt(const std::string& what) const {
    throw Finding{Verdict::kInconclusive, what + ", so nothing shows that waiting for an event works"};
  }

  const Table& table() const { return context_->table(); }
  std::byte* host() const { return scratch_->host.begin(); }
  Address device() const { return scratch_->device.address(); }

  void look_at_pointers() const {
    if (!scratch_->host.pinned()) fail("host memory cannot be pinned", place_of(context_->device()));
    unsigned host_type = 0, device_type = 0;
    int ordinal = -1;
    const auto ask = [&](void* value, int attribute, Address address) {
      context_->check(table().pointer_get_attribute(value, attribute, address), "cuPointerGetAttribute");
    };
    ask(&host_type, kMemoryType, reinterpret_cast<Address>(host()));
    ask(&device_type, kMemoryType, device());
    ask(&ordinal, kDeviceOrdinal, device());
    if (host_type != kHostType) fail("the driver does not know pinned memory", place_of(context_->device()));
    if (device_type != kDeviceType || ordinal != context_->device()) {
      fail("the driver does not know memory that it has given out", place_of(context_->device()));
    }
  }

  void hold_up(StreamHandle stream, const int& pause_ms) const {
    context_->check(table().launch_host_func(stream, pause, const_cast<int*>(&pause_ms)), "cuLaunchHostFunc");
  }
  void fill(StreamHandle stream, int value) const {
    context_->check(table().memset_async(device(), static_cast<unsigned char>(value), kBytes, stream), "cuMemsetD8Async");
  }
  void copy_to_host() const {
    context_->check(table().memcpy_dtoh_async(host(), device(), kBytes, scratch_->copying.get()), "cuMemcpyDtoHAsync");
  }
  void wait_for(const Event& event) const {
    while (!event.has_happened()) {
      if (Clock::now() > deadline_) throw Late();
      std::this_thread::sleep_for(kLook);
    }
  }
  void finish(StreamHandle stream) const {
    scratch_->done.record(stream);
    wait_for(scratch_->done);
  }
  bool host_is_all(int value) const {
    const auto wanted = static_cast<std::byte>(value);
    return std::all_of(host(), host() + kBytes, [=](std::byte each) { return each == wanted; });
  }

  // Whether the copy has brought what was written, and nothing else.
  bool read_after_write(StreamHandle stream, bool ordered, const int& pause_ms = kPausesMs[0]) const {
    fill(stream, kBefore);
    finish(stream);
    hold_up(stream, pause_ms);
    fill(stream, kWritten);
    scratch_->written.record(stream);
    if (ordered) scratch_->written.hold_back(scratch_->copying.get());
    copy_to_host();
    finish(scratch_->copying.get());
    const bool right = host_is_all(kWritten);
    finish(stream);
    return right;
  }

  // Whether the copy has brought nothing of what was written behind it.
  bool write_after_read(StreamHandle stream, bool ordered, const int& pause_ms = kPausesMs[0]) const {
    fill(stream, kWritten);
    finish(stream);
    hold_up(scratch_->copying.get(), pause_ms);
    copy_to_host();
    scratch_->copied.record(scratch_->copying.get());
    if (ordered) scratch_->copied.hold_back(stream);
    fill(stream, kAfter);
    finish(stream);
    finish(scratch_->copying.get());
    return host_is_all(kWritten);
  }

  bool there_and_back(size_t size) const {
    std::byte* const out = host() + kHostOffset;
    std::byte* const back = host() + kRoom + kHostOffset;
    for (size_t i = 0; i < size; ++i) out[i] = static_cast<std::byte>((i * 151 + size) >> 3);
    std::memset(back - 1, kBefore, size + 2);
    const StreamHandle stream = scratch_->copying.get();
    context_->check(table().memcpy_htod_async(device() + kDeviceOffset, out, size, stream), "cuMemcpyHtoDAsync");
    context_->check(table().memcpy_dtoh_async(back, device() + kDeviceOffset, size, stream), "cuMemcpyDtoHAsync");
    finish(stream);
    const auto untouched = static_cast<std::byte>(kBefore);
    return std::memcmp(out, back, size) == 0 && back[-1] == untouched && back[size] == untouched;
  }

  const std::shared_ptr<const Context> context_;
  const Clock::time_point deadline_;
  std::unique_ptr<Scratch> scratch_;
};

bool is_of_capture(const Error& error) { return error.code() >= kFirstOfCapture && error.code() <= kLastOfCapture; }

}  // namespace

SelfCheck check_device(const std::shared_ptr<const Context>& context, double timeout_s) {
  const Table& table = context->table();
  if (table.launch_host_func == nullptr || table.memset_async == nullptr) {
    return {Verdict::kInconclusive, "the driver has no cuLaunchHostFunc or cuMemsetD8Async"};
  }
  try {
    const Current current(*context);
    if (context->is_capturing(nullptr)) return {Verdict::kInconclusive, "a graph is being captured"};
    const auto allowed = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
    Check check(context, Clock::now() + allowed);
    try {
      check.run();
    } catch (const Late&) {
      check.leak();
      std::ostringstream text;
      text << "the device has not done it within " << timeout_s << " s";
      return {Verdict::kLate, text.str()};
    } catch (const Error&) {
      check.leak();  // what has been enqueued may still be going on
      throw;
    }
  } catch (const Finding& finding) {
    return {finding.verdict, finding.reason};
  } catch (const Error& error) {
    if (is_of_capture(error)) return {Verdict::kInconclusive, std::string("a graph is being captured: ") + error.what()};
    return {Verdict::kFailed, error.what()};
  }
  return {};
}

}  // namespace lazyckpt::cuda
