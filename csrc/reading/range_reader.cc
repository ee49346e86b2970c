#include "reading/range_reader.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "base/condition_variable.h"
#include "base/crc32.h"
#include "base/error.h"
#include "base/signals.h"
#include "cuda/upload.h"
#include "os/file.h"

namespace lazyckpt {
namespace {

// Shorter ranges are not worth reads of their own: they are bounced, many with one read.
constexpr uint64_t kShortestStraight = 256 * 1024;
// Bytes between two ranges that are rather read than skipped.
constexpr uint64_t kSmallGap = 64 * 1024;
constexpr auto kInterruptEvery = std::chrono::milliseconds(50);
// How long a read in progress may take to end after the reading was given up.
constexpr auto kGrace = std::chrono::seconds(10);
constexpr size_t kPage = 4096;

// A part of one range, inside one piece.
struct Segment {
  size_t range;
  uint64_t offset, length;
  std::byte* to;  // null: only checksummed
  int device;
  uint32_t crc;
};

// One read, and what it is for. Straight: aligned, and read to its place, where its segments lie side by side, too.
struct Piece {
  uint64_t begin, end;
  size_t first, last;  // segments
  bool straight;
  bool uploads;  // some of it goes to a device
};

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<std::byte, FreeDeleter>;

Buffer make_buffer(size_t align, size_t bytes) {
  void* memory = nullptr;
  if (::posix_memalign(&memory, std::max(align, kPage), bytes) != 0) throw std::bad_alloc();
  return Buffer(static_cast<std::byte*>(memory));
}

// Cuts ranges into pieces, in the order of the file.
class Cutter {
 public:
  Cutter(const ReadableFile& file, size_t piece_bytes)
      : file_(file), align_(std::max(file.limits().memory_align, file.limits().offset_align)), piece_bytes_(piece_bytes) {}

  void cut(const std::vector<ReadRange>& ranges) {
    std::vector<size_t> order;
    order.reserve(ranges.size());
    for (size_t i = 0; i < ranges.size(); ++i) {
      const ReadRange& range = ranges[i];
      if (range.offset > file_.size() || range.length > file_.size() - range.offset) refuse(range);
      if (range.length > 0) order.push_back(i);
    }
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ranges[a].offset < ranges[b].offset; });
    for (size_t i = 0; i < order.size();) {
      size_t end = i + 1;
      while (end < order.size() && follows(ranges[order[end - 1]], ranges[order[end]])) ++end;
      cut_run(ranges, order.data() + i, order.data() + end);
      i = end;
    }
  }

  std::vector<Segment> segments;
  std::vector<Piece> pieces;

 private:
  [[noreturn]] void refuse(const ReadRange& range) const {
    throw Error(ErrorKind::kCorrupt,
                "'" + file_.path() + "' has " + std::to_string(file_.size()) + " bytes; " + std::to_string(range.length) +
                    " bytes at offset " + std::to_string(range.offset) + " are not in it",
                0, file_.path());
  }

  uint64_t down(uint64_t offset) const { return offset / align_ * align_; }
  uint64_t up(uint64_t offset) const { return (offset + align_ - 1) / align_ * align_; }

  // Whether both lie side by side, in the file as in memory.
  static bool follows(const ReadRange& before, const ReadRange& range) {
    return before.offset + before.length == range.offset && before.to != nullptr && before.to + before.length == range.to &&
           before.device == range.device;
  }

  // Of ranges each of which follows the one before.
  void cut_run(const std::vector<ReadRange>& ranges, const size_t* first, const size_t* last) {
    const ReadRange& head = ranges[*first];
    const uint64_t run_end = ranges[last[-1]].offset + ranges[last[-1]].length;
    const auto address = reinterpret_cast<uintptr_t>(head.to);
    const bool congruent = head.to != nullptr && head.device == kHost && address % align_ == head.offset % align_;
    uint64_t begin = run_end, end = run_end;  // what is read straight
    if (congruent && run_end - head.offset >= kShortestStraight) begin = up(head.offset), end = down(run_end);
    for (const size_t* each = first; each < last; ++each) bounce_part(*each, ranges[*each], 0, begin);
    for (uint64_t at = begin; at < end; at += piece_bytes_) {
      const uint64_t piece_end = std::min(at + piece_bytes_, end);
      pieces.push_back({at, piece_end, segments.size(), segments.size(), true, false});
      for (; first < last && ranges[*first].offset < piece_end; ++first) {
        const ReadRange& range = ranges[*first];
        const uint64_t from = std::max(range.offset, at), to = std::min(range.offset + range.length, piece_end);
        if (from < to) segments.push_back({*first, from, to - from, range.to + (from - range.offset), kHost, 0});
        if (range.offset + range.length > piece_end) break;
      }
      pieces.back().last = segments.size();
    }
    for (; first < last; ++first) bounce_part(*first, ranges[*first], end, run_end);
  }

