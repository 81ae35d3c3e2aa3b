// What the layer does with queries that are packed: projections, and what lies between them.
#pragma once
#include "kernels.h"
#include "products.h"
#include "vectors.h"

namespace emca::ISA {
namespace {

template <class T>
void pack_as(const Rows& queries, const Rows* position, int count, int channels, float* packed) {
  const T *data = static_cast<const T*>(queries.data), *place = position ? static_cast<const T*>(position->data) : nullptr;
  for (int lane = 0; lane < 16; ++lane) {
    float* to = packed + int64_t(lane / W) * channels * W + lane % W;
    const T* from = data + lane * queries.pixel_stride;
    const T* offset = place + (place ? lane * position->pixel_stride : 0);
    for (int c = 0; c < channels; ++c)
      to[c * W] = lane >= count ? 0.f
                  : place       ? widen(from + c * queries.channel_stride) + widen(offset + c * position->channel_stride)
                                : widen(from + c * queries.channel_stride);
  }
}

void pack(const Rows& queries, const Rows* position, int count, int channels, float* packed) {
  switch (queries.type) {
    case Type::float32: return pack_as<float>(queries, position, count, channels, packed);
    case Type::bfloat16: return pack_as<Bfloat16>(queries, position, count, channels, packed);
    case Type::float16: return pack_as<Float16>(queries, position, count, channels, packed);
  }
}

void unpack(const float* packed, int count, int channels, float* rows) {
  for (int lane = 0; lane < count; ++lane) {
    const float* from = packed + int64_t(lane / W) * channels * W + lane % W;
    for (int c = 0; c < channels; ++c) rows[int64_t(lane) * channels + c] = from[c * W];
  }
}

#if defined(__AVX512BF16__)
void pair(const float* packed, int lanes, int channels, float* pairs) {
  const auto rounded = [](const float* from) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(from))); };
  for (int64_t step = 0; step < int64_t(lanes) / W * channels / 2; ++step) {
    const float* from = packed + 2 * step * W;
    store(pairs + step * W, (Floats)(rounded(from) | _mm512_slli_epi32(rounded(from + W), 16)));
  }
}
#define PAIR pair
#else
#define PAIR nullptr
#endif

void project(const Weight& weight, const Packed& queries, const float* bias, float* to) {
  const auto use = [&](auto rows, int v, int p, auto products) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < decltype(rows)::value; ++i) {
      const Floats product = products(i);
      store(to + (int64_t(v) * weight.rows + p + i) * W, bias ? product + all(bias[p + i]) : product);
    }
  };
  if (weight.column_stride == 1) return products(weight.rows, queries, use, FloatRows{weight.data, weight.row_stride});
  products(weight.rows, queries, use, FloatColumns{{weight.data, weight.column_stride}});
}

void add(float* one, const float* other, int64_t count) {
  for (int64_t at = 0; at < count; at += W) store(one + at, load(one + at) + load(other + at));
}

void multiply(const float* one, const float* other, int64_t count, float* to) {
  for (int64_t at = 0; at < count; at += W) store(to + at, load(one + at) * load(other + at));
}

void scale(float* one, float factor, int64_t count) {
  for (int64_t at = 0; at < count; at += W) store(one + at, load(one + at) * all(factor));
}

// SPEC section 1: a norm is at least this
constexpr float SMALLEST_NORM = 1e-12f;

void reweigh(const float* alpha, const Packed& keys, float* product) {
  for (int v = 0; v < keys.vectors; ++v) {
    float* own = product + int64_t(v) * keys.channels * W;
    const float* key = keys.data + int64_t(v) * keys.channels * W;
    Floats squares{};
    for (int c = 0; c < keys.channels; ++c) squares += load(own + c * W) * load(own + c * W);
    Floats inverse;
    for (int i = 0; i < W; ++i) {
      const float norm = __builtin_sqrtf(squares[i]);
      inverse[i] = 1.f / (norm < SMALLEST_NORM ? SMALLEST_NORM : norm);
    }
    for (int c = 0; c < keys.channels; ++c) store(own + c * W, all(alpha[c]) * (load(own + c * W) * inverse) + load(key + c * W));
  }
}

}  // namespace
}  // namespace emca::ISA
