#include "base/crc32.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#define LAZYCKPT_X86 1
#else
#define LAZYCKPT_X86 0
#endif

namespace lazyckpt {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;  // bit-reflected: bit 31 is x^0

// ---- Polynomials modulo P over GF(2), in the reflected representation --------------------------------------------

constexpr uint32_t multiply_mod(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b & 1) ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

// powers[k] = x^(2^k) mod P
constexpr std::array<uint32_t, 64> make_squares() {
  std::array<uint32_t, 64> powers{};
  powers[0] = 0x40000000u;  // x^1
  for (size_t k = 1; k < powers.size(); ++k) powers[k] = multiply_mod(powers[k - 1], powers[k - 1]);
  return powers;
}
constexpr auto kSquares = make_squares();

// x^bits mod P
constexpr uint32_t power_mod(uint64_t bits) {
  uint32_t result = 0x80000000u;  // x^0
  for (size_t k = 0; bits != 0; ++k, bits >>= 1) {
    if (bits & 1) result = multiply_mod(result, kSquares[k]);
  }
  return result;
}

// ---- Portable kernel: slicing by 16 ------------------------------------------------------------------------------

constexpr size_t kSlices = 16;
using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ kPolynomial : crc >> 1;
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (size_t slice = 1; slice < kSlices; ++slice) {
      const uint32_t before = tables[slice - 1][byte];
      tables[slice][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}
constexpr Tables kTables = make_tables();

// Works on the inverted register, as all kernels here do.
uint32_t update_table(uint32_t crc, const uint8_t* p, size_t length) {
  while (length >= kSlices) {
    uint8_t block[kSlices];
    std::memcpy(block, p, kSlices);
    for (size_t i = 0; i < 4; ++i) block[i] = static_cast<uint8_t>(block[i] ^ (crc >> (8 * i)));
    crc = 0;
    for (size_t i = 0; i < kSlices; ++i) crc ^= kTables[kSlices - 1 - i][block[i]];
    p += kSlices;
    length -= kSlices;
  }
  for (; length > 0; --length, ++p) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xFF];
  return crc;
}

// ---- Carry-less multiplication -----------------------------------------------------------------------------------
// Folding as in V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel,
// 2009): a 128-bit accumulator moved past D more bits is its two halves times x^(D+64) and x^D modulo P. In the
// reflected representation a 64x64 product comes out one bit short, hence the constants x^(D+32) and x^(D-32), shifted.

#if LAZYCKPT_X86

constexpr uint64_t fold_constant(uint64_t bits) { return static_cast<uint64_t>(power_mod(bits)) << 1; }
constexpr uint64_t fold_low(uint64_t distance_bits) { return fold_constant(distance_bits + 32); }
constexpr uint64_t fold_high(uint64_t distance_bits) { return fold_constant(distance_bits - 32); }

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold128(__m128i sum, __m128i data, __m128i constants) {
  const __m128i low = _mm_clmulepi64_si128(sum, constants, 0x00);
  const __m128i high = _mm_clmulepi64_si128(sum, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), data);
}

// The register after the 16 bytes of `sum`: fed through the table, which costs nothing beside the folding.
__attribute__((target("sse4.1"))) inline uint32_t reduce128(__m128i sum) {
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), sum);
  return update_table(0, bytes, sizeof bytes);
}

// All kernels below may copy the bytes that they read, past the cache: what writes them to a disk reads them from memory, and the
// cache belongs to who trains. Then `to` is a multiple of 64.
inline void end_copy(uint8_t* to, const uint8_t* p, size_t left) {
  std::memcpy(to, p, left);
  _mm_sfence();
}

// A processor foresees which bytes come next, but not beyond the page. So they are asked for this far ahead, which may be past the
// end: of what is not there, a prefetch does nothing. Nor do they stay in the cache, which belongs to who trains, when they were read.
constexpr size_t kAhead = 2048;

template <size_t kBytes>
inline void fetch_ahead(const uint8_t* p) {
  for (size_t line = 0; line < kBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead + line), _MM_HINT_NTA);
  }
}

template <bool kCopies>
__attribute__((target("pclmul,sse4.1"))) inline __m128i take128(const uint8_t* p, [[maybe_unused]] uint8_t* to) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (kCopies) _mm_stream_si128(reinterpret_cast<__m128i*>(to), bytes);
  return bytes;
}

