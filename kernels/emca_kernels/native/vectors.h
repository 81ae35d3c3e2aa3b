// Vectors as wide as the registers of one instruction set (ISA is its namespace), and numbers of other widths.
#pragma once
#include <cstdint>
#include <cstring>

namespace emca::ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes of a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));

constexpr float INFINITE = __builtin_inff();

template <class Vector, class Element>
inline Vector read(const Element* from) {
  Vector lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Floats load(const float* from) { return read<Floats>(from); }
inline Ints load(const int32_t* from) { return read<Ints>(from); }
inline void store(float* to, Floats lanes) { std::memcpy(to, &lanes, sizeof lanes); }
inline void store(int32_t* to, Ints lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// x - 0 is x, so that this is a broadcast and nothing else; 0 + x is not for x = -0
inline Floats all(float value) { return value - Floats{}; }

inline Floats larger(Floats one, Floats other) { return one > other ? one : other; }

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(const float* from) { return *from; }

struct Bfloat16 {
  uint16_t bits;
};

inline float widen(const Bfloat16* from) { return as_float(uint32_t(from->bits) << 16); }

struct Float16 {
  uint16_t bits;
};

inline float widen(const Float16* from) {
  const uint32_t sign = uint32_t(from->bits & 0x8000) << 16, rest = from->bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // a power of two moves the exponent, subnormals included
  return as_float(sign | __builtin_bit_cast(uint32_t, as_float(rest << 13) * 0x1p112f));
}

}  // namespace
}  // namespace emca::ISA
