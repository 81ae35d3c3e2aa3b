// What each instruction set exports: the inner loops over tiles of pixels and over weights. No library headers here: an inline function
// shared with an object file of a richer instruction set could be the one that the linker keeps, and would fault on a plainer CPU.
#pragma once
#include <cstdint>

namespace emca {

enum class Type { float32, bfloat16, float16 };

// Rows [N, C] anywhere in memory: pixel features, queries, weights. Strides in elements.
struct Rows {
  const void* data;
  Type type;
  int64_t pixel_stride, channel_stride;
};

// Vectors of queries, [vectors][channels][width] floats: the lanes of a vector are queries. Beside a bfloat16 tile their channels are
// bfloat16 pairs, [vectors][channels / 2][width][2].
struct Packed {
  const float* data;
  int vectors, channels;
};

// Pixels [first, first + count) as rows [count][channels] of floats or bfloat16, `stride` apart, and what each query allows there: word
// v * words + p holds a bit for each of the queries 16 v .. 16 v + 15; null allows all. A bfloat16 tile may have rows of positions that are
// to be added to it.
struct Tile {
  const void* data;
  Type type;
  int64_t stride, first;
  int count;
  const uint16_t* allowed;
  int64_t words;
  const void* position = nullptr;
  int64_t position_stride = 0;
};

// A matrix [rows, columns] of floats of which one stride is 1.
struct Weight {
  const float* data;
  int64_t row_stride, column_stride;
  int rows;
};

// Running softmax-weighted (or plain) sum over pixels: [lanes] maximum, [lanes] sum of weights, [lanes][channels] weighted features.
struct Pool {
  float *maximum, *total, *sum;
};

struct Kernels {
  const char* name;
  int width;
  // features, plus positions where there are any, of pixels [first, first + count) to floats [count][channels]
  void (*load)(const Rows& features, const Rows* position, int64_t first, int count, int channels, float* tile);
  // [count, C] rows, plus positions, to 16 lanes of Packed; lanes beyond count are zero
  void (*pack)(const Rows& queries, const Rows* position, int count, int channels, float* packed);
  // the first `count` lanes of Packed to floats [count][channels]
  void (*unpack)(const float* packed, int count, int channels, float* rows);
  // floats to bfloat16 pairs, for `lanes` lanes of Packed; null where there are no such products
  void (*pair)(const float* packed, int lanes, int channels, float* pairs);
  // bool rows [count <= 16][pixels] to a bit per row; a row without a true byte counts as all true
  void (*allow)(const uint8_t* rows, int64_t stride, int count, int64_t pixels, uint16_t* words);
  // updates best [lanes] and index [lanes] by the scores of a tile; a later pixel wins by a higher score only
  void (*best)(const Tile& tile, const Packed& queries, float* best, int32_t* index);
  // scores [count][lanes] of a tile, -infinity where not allowed
  void (*scores)(const Tile& tile, const Packed& queries, float* scores);
  // adds a tile of floats to a pool: weights are exp(score), or 1 with `scores` null; `weights` is scratch [count + 1][lanes]
  void (*pool)(const Tile& tile, int lanes, int channels, const float* scores, float* weights, const Pool& pool);
  // weight times Packed, plus a bias [rows] that may be null, to Packed [vectors][rows][width]
  void (*project)(const Weight& weight, const Packed& queries, const float* bias, float* to);
  // one += other, of Packed
  void (*add)(float* one, const float* other, int64_t count);
  // to = one * other, of Packed
  void (*multiply)(const float* one, const float* other, int64_t count, float* to);
  // one *= factor, of Packed
  void (*scale)(float* one, float factor, int64_t count);
  // product = alpha * product / ||product|| + keys, of Packed; the norm is each query's
  void (*reweigh)(const float* alpha, const Packed& keys, float* product);
  // `rounds` register-only multiply-adds of 16 vectors; returns a value that depends on them
  float (*burst)(int64_t rounds);
};

namespace base { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
#endif

}  // namespace emca