  // What of the range lies in bytes begin..end of the file.
  void bounce_part(size_t index, const ReadRange& range, uint64_t begin, uint64_t end) {
    const uint64_t from = std::max(begin, range.offset), to = std::min(end, range.offset + range.length);
    if (from < to) bounce(index, range, from - range.offset, to - range.offset);
  }

  // Bytes begin..end of the range, relative to it.
  void bounce(size_t index, const ReadRange& range, uint64_t begin, uint64_t end) {
    while (begin < end) {
      const uint64_t offset = range.offset + begin;
      // One that begins before it overlaps with a range whose end that piece is.
      const bool joins = !pieces.empty() && !pieces.back().straight && offset >= pieces.back().begin &&
                         offset <= pieces.back().end + kSmallGap && offset < down(pieces.back().begin) + piece_bytes_;
      if (!joins) pieces.push_back({offset, offset, segments.size(), segments.size(), false, false});
      Piece& piece = pieces.back();
      const uint64_t length = std::min(end - begin, down(piece.begin) + piece_bytes_ - offset);
      segments.push_back({index, offset, length, range.to == nullptr ? nullptr : range.to + begin, range.device, 0});
      piece.uploads |= range.to != nullptr && range.device != kHost;
      piece.end = std::max(piece.end, offset + length);
      piece.last = segments.size();
      begin += length;
    }
  }

  const ReadableFile& file_;
  const uint64_t align_;
  const uint64_t piece_bytes_;
};

// Shared by the threads; outlives a caller that gives them up.
struct Reading {
  Reading(std::shared_ptr<const ReadableFile> from, size_t piece_bytes)
      : file(std::move(from)), buffer_bytes(piece_bytes),
        align(std::max(file->limits().memory_align, file->limits().offset_align)) {}

  const std::shared_ptr<const ReadableFile> file;
  const size_t buffer_bytes;
  const uint64_t align;
  std::vector<Segment> segments;
  std::vector<Piece> pieces;
  std::shared_ptr<Uplinks> uplinks;  // if some are on devices

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  size_t next = 0;
  int running = 0;
  std::exception_ptr error;  // the first

  void read_pieces() noexcept;  // until there are none left

 private:
  // Of one thread: where pieces go that are not read straight to their place.
  struct Bounce {
    Buffer buffer;
    std::optional<UploadRing> ring;
  };
  bool take(size_t& index);
  std::byte* place_for(const Piece& piece, Bounce& bounce);
  void read(const Piece& piece, Bounce& bounce);
};

bool Reading::take(size_t& index) {
  std::lock_guard<std::mutex> lock(mutex);
  if (error || next >= pieces.size()) return false;
  index = next++;
  return true;
}

std::byte* Reading::place_for(const Piece& piece, Bounce& bounce) {
  if (piece.straight) return segments[piece.first].to;
  if (piece.uploads) {
    if (!bounce.ring) bounce.ring.emplace(uplinks, buffer_bytes, align);
    return bounce.ring->next();
  }
  if (!bounce.buffer) bounce.buffer = make_buffer(align, buffer_bytes);
  return bounce.buffer.get();
}

void Reading::read(const Piece& piece, Bounce& bounce) {
  const uint64_t begin = piece.begin / align * align;
  const uint64_t wanted = (piece.end + align - 1) / align * align - begin;
  std::byte* const to = place_for(piece, bounce);
  size_t got = 0;
  try {
    got = file->read_blocks(to, static_cast<size_t>(wanted), begin);
  } catch (Error& error) {
    error.at(piece.begin, piece.end - piece.begin);
    throw;
  }
  if (got < piece.end - begin) {
    throw Error(ErrorKind::kCorrupt,
                "'" + file->path() + "' ended at byte " + std::to_string(begin + got) +
                    " while it was read: it was truncated by someone",
                0, file->path());
  }
  for (size_t i = piece.first; i < piece.last; ++i) {
    Segment& segment = segments[i];
    const std::byte* const bytes = to + (segment.offset - begin);
    segment.crc = crc32(0, bytes, static_cast<size_t>(segment.length));
    if (piece.straight || segment.to == nullptr) continue;
    if (segment.device != kHost) {
      bounce.ring->add(segment.device, segment.to, bytes, static_cast<size_t>(segment.length));
    } else {
      std::memcpy(segment.to, bytes, static_cast<size_t>(segment.length));
    }
  }
  if (piece.uploads) bounce.ring->send();
}

