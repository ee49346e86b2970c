// Drives the core without Python, for the sanitizers: many threads submit, fence and close at random, storage is slow,
// short, full or gone, and every file that becomes durable is compared with an independent copy of what it should hold;
// of files of several archives each is read by itself; several ranks write one file together; and bytes come from devices and
// go to them, which a fake driver plays (libfake_cuda.so, beside the program). Of a directory on XFS or btrfs files share blocks.
//
//     stress [seconds] [seed] [directory]
//
// Prints a summary; exit status 1 if anything was not as promised.
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "archives.h"
#include "base/error.h"
#include "base/fault.h"
#include "checks.h"
#include "devices.h"
#include "engine/engine.h"
#include "format/torch_zip.h"
#include "generations.h"
#include "loads.h"
#include "os/file.h"
#include "reading/record_file.h"
#include "sample.h"
#include "shares.h"

using namespace lazyckpt;
using namespace lazyckpt::stress;

namespace {

constexpr size_t kJobsPerThread = 6;
constexpr int kThreads = 3;

std::atomic<int> next_file{0};

// ---- One engine, several threads ---------------------------------------------------------------------------------

struct Flight {
  std::string path;
  Sample sample;
  std::shared_ptr<Job> job;
  bool may_fail = false;
};

void check_pieces(const Flight& flight) {
  const Checksums& found = flight.job->checksums;
  const std::string& file = flight.sample.expected;
  const size_t count = file.empty() ? 0 : (file.size() - 1) / found.piece_bytes + 1;
  if (found.pieces.size() != count) return mismatch(flight.path + " has another number of pieces");
  for (size_t i = 0; i < count; ++i) {
    const uint32_t crc = plain_crc32(file.substr(i * found.piece_bytes, found.piece_bytes));
    expect(found.pieces[i] == crc, flight.path + " has another CRC-32 in its piece " + std::to_string(i));
  }
}

void check_finished(Flight& flight, bool engine_ended) {
  const Outcome outcome = look_at(*flight.job);
  expect(outcome.finished, flight.path + " is not finished");
  if (outcome.failed) {
    ++failed;
    expect(flight.may_fail || engine_ended, flight.path + " failed without a reason: " + outcome.error);
    expect(!exists(flight.path), flight.path + " failed and was left behind");
    return;
  }
  const std::string found = read_back(flight.path);
  expect(found == flight.sample.expected, flight.path + " does not hold what it should");
  expect(flight.job->checksums.written == plain_crc32(flight.sample.expected), flight.path + " has another CRC-32");
  check_pieces(flight);
  check_archives(flight.sample, flight.path + "archive");
  ++durable;
  bytes_verified += found.size();
  ::unlink(flight.path.c_str());
}

class Round {
 public:
  Round(uint64_t seed, const std::string& directory) : random_(seed), directory_(directory) {}

  void run() {
    choose_weather(random_);
    options_.arena_bytes = size_t{1} << (18 + random_.up_to(random_.one_in(2) ? 0 : 4));
    options_.chunk_bytes = size_t{1} << (16 + random_.up_to(3));
    options_.writers = 1 + static_cast<int>(random_.up_to(3));
    {
      Engine engine(options_);
      std::vector<std::thread> threads;
      for (int i = 0; i < kThreads; ++i) {
        threads.emplace_back([this, &engine, seed = random_.up_to(~uint64_t{0})] { fly(engine, Random(seed)); });
      }
      threads.emplace_back([this, &engine] { fence_now_and_then(engine); });
      for (int i = 0; i < kThreads; ++i) threads[static_cast<size_t>(i)].join();
      done_ = true;
      threads.back().join();
      end(engine);
    }
    for (Flight& flight : unfinished_) check_finished(flight, true);
    end_weather();
    ++rounds;
  }

 private:
  void add_fault(Random& random, Flight& flight) {
    if (!random.one_in(5)) return;
    flight.may_fail = true;
    static const std::vector<std::string> calls{"fallocate", "pwritev", "pwritev", "ftruncate", "fdatasync", "close"};
    const std::string& call = random.choose(calls);
    const auto skip = static_cast<int64_t>(call == "pwritev" ? random.up_to(12) : 0);
    const int code = random.choose<int>({ENOSPC, EIO, EDQUOT, EINVAL});
    fault::add({call, flight.path, skip, 1, code, -1, random.seconds(0.003)});
  }

  void fly(Engine& engine, Random random) {
    std::vector<Flight> waiting;
    for (size_t i = 0; i < kJobsPerThread; ++i) {
      Flight flight;
      flight.path = directory_ + "/f" + std::to_string(next_file++) + "-";
      add_fault(random, flight);
      flight.sample = make_sample(random);
      if (!take_off(engine, random, flight)) continue;
      flight.sample.each(Source::kCopy, &Buffer::spoil);
      if (random.one_in(2)) flight.sample.each(Source::kCopy, &Buffer::release);
      if (random.one_in(2)) pass_fence(engine, random, flight);
      waiting.push_back(std::move(flight));
      if (random.one_in(2)) land(waiting);
    }
    if (random.one_in(2)) land(waiting);
    std::lock_guard<std::mutex> lock(mutex_);
    for (Flight& flight : waiting) unfinished_.push_back(std::move(flight));
  }