template <bool kCopies>
__attribute__((target("pclmul,sse4.1"))) uint32_t fold_pclmul(uint32_t crc, const uint8_t* p, uint8_t* to, size_t length) {
  const __m128i by64 = _mm_set_epi64x(static_cast<long long>(fold_high(512)), static_cast<long long>(fold_low(512)));
  const __m128i by16 = _mm_set_epi64x(static_cast<long long>(fold_high(128)), static_cast<long long>(fold_low(128)));
  __m128i s0 = _mm_xor_si128(take128<kCopies>(p, to), _mm_cvtsi32_si128(static_cast<int>(crc)));
  __m128i s1 = take128<kCopies>(p + 16, to + 16), s2 = take128<kCopies>(p + 32, to + 32);
  __m128i s3 = take128<kCopies>(p + 48, to + 48);
  size_t at = 64;
  for (; length - at >= 64; at += 64) {
    fetch_ahead<64>(p + at);
    s0 = fold128(s0, take128<kCopies>(p + at, to + at), by64);
    s1 = fold128(s1, take128<kCopies>(p + at + 16, to + at + 16), by64);
    s2 = fold128(s2, take128<kCopies>(p + at + 32, to + at + 32), by64);
    s3 = fold128(s3, take128<kCopies>(p + at + 48, to + at + 48), by64);
  }
  if constexpr (kCopies) end_copy(to + at, p + at, length - at);
  s0 = fold128(fold128(fold128(s0, s1, by16), s2, by16), s3, by16);
  return update_table(reduce128(s0), (kCopies ? to : p) + at, length - at);
}

#define LAZYCKPT_VPCLMUL256 __attribute__((target("vpclmulqdq,avx2,pclmul,sse4.1")))

LAZYCKPT_VPCLMUL256 inline __m256i fold256(__m256i sum, __m256i data, __m256i constants) {
  const __m256i low = _mm256_clmulepi64_epi128(sum, constants, 0x00);
  const __m256i high = _mm256_clmulepi64_epi128(sum, constants, 0x11);
  return _mm256_xor_si256(_mm256_xor_si256(low, high), data);
}

LAZYCKPT_VPCLMUL256 inline __m256i pair256(uint64_t high, uint64_t low) {
  const auto h = static_cast<long long>(high), l = static_cast<long long>(low);
  return _mm256_set_epi64x(h, l, h, l);
}

template <bool kCopies>
LAZYCKPT_VPCLMUL256 inline __m256i take256(const uint8_t* p, [[maybe_unused]] uint8_t* to) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (kCopies) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bytes);
  return bytes;
}

template <bool kCopies>
LAZYCKPT_VPCLMUL256 uint32_t fold_vpclmul256(uint32_t crc, const uint8_t* p, uint8_t* to, size_t length) {
  const __m256i by128 = pair256(fold_high(1024), fold_low(1024));
  const __m256i by32 = pair256(fold_high(256), fold_low(256));
  __m256i s0 = _mm256_xor_si256(take256<kCopies>(p, to), _mm256_zextsi128_si256(_mm_cvtsi32_si128(static_cast<int>(crc))));
  __m256i s1 = take256<kCopies>(p + 32, to + 32), s2 = take256<kCopies>(p + 64, to + 64);
  __m256i s3 = take256<kCopies>(p + 96, to + 96);
  size_t at = 128;
  for (; length - at >= 128; at += 128) {
    fetch_ahead<128>(p + at);
    s0 = fold256(s0, take256<kCopies>(p + at, to + at), by128);
    s1 = fold256(s1, take256<kCopies>(p + at + 32, to + at + 32), by128);
    s2 = fold256(s2, take256<kCopies>(p + at + 64, to + at + 64), by128);
    s3 = fold256(s3, take256<kCopies>(p + at + 96, to + at + 96), by128);
  }
  if constexpr (kCopies) end_copy(to + at, p + at, length - at);
  s0 = fold256(fold256(fold256(s0, s1, by32), s2, by32), s3, by32);
  uint8_t sum[32];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum), s0);
  return update_table(update_table(0, sum, sizeof sum), (kCopies ? to : p) + at, length - at);
}

#define LAZYCKPT_VPCLMUL512 __attribute__((target("vpclmulqdq,avx512f,avx512vl,avx512dq,pclmul,sse4.1")))

LAZYCKPT_VPCLMUL512 inline __m512i fold512(__m512i sum, __m512i data, __m512i constants) {
  const __m512i low = _mm512_clmulepi64_epi128(sum, constants, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(sum, constants, 0x11);
  return _mm512_ternarylogic_epi64(low, high, data, 0x96);  // three-way xor
}

LAZYCKPT_VPCLMUL512 inline __m512i pair512(uint64_t high, uint64_t low) {
  const auto h = static_cast<long long>(high), l = static_cast<long long>(low);
  return _mm512_set_epi64(h, l, h, l, h, l, h, l);
}

template <bool kCopies>
LAZYCKPT_VPCLMUL512 inline __m512i take512(const uint8_t* p, [[maybe_unused]] uint8_t* to) {
  const __m512i bytes = _mm512_loadu_si512(p);
  if constexpr (kCopies) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bytes);
  return bytes;
}

