#include "devices.h"

#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "archives.h"
#include "base/error.h"
#include "checks.h"
#include "cuda/driver.h"
#include "engine/engine.h"
#include "fake.h"
#include "os/file.h"

namespace lazyckpt::stress {
namespace {

constexpr int kThreads = 2;
constexpr int kJobsPerThread = 4;

std::atomic<int> next_file{0};

struct Save {
  std::string path;
  Sample sample;
  std::shared_ptr<Job> job;
};

// Where a file is wrong, and with what.
std::string difference(const std::string& found, const Sample& sample) {
  size_t at = 0;
  while (at < found.size() && at < sample.expected.size() && found[at] == sample.expected[at]) ++at;
  std::string text = ": first at " + std::to_string(at);
  if (at < found.size()) text += ", where it has " + std::to_string(static_cast<unsigned char>(found[at]));
  for (const Extent& extent : sample.spec.extents) {
    if (at < extent.offset || at >= extent.offset + extent.length) continue;
    text += ", in an extent of kind " + std::to_string(static_cast<int>(extent.kind));
  }
  return text;
}

class Training {
 public:
  Training(Random& random, std::string directory, std::string library)
      : random_(random), directory_(std::move(directory)), library_(std::move(library)), fake_(library_) {}

  void run() {
    fake_.configure(kDevices, random_.up_to(~uint64_t{0}), random_.seconds(random_.one_in(2) ? 0.0003 : 0.003));
    choose_weather(random_);
    if (random_.one_in(3)) {
      may_fail_ = true;
      static const std::vector<std::string> calls{"cuMemcpyDtoHAsync", "cuMemcpyBatchAsync", "batched copies", "cuEventRecord",
                                                  "cuEventCreate",     "cuStreamWaitEvent",  "cuMemHostRegister",
                                                  "cuCtxGetCurrent",   "cuMemcpyDtoDAsync",  "cuMemcpyDtoDAsync", "cuMemAlloc",
                                                  "cuCtxSetCurrent",   "cuThreadExchangeStreamCaptureMode"};
      const std::string& call = random_.choose(calls);
      const uint64_t most_skipped = call == "cuThreadExchangeStreamCaptureMode" ? kDevices - 1 : 40;  // once for each lane
      fake_.fail(call.c_str(), static_cast<int64_t>(random_.up_to(most_skipped)), cuda::kOutOfMemory, random_.one_in(2) ? 1 : 0);
    }
    EngineOptions options;
    options.arena_bytes = size_t{1} << (18 + random_.up_to(3));
    options.chunk_bytes = size_t{1} << (16 + random_.up_to(2));
    options.writers = 1 + static_cast<int>(random_.up_to(2));
    options.cuda_library = library_;
    if (!random_.one_in(3)) options.device_cache_bytes = size_t{1} << (18 + random_.up_to(3));
    options.device_batches = random_.one_in(2);
    if (random_.one_in(4)) options.device_rate = size_t{1} << (22 + random_.up_to(4));
    options.smallest_pinned_slab_bytes = size_t{1} << (12 + random_.up_to(6));
    options.pinned_slab_bytes = size_t{1} << (16 + random_.up_to(3));
    if (random_.one_in(2)) options.most_arena_bytes = size_t{1} << 21;
    options.device_window_bytes = random_.one_in(2) ? 0 : size_t{1} << (17 + random_.up_to(3));
    fly(options);
    end_weather();
    fake_.configure(kDevices, 0, 0);
    fake_.expect_nothing_left();
    ++rounds;
  }

 private:
  void fly(const EngineOptions& options) {
    std::vector<std::vector<Save>> saves(kThreads);  // their memory outlives the engine
    {
      Engine engine(options);
      std::vector<std::thread> threads;
      for (std::vector<Save>& mine : saves) {
        threads.emplace_back([&, seed = random_.up_to(~uint64_t{0})] { train(engine, Random(seed), mine); });
      }
      for (std::thread& thread : threads) thread.join();
      if (random_.one_in(2)) {
        expect(engine.close(kPatienceS, {}), "the engine did not drain");
        expect(engine.arena().used() == 0, "the arena is in use after all jobs have ended");
        ended_early_ = false;
      }
    }
    for (int device = 0; device < kDevices; ++device) fake_.synchronize(device, nullptr);
    for (std::vector<Save>& mine : saves) {
      for (Save& save : mine) check(save);
    }
  }

