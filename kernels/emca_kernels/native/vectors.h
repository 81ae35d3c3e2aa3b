// Vectors as wide as the registers of an instruction set (ISA is its namespace). All of it is private to the object file that includes it,
// see kernels.h.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#define TEXT(name) #name
#define NAME(name) TEXT(name)

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

typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

inline Words load_halves(const void* from) {
  Halves lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return __builtin_convertvector(lanes, Words);
}

inline Floats as_floats(Words bits) {
  Floats lanes;
  std::memcpy(&lanes, &bits, sizeof lanes);
  return lanes;
}

inline Floats load(const Bfloat16* from) { return as_floats(load_halves(from) << 16); }

inline Floats load(const Float16* from) {
  const Words bits = load_halves(from), sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  const Floats number = as_floats(rest << 13) * all(0x1p112f), beyond = as_floats((rest & 0x3ff) << 13 | 0x7f800000);
  const Floats size = rest >= 0x7c00 ? beyond : number;
  Words size_bits;
  std::memcpy(&size_bits, &size, sizeof size_bits);
  return as_floats(size_bits | sign);
}

// Sum of all lanes.
inline float sum(Floats lanes) {
  float parts[W];
  store(parts, lanes);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// e^x for x <= 0, 2 ulp; 0 below the smallest normal number and for -infinity.
inline Floats exponential(Floats x) {
  const Ints vanishes = x < all(-87.f);
  x = vanishes ? all(-87.f) : x;
  const Floats shift = all(0x1.8p23f);
  const Floats rounded = (x * all(1.44269504f) + shift) - shift;
  const Floats rest = (x - rounded * all(0x1.62e4p-1f)) - rounded * all(0x1.7f7d1cp-20f);
  Floats power = all(1.f / 5040);
  for (const float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) power = power * rest + all(factor);
  const Ints exponent = (__builtin_convertvector(rounded, Ints) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return vanishes ? Floats{} : power * scale;
}

}  // namespace
}  // namespace emca::ISA
