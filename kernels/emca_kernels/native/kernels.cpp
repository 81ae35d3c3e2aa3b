// Compiled once per instruction set: tiles of pixels are loaded, scored, and chosen from or pooled.
#include "kernels.h"
#include "packed.h"
#include "products.h"
#include "vectors.h"

namespace emca::ISA {
namespace {

#if defined(__AVX512F__)
constexpr int POOL_ROWS = 8, POOL_COLUMNS = 3;
#else
constexpr int POOL_ROWS = 4, POOL_COLUMNS = 3;
#endif

// Lanes of vector v that pixel p of the tile allows, as a comparison gives them.
inline Ints allowed_lanes(const Tile& tile, int v, int p) {
  const int lane = v * W;
  const int32_t bits = tile.allowed[lane / 16 * tile.words + p] >> (lane % 16);
  Ints bit;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) bit[i] = 1 << i;
  return ((Ints{} + bits) & bit) != 0;
}

template <class T, bool located>
void load_rows(const Rows& features, const Rows* position, int64_t first, int count, int channels, float* tile) {
  const auto start = [&](const Rows& rows) { return static_cast<const T*>(rows.data) + first * rows.pixel_stride; };
  const T *data = start(features), *place = located ? start(*position) : data;
  const auto value = [&](int64_t at, int64_t place_at) { return located ? widen(data + at) + widen(place + place_at) : widen(data + at); };
  if (features.channel_stride == 1 && (!located || position->channel_stride == 1)) {
    for (int p = 0; p < count; ++p, data += features.pixel_stride, place += located ? position->pixel_stride : 0)
      for (int c = 0; c < channels; ++c) tile[p * channels + c] = value(c, c);
    return;
  }
  // channels lie far apart: read along the pixels
  for (int c = 0; c < channels; ++c, data += features.channel_stride, place += located ? position->channel_stride : 0)
    for (int p = 0; p < count; ++p)
      tile[p * channels + c] = value(p * features.pixel_stride, located ? p * position->pixel_stride : 0);
}

template <class T>
void load_as(const Rows& features, const Rows* position, int64_t first, int count, int channels, float* tile) {
  position ? load_rows<T, true>(features, position, first, count, channels, tile)
           : load_rows<T, false>(features, position, first, count, channels, tile);
}

void load_tile(const Rows& features, const Rows* position, int64_t first, int count, int channels, float* tile) {
  switch (features.type) {
    case Type::float32: return load_as<float>(features, position, first, count, channels, tile);
    case Type::bfloat16: return load_as<Bfloat16>(features, position, first, count, channels, tile);
    case Type::float16: return load_as<Float16>(features, position, first, count, channels, tile);
  }
}

template <class Use>
inline void score_tile(const Tile& tile, const Packed& queries, const Use& use) {
#if defined(__AVX512BF16__)
  if (tile.type == Type::bfloat16) {
    const PairRows rows{static_cast<const Bfloat16*>(tile.data), tile.stride};
    if (!tile.position) return products(tile.count, queries, use, rows);
    return products(tile.count, queries, use, rows, PairRows{static_cast<const Bfloat16*>(tile.position), tile.position_stride});
  }
#endif
  products(tile.count, queries, use, FloatRows{static_cast<const float*>(tile.data), tile.stride});
}

template <bool masked>
void best_of(const Tile& tile, const Packed& queries, float* best, int32_t* index) {
  score_tile(tile, queries, [&](auto rows, int v, int p, auto scores) __attribute__((always_inline)) {
    Floats top = load(best + v * W);
    Ints at = load(index + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < decltype(rows)::value; ++i) {
      const Floats score = scores(i);
      Ints wins = score > top;
      if (masked) wins &= allowed_lanes(tile, v, p + i);
      top = wins ? score : top;
      at = wins ? Ints{} + int32_t(tile.first + p + i) : at;
    }
    store(best + v * W, top);
    store(index + v * W, at);
  });
}

void best(const Tile& tile, const Packed& queries, float* best, int32_t* index) {
  tile.allowed ? best_of<true>(tile, queries, best, index) : best_of<false>(tile, queries, best, index);
}

template <bool masked>
void scores_of(const Tile& tile, const Packed& queries, float* to) {
  const int lanes = queries.vectors * W;
  score_tile(tile, queries, [&](auto rows, int v, int p, auto scores) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < decltype(rows)::value; ++i) {
      Floats score = scores(i);
      if (masked) score = allowed_lanes(tile, v, p + i) ? score : all(-INFINITE);
      store(to + (p + i) * lanes + v * W, score);
    }
  });
}

void scores(const Tile& tile, const Packed& queries, float* to) {
  tile.allowed ? scores_of<true>(tile, queries, to) : scores_of<false>(tile, queries, to);
}

typedef uint8_t Bytes __attribute__((vector_size(2 * W)));
typedef uint16_t MaskWords __attribute__((vector_size(4 * W)));

