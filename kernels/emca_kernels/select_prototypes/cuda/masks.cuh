// What queries allow, as bits. Include a machine first: hopper.cuh.
#pragma once
#include <cstdint>

#include "layout.h"
#include "problem.h"

namespace emca::cuda {

constexpr unsigned ALL_LANES = ~0u;

// A bit for each pixel of a tile.
template <int TILE>
struct Bits {
  uint32_t word[TILE / 32];

  __device__ bool any() const {
    uint32_t all = 0;
#pragma unroll
    for (uint32_t one : word) all |= one;
    return all;
  }
  // the first `count` pixels
  __device__ static Bits first(int count) {
    Bits bits;
#pragma unroll
    for (int w = 0; w < TILE / 32; ++w) bits.word[w] = first_bits(count - 32 * w);
    return bits;
  }
  __device__ Bits operator&(const Bits& other) const {
    Bits bits;
#pragma unroll
    for (int w = 0; w < TILE / 32; ++w) bits.word[w] = word[w] & other.word[w];
    return bits;
  }
  __device__ Bits operator|(const Bits& other) const {
    Bits bits;
#pragma unroll
    for (int w = 0; w < TILE / 32; ++w) bits.word[w] = word[w] | other.word[w];
    return bits;
  }
  // so that the bits of a thread's pixels stand at places that the compiler knows
  __device__ Bits shifted(int count) const {
    Bits bits;
#pragma unroll
    for (int w = 0; w < TILE / 32; ++w) bits.word[w] = word[w] >> count;
    return bits;
  }
  __device__ bool at(int pixel) const { return word[pixel / 32] >> pixel % 32 & 1; }
};

// What is read of a query's mask in a tile. Reading and use are apart: the products are made while the numbers are on their way.
template <Mask MASK, int TILE>
struct MaskRow;

template <int TILE>
struct MaskRow<Mask::none, TILE> {
  __device__ void read(const Problem&, int, int, int) {}
  __device__ Bits<TILE> bits() const { return Bits<TILE>::first(TILE); }
};

template <int TILE>
struct MaskRow<Mask::words, TILE> {
  Bits<TILE> own;

  __device__ void read(const Problem& problem, int image, int query, int first) {
    const Allowed& allowed = problem.allowed;
    const auto* words = static_cast<const uint32_t*>(allowed.data) + image * allowed.image_stride + query * allowed.query_stride;
    const int count = query < problem.queries ? divide_up(problem.pixels, 32) : 0;
#pragma unroll
    for (int w = 0; w < TILE / 32; ++w) own.word[w] = first / 32 + w < count ? words[first / 32 + w] : 0;
  }
  __device__ Bits<TILE> bits() const { return own; }
};

// Four lanes share a query, and each reads a fourth of the tile.
template <int TILE>
struct MaskRow<Mask::bytes, TILE> {
  static constexpr int EACH = TILE / 4;
  uint64_t eights[EACH / 8];

  __device__ void read(const Problem& problem, int image, int query, int first) {
    const Allowed& allowed = problem.allowed;
    const int own = first + int(threadIdx.x % 4) * EACH, count = query < problem.queries ? problem.pixels - own : 0;
    const auto* bytes = static_cast<const uint8_t*>(allowed.data) + image * allowed.image_stride + query * allowed.query_stride + own;
    const bool aligned = reinterpret_cast<uintptr_t>(bytes) % 8 == 0;
#pragma unroll
    for (int i = 0; i < EACH / 8; ++i)
      eights[i] = aligned && count >= 8 * (i + 1) ? reinterpret_cast<const uint64_t*>(bytes)[i] : read_slowly(bytes + 8 * i, count - 8 * i);
  }
  __device__ static uint64_t read_slowly(const uint8_t* bytes, int count) {
    uint64_t eight = 0;
#pragma unroll 1
    for (int i = 0; i < 8 && i < count; ++i) eight |= uint64_t(bytes[i]) << 8 * i;
    return eight;
  }
  __device__ Bits<TILE> bits() const {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < EACH / 8; ++i) own |= bits_of_bytes(eights[i]) << 8 * i;
    Bits<TILE> bits{};
    const int first_lane = int(threadIdx.x % 32) / 4 * 4;
#pragma unroll
    for (int source = 0; source < 4; ++source)
      bits.word[source * EACH / 32] |= __shfl_sync(ALL_LANES, own, first_lane + source) << source * EACH % 32;
    return bits;
  }
};

}  // namespace emca::cuda
