// Random files for the stress program: what the engine is told, and, apart from that, what the file must hold.
#pragma once

#include <stdlib.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "format/file_spec.h"

namespace lazyckpt::stress {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t up_to(uint64_t most) { return std::uniform_int_distribution<uint64_t>(0, most)(engine_); }
  bool one_in(uint64_t n) { return up_to(n - 1) == 0; }
  double seconds(double most) { return std::uniform_real_distribution<double>(0, most)(engine_); }
  template <typename T>
  const T& choose(const std::vector<T>& from) { return from[up_to(from.size() - 1)]; }

 private:
  std::mt19937_64 engine_;
};

// Byte by byte from its own table: nothing that it shares with what it checks.
inline uint32_t plain_crc32(const std::string& bytes) {
  static const std::vector<uint32_t> table = [] {
    std::vector<uint32_t> made(256);
    for (uint32_t i = 0; i < 256; ++i) {
      made[i] = i;
      for (int bit = 0; bit < 8; ++bit) made[i] = (made[i] >> 1) ^ ((made[i] & 1) != 0 ? 0xEDB88320u : 0);
    }
    return made;
  }();
  uint32_t crc = 0xFFFFFFFFu;
  for (const char byte : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<uint8_t>(byte)) & 0xFF];
  return ~crc;
}

// A megabyte of noise, to copy from: making new noise is slow under a sanitizer.
inline const std::vector<std::byte>& noise() {
  static const std::vector<std::byte> made = [] {
    std::mt19937_64 engine(4);
    std::vector<std::byte> bytes(size_t{1} << 20);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(engine());
    return bytes;
  }();
  return made;
}

// Memory of the caller: exactly as long as it says, so that a sanitizer sees any step beside it.
class Buffer {
 public:
  Buffer(size_t length, size_t misalign) : length_(length) {
    void* got = nullptr;
    if (::posix_memalign(&got, 4096, misalign + length) != 0) throw std::bad_alloc();
    base_.reset(static_cast<std::byte*>(got));
    begin_ = base_.get() + misalign;
  }
  std::byte* begin() const { return begin_; }
  size_t length() const { return length_; }
  void fill(Random& random) { std::memcpy(begin_, noise().data() + random.up_to(noise().size() - length_), length_); }
  void spoil() { std::memset(begin_, 0xEE, length_); }
  void release() { base_.reset(); }

 private:
  struct Free {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<std::byte, Free> base_;
  std::byte* begin_ = nullptr;
  size_t length_ = 0;
};

// A zip archive in a file of several: bytes [begin, end), and its records in order, with their names.
struct Archive {
  uint64_t begin = 0, end = 0;
  std::vector<std::pair<std::string, std::string>> records;
};

struct Sample {
  FileSpec spec;
  std::vector<std::pair<Source, Buffer>> memory;  // of each extent
  std::string expected;
  std::vector<Archive> archives;  // if it is made of them

  void each(Source kind, void (Buffer::*act)()) {
    for (auto& [is, buffer] : memory) {
      if (is == kind) (buffer.*act)();
    }
  }
};

class SampleMaker {
 public:
  SampleMaker(Random& random, size_t block) : random_(random), block_(block), keeps_structure_(random.one_in(2)) {}

  Sample make() {
    const size_t records = random_.up_to(12);
    add_structure(1 + random_.up_to(200));
    for (uint32_t record = 0; record < records; ++record) add_record(record);
    add_structure(random_.up_to(3000));
    sample_.spec.record_count = records;
    sample_.spec.size = sample_.expected.size();
    if (keeps_structure_) sample_.spec.kept = std::shared_ptr<const void>(std::shared_ptr<const void>(), &noise());
    return std::move(sample_);
  }

  // Lazy bytes that a writer takes at once, then more to copy than the arena holds.
  Sample make_too_large(size_t arena_bytes) {
    add(Source::kLazy, size_t{1} << 17, 0);
    for (size_t done = 0; done <= arena_bytes; done += 1 << 16) add_structure(1 << 16);
    sample_.spec.record_count = 1;
    sample_.spec.size = sample_.expected.size();
    return std::move(sample_);
  }

 private:
  void add(Source kind, size_t length, uint32_t record) {
    if (length == 0) return;
    const size_t offset = sample_.expected.size();
    const size_t misalign = random_.one_in(3) ? random_.up_to(4095) : offset % 4096;
    const bool is_kept = record == kStructure && keeps_structure_;
    sample_.memory.emplace_back(is_kept ? Source::kOwned : kind, Buffer(length, misalign));
    Buffer& buffer = sample_.memory.back().second;
    buffer.fill(random_);
    sample_.spec.extents.push_back({buffer.begin(), length, offset, kind, record});
    sample_.expected.append(reinterpret_cast<const char*>(buffer.begin()), length);
  }

  void add_structure(size_t length) { add(Source::kCopy, length, kStructure); }

  void add_gap() {
    const size_t to_block = block_ - sample_.expected.size() % block_;
    sample_.expected.append(random_.one_in(3) ? to_block : random_.up_to(70), '\0');
  }

  // One or several extents, and behind them, sooner or later, the field for their CRC-32.
  void add_record(uint32_t record) {
    if (random_.one_in(2)) add_gap();
    std::string content;
    for (size_t part = 0; part <= random_.up_to(2); ++part) {
      const size_t begin = sample_.expected.size();
      const size_t length = random_.one_in(3) ? random_.up_to(250000) : random_.up_to(5000);
      add(random_.choose<Source>({Source::kCopy, Source::kLazy, Source::kLazy, Source::kOwned}), length, record);
      content += sample_.expected.substr(begin);
    }
    if (content.empty()) return;
    add_structure(random_.up_to(40));
    add_field(record, plain_crc32(content));
    add_structure(random_.up_to(40));
  }

  void add_field(uint32_t record, uint32_t crc) {
    const size_t offset = sample_.expected.size();
    add_structure(4);
    sample_.spec.crc_fields.push_back({offset, record});
    for (size_t i = 0; i < 4; ++i) sample_.expected[offset + i] = static_cast<char>(crc >> (8 * i));
  }

  Random& random_;
  const size_t block_;
  const bool keeps_structure_;  // where it lies, as FileSpec::kept says
  Sample sample_;
};

}  // namespace lazyckpt::stress