void allow(const uint8_t* rows, int64_t stride, int count, int64_t pixels, uint16_t* words) {
  uint16_t everything = 0;
  for (int i = 0; i < count; ++i) everything |= uint16_t(!__builtin_memchr(rows + i * stride, 1, pixels)) << i;
  // a whole cache line of each row at a time: rows a power of two apart push one another out
  constexpr int LINE = 64, LANES = 2 * W, AHEAD = 4 * LINE;
  int64_t p = 0;
  for (; p + LINE <= pixels; p += LINE) {
    MaskWords bits[LINE / LANES];
    for (MaskWords& part : bits) part = MaskWords{} + everything;
    for (int i = 0; i < count; ++i) {
      const uint8_t* row = rows + i * stride + p;
      __builtin_prefetch(row + AHEAD);
      for (int part = 0; part < LINE / LANES; ++part) bits[part] |= __builtin_convertvector(read<Bytes>(row + part * LANES), MaskWords) << i;
    }
    std::memcpy(words + p, bits, sizeof bits);
  }
  for (; p < pixels; ++p) {
    words[p] = everything;
    for (int i = 0; i < count; ++i) words[p] |= uint16_t(rows[i * stride + p] << i);
  }
}

// Weights of a tile, and what they do to the sums so far: `shrink` [lanes] is what these are to be multiplied with.
void weigh(const Tile& tile, int lanes, const float* scores, float* weights, const Pool& pool, float* shrink) {
  for (int lane = 0; lane < lanes; lane += W) {
    Floats total = load(pool.total + lane);
    if (!scores) {
      for (int p = 0; p < tile.count; ++p) {
        const Floats weight = tile.allowed ? (allowed_lanes(tile, lane / W, p) ? all(1.f) : Floats{}) : all(1.f);
        total += weight;
        store(weights + p * lanes + lane, weight);
      }
      store(shrink + lane, all(1.f));
    } else {
      const Floats before = load(pool.maximum + lane);
      Floats maximum = before;
      for (int p = 0; p < tile.count; ++p) maximum = larger(load(scores + p * lanes + lane), maximum);
      // a lane that has seen no allowed pixel yet has no maximum to subtract
      const Floats reference = maximum > all(-INFINITE) ? maximum : Floats{};
      const Floats factor = exponential(before - reference);
      total *= factor;
      for (int p = 0; p < tile.count; ++p) {
        const Floats weight = exponential(load(scores + p * lanes + lane) - reference);
        total += weight;
        store(weights + p * lanes + lane, weight);
      }
      store(pool.maximum + lane, maximum);
      store(shrink + lane, factor);
    }
    store(pool.total + lane, total);
  }
}

// sum [R lanes][V vectors of channels] += weights^T tile
template <int R, int V>
inline void add_block(const Tile& tile, int lanes, int channels, const float* weights, const float* shrink, int lane, int c, float* sum) {
  const auto* rows = static_cast<const float*>(tile.data);
  Floats sums[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = load(sum + int64_t(lane + i) * channels + c + j * W) * all(shrink[lane + i]);
  for (int p = 0; p < tile.count; ++p) {
    Floats features[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) features[j] = load(rows + p * tile.stride + c + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Floats weight = all(weights[p * lanes + lane + i]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] += weight * features[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) store(sum + int64_t(lane + i) * channels + c + j * W, sums[i][j]);
}

void pool(const Tile& tile, int lanes, int channels, const float* scores, float* weights, const Pool& pool) {
  const auto* rows = static_cast<const float*>(tile.data);
  float* shrink = weights + tile.count * lanes;
  weigh(tile, lanes, scores, weights, pool, shrink);
  for (int lane = 0; lane < lanes; lane += POOL_ROWS) {
    int c = 0;
    for (; c + POOL_COLUMNS * W <= channels; c += POOL_COLUMNS * W)
      add_block<POOL_ROWS, POOL_COLUMNS>(tile, lanes, channels, weights, shrink, lane, c, pool.sum);
    for (; c + W <= channels; c += W) add_block<POOL_ROWS, 1>(tile, lanes, channels, weights, shrink, lane, c, pool.sum);
    for (; c < channels; ++c)
      for (int i = lane; i < lane + POOL_ROWS; ++i) {
        float value = pool.sum[int64_t(i) * channels + c] * shrink[i];
        for (int p = 0; p < tile.count; ++p) value += weights[p * lanes + i] * rows[p * tile.stride + c];
        pool.sum[int64_t(i) * channels + c] = value;
      }
  }
}

float burst(int64_t rounds) {
  Floats sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = all(float(i));
  const Floats factor = all(0x1.fffffep-1f), term = all(1e-7f);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = sums[i] * factor + term;
  float result = 0;
  for (int i = 0; i < 16; ++i) result += sums[i][i % W];
  return result;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{NAME(ISA), W, load_tile, pack, unpack, PAIR, allow, best, scores, pool, project, add, multiply, scale, reweigh, burst};

}  // namespace emca::ISA
