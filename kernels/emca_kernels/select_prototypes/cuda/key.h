// What a query knows of a pixel, in 64 bits that compare as candidates do: allowed before blocked, then the higher score, then the lower
// pixel. The maximum of keys is the same in any order. Plain C++, so that a host can check it.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

namespace emca::cuda {

constexpr uint32_t PIXEL_BITS = 30, NOWHERE = (1u << PIXEL_BITS) - 1;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// An integer that orders as scores do: -0 equals 0, and NaN is above all numbers, as for torch.max.
constexpr uint32_t ordered(float score) {
  if (score != score) return ~0u;
  // -0 + 0 is 0
  const auto bits = std::bit_cast<uint32_t>(score + 0.f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

constexpr float score_of(uint32_t order) { return std::bit_cast<float>(order >> 31 ? order & ~(1u << 31) : ~order); }

constexpr uint64_t make_key(bool allowed, float score, uint32_t pixel) {
  return uint64_t(allowed) << 62 | uint64_t(ordered(score)) << PIXEL_BITS | (NOWHERE - pixel);
}

constexpr float key_score(uint64_t key) { return score_of(uint32_t(key >> PIXEL_BITS)); }

// Where every score is -infinity the first pixel stands for the query, as the first of equal values does.
constexpr int64_t key_pixel(uint64_t key) { return key_score(key) == LOWEST ? 0 : int64_t(NOWHERE - (key & NOWHERE)); }

// A maximum that is worth a look: NaN beats numbers, nothing beats NaN.
constexpr bool beats(float score, float best) { return score > best || (score != score && best == best); }

}  // namespace emca::cuda