  // False if it was called off; its memory goes away at once then, as it does when Python unwinds.
  bool take_off(Engine& engine, Random& random, Flight& flight) {
    int looks_left = random.one_in(3) ? static_cast<int>(random.up_to(2)) : 1 << 30;
    const auto interrupt = [&] {
      if (looks_left-- <= 0) throw std::runtime_error("interrupted");
    };
    const double timeout_s = random.one_in(10) ? 0.02 : kPatienceS;
    flight.may_fail = flight.may_fail || timeout_s < 1;
    try {
      auto file = make_file(random, flight.path, !random.one_in(4));
      flight.job = engine.submit(std::move(file), flight.sample.spec, {random.one_in(4)}, timeout_s, interrupt);
      return true;
    } catch (const std::runtime_error&) {
      ++cancelled;
      return false;
    }
  }

  // Behind the fence everything lazy may change, and if the save has not failed, it may go away.
  void pass_fence(Engine& engine, Random& random, Flight& flight) {
    int looks_left = random.one_in(4) ? 0 : 1 << 30;
    try {
      engine.fence([&] {
        if (looks_left-- <= 0) throw std::runtime_error("interrupted");
      });
    } catch (const std::runtime_error&) {
      ++interrupted_fences;
      return;
    }
    const Outcome outcome = look_at(*flight.job);
    expect(outcome.captured, flight.path + " is not captured behind the fence");
    if (outcome.failed) return;
    flight.sample.each(Source::kLazy, &Buffer::spoil);
    flight.sample.each(Source::kLazy, &Buffer::release);
  }

  void land(std::vector<Flight>& waiting) {
    for (Flight& flight : waiting) {
      expect(wait_until_finished(*flight.job), flight.path + " never finished");
      check_finished(flight, false);
    }
    waiting.clear();
  }

