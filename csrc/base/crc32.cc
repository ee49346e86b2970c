#include "base/crc32.h"

#include <array>
#include <cstring>

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

__attribute__((target("pclmul,sse4.1"))) uint32_t update_pclmul(uint32_t crc, const uint8_t* p, size_t length) {
  if (length < 128) return update_table(crc, p, length);
  const auto load = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  const __m128i by64 = _mm_set_epi64x(static_cast<long long>(fold_high(512)), static_cast<long long>(fold_low(512)));
  const __m128i by16 = _mm_set_epi64x(static_cast<long long>(fold_high(128)), static_cast<long long>(fold_low(128)));
  __m128i s0 = _mm_xor_si128(load(p), _mm_cvtsi32_si128(static_cast<int>(crc)));
  __m128i s1 = load(p + 16), s2 = load(p + 32), s3 = load(p + 48);
  p += 64;
  length -= 64;
  for (; length >= 64; p += 64, length -= 64) {
    s0 = fold128(s0, load(p), by64);
    s1 = fold128(s1, load(p + 16), by64);
    s2 = fold128(s2, load(p + 32), by64);
    s3 = fold128(s3, load(p + 48), by64);
  }
  s0 = fold128(fold128(fold128(s0, s1, by16), s2, by16), s3, by16);
  return update_table(reduce128(s0), p, length);
}

#define LAZYCKPT_VPCLMUL __attribute__((target("vpclmulqdq,avx512f,avx512vl,avx512dq,pclmul,sse4.1")))

LAZYCKPT_VPCLMUL inline __m512i fold512(__m512i sum, __m512i data, __m512i constants) {
  const __m512i low = _mm512_clmulepi64_epi128(sum, constants, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(sum, constants, 0x11);
  return _mm512_ternarylogic_epi64(low, high, data, 0x96);  // three-way xor
}

LAZYCKPT_VPCLMUL inline __m512i pair512(uint64_t high, uint64_t low) {
  const auto h = static_cast<long long>(high), l = static_cast<long long>(low);
  return _mm512_set_epi64(h, l, h, l, h, l, h, l);
}

LAZYCKPT_VPCLMUL uint32_t update_vpclmul(uint32_t crc, const uint8_t* p, size_t length) {
  if (length < 512) return update_pclmul(crc, p, length);
  const __m512i by256 = pair512(fold_high(2048), fold_low(2048));
  const __m512i by64 = pair512(fold_high(512), fold_low(512));
  __m512i s0 = _mm512_xor_si512(_mm512_loadu_si512(p),
                                _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  __m512i s1 = _mm512_loadu_si512(p + 64), s2 = _mm512_loadu_si512(p + 128), s3 = _mm512_loadu_si512(p + 192);
  p += 256;
  length -= 256;
  for (; length >= 256; p += 256, length -= 256) {
    s0 = fold512(s0, _mm512_loadu_si512(p), by256);
    s1 = fold512(s1, _mm512_loadu_si512(p + 64), by256);
    s2 = fold512(s2, _mm512_loadu_si512(p + 128), by256);
    s3 = fold512(s3, _mm512_loadu_si512(p + 192), by256);
  }
  s0 = fold512(fold512(fold512(s0, s1, by64), s2, by64), s3, by64);
  uint8_t sum[64];
  _mm512_storeu_si512(sum, s0);
  return update_table(update_table(0, sum, sizeof sum), p, length);
}

#endif  // LAZYCKPT_X86

// ---- Choice ------------------------------------------------------------------------------------------------------

struct Kernel {
  const char* name;
  uint32_t (*update)(uint32_t, const uint8_t*, size_t);
};

Kernel choose() {
#if LAZYCKPT_X86
  __builtin_cpu_init();
  const bool pclmul = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (pclmul && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return {"vpclmulqdq", update_vpclmul};
  }
  if (pclmul) return {"pclmulqdq", update_pclmul};
#endif
  return {"table", update_table};
}

const Kernel& kernel() {
  static const Kernel chosen = choose();
  return chosen;
}

}  // namespace

uint32_t crc32(uint32_t crc, const void* bytes, size_t length) {
  return ~kernel().update(~crc, static_cast<const uint8_t*>(bytes), length);
}

uint32_t crc32_table(uint32_t crc, const void* bytes, size_t length) {
  return ~update_table(~crc, static_cast<const uint8_t*>(bytes), length);
}

uint32_t crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) {
  return multiply_mod(crc_a, power_mod(8 * length_b)) ^ crc_b;
}

const char* crc32_kernel() { return kernel().name; }

}  // namespace lazyckpt