template <bool kCopies>
LAZYCKPT_VPCLMUL512 uint32_t fold_vpclmul512(uint32_t crc, const uint8_t* p, uint8_t* to, size_t length) {
  const __m512i by256 = pair512(fold_high(2048), fold_low(2048));
  const __m512i by64 = pair512(fold_high(512), fold_low(512));
  __m512i s0 = _mm512_xor_si512(take512<kCopies>(p, to), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  __m512i s1 = take512<kCopies>(p + 64, to + 64), s2 = take512<kCopies>(p + 128, to + 128);
  __m512i s3 = take512<kCopies>(p + 192, to + 192);
  size_t at = 256;
  for (; length - at >= 256; at += 256) {
    fetch_ahead<256>(p + at);
    s0 = fold512(s0, take512<kCopies>(p + at, to + at), by256);
    s1 = fold512(s1, take512<kCopies>(p + at + 64, to + at + 64), by256);
    s2 = fold512(s2, take512<kCopies>(p + at + 128, to + at + 128), by256);
    s3 = fold512(s3, take512<kCopies>(p + at + 192, to + at + 192), by256);
  }
  if constexpr (kCopies) end_copy(to + at, p + at, length - at);
  s0 = fold512(fold512(fold512(s0, s1, by64), s2, by64), s3, by64);
  uint8_t sum[64];
  _mm512_storeu_si512(sum, s0);
  return update_table(update_table(0, sum, sizeof sum), (kCopies ? to : p) + at, length - at);
}

#endif  // LAZYCKPT_X86

// ---- Choice ------------------------------------------------------------------------------------------------------

using Fold = uint32_t (*)(uint32_t, const uint8_t*, uint8_t*, size_t);

struct Kernel {
  const char* name;
  size_t shortest;  // below that many bytes the table is as quick
  Fold sum, copy;
};

uint32_t table_sum(uint32_t crc, const uint8_t* p, uint8_t*, size_t length) { return update_table(crc, p, length); }

uint32_t table_copy(uint32_t crc, const uint8_t* p, uint8_t* to, size_t length) {
  std::memcpy(to, p, length);
  return update_table(crc, to, length);  // what is there, should somebody write to `p` meanwhile
}

// What this processor can do, the best first.
std::vector<Kernel> find_kernels() {
  std::vector<Kernel> found;
#if LAZYCKPT_X86
  __builtin_cpu_init();
  const bool pclmul = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  const bool vpclmul = pclmul && __builtin_cpu_supports("vpclmulqdq");
  if (vpclmul && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back({"vpclmulqdq-512", 512, fold_vpclmul512<false>, fold_vpclmul512<true>});
  }
  if (vpclmul && __builtin_cpu_supports("avx2")) {
    found.push_back({"vpclmulqdq-256", 256, fold_vpclmul256<false>, fold_vpclmul256<true>});
  }
  if (pclmul) found.push_back({"pclmulqdq", 128, fold_pclmul<false>, fold_pclmul<true>});
#endif
  found.push_back({"table", 0, table_sum, table_copy});
  return found;
}

// Found when the library is loaded. At first use a thread might be about to find them while another one forks: the child would wait
// for it for ever.
const std::vector<Kernel> kKernels = find_kernels();

// By the kernel `first`, or what comes behind it where there are too few bytes.
const Kernel& kernel_for(size_t first, size_t length) {
  size_t index = first;
  while (length < kKernels[index].shortest) ++index;
  return kKernels[index];
}

uint32_t sum_by(size_t first, uint32_t crc, const void* bytes, size_t length) {
  return ~kernel_for(first, length).sum(~crc, static_cast<const uint8_t*>(bytes), nullptr, length);
}

uint32_t copy_by(size_t first, uint32_t crc, void* to, const void* bytes, size_t length) {
  constexpr size_t kLine = 64;
  auto* target = static_cast<uint8_t*>(to);
  const auto* source = static_cast<const uint8_t*>(bytes);
  const size_t head = std::min(length, (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine);
  const uint32_t begun = table_copy(~crc, source, target, head);
  return ~kernel_for(first, length - head).copy(begun, source + head, target + head, length - head);
}

size_t index_of(const std::string& kernel) {
  for (size_t i = 0; i < kKernels.size(); ++i) {
    if (kKernels[i].name == kernel) return i;
  }
  throw std::invalid_argument("this processor has no CRC-32 kernel '" + kernel + "'");
}

}  // namespace

uint32_t crc32(uint32_t crc, const void* bytes, size_t length) { return sum_by(0, crc, bytes, length); }

uint32_t crc32_copy(uint32_t crc, void* to, const void* bytes, size_t length) { return copy_by(0, crc, to, bytes, length); }

uint32_t crc32_with(const std::string& kernel, uint32_t crc, const void* bytes, size_t length) {
  return sum_by(index_of(kernel), crc, bytes, length);
}

uint32_t crc32_copy_with(const std::string& kernel, uint32_t crc, void* to, const void* bytes, size_t length) {
  return copy_by(index_of(kernel), crc, to, bytes, length);
}

uint32_t crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) {
  return multiply_mod(crc_a, power_mod(8 * length_b)) ^ crc_b;
}

std::vector<std::string> crc32_kernels() {
  std::vector<std::string> names;
  for (const Kernel& kernel : kKernels) names.emplace_back(kernel.name);
  return names;
}

}  // namespace lazyckpt
