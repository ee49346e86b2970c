#include "loads.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/fault.h"
#include "checks.h"
#include "cuda/driver.h"
#include "fake.h"
#include "os/file.h"
#include "reading/range_reader.h"

namespace lazyckpt::stress {
namespace {

class Load {
 public:
  Load(Random& random, const std::string& directory, const std::string& library)
      : random_(random), path_(directory + "/loaded"), library_(library), fake_(library) {}

  void run() {
    fake_.configure(kDevices, random_.up_to(~uint64_t{0}), random_.seconds(random_.one_in(2) ? 0.0003 : 0.003));
    write();
    choose_ranges();
    choose_faults();
    read();
    end_weather();
    for (int device = 0; device < kDevices; ++device) fake_.synchronize(device, nullptr);
    check();
    fake_.configure(kDevices, 0, 0);
    fake_.expect_nothing_left();
    ::unlink(path_.c_str());
  }

 private:
  void write() {
    const auto* const bytes = reinterpret_cast<const char*>(noise().data());
    for (size_t part = 0; part <= random_.up_to(3); ++part) content_.append(bytes, noise().size() - random_.up_to(5000));
    std::ofstream file(path_, std::ios::binary | std::ios::trunc);
    file.write(content_.data(), static_cast<std::streamsize>(content_.size()));
  }

  void choose_ranges() {
    for (size_t i = 0; i <= random_.up_to(40); ++i) {
      const size_t most = std::min<size_t>(content_.size(), random_.one_in(4) ? 900000 : 9000);
      const size_t length = random_.up_to(most), offset = random_.up_to(content_.size() - length);
      places_.emplace_back(length, random_.one_in(3) ? random_.up_to(4095) : offset % 4096);
      const int device = static_cast<int>(random_.up_to(kDevices)) - 1;
      ranges_.push_back({offset, length, random_.one_in(9) ? nullptr : places_.back().begin(), device});
    }
    for (const ReadRange& range : ranges_) {
      if (range.to != nullptr && range.device != kHost) fake_.fill(range.device, nullptr, range.to, 0xEE, range.length);
    }
  }

  void choose_faults() {
    if (random_.one_in(3)) override_limits(random_.choose<IoLimits>({{512, 512}, {4096, 4096}, {32768, 32768}}));
    if (random_.one_in(4)) fault::add({"pread", path_, 0, 20, 0, static_cast<int64_t>(32768 + random_.up_to(40000)), 0});
    if (random_.one_in(4)) fault::add({"pread", path_, static_cast<int64_t>(random_.up_to(5)), 3, EINTR, -1, 0});
    if (random_.one_in(8)) {
      may_fail_ = true;
      fault::add({"pread", path_, static_cast<int64_t>(random_.up_to(9)), 1, EIO, -1, 0});
    }
    if (!random_.one_in(3)) return;
    may_fail_ = true;
    static const std::vector<std::string> calls{"cuMemcpyHtoDAsync", "cuMemcpyBatchAsync", "batched copies", "cuEventRecord",
                                                "cuEventCreate",     "cuStreamWaitEvent",  "cuMemHostRegister",
                                                "cuCtxSetCurrent",   "cuCtxGetCurrent",    "cuStreamCreate",
                                                "cuDevicePrimaryCtxRetain"};
    const std::string& call = random_.choose(calls);
    const uint64_t most_skipped = call.rfind("cuCtx", 0) == 0 ? 60 : 12;  // those stand around all others, and every look
    fake_.fail(call.c_str(), static_cast<int64_t>(random_.up_to(most_skipped)), cuda::kOutOfMemory, random_.one_in(2) ? 1 : 0);
  }

  void read() {
    ReadOptions options;
    options.threads = 1 + static_cast<int>(random_.up_to(3));
    options.timeout_s = kPatienceS;
    options.piece_bytes = size_t{1} << (16 + random_.up_to(4));
    options.driver = library_;
    options.streams = {{0, 0}, {1, 0}};
    int looks_left = random_.one_in(6) ? static_cast<int>(random_.up_to(1)) : 1 << 30;
    options.interrupt = [&] {
      if (looks_left-- <= 0) throw std::runtime_error("interrupted");
    };
    try {
      crcs_ = read_ranges(std::make_shared<ReadableFile>(path_, !random_.one_in(4)), ranges_, options);
    } catch (const Error& error) {
      ++failed;
      expect(may_fail_, path_ + " could not be read: " + error.what());
    } catch (const std::runtime_error&) {
      ++cancelled;
    }
  }

  void check() {
    if (crcs_.empty()) return;
    for (size_t i = 0; i < ranges_.size(); ++i) {
      const ReadRange& range = ranges_[i];
      const std::string expected = content_.substr(range.offset, range.length);
      expect(crcs_[i] == plain_crc32(expected), path_ + ": a range has another CRC-32");
      if (range.to == nullptr) continue;
      const bool same = std::equal(expected.begin(), expected.end(), reinterpret_cast<const char*>(range.to));
      expect(same, path_ + ": a range on device " + std::to_string(range.device) + " has other bytes");
      bytes_loaded += range.length;
    }
  }

  Random& random_;
  const std::string path_, library_;
  const Fake fake_;
  std::string content_;
  std::vector<Buffer> places_;
  std::vector<ReadRange> ranges_;
  std::vector<uint32_t> crcs_;
  bool may_fail_ = false;
};

}  // namespace

void load_to_devices(Random& random, const std::string& directory, const std::string& library) {
  Load(random, directory, library).run();
}

}  // namespace lazyckpt::stress
