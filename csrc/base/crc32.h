// CRC-32 with the zip polynomial (reflected 0xEDB88320), as zlib's crc32().
//
// Bytes go through carry-less multiplication where the processor has it (chosen once, at run time) and through
// slicing tables elsewhere. Pieces computed apart, by different threads, are joined by crc32_combine().
#pragma once

#include <cstddef>
#include <cstdint>

namespace lazyckpt {

// The CRC-32 of the bytes seen so far, continued over `length` more. Start with crc = 0.
uint32_t crc32(uint32_t crc, const void* bytes, size_t length);

// The CRC-32 of A followed by B, from that of A, that of B, and B's length in bytes. Cost: O(log length_b).
uint32_t crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b);

// "vpclmulqdq", "pclmulqdq" or "table": which kernel crc32() uses on this processor.
const char* crc32_kernel();

// The portable kernel, always present: what the tests compare the others with.
uint32_t crc32_table(uint32_t crc, const void* bytes, size_t length);

}  // namespace lazyckpt