void Reading::read_pieces() noexcept {
  Bounce bounce;  // goes when no copy out of it is under way, which counts as running
  try {
    for (size_t index = 0; take(index);) read(pieces[index], bounce);
    if (bounce.ring) bounce.ring->finish();
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!error) error = std::current_exception();
  }
}

void run_thread(const std::shared_ptr<Reading>& reading) {
  reading->read_pieces();
  std::lock_guard<std::mutex> lock(reading->mutex);
  --reading->running;
  reading->changed.notify_all();
}

// Starts as many as asked for and as the system allows; none is no error.
std::vector<std::thread> start_threads(const std::shared_ptr<Reading>& reading, int wanted) {
  std::vector<std::thread> threads;
  const SignalsBlocked blocked;
  try {
    for (int i = 0; i < wanted; ++i) {
      {
        std::lock_guard<std::mutex> lock(reading->mutex);
        ++reading->running;
      }
      threads.emplace_back([reading] { run_thread(reading); });
      pthread_setname_np(threads.back().native_handle(), ("ckpt-reader-" + std::to_string(i)).c_str());
    }
  } catch (const std::exception&) {
    std::lock_guard<std::mutex> lock(reading->mutex);
    --reading->running;
  }
  return threads;
}

// Returns when all threads are done. Whatever `interrupt` throws, or the deadline, becomes the error of the reading.
void wait_for(Reading& reading, const ReadOptions& options) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::duration<double>(options.timeout_s);
  std::unique_lock<std::mutex> lock(reading.mutex);
  const auto done = [&] { return reading.running == 0; };
  while (!reading.changed.wait_for(lock, kInterruptEvery, done)) {
    std::exception_ptr cause;
    if (Clock::now() >= deadline) {
      cause = std::make_exception_ptr(Error(
          ErrorKind::kDeadline,
          "reading '" + reading.file->path() + "' took longer than " + std::to_string(options.timeout_s) +
              " s; is the storage slow or stuck? Allow more time, or load from elsewhere",
          0, reading.file->path()));
    } else if (options.interrupt) {
      lock.unlock();
      try {
        options.interrupt();
      } catch (...) {
        cause = std::current_exception();
      }
      lock.lock();
    }
    if (!cause) continue;
    // Whatever some thread has failed with: another still has its place to write to, which who catches this must know.
    reading.error = cause;
    reading.changed.wait_for(lock, kGrace, done);
    return;
  }
}

std::shared_ptr<Uplinks> uplinks_of(const std::vector<ReadRange>& ranges, const ReadOptions& options) {
  std::set<int> devices;
  for (const ReadRange& range : ranges) {
    if (range.to != nullptr && range.length > 0 && range.device != kHost) devices.insert(range.device);
  }
  if (devices.empty()) return nullptr;
  return std::make_shared<Uplinks>(options.driver, std::vector<int>(devices.begin(), devices.end()), options.streams);
}

}  // namespace

std::vector<uint32_t> read_ranges(const std::shared_ptr<const ReadableFile>& file, const std::vector<ReadRange>& ranges,
                                  const ReadOptions& options) {
  Cutter cutter(*file, options.piece_bytes);
  cutter.cut(ranges);
  const auto reading = std::make_shared<Reading>(file, options.piece_bytes);
  reading->segments = std::move(cutter.segments);
  reading->pieces = std::move(cutter.pieces);
  const auto wanted = std::min<size_t>(static_cast<size_t>(std::max(options.threads, 1)), reading->pieces.size());
  reading->uplinks = uplinks_of(ranges, options);
  const bool alone = wanted <= 1 && reading->uplinks == nullptr;  // a device may hang, which a thread can be left to wait for
  std::vector<std::thread> threads;
  if (!alone) threads = start_threads(reading, static_cast<int>(wanted));
  if (threads.empty() && reading->uplinks != nullptr) {
    throw Error(ErrorKind::kDevice, "cannot start a thread that reads '" + file->path() + "'; raise the limit of processes (ulimit -u)");
  }
  if (threads.empty()) {
    reading->read_pieces();
  } else {
    wait_for(*reading, options);
  }
  bool stuck = false;
  {
    std::lock_guard<std::mutex> lock(reading->mutex);
    stuck = reading->running > 0;
  }
  if (stuck && options.abandon) options.abandon();
  for (std::thread& thread : threads) stuck ? thread.detach() : thread.join();
  if (reading->error) std::rethrow_exception(reading->error);
  std::vector<uint32_t> crcs(ranges.size(), 0);
  for (const Segment& segment : reading->segments) {
    crcs[segment.range] = crc32_combine(crcs[segment.range], segment.crc, segment.length);
  }
  return crcs;
}

}  // namespace lazyckpt
