// The register-blocked product of rows (pixels, or rows of a weight) with vectors of queries: what takes the time.
#pragma once
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "vectors.h"

namespace emca::ISA {
namespace {

// Register blocks: ROWS[V] rows by V vectors of queries leave room for the operands.
#if defined(__AVX512F__)
constexpr int ROWS[] = {0, 12, 12, 8, 6};
constexpr int COLUMNS = 4;
#else
constexpr int ROWS[] = {0, 8, 4, 4};
constexpr int COLUMNS = 3;
#endif

// Rows of floats, `stride` apart; a step of the product is one channel.
struct FloatRows {
  using Element = float;
  static constexpr int CHANNELS = 1;
  const float* data;
  int64_t stride;

  const float* row(int i) const { return data + i * stride; }
  Floats at(const float* row, int step) const { return all(row[step]); }
  static Floats add(Floats sum, Floats feature, Floats query) { return sum + feature * query; }
};

// The same of a matrix that lies transposed: neighbours in a column are neighbours in memory.
struct FloatColumns : FloatRows {
  const float* row(int i) const { return data + i; }
  Floats at(const float* row, int step) const { return all(row[step * stride]); }
};

#if defined(__AVX512BF16__)
// Rows of bfloat16: a step is two channels, multiplied as they are and summed in float32.
struct PairRows {
  using Element = Bfloat16;
  static constexpr int CHANNELS = 2;
  const Bfloat16* data;
  int64_t stride;

  const Bfloat16* row(int i) const { return data + i * stride; }
  Floats at(const Bfloat16* row, int step) const {
    int32_t pair;
    std::memcpy(&pair, row + 2 * step, sizeof pair);
    return (Floats)(Ints{} + pair);
  }
  static Floats add(Floats sum, Floats feature, Floats query) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)feature, (__m512bh)query);
  }
};
#endif

// Adds products of R rows with V vectors of queries to sums in registers.
template <int R, int V, class Source>
__attribute__((always_inline)) inline void add_products(Floats (&sums)[R][V], const Source& source, const Packed& queries, int v, int p) {
  const int steps = queries.channels / Source::CHANNELS;
  const float* lanes[V];
  for (int j = 0; j < V; ++j) lanes[j] = queries.data + int64_t(v + j) * steps * W;
  const typename Source::Element* rows[R];
  for (int i = 0; i < R; ++i) rows[i] = source.row(p + i);
  const auto* next = source.row(p + R);
  for (int step = 0; step < steps; ++step) {
    if (step % 16 == 0)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) __builtin_prefetch(next + (step * R + i * 16) * Source::CHANNELS);
    Floats query[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) query[j] = load(lanes[j] + step * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Floats feature = source.at(rows[i], step);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = Source::add(sums[i][j], feature, query[j]);
    }
  }
}

// Products of R rows with V vectors, the sum over all sources, handed to `use(vector, row, products)` in the order of rows.
template <int R, int V, class Use, class... Sources>
inline void product_block(const Packed& queries, int v, int p, const Use& use, const Sources&... sources) {
  Floats sums[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = Floats{};
  (add_products<R, V>(sums, sources, queries, v, p), ...);
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) use(std::integral_constant<int, R>{}, v + j, p, [&](int i) { return sums[i][j]; });
}

template <int V, class Use, class... Sources>
inline void product_columns(int count, const Packed& queries, int v, const Use& use, const Sources&... sources) {
  constexpr int R = ROWS[V];
  int p = 0;
  for (; p + R <= count; p += R) product_block<R, V>(queries, v, p, use, sources...);
  for (; p < count; ++p) product_block<1, V>(queries, v, p, use, sources...);
}

// Of `count` rows with all vectors.
template <class Use, class... Sources>
inline void products(int count, const Packed& queries, const Use& use, const Sources&... sources) {
  // as few and as even groups of vectors as fit: 7 are 4 and 3
  for (int v = 0, groups = (queries.vectors + COLUMNS - 1) / COLUMNS; groups > 0; --groups) {
    const int size = (queries.vectors - v + groups - 1) / groups;
    switch (size) {
#if defined(__AVX512F__)
      case 4: product_columns<4>(count, queries, v, use, sources...); break;
#endif
      case 3: product_columns<3>(count, queries, v, use, sources...); break;
      case 2: product_columns<2>(count, queries, v, use, sources...); break;
      default: product_columns<1>(count, queries, v, use, sources...);
    }
    v += size;
  }
}

}  // namespace
}  // namespace emca::ISA
