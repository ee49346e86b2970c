// CRC-32 with the zip polynomial (reflected 0xEDB88320), as zlib's crc32().
//
// Bytes go through carry-less multiplication where the processor has it (chosen once, at run time) and through
// slicing tables elsewhere. Pieces computed apart, by different threads, are joined by crc32_combine().
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lazyckpt {

// The CRC-32 of the bytes seen so far, continued over `length` more. Start with crc = 0.
uint32_t crc32(uint32_t crc, const void* bytes, size_t length);

// The same, and copies the bytes to `to`: past the cache where the processor can, for what a device reads next. Costs hardly more,
// because the reading does.
uint32_t crc32_copy(uint32_t crc, void* to, const void* bytes, size_t length);

// The CRC-32 of A followed by B, from that of A, that of B, and B's length in bytes. Cost: O(log length_b).
uint32_t crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b);

// What this processor has of "vpclmulqdq-512", "vpclmulqdq-256", "pclmulqdq" and, always, "table". The functions above use the
// first; where there are too few bytes for it, one behind it.
std::vector<std::string> crc32_kernels();

// By one of these or what is behind it, for tests and benchmarks. Throws std::invalid_argument for others.
uint32_t crc32_with(const std::string& kernel, uint32_t crc, const void* bytes, size_t length);
uint32_t crc32_copy_with(const std::string& kernel, uint32_t crc, void* to, const void* bytes, size_t length);

}  // namespace lazyckpt