  void fence_now_and_then(Engine& engine) {
    while (!done_) {
      engine.fence({});
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
  }

  // By draining, by a deadline that some jobs miss, or by the destructor, with jobs in flight.
  void end(Engine& engine) {
    const uint64_t how = random_.up_to(2);
    if (how == 2) return;
    const bool drained = engine.close(how == 0 ? kPatienceS : random_.seconds(0.01), {});
    expect(drained, "the engine did not drain");
    expect(engine.in_flight() == 0, "jobs are in flight after close()");
    expect(engine.arena().used() == 0, "the arena is in use after all jobs have ended");
    Flight late{directory_ + "/late-", make_sample(random_), nullptr, true};
    try {
      engine.submit(std::make_unique<WritableFile>(late.path, false), late.sample.spec, {}, 1, {});
      mismatch("a closed engine took a job");
    } catch (const Error& error) {
      expect(error.kind() == ErrorKind::kClosed, error.what());
    }
    expect(!exists(late.path), "a refused job left its file behind");
  }

  Random random_;
  const std::string directory_;
  EngineOptions options_;
  std::atomic<bool> done_{false};
  std::mutex mutex_;
  std::vector<Flight> unfinished_;  // guarded by mutex_
};

// A save is called off while a writer is inside its memory, which goes away as soon as submit() has thrown.
void call_off(Random& random, const std::string& directory) {
  EngineOptions options;
  options.arena_bytes = size_t{1} << 18;
  options.writers = 1 + static_cast<int>(random.up_to(1));
  Engine engine(options);
  const std::string path = directory + "/called-off";
  fault::add({"pwritev", path, 0, 2, 0, -1, 0.15 + random.seconds(0.1)});
  {
    Sample sample = SampleMaker(random, 4096).make_too_large(options.arena_bytes);
    const bool verify = random.one_in(2);
    try {
      engine.submit(make_file(random, path, random.one_in(2)), sample.spec, {verify}, kPatienceS,
                    [] { throw std::runtime_error("interrupted"); });
      mismatch("a save that was called off went through");
    } catch (const std::runtime_error&) {
      ++cancelled;
    }
  }
  expect(engine.close(kPatienceS, {}), "the engine did not drain after a save was called off");
  expect(engine.arena().used() == 0, "the arena is in use after a save was called off");
  expect(!exists(path), "a save that was called off left its file behind");
  fault::clear();
}

// ---- Damaged files -----------------------------------------------------------------------------------------------

std::string write_torch_file(Random& random, const std::string& path) {
  std::vector<Buffer> memory;
  TorchFile file;
  file.archive = "archive";
  for (size_t i = 0; i <= random.up_to(6); ++i) {
    memory.emplace_back(random.up_to(9000), random.up_to(64));
    memory.back().fill(random);
    const Source kind = random.one_in(2) ? Source::kCopy : Source::kLazy;
    file.storages.push_back({memory.back().begin(), memory.back().length(), kind});
  }
  Buffer pickle(1 + random.up_to(500), 0);
  pickle.fill(random);
  file.head.push_back({"data.pkl", pickle.begin(), pickle.length(), Source::kCopy});
  file.tail.push_back({"version", pickle.begin(), 1, Source::kOwned});
  file.uniform_alignment = random.choose<uint32_t>({0, 64, 4096});
  auto target = std::make_unique<WritableFile>(path, true);
  ZipLayout layout;
  FileSpec spec = describe(file, target->limits(), {}, layout);
  if (random.one_in(2)) spec.kept = std::shared_ptr<const void>(std::shared_ptr<const void>(), &layout);
  Engine engine({size_t{1} << 18, size_t{1} << 16, 1});
  const auto job = engine.submit(std::move(target), std::move(spec), {}, kPatienceS, {});
  expect(wait_until_finished(*job) && !look_at(*job).failed, path + " could not be written");
  return read_back(path);
}

void write_raw(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::string damage(Random& random, std::string bytes) {
  const uint64_t how = random.up_to(3);
  if (how == 0) bytes.resize(random.up_to(bytes.size() - 1));
  const size_t flips = how == 0 ? random.up_to(1) : 1 + random.up_to(how == 1 ? 0 : 6);
  for (size_t i = 0; i < flips && !bytes.empty(); ++i) {
    // The numbers that a reader trusts stand at the end.
    const size_t from = how == 3 && bytes.size() > 300 ? bytes.size() - 300 : 0;
    bytes[from + random.up_to(bytes.size() - from - 1)] ^= static_cast<char>(1 + random.up_to(254));
  }
  return bytes;
}

// A byte of every padding, and one of the directory's: no stretch between records is whole.
std::string damage_everywhere(Random& random, std::string bytes) {
  for (size_t at = bytes.find("ZZ"); at != std::string::npos; at = bytes.find("ZZ", at)) {
    const size_t behind = bytes.find_first_not_of('Z', at);
    bytes[at] = 'z';
    at = behind;
  }
  bytes[bytes.size() - 1 - random.up_to(97)] ^= static_cast<char>(1 + random.up_to(254));  // of its end records
  return bytes;
}

// Whatever the bytes, the reader ends with a verdict; for bytes that have changed it is the right one.
void fuzz(Random& random, const std::string& directory) {
  const std::string path = directory + "/fuzzed";
  ::unlink(path.c_str());
  const std::string good = write_torch_file(random, path);
  expect(verify_torch_file(path, {}), "a good file passes unchecked");
  for (int i = 0; i < 20; ++i) {
    const std::string bad = i % 5 == 0 ? damage_everywhere(random, good) : damage(random, good);
    write_raw(path, bad);
    ++fuzzed;
    try {
      verify_torch_file(path, {});
      expect(bad == good, "damage was not found");
    } catch (const Error& error) {
      ++found_damaged;
      expect(error.kind() == ErrorKind::kCorrupt, error.what());
    }
  }
}

std::string library_beside(const std::string& program) {
  return program.substr(0, program.rfind('/') + 1) + "libfake_cuda.so";
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 20;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 0) : std::random_device{}();
  const char* temporary = ::getenv("TMPDIR");
  const char* parent = argc > 3 ? argv[3] : temporary != nullptr ? temporary : "/tmp";
  std::string directory = std::string(parent) + "/stress-XXXXXX";
  ::alarm(static_cast<unsigned>(seconds) + 180);  // a hang ends the program, too
  if (::mkdtemp(directory.data()) == nullptr) {
    std::perror(directory.c_str());
    return 1;
  }
  std::printf("seed %llu, in %s\n", static_cast<unsigned long long>(seed), directory.c_str());
  std::fflush(stdout);
  Random random(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end && mismatches == 0) {
    Round(random.up_to(~uint64_t{0}), directory).run();
    write_together(random, directory);
    save_generations(random, directory);
    carry_from_devices(random, directory, library_beside(argv[0]));
    load_to_devices(random, directory, library_beside(argv[0]));
    if (rounds % 3 == 0) fuzz(random, directory);
    if (rounds % 5 == 0) call_off(random, directory);
  }
  std::printf("%d rounds: %d files durable and right (%.1f MiB, %.1f through caches), %d failed, %d called off, %d fences interrupted; "
              "%d damaged files, %d found; %d written together, %d with a share that failed; %d archives read; %.1f MiB loaded; %.1f MiB shared unread; %d mismatches\n",
              rounds.load(), durable.load(), static_cast<double>(bytes_verified) / 1048576,
              static_cast<double>(bytes_cached) / 1048576, failed.load(), cancelled.load(), interrupted_fences.load(), fuzzed.load(), found_damaged.load(), joined.load(),
              torn.load(), archives_read.load(), static_cast<double>(bytes_loaded) / 1048576, static_cast<double>(bytes_unread) / 1048576, mismatches.load());
  if (mismatches == 0) {
    ::unlink((directory + "/fuzzed").c_str());
    if (::rmdir(directory.c_str()) != 0) mismatch("files were left behind in " + directory);
  }
  return mismatches == 0 ? 0 : 1;
}