  void train(Engine& engine, Random random, std::vector<Save>& saves) {
    for (int i = 0; i < kJobsPerThread; ++i) {
      Sample sample = to_devices(random, make_sample(random));
      Save save{directory_ + "/d" + std::to_string(next_file++) + "-", std::move(sample), nullptr};
      try {
        auto file = make_file(random, save.path, !random.one_in(4));
        if (random.one_in(3)) engine.grow_arena(size_t{1} << (18 + random.up_to(3)));
        const CaptureChecks checks{random.one_in(4), random.one_in(2), random.one_in(4)};
        save.job = engine.submit(std::move(file), save.sample.spec, checks, kPatienceS, {}, streams_);
      } catch (const Error& error) {
        ++cancelled;
        expect(may_fail_, save.path + " was refused: " + error.what());
        // What was enqueued before still reads the memory.
        saves.push_back(std::move(save));
        continue;
      }
      if (random.one_in(8)) {  // caches are given back
        for (int device = 0; device < 2; ++device) fake_.set_memory(device, uint64_t{1} << 30, uint64_t{1} << 30);
      }
      save.sample.each(Source::kCopy, &Buffer::spoil);
      spoil_on_devices(save, Source::kDeviceCopy);
      if (random.one_in(2)) pass_fence(engine, random, save);
      saves.push_back(std::move(save));
    }
  }

  static Sample to_devices(Random& random, Sample sample) {
    const bool all = random.one_in(3);
    for (size_t i = 0; i < sample.spec.extents.size(); ++i) {
      Extent& extent = sample.spec.extents[i];
      if (extent.record == kStructure || (!all && random.one_in(3))) continue;
      extent.kind = extent.kind == Source::kCopy ? Source::kDeviceCopy : Source::kDeviceLazy;
      extent.device = static_cast<int>(random.up_to(kDevices - 1));
      sample.memory[i].first = extent.kind;
    }
    return sample;
  }

  void spoil_on_devices(Save& save, Source kind) {
    for (size_t i = 0; i < save.sample.spec.extents.size(); ++i) {
      const Extent& extent = save.sample.spec.extents[i];
      if (extent.kind == kind) fake_.fill(extent.device, nullptr, save.sample.memory[i].second.begin(), 0xEE, extent.length);
    }
  }

  void pass_fence(Engine& engine, Random& random, Save& save) {
    try {
      if (random.one_in(4)) {
        engine.fence({});
        expect(may_fail_ || save.job->released(), save.path + " is not released behind a fence of the host");
      } else {
        engine.fence({}, streams_);
      }
      if (random.one_in(3)) engine.order({}, streams_);
    } catch (const Error& error) {
      ++interrupted_fences;
      expect(may_fail_, std::string("the fence failed: ") + error.what());
      return;
    }
    const Outcome outcome = look_at(*save.job);
    expect(outcome.captured, save.path + " is not captured behind the fence");
    if (outcome.failed) return;
    save.sample.each(Source::kLazy, &Buffer::spoil);
    spoil_on_devices(save, Source::kDeviceLazy);
  }

  void check(Save& save) {
    if (save.job == nullptr) return expect(!exists(save.path), save.path + " was refused and left behind");
    const Outcome outcome = look_at(*save.job);
    expect(outcome.finished, save.path + " is not finished");
    if (outcome.failed) {
      ++failed;
      expect(may_fail_ || ended_early_, save.path + " failed without a reason: " + outcome.error);
      return expect(!exists(save.path), save.path + " failed and was left behind");
    }
    bytes_cached += save.job->stats.device_cached_bytes;
    const std::string found = read_back(save.path);
    expect(found == save.sample.expected, save.path + " does not hold what it should" + difference(found, save.sample));
    check_archives(save.sample, save.path + "archive");
    ++durable;
    bytes_verified += found.size();
    ::unlink(save.path.c_str());
  }

  Random& random_;
  const std::string directory_, library_;
  const Fake fake_;
  const Streams streams_{{0, 0}, {1, 0}};
  std::atomic<bool> may_fail_{false}, ended_early_{true};
};

}  // namespace

void carry_from_devices(Random& random, const std::string& directory, const std::string& library) {
  Training(random, directory, library).run();
}

}  // namespace lazyckpt::stress
