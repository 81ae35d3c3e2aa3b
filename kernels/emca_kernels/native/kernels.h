// What each instruction set exports: the inner loops over one tile of pixels. No library headers here: an inline function shared with
// an object file of a richer instruction set could be the one that the linker keeps, and would fault on a plainer CPU.
#pragma once
#include <cstdint>

namespace emca {

enum class Type { float32, bfloat16, float16 };

// Pixel features [P, C] anywhere in memory, strides in elements.
struct Rows {
  const void* data;
  Type type;
  int64_t pixel_stride, channel_stride;
};

// Queries packed to [vectors][channels][width] floats: the lanes of a vector are queries.
struct Packed {
  const float* data;
  int vectors, channels;
};

// Pixels [first, first + count) as floats [count][channels], rows `stride` apart, and what each query allows there: word v * words + p
// holds a bit for each of the queries 16 v .. 16 v + 15; null allows all.
struct Tile {
  const float* data;
  int64_t stride, first;
  int count;
  const uint16_t* allowed;
  int64_t words;
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
  // [Q, C] rows to Packed, lanes beyond Q are zero
  void (*pack)(const Rows& queries, int count, int channels, float* packed);
  // updates best [lanes] and index [lanes] by the scores of a tile; a later pixel wins by a higher score only
  void (*best)(const Tile& tile, const Packed& queries, float* best, int32_t* index);
  // scores [count][lanes] of a tile, -infinity where not allowed
  void (*scores)(const Tile& tile, const Packed& queries, float* scores);
  // adds a tile to a pool: weights are exp(score), or 1 with `scores` null; `weights` is scratch [count][lanes]
  void (*pool)(const Tile& tile, int lanes, int channels, const float* scores, float* weights, const Pool& pool);
  // `rounds` register-only multiply-adds of 16 vectors; returns a value that depends on them
  float (*burst)(int64_t rounds);
};

namespace base { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

}  // namespace emca
